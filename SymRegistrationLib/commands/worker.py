"""``symreg worker``: one long-lived process that takes jobs as JSON lines; what the Slicer module talks to.

One request a line on stdin, answers as JSON lines on stdout, everything else (prints of libraries, warnings,
tracebacks) on stderr. Networks, CUDA and torch stay loaded between jobs, and so do the two scans read last and the
registration finished last, so that going on from it makes again only what changes. Protocol 1:

* first line out: ``{"event": "ready", "protocol": 1, "version", "pid", "devices": [{"name", "title", "memory_gb"}]}``
* in: ``{"id": "1", "command": "register", "job": {...}, "outputs": [...]}``; ``pair`` takes what
  :mod:`SymRegistrationLib.cohort.pair` says; ``apply``, ``evaluate`` and ``report`` take ``"arguments": {...}``;
  ``methods``, ``ping`` and ``shutdown`` take nothing, ``presets`` nothing or ``"preset_file"``, ``suggest`` takes the
  paths ``"fixed"`` and ``"moving"``. ``undo``, ``redo`` and ``history`` take ``"folder"`` (and the first two
  ``"outputs"``); ``continue`` takes ``"folder"``, ``"changes"`` and ``"options"`` as
  :func:`SymRegistrationLib.jobs.history.continuing_job` does, and updates or repairs; ``enough``, also while a job
  runs, ends that job's optimisation: it then delivers a complete result.
* out, with the request's id: with ``"live": true`` in a ``register`` or ``continue`` request one ``level`` after each
  level of the optimiser (level, levels, similarity, folded_percent, and ``image``, the path of a small NRRD that is
  there until the job ends); ``progress`` (stage, fraction, seconds_left, message), then one ``result`` or one ``error``
  (message, hint, exit_code). A failed job ends nothing: the next line is served.

``outputs`` names what a register job shall write, as uncompressed NRRD, which costs a tenth of the time of compressed
files; without it the job's folder gets what the command line writes. When stdin closes, the client is gone: a running
job is given up, nothing half-written stays, and the process ends.
"""

from __future__ import annotations

import _thread
import argparse
import dataclasses
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from ..console import jsonable
from ..job import InputError, Job, Options, RegistrationError
from ..quality import outputs
from . import choosing
from .answers import judged, write_raw

PROTOCOL = 1
#: Longest request line, bytes; a job with all its paths needs a few thousand.
LONGEST_LINE = 1 << 20
_FIELDS = {
    "register": {"job", "outputs", "live"},
    "continue": {"folder", "changes", "options", "outputs", "live"},
    "undo": {"folder", "outputs"},
    "redo": {"folder", "outputs"},
    "history": {"folder"},
    "enough": set(),
    "pair": {"pair"},
    "apply": {"arguments"},
    "evaluate": {"arguments"},
    "report": {"arguments"},
    "methods": set(),
    "presets": {"preset_file"},
    "suggest": {"fixed", "moving"},
    "ping": set(),
    "shutdown": set(),
}


def main(arguments: Sequence[str]) -> int:
    """Serve stdin and stdout until one of them closes; returns the exit code."""
    parser = argparse.ArgumentParser("symreg worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--own-group",
        action="store_true",
        help="start a process group and lower the priority, so that a client can end everything at once "
        "and stays responsive",
    )
    options = parser.parse_args(list(arguments))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not break the protocol
    sys.stdout = sys.stderr
    if options.own_group:
        _own_group()
    # A parent that ignores Ctrl-C hands that on; but this is how a running job is given up when the client leaves.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A reader of its own: Python's stdin cannot be finalized while a thread waits for it.
    return Worker(os.fdopen(os.dup(0), "rb"), answers).serve()


def _own_group() -> None:
    import psutil

    if hasattr(os, "setsid") and os.getpid() != os.getsid(0):
        os.setsid()
    psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if sys.platform == "win32" else 5)


