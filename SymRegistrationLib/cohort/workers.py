"""Warm worker processes: each takes one pair after the other; one that dies or hangs is replaced."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from ..job import InputError, Progress, RegistrationError, silent
from .pair import PairRequest

#: A worker gets at least so long to load its libraries, seconds.
START_SECONDS = 180.0
#: How often a pair is tried when its worker is lost.
ATTEMPTS = 2


class WorkerLost(Exception):
    """A worker died or hangs; the text says how."""


class WorkersBroken(RegistrationError):
    """No worker can be started here."""


@dataclass(frozen=True)
class Slot:
    """Where one worker computes; None leaves the request as it is."""

    device: str | None = None
    threads: int | None = None
    memory_gb: float | None = None

    def fitted(self, request: PairRequest) -> PairRequest:
        """The request on this slot's device, threads and memory."""
        changes = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        options = dataclasses.replace(request.job.options, **changes)
        return dataclasses.replace(request, job=dataclasses.replace(request.job, options=options))


@dataclass(frozen=True)
class Event:
    """What happened to pair number ``index``.

    Attributes:
        kind: ``progress`` (fraction, message), ``done`` (metrics), ``failed`` (message) or ``again`` (message: why).
        seconds: the pair took, of its last attempt.
        attempts: how often it was started.
    """

    kind: str
    index: int
    message: str = ""
    fraction: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1


