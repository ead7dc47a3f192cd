"""The worker client: requests go out as JSON lines, answers come back to call-backs, and every way in which a process
can fail is told in words."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import qt
from slicer.i18n import tr as _

import SymRegistrationLib

from . import settings
from .processes import QtWorkerProcess, workerCommand

PROTOCOL = 1
#: Lines of the worker's stderr that are kept for the log of a failure.
KEPT_LINES = 200


@dataclass(frozen=True)
class Patience:
    """Seconds without a word after which the process is taken for hanging; every line from it starts the count anew.

    Attributes:
        start: until it is ready; loading its libraries from a slow disk for the first time may take minutes.
        silence: while it works. One pass of a large network on a processor says nothing for many minutes, so this is
            generous, and the same as in ``symreg batch``.
        tick: how often it is looked at. A longer time between two looks, because the computer slept or this application
            was busy and did not listen, counts as two ticks.
        idle: gives the seconds without any request after which the process ends and gives its memory back; 0 = never.
    """

    start: float = 300.0
    silence: float = 1800.0
    tick: float = 1.0
    idle: Callable[[], float] = lambda: 60.0 * settings.idleMinutes()


@dataclass
class _Pending:
    """One request that waits for its answer."""

    onResult: Callable[[Any], None]
    onError: Callable[["WorkerError"], None]
    onProgress: Callable[[dict], None]
    onLevel: Callable[[dict], None]


class WorkerError(Exception):
    """What went wrong, for people.

    Attributes:
        message: what happened.
        hint: what to do.
        environment: True when the installation is to blame, so that repairing it may help.
    """

    def __init__(self, message, hint="", environment=False):
        super().__init__(message)
        self.message, self.hint, self.environment = message, hint, environment

    def __str__(self):
        return f"{self.message} {self.hint}".strip()


class WorkerClient:
    """Starts the worker on the first request and keeps it for the next ones.

    Args:
        processFactory: makes a :class:`~.processes.WorkerProcess`.
        command: gives (program, arguments, environment, working folder).
        onLog: gets lines of text for the log panel.
        patience: when a silent process is given up and an idle one ended.
        clock: seconds, for :meth:`look`.
    """

    def __init__(
        self,
        processFactory=QtWorkerProcess,
        command=workerCommand,
        onLog=None,
        patience=Patience(),
        clock=time.monotonic,
    ):
        self._processFactory = processFactory
        self._command = command
        self._patience = patience
        self._clock = clock
        self._silence = self._looked = 0.0
        self._timer = qt.QTimer()
        self._timer.interval = round(1000 * patience.tick)
        self._timer.timeout.connect(self.look)
        self.onLog = onLog or (lambda text: None)
        self.onDevices = lambda devices: None
        self._process = None
        self._forget()

    def _forget(self):
        self._timer.stop()
        self.ready = False
        self.devices = []
        self._rest = b""
        self._waiting = []
        self._pending = {}
        self._count = 0
        self._lastLines = []
        self._startError = None

    @property
    def running(self):
        return self._process is not None

    @property
    def busy(self):
        return bool(self._pending)

    def start(self):
        """Start the process now, so that it is warm later. Returns a WorkerError, or None."""
        if self._process is not None:
            return None
        process = self._processFactory()
        process.onOutput, process.onErrorOutput, process.onExit = self._output, self._errorOutput, self._exited
        program, arguments, environment, folder = self._command()
        self._process = process
        self._silence, self._looked = 0.0, self._clock()
        self._timer.start()
        if not process.start(program, arguments, environment, folder):
            self._process = None
            self._timer.stop()
            return WorkerError(
                _("The registration process could not be started ({program}).").format(program=program),
                _("Check that the Slicer installation is complete."),
            )
        return None

    def request(self, command, fields, onResult, onError, onProgress=lambda event: None, onLevel=lambda event: None):
        """Send one request; exactly one of ``onResult`` and ``onError`` is called later, unless :meth:`cancel` comes
        first. ``onLevel`` is called after each level of an optimizer when the request says ``live``.
        """
        problem = self.start()
        if problem is not None:
            onError(problem)
            return
        self._count += 1
        identity = str(self._count)
        self._pending[identity] = _Pending(onResult, onError, onProgress, onLevel)
        if len(self._pending) == 1:
            self._silence = 0.0
        line = json.dumps({"id": identity, "command": command, **fields}).encode() + b"\n"
        if self.ready:
            self._process.write(line)
        else:
            self._waiting.append(line)

    def cancel(self):
        """End the worker with everything it started; pending call-backs are never called."""
        process, self._process = self._process, None
        self._forget()
        if process is not None:
            process.kill()

    stop = cancel

    # ------------------------------------------------------------------------------------------ from the process

    def look(self):
        """What the timer does each tick: give up a silent process that is waited for, end one that nobody needs."""
        now = self._clock()
        self._silence += min(now - self._looked, 2 * self._patience.tick)
        self._looked = now
        if self._pending:
            if self._silence > (self._patience.silence if self.ready else self._patience.start):
                self._fail(silenceError(self.ready, self._silence))
            return
        idle = self._patience.idle()
        if 0 < idle < self._silence:
            self.stop()
            self.onLog(
                _(
                    "The registration process had nothing to do for {minutes} minutes and was ended, which gives "
                    "its memory back. The next registration starts it again."
                ).format(minutes=f"{idle / 60:.3g}")
            )

    def _output(self, data):
        self._silence = 0.0
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if self._process is None:  # a call-back cancelled
                return
            try:
                event = json.loads(line)
            except ValueError:
                self._fail(
                    WorkerError(
                        _("The registration process answered something that is not understood."),
                        _("Install the extension again."),
                        environment=True,
                    )
                )
                return
            self._handle(event)

    def _handle(self, event):
        kind = event.get("event")
        if kind == "ready":
            self._welcome(event)
            return
        identity = event.get("id")
        if identity is None and kind == "error":
            self._startError = WorkerError(_sentence(event["message"]), event.get("hint", ""), environment=True)
            return
        pending = self._pending.get(identity)
        if pending is None:
            return
        if kind == "progress":
            pending.onProgress(event)
            return
        if kind == "level":
            pending.onLevel(event)
            return
        del self._pending[identity]
        if kind == "result":
            pending.onResult(event.get("result"))
        else:
            pending.onError(WorkerError(_sentence(event.get("message", "")), event.get("hint", "")))

    def _welcome(self, event):
        theirs = (event.get("protocol"), event.get("version"))
        ours = (PROTOCOL, SymRegistrationLib.__version__)
        if theirs != ours:
            self._fail(
                WorkerError(
                    _("The registration process is version {theirs}, this module is version {ours}.").format(
                        theirs=theirs[1], ours=ours[1]
                    ),
                    _("Restart Slicer; if that does not help, install the extension again."),
                    environment=True,
                )
            )
            return
        self.ready = True
        self.devices = event.get("devices", [])
        self.onDevices(self.devices)
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            self._process.write(line)

    def _errorOutput(self, data):
        self._silence = 0.0
        text = data.decode("utf-8", "replace")
        self._lastLines = (self._lastLines + text.splitlines())[-KEPT_LINES:]
        self.onLog(text.rstrip("\n"))

    def _exited(self, exitCode, crashed):
        self._process = None
        error = self._startError or exitError(exitCode, crashed, self.ready, self._lastLines)
        self._fail(error)

    def _fail(self, error):
        """End the process and hand ``error`` to everyone who waits."""
        process, pending, self._process = self._process, list(self._pending.values()), None
        self._forget()
        if process is not None:
            process.kill()
        for one in pending:
            one.onError(error)


def silenceError(wasReady, seconds):
    """In words that a process was given up because it said nothing."""
    minutes = f"{seconds / 60:.3g}"
    if not wasReady:
        return WorkerError(
            _("The registration process did not get ready within {minutes} minutes and was ended.").format(
                minutes=minutes
            ),
            _("Try again: a second start is faster. If it happens again, restart the computer, or see the log."),
        )
    return WorkerError(
        _("The registration process has said nothing for {minutes} minutes and was ended.").format(minutes=minutes),
        _("Register again, which starts a new process; if it happens again, choose the fast preset or the CPU."),
    )


#: Windows' codes for "not enough memory" and "commitment limit", as signed numbers.
_WINDOWS_MEMORY = (0xC0000017 - (1 << 32), 0xC000012D - (1 << 32))


def exitError(exitCode, crashed, wasReady, lines):
    """In words why a process ended that should not have.

    Args:
        exitCode: its exit code; of the launcher where there is one, which is 1 after any crash of the worker behind it.
        crashed: True when the system ended it.
        wasReady: it had announced itself.
        lines: the last lines of its stderr.
    """
    text = "\n".join(lines).lower()
    memory = _(
        "Choose the fast preset, a larger working voxel size or another device, and close what else needs memory."
    )
    again = _("Register again; if it happens again, choose the CPU and report what the log says.")
    if "memoryerror" in text or "out of memory" in text or "bad_alloc" in text or exitCode in _WINDOWS_MEMORY:
        return WorkerError(_("The registration ran out of memory."), memory)
    if (
        "exit abnormally" in text
    ):  # what PythonSlicer, the launcher, says when the Python behind it crashed or was ended
        return WorkerError(
            _("The registration process crashed or was ended from outside; most often the computer ran out of memory."),
            f"{memory} {again}",
        )
    if not wasReady and ("no module named" in text or "importerror" in text or "modulenotfounderror" in text):
        return WorkerError(
            _("A library that the registration needs is missing or damaged: {line}").format(line=lines[-1]),
            _("Install the libraries again."),
            environment=True,
        )
    if crashed or exitCode < 0 or exitCode in (128 + 9, 128 + 6, 128 + 11):
        number = exitCode % 128 if exitCode > 0 else -exitCode
        if number == getattr(signal, "SIGKILL", 9):
            return WorkerError(
                _("The registration process was ended from outside; most often the computer ran out of memory."), memory
            )
        return WorkerError(_("The registration process crashed (code {code}).").format(code=exitCode), again)
    return WorkerError(
        _("The registration process ended unexpectedly (exit code {code}).").format(code=exitCode),
        _("See the log; register again, which starts a new process."),
        environment=not wasReady,
    )


def _sentence(text):
    return text[:1].upper() + text[1:]