class Worker:
    """The loop behind :func:`main`.

    Args:
        requests: binary stream of JSON lines; read in a thread of its own, so that a closing stream is seen at once.
        answers: binary stream for JSON lines.
    """

    def __init__(self, requests: BinaryIO, answers: BinaryIO):
        self._requests = requests
        self._answers = answers
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        self._working = False
        self._memory: Any = None  # a jobs.memory.Memory, once torch is loaded
        self._enough = threading.Event()
        self._writing = threading.Lock()
        self._last: tuple[Any, dict] | None = None

    def serve(self) -> int:
        """Announce, then answer every request. 0 = the client left or asked for the end, 1 = cannot work here."""
        try:
            from ..jobs import register  # noqa: F401  torch, SimpleITK: loaded before the first job, not within it
            from ..jobs.memory import Memory
            from ..registration import devices

            listing = devices.listing()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            traceback.print_exc()
            self._emit(
                {
                    "id": None,
                    "event": "error",
                    "exit_code": 1,
                    "message": f"the libraries for registration could not be loaded ({type(error).__name__}: {error}).",
                    "hint": "PyTorch, SimpleITK or safetensors is missing or damaged; install them again.",
                }
            )
            return 1
        self._memory = Memory()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._emit(
                {"event": "ready", "protocol": PROTOCOL, "version": __version__, "pid": os.getpid(), "devices": listing}
            )
            while (line := self._queue.get()) is not None:
                if not self._answer(line):
                    break
        except (KeyboardInterrupt, BrokenPipeError):  # the client left in the middle
            pass
        return 0

    def _read(self) -> None:
        """Fill the queue until stdin ends; then stop whatever runs."""
        while True:
            line = self._requests.readline(LONGEST_LINE + 1)
            if not line:
                break
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = self._requests.readline(LONGEST_LINE)
                line = b"\0"  # stands for a line that is too long
            if line.strip() and not self._ends_optimisation(line):
                self._queue.put(line)
        self._queue.put(None)
        if self._working:
            _thread.interrupt_main()

    def _ends_optimisation(self, line: bytes) -> bool:
        """Serve an ``enough`` at once, beside the job that runs; False for every other line."""
        if b'"enough"' not in line:
            return False
        try:
            request = _parsed(line)
            if _checked(request) != "enough":
                return False
        except InputError:
            return False
        if self._working:
            self._enough.set()
        self._emit({"id": request.get("id"), "event": "result", "result": {"running": self._working}})
        return True

    def _emit(self, event: dict) -> None:
        with self._writing:
            self._answers.write(json.dumps(jsonable(event)).encode() + b"\n")
            self._answers.flush()

    def _answer(self, line: bytes) -> bool:
        """Serve one line; False after ``shutdown``. Whatever goes wrong becomes one error line."""
        identity: Any = None
        self._enough.clear()
        self._working = True
        try:
            request = _parsed(line)
            identity = request.get("id")
            command = _checked(request)
            if command == "shutdown":
                self._emit({"id": identity, "event": "result", "result": {}})
                return False
            result = getattr(self, f"_{command}")(request, self._progress(identity))
            self._emit({"id": identity, "event": "result", "result": result})
        except BrokenPipeError:
            raise
        except RegistrationError as error:
            self._error(identity, error.message, error.hint, error.exit_code)
        except MemoryError:
            self._error(identity, *_MEMORY)
        except (
            Exception
        ) as error:  # a bug, or a library that gave up: the client hears it, the traceback goes to stderr
            traceback.print_exc()
            if _out_of_memory(error):
                self._error(identity, *_MEMORY)
            else:
                self._error(
                    identity,
                    f"the registration failed unexpectedly ({type(error).__name__}: {str(error)[:300]}).",
                    "The log has the details; please report them.",
                )
        finally:
            self._working = False
        return True

    def _error(self, identity: Any, message: str, hint: str, exit_code: int = 1) -> None:
        self._emit({"id": identity, "event": "error", "message": message, "hint": hint, "exit_code": exit_code})

    def _progress(self, identity: Any) -> Callable[[str, float, str], None]:
        """A progress call-back that writes at most ten lines a second, and every new stage."""
        started = time.monotonic()
        last: dict[str, Any] = {"stage": "", "at": 0.0}

        def progress(stage: str, fraction: float, message: str) -> None:
            now = time.monotonic()
            if stage == last["stage"] and now - last["at"] < 0.1 and fraction < 1:
                return
            last.update(stage=stage, at=now)
            fraction = min(max(fraction, 0.0), 1.0)
            left = (
                None
                if fraction < 0.05 or now - started < 0.5
                else round((now - started) * (1 - fraction) / fraction, 1)
            )
            self._emit(
                {
                    "id": identity,
                    "event": "progress",
                    "stage": stage,
                    "fraction": round(fraction, 4),
                    "seconds_left": left,
                    "message": message,
                }
            )

        return progress

    # ------------------------------------------------------------------------------------------ commands

    def _ping(self, request: dict, progress: Callable) -> dict:
        return {}

    def _methods(self, request: dict, progress: Callable) -> list[dict]:
        from ..jobs.methods import catalogue

        return catalogue()

    def _presets(self, request: dict, progress: Callable) -> dict:
        return choosing.asked_catalogue(request)

    def _suggest(self, request: dict, progress: Callable) -> dict:
        return choosing.asked_suggestion(request)

    def _register(self, request: dict, progress: Callable) -> dict:
        return self._run_job(request, Job.from_dict(request.get("job")), progress)

    def _continue(self, request: dict, progress: Callable) -> dict:
        from ..jobs.history import continuing_job

        changes, options = request.get("changes") or {}, request.get("options") or {}
        if not (isinstance(changes, dict) and isinstance(options, dict)):
            raise InputError("'changes' and 'options' must be objects.", "Send what differs from the last step.")
        _known("changes", changes, Job)
        _known("options", options, Options)
        job = continuing_job(_folder(request), None, changes, options)
        return self._run_job(request, Job.from_dict(dataclasses.asdict(job)), progress)

    def _run_job(self, request: dict, job: Job, progress: Callable) -> dict:
        """Register, update or repair, with a client that may look and may have enough."""
        from ..jobs import register

        with tempfile.TemporaryDirectory(prefix="symreg-live-") as folder:
            watch = self._watch(request.get("id"), Path(folder), request.get("live") is True)
            return self._delivered(request, lambda write: register.run(job, progress, write, watch, None, self._memory))

    def _undo(self, request: dict, progress: Callable) -> dict:
        from ..jobs import history

        return self._delivered(request, lambda write: history.undo(_folder(request), progress, write, self._memory))

    def _redo(self, request: dict, progress: Callable) -> dict:
        from ..jobs import history

        return self._delivered(request, lambda write: history.redo(_folder(request), progress, write, self._memory))

    def _history(self, request: dict, progress: Callable) -> dict:
        from ..jobs import history

        found = history.read(_folder(request))
        return {"current": found.current, "steps": list(found.steps)}

    def _watch(self, identity: Any, folder: Path, live: bool) -> Any:
        """Who looks for the client: tells of each level when it asked to, and knows when it has had enough."""
        from ..geometry.volumes import to_itk
        from ..registration.live import Watch

        def show(look: Any) -> None:
            import SimpleITK as sitk

            path = folder / f"level-{look.level}.nrrd"
            sitk.WriteImage(to_itk(look.image, look.grid), str(path), useCompression=False)
            self._emit(
                {
                    "id": identity,
                    "event": "level",
                    "level": look.level,
                    "levels": look.levels,
                    "similarity": look.similarity,
                    "folded_percent": look.folded_percent,
                    "image": str(path),
                }
            )

        return Watch(show if live else None, self._enough.is_set)

    def _delivered(self, request: dict, run: Callable) -> dict:
        """The answer to a request whose ``run(write)`` registers; the result is kept for a report."""
        from ..jobs import register

        wanted = request.get("outputs")
        self._last = None  # frees the arrays of the run before

        def write(folder: Path, job: Job, result: Any) -> dict[str, str]:
            self._last = (result, {})
            return register.write_result(folder, job, result) if wanted is None else write_raw(folder, wanted, result)

        metrics = run(write)
        if self._last is not None:
            self._last[1].update(metrics)
        return {**metrics, "verdict": judged(metrics)}

    def _pair(self, request: dict, progress: Callable) -> dict:
        """One pair of a batch: registered and recorded."""
        from ..cohort.pair import PairRequest, run_pair

        self._last = None
        return run_pair(PairRequest.from_dict(request.get("pair")), progress)

    def _apply(self, request: dict, progress: Callable) -> dict:
        from ..jobs.apply import Application, apply_transform

        return apply_transform(Application.from_dict(request.get("arguments")), progress)

    def _evaluate(self, request: dict, progress: Callable) -> dict:
        from ..jobs.evaluate import Evaluation, evaluate

        return evaluate(Evaluation.from_dict(request.get("arguments")), progress)

    def _report(self, request: dict, progress: Callable) -> dict:
        """Write the report of the last registration to ``arguments.path``."""
        from ..report.page import write_report

        arguments = request.get("arguments")
        if not isinstance(arguments, dict) or set(arguments) != {"path"} or not isinstance(arguments["path"], str):
            raise InputError("the report request must be an object with a path.", 'Send "arguments": {"path": FILE}.')
        if self._last is None:
            raise InputError("there is no registration to report on.", "Register first.")
        write_report(Path(arguments["path"]), *self._last)
        return {"path": arguments["path"]}