class WorkerProcess:
    """One ``symreg worker``.

    Args:
        log: gets what it writes to stderr, a line at a time.
        inherit: file descriptors that it shall hold as long as it lives (a lock).
        environment: set beside what this process has.
    """

    def __init__(
        self,
        log: Callable[[str], None] = lambda line: None,
        inherit: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ):
        library = str(Path(__file__).resolve().parents[2])
        paths = [library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        groups: dict[str, Any]
        if sys.platform == "win32":
            groups = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            groups = {"start_new_session": True, "pass_fds": tuple(inherit)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "SymRegistrationLib", "worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)},
            **groups,
        )
        self._stdin, self._stdout, self._stderr = (
            cast(IO[bytes], pipe) for pipe in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        self._lines: queue.Queue[dict | None] = queue.Queue()
        self._last: collections.deque[str] = collections.deque(maxlen=40)
        self._log = log
        self._count = 0
        for target in (self._read, self._listen):
            threading.Thread(target=target, daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def ready(self) -> dict[str, Any]:
        """Wait for its first line. Raises WorkerLost, or WorkersBroken when its libraries are missing."""
        event = self._next(START_SECONDS)
        if event.get("event") == "error":
            raise WorkersBroken(event["message"], event.get("hint", ""))
        return event

    def ask(self, command: str, fields: dict[str, Any], worker_timeout_s: float, progress: Progress = silent) -> Any:
        """One request.

        Args:
            worker_timeout_s: seconds without any word after which the worker is taken for hanging.

        Raises:
            WorkerLost: it died or hangs. InputError, RegistrationError: what it answered.
        """
        self._count += 1
        identity = str(self._count)
        try:
            self._stdin.write(json.dumps({"id": identity, "command": command, **fields}).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            raise WorkerLost(self._why()) from None
        while True:
            event = self._next(worker_timeout_s)
            if event.get("id") != identity:
                continue
            if event["event"] == "progress":
                progress(event["stage"], event["fraction"], event["message"])
            elif event["event"] == "result":
                return event["result"]
            else:
                kind = InputError if event.get("exit_code") == 2 else RegistrationError
                raise kind(event["message"], event.get("hint", ""))

    def kill(self) -> None:
        """End it with everything that it started, at once."""
        if self._process.poll() is None:
            if os.name == "nt":
                subprocess.run(["taskkill", "/PID", str(self.pid), "/T", "/F"], capture_output=True, check=False)
            else:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def close(self) -> None:
        """Let it end: its stdin closes."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            event = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise WorkerLost(f"the worker said nothing for {seconds / 60:.3g} min and was ended") from None
        if event is None:
            raise WorkerLost(self._why())
        return event

    def _read(self) -> None:
        for line in self._stdout:
            try:
                event = json.loads(line)
            except ValueError:
                event = None  # whatever talks there is no worker
            self._lines.put(event if isinstance(event, dict) else None)
        self._lines.put(None)

    def _listen(self) -> None:
        for line in self._stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self._last.append(text)
            self._log(text)

    def _why(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "the worker answered something that is not understood"
        if code == -getattr(signal, "SIGKILL", 9):
            return "the worker was killed (most often because the machine ran out of memory)"
        if code < 0:
            return f"the worker crashed (signal {-code})"
        return f"the worker ended unexpectedly (exit code {code}{': ' + self._last[-1][:200] if self._last else ''})"


class Pool:
    """Slots that share one list of pairs.

    Args:
        slots: one worker each.
        worker_timeout_s: see :meth:`WorkerProcess.ask`.
        start: makes a :class:`WorkerProcess`.
        first: a worker that is ready already, for the first slot.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        worker_timeout_s: float,
        start: Callable[[], WorkerProcess],
        first: WorkerProcess | None = None,
    ):
        self._slots, self._worker_timeout_s, self._start = list(slots), worker_timeout_s, start
        self._processes: dict[int, WorkerProcess] = {0: first} if first is not None else {}
        self._events: queue.Queue[Event | BaseException] = queue.Queue()
        self._waiting: collections.deque[tuple[int, int]] = collections.deque()
        self._change = threading.Condition()
        self._busy = 0
        self._stopped = False
        self._started = first is not None

    def run(self, requests: Sequence[PairRequest], tell: Callable[[Event], None]) -> None:
        """Do every request; ``tell`` is called in this thread. On any exception all workers end at once.

        Raises:
            WorkersBroken: no worker can be started.
        """
        self._waiting.extend((index, 1) for index in range(len(requests)))
        left = len(requests)
        threads = [
            threading.Thread(target=self._serve, args=(number, requests), daemon=True)
            for number in range(min(len(self._slots), max(left, 1)))
        ]
        for thread in threads:
            thread.start()
        try:
            while left:
                event = self._events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= event.kind in ("done", "failed")
                tell(event)
        except BaseException:
            self.stop()
            raise
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """End every worker at once."""
        with self._change:
            self._stopped = True
            processes = list(self._processes.values())
            self._change.notify_all()
        for process in processes:
            process.kill()

    # ------------------------------------------------------------------------------------------ one slot

    def _serve(self, number: int, requests: Sequence[PairRequest]) -> None:
        try:
            while (pair := self._take()) is not None:
                self._work(number, *pair, requests[pair[0]])
                with self._change:
                    self._busy -= 1
                    self._change.notify_all()
        except BaseException as error:
            self._events.put(error)
        finally:
            process = self._processes.pop(number, None)
            if process is not None and not self._stopped:
                process.close()

    def _take(self) -> tuple[int, int] | None:
        """The next pair (index, attempt); waits while a running one may come back; None at the end."""
        with self._change:
            while not self._stopped:
                if self._waiting:
                    self._busy += 1
                    return self._waiting.popleft()
                if not self._busy:
                    return None
                self._change.wait()
        return None

    def _work(self, number: int, index: int, attempt: int, request: PairRequest) -> None:
        started = time.monotonic()

        def progress(stage: str, fraction: float, message: str) -> None:
            self._events.put(Event("progress", index, message, fraction, attempts=attempt))

        def end(kind: str, message: str = "", metrics: dict | None = None) -> None:
            self._events.put(
                Event(kind, index, message, metrics=metrics or {}, seconds=time.monotonic() - started, attempts=attempt)
            )

        try:
            process = self._process(number)
            fields = {"pair": self._slots[number].fitted(request).to_dict()}
            end("done", metrics=process.ask("pair", fields, self._worker_timeout_s, progress))
        except WorkerLost as lost:
            if self._stopped:
                return
            gone = self._processes.pop(number, None)
            if gone is not None:
                gone.kill()
            if attempt < ATTEMPTS:
                end("again", str(lost))
                with self._change:
                    self._waiting.append((index, attempt + 1))
            else:
                end("failed", f"{lost}, {ATTEMPTS} times.")
        except WorkersBroken:
            raise
        except RegistrationError as error:
            end("failed", str(error))

    def _process(self, number: int) -> WorkerProcess:
        with self._change:
            process = self._processes.get(number)
            if process is not None:
                return process
            if self._stopped:
                raise WorkerLost("stopped")
            process = self._processes[number] = self._start()
        try:
            process.ready()
        except WorkersBroken as error:
            process.kill()
            if self._started:  # others could be started, so this is a passing trouble
                raise WorkerLost(error.message.rstrip(".")) from None
            raise
        self._started = True
        return process
