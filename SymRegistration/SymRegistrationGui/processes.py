"""The operating-system side of the worker: starting PythonSlicer, its three streams, and ending everything it started.

:class:`WorkerProcess` is all that the client needs, so that tests can put anything in its place.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import qt
import slicer


class WorkerProcess(Protocol):
    """A child process with call-backs on the main thread; each is set by the client before :meth:`start`."""

    onOutput: Callable[[bytes], None]
    onErrorOutput: Callable[[bytes], None]
    #: exit code, and True when the process did not end by itself.
    onExit: Callable[[int, bool], None]

    def start(self, program: str, arguments: list, environment: dict) -> bool:
        """False when the program cannot be started."""

    def write(self, data: bytes) -> None:
        """To the child's stdin."""

    def kill(self) -> None:
        """End the child and everything it started, at once. ``onExit`` is not called."""


class QtWorkerProcess:
    """:class:`WorkerProcess` with QProcess."""

    def __init__(self):
        self.onOutput = self.onErrorOutput = self.onExit = None
        self._process = qt.QProcess()
        self._process.readyReadStandardOutput.connect(self._outputReady)
        self._process.readyReadStandardError.connect(self._errorReady)
        self._process.finished.connect(self._finished)
        self._silent = False

    def start(self, program, arguments, environment):
        settings = qt.QProcessEnvironment()
        for name, value in environment.items():
            settings.insert(name, value)
        self._process.setProcessEnvironment(settings)
        self._process.start(program, arguments)
        return self._process.waitForStarted(5000)

    def write(self, data):
        self._process.write(qt.QByteArray(data))

    def kill(self):
        self._silent = True
        pid = self._process.processId()
        if pid and self._process.state() != qt.QProcess.NotRunning:
            killTree(int(pid))
            self._process.kill()
            self._process.waitForFinished(2000)

    def _outputReady(self):
        data = bytes(self._process.readAllStandardOutput().data())
        if data and not self._silent:
            self.onOutput(data)

    def _errorReady(self):
        data = bytes(self._process.readAllStandardError().data())
        if data and not self._silent:
            self.onErrorOutput(data)

    def _finished(self):
        if not self._silent:
            self._outputReady()
            self._errorReady()
            self._silent = True
            self.onExit(self._process.exitCode(), self._process.exitStatus() == qt.QProcess.CrashExit)


def killTree(pid):
    """End process ``pid`` with all its descendants, by what this machine offers.

    The worker leads a process group of its own, so the group is enough where groups exist; psutil, when it is there, also
    finds children that left the group.
    """
    others = _descendants(pid)
    if os.name == "nt":
        subprocess.run(["taskkill", "/PID", str(pid), "/T", "/F"], capture_output=True, check=False,
                       creationflags=subprocess.CREATE_NO_WINDOW)
    else:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:  # the worker has not made its group yet, so it has no children yet
                os.kill(pid, signal.SIGKILL)
    for other in others:
        with contextlib.suppress(OSError):  # already gone
            os.kill(other, getattr(signal, "SIGKILL", signal.SIGTERM))


def _descendants(pid):
    """Process numbers below ``pid``, as far as psutil is there to find them."""
    try:
        import psutil
    except (ImportError, OSError):
        return []
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def pythonProgram():
    """Path of PythonSlicer, or of the running Python where there is none."""
    home = os.environ.get("SLICER_HOME", "")
    for candidate in (shutil.which("PythonSlicer"), *(shutil.which(os.path.join(home, "bin", name)) for name in
                                                      ("PythonSlicer", "PythonSlicer.exe", "PythonSlicer-real"))):
        if candidate:
            return candidate
    return sys.executable


def libraryFolder():
    """The folder from which SymRegistrationLib was imported."""
    import SymRegistrationLib

    return str(Path(SymRegistrationLib.__file__).resolve().parent.parent)


def workerCommand():
    """(program, arguments, environment) that start the worker."""
    environment = dict(slicer.util.startupEnvironment())
    # PythonSlicer adds its own paths; ours has to be found first, whatever else is installed.
    paths = [libraryFolder(), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["PYTHONIOENCODING"] = "utf-8"
    return pythonProgram(), ["-m", "SymRegistrationLib", "worker", "--own-group"], environment
