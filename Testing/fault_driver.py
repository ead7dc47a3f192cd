"""Commands under faults: each in a forked child of one warm process, so that a hundred cost little.

stdin: ``{"result_of": [words] or null, "cases": [{"words": [...], "fault": {...} or null, "cached": bool, "keep":
[...]}, ...]}``. stdout: a JSON list of ``{"code", "signal", "stderr"}``. A ``cached`` case does not compute: it writes
what the command ``result_of`` computed, so that only the writing is under test. ``keep``: [folder, copy], made when the
child has ended.

Faults: ``{"kind": "signal", "number", "at", "count"}`` sends a signal before the count-th ``replace`` (a file gets its
final name), at the count-th ``half`` (a file is half written), ``append`` (a training step is over) or ``checkpoint``
(a checkpoint is half written); ``{"kind": "errno", "number", "at", "count"}`` fails there; ``fsize`` and ``memory``
limit the size of files and the memory that may be taken beyond the present; ``clock`` lets the time of day jump.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Threads do not survive a fork.
os.environ.update(OMP_NUM_THREADS="1", ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS="1")


def main() -> None:
    """Read the cases, run them, write what came of them."""
    # A shell that starts tests in the background has them ignore Ctrl-C; here it is what is under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = json.load(sys.stdin)
    for name in (
        "jobs.register",
        "jobs.apply",
        "jobs.evaluate",
        "report.page",
        "report.rows",
        "training.loop",
        "registration.inference",
        "registration.optimisers.syn",
    ):
        importlib.import_module(f"SymRegistrationLib.{name}")
    import torch

    torch.set_num_threads(1)
    cached = [case for case in asked["cases"] if case.get("cached")]
    told: list[Any] = [None] * len(asked["cases"])
    for k, case in enumerate(asked["cases"]):
        if not case.get("cached"):
            told[k] = _child(case, None)
    result = _computed(asked["result_of"]) if cached else None
    for k, case in enumerate(asked["cases"]):
        if case.get("cached"):
            told[k] = _child(case, result)
    json.dump(told, sys.stdout)


def _computed(words: list[str]) -> Any:
    """What ``symreg register`` with these words computes; it also writes."""
    from SymRegistrationLib.commands.cli import main as symreg
    from SymRegistrationLib.jobs import register as outputs

    found = []
    register = outputs.register

    def kept(*arguments, **named):
        found.append(register(*arguments, **named))
        return found[0]

    outputs.register = kept
    assert symreg(words) == 0
    outputs.register = register
    return found[0]


def _child(case: dict, result: Any) -> dict:
    # A pipe, because a file would fall under the limit on the size of files.
    ours, theirs = os.pipe()
    with open(ours, "rb") as log:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(theirs, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code = _faulty(case, result)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(theirs)
        said = log.read().decode()
        _, status = os.waitpid(child, 0)
        if "keep" in case and Path(case["keep"][0]).exists():
            shutil.copytree(*case["keep"])
        return {
            "code": os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None,
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "stderr": said,
        }


def _faulty(case: dict, result: Any) -> int:
    from SymRegistrationLib.commands.cli import main as symreg
    from SymRegistrationLib.jobs import register as outputs

    if result is not None:
        outputs.register = lambda *arguments, **named: result
    fault = case.get("fault") or {"kind": "none"}
    if fault["kind"] in ("signal", "errno"):
        _at_the_moment(fault)
    elif fault["kind"] == "fsize":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"],) * 2)
    elif fault["kind"] == "memory":
        import psutil

        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + fault["bytes"],) * 2)
    elif fault["kind"] == "clock":
        jumps = random.Random(7)
        now = time.time
        time.time = lambda: now() + jumps.uniform(-1e6, 1e6)
    return symreg(case["words"])


def _at_the_moment(fault: dict) -> None:
    """Let the fault happen at the count-th call of what ``at`` names."""
    import SimpleITK

    from SymRegistrationLib.geometry import transform_files
    from SymRegistrationLib.training import checkpoints

    left = [fault["count"]]

    def strike(half_written: str | None = None) -> None:
        left[0] -= 1
        if left[0]:
            return
        if half_written is not None:
            os.truncate(half_written, Path(half_written).stat().st_size // 2)
        if fault["kind"] == "errno":
            raise OSError(fault["number"], os.strerror(fault["number"]))
        os.kill(os.getpid(), fault["number"])

    def before(module: Any, name: str) -> None:
        call = getattr(module, name)

        def struck(*arguments, **named):
            strike()
            return call(*arguments, **named)

        setattr(module, name, struck)

    def during(module: Any, name: str, which: int) -> None:
        call = getattr(module, name)

        def struck(*arguments, **named):
            answer = call(*arguments, **named)
            strike(str(arguments[which]))
            return answer

        setattr(module, name, struck)

    at = fault["at"]
    if at == "replace":
        before(os, "replace")
    elif at == "mkdtemp":
        before(tempfile, "mkdtemp")
    elif at == "append":
        before(checkpoints, "append")
    elif at == "checkpoint":
        during(checkpoints, "save_file", 1)
    else:
        during(SimpleITK, "WriteImage", 1)
        during(transform_files, "write_transforms", 0)


if __name__ == "__main__":
    main()