def _known(what: str, given: dict, cls: type) -> None:
    """Raises InputError for a field that ``cls`` does not have; :func:`continuing_job` checks the values."""
    names = {f.name for f in dataclasses.fields(cls)} - {"options"}
    if unknown := set(given) - names:
        raise InputError(f"unknown field '{min(unknown)[:100]}' in the {what}.", f"Known: {', '.join(sorted(names))}.")


def _folder(request: dict) -> str:
    folder = request.get("folder")
    if not isinstance(folder, str) or not folder:
        raise InputError("the request names no folder.", 'Send "folder": the output folder of the registration.')
    return folder


_MEMORY = (
    "there is not enough memory for this registration.",
    "Choose the fast preset, a larger working voxel size, or another device, and close what else needs memory.",
    1,
)


def _out_of_memory(error: Exception) -> bool:
    """True for a full GPU (torch.OutOfMemoryError) and for a failed allocation in C++ (std::bad_alloc)."""
    import torch

    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
    return False


def _parsed(line: bytes) -> dict:
    if line == b"\0":
        raise InputError(f"a request is longer than {LONGEST_LINE} bytes.", "Send paths, not data.")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"a request is not JSON ({str(error)[:100]}).", "One JSON object a line.") from None
    if not isinstance(request, dict):
        raise InputError("a request is not a JSON object.", 'Send {"id": ..., "command": ...}.')
    return request


def _checked(request: dict) -> str:
    """The command of a request whose fields are known. Raises InputError."""
    command = request.get("command")
    if not isinstance(command, str) or command not in _FIELDS:
        raise InputError(f"unknown command {command!r:.100}.", f"Known: {', '.join(_FIELDS)}.")
    unknown = set(request) - _FIELDS[command] - {"id", "command"}
    if unknown:
        raise InputError(
            f"unknown field '{min(unknown)[:100]}' in a {command} request.",
            f"Known: {', '.join(['id', 'command', *sorted(_FIELDS[command])])}.",
        )
    wanted = request.get("outputs")
    if wanted is not None and not (isinstance(wanted, list) and all(name in outputs.names() for name in wanted)):
        raise InputError("'outputs' must be a list of known names.", f"Known: {', '.join(outputs.names())}.")
    return command
