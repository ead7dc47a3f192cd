"""Many pairs: checked, divided among warm workers or handed to a cluster, resumed after anything, and summed up.

No torch in this process. A pair's folder is finished when its record says so (see
:mod:`SymRegistrationLib.cohort.pair`); everything else is done again. ``summary.csv`` and ``index.html`` are renewed
while the batch runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..console import Console, duration
from ..files import json_object, write_whole
from ..job import InputError
from ..registration.memory import BATCH_SHARE
from .check import Checker, cores
from .page import page
from .pair import Digests, PairRequest, recorded
from .summary import PairState, counts, csv_text, finish, judge
from .table import Row
from .workers import Event, Pool, Slot, WorkerLost, WorkerProcess, WorkersBroken

#: Seconds between two renewals of summary.csv and index.html.
RENEW_SECONDS = 60.0
LOCK = ".symreg-batch.lock"
#: A lock that workers of a killed batch still hold is waited for so long: they give up their pair within seconds.
LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class CohortPlan:
    """How to run a batch.

    Attributes:
        output: its folder.
        workers: processes; ``None`` = from memory, processors and GPUs.
        scheduler: address of a Dask scheduler instead.
        worker_timeout_s: seconds without a word after which a worker is taken for hanging.
        group: the pairs also write what :mod:`SymRegistrationLib.cohort.template` needs.
        verify_outputs: finished pairs are compared by the SHA-256 of their outputs too, not only by that of
            inputs and job.
        title: of the page.
        links: (file, what it is) for the page.
    """

    output: str
    workers: int | None = None
    scheduler: str | None = None
    worker_timeout_s: float = 1800.0
    group: bool = False
    verify_outputs: bool = False
    title: str = "Batch"
    links: tuple[tuple[str, str], ...] = ()


def check_rows(rows: Sequence[Row], output: str, console: Console) -> tuple[list[PairState], Checker]:
    """Look at the header of every file; rows that cannot run come back as failed."""
    checker, states = Checker(), []
    for k, row in enumerate(rows):
        if k % 100 == 0:
            console.progress("check", 0.0, f"checking row {k + 1} of {len(rows)}")
        problem = checker.problem(row.job, Path(output))
        states.append(PairState(row, "failed", problem) if problem else PairState(row))
    return states, checker


def run_batch(rows: Sequence[Row], plan: CohortPlan, console: Console) -> list[PairState]:
    """Do every row that is not finished.

    Returns:
        One judged state per row.

    Raises:
        InputError: no row can run, the folder cannot be used or another batch works in it, no cluster answers.
        RegistrationError: no worker can be started.
    """
    states, checker = check_rows(rows, plan.output, console)
    broken = [state for state in states if state.status == "failed"]
    if len(broken) == len(states):
        raise InputError(
            f"none of the {len(states)} pairs can be registered; line {broken[0].row.line}: {broken[0].reason}",
            "--dry-run tells it of every line.",
        )
    with contextlib.ExitStack() as stack:
        client = None
        if plan.scheduler:
            from .cluster import connected

            client = stack.enter_context(connected(plan.scheduler))
        lock = stack.enter_context(_locked(Path(plan.output)))
        return _Run(states, plan, console, checker, lock).run(client)


class _Run:
    """One batch under way."""

    def __init__(self, states: list[PairState], plan: CohortPlan, console: Console, checker: Checker, lock: int):
        self._states, self._plan, self._console, self._checker, self._lock = states, plan, console, checker, lock
        self._output = Path(plan.output)
        self._started, self._renewed = time.monotonic(), 0.0
        self._todo: list[PairState] = []
        self._fractions: dict[int, float] = {}
        self._last, self._told = "start", 0.0
        self._facts: dict[str, Any] = {"threads": None, "memory_gb": None}

    def run(self, client: Any = None) -> list[PairState]:
        """Everything; on the cluster of ``client`` when there is one."""
        for state in self._states:
            if state.status == "failed":
                self._say(state)
        self._keep_finished()
        self._todo = [state for state in self._states if state.status == "waiting"]
        try:
            if self._todo:
                requests = [self._request(state) for state in self._todo]
                self._renew()
                if client is not None:
                    from .cluster import run_on_cluster

                    run_on_cluster(client, [_absolute(r) for r in requests], self._plan.worker_timeout_s, self._event)
                else:
                    self._run_here(requests)
        finally:
            self._renew()
        return self._states

    def _request(self, state: PairState) -> PairRequest:
        return PairRequest(state.row.job, self._plan.group)

    def _keep_finished(self) -> None:
        """Recognise what an earlier run has finished."""
        digests, changed = Digests(), 0
        there = [state for state in self._states if state.status == "waiting" and Path(state.row.job.output).is_dir()]
        for k, state in enumerate(there):
            self._console.progress("resume", 0.0, f"checking finished pairs, {k + 1} of {len(there)}")
            try:
                metrics = recorded(self._request(state), digests, self._plan.verify_outputs)
            except InputError:  # an input cannot be read; the pair's own run will say so
                metrics = None
            if metrics is None:
                changed += (Path(state.row.job.output) / "metrics.json").exists()
                continue
            state.kept, state.attempts = True, 1
            finish(state, metrics)
            state.seconds = (metrics.get("seconds") or {}).get("total")
        kept = sum(state.kept for state in self._states)
        if kept:
            self._console.note(f"{kept} pairs are finished already: inputs and job are the same")
        if changed:
            self._console.note(
                f"{changed} pairs are done again: an input, the job or an output has changed, or they were cut off"
            )

    # ------------------------------------------------------------------------------------------ on this machine

    def _run_here(self, requests: list[PairRequest]) -> None:
        first = None
        path = self._output / "workers.log"
        with open(path, "a", encoding="utf-8") as log:

            def write(line: str) -> None:
                with contextlib.suppress(ValueError):  # closed: the last words of a worker that is let go
                    print(line, file=log, flush=True)

            def start() -> WorkerProcess:
                return WorkerProcess(
                    write,
                    () if self._lock < 0 else (self._lock,),
                    {} if self._plan.workers == 1 else {"OMP_WAIT_POLICY": "passive"},
                )

            try:
                first = start()
                pool = Pool(self._slots(requests, first.ready()["devices"]), self._plan.worker_timeout_s, start, first)
                first = None  # the pool's now
                pool.run(requests, self._event)
            except WorkerLost as lost:
                raise WorkersBroken(f"no worker can be started: {lost}.", f"See {path}.") from None
            finally:
                if first is not None:
                    first.kill()
        if not path.stat().st_size:
            path.unlink()

    def _slots(self, requests: list[PairRequest], devices: list[dict[str, Any]]) -> list[Slot]:
        """Where the workers compute: one per GPU, or as many as processors and memory allow."""
        options = requests[0].job.options
        gpus = (
            [device["name"] for device in devices if device["name"].startswith("cuda")]
            if options.device == "auto"
            else []
        )
        free = devices[0].get("free_gb", devices[0]["memory_gb"])
        need = options.memory_gb or max(self._checker.memory_gb(request.job) for request in requests)
        fits = max(1, int(BATCH_SHARE * free / need))
        count = self._plan.workers or (len(gpus) if gpus else min(cores(), fits))
        count = max(1, min(count, len(requests)))
        if not gpus and count > fits:
            self._console.note(f"{count} workers need about {count * need:.1f} GB of memory, {free:.1f} GB are free")
        before = json_object(self._output / "batch.json") or {}
        threads = options.threads or before.get("threads") or max(1, cores() // count)
        memory = options.memory_gb
        if memory is None and not gpus:
            # Stated, not looked up by each worker, so that a moment's load changes no result.
            memory = round(min(before.get("memory_gb") or free, 0.6 * free / count), 2)
        self._facts = {"threads": threads, "memory_gb": memory}
        told = f"{count} worker{'s' if count > 1 else ''} with {threads} thread{'s' if threads > 1 else ''} each"
        self._console.progress(
            "start", 0.0, f"{len(requests)} pairs, {told}{' on ' + ', '.join(gpus[:count]) if gpus else ''}"
        )
        return [Slot(gpus[k % len(gpus)] if gpus else None, threads, memory) for k in range(count)]

    # ------------------------------------------------------------------------------------------ what happens

    def _event(self, event: Event) -> None:
        state = self._todo[event.index]
        if event.kind == "progress":
            self._fractions[event.index] = event.fraction
            self._show(state, event.message)
            return
        if event.kind == "again":
            self._fractions.pop(event.index, None)
            self._console.note(f"{state.row.identity}: {event.message}; it is tried once more")
            return
        self._fractions.pop(event.index, None)
        state.status, state.reason, state.seconds, state.attempts = (
            event.kind,
            event.message,
            event.seconds,
            event.attempts,
        )
        if event.kind == "done":
            finish(state, event.metrics)
        self._say(state)
        self._last = state.row.identity
        self._show(state, f"{event.kind} in {duration(event.seconds)}", always=True)
        if time.monotonic() - self._renewed > RENEW_SECONDS:
            self._renew()

    def _ended(self) -> int:
        return sum(state.status != "waiting" for state in self._todo)

    def _show(self, state: PairState, message: str, always: bool = False) -> None:
        """Progress over all pairs; a few lines a second are enough."""
        now = time.monotonic()
        if now - self._told < 0.3 and not always:
            return
        self._told = now
        ended, every = self._ended(), len(self._todo)
        fraction = min((ended + sum(self._fractions.values())) / every, 0.9999 if ended < every else 1.0)
        self._console.progress(self._last, fraction, f"{ended} of {every} pairs; {state.row.identity}: {message}")

    def _say(self, state: PairState) -> None:
        self._console.event(
            "pair",
            id=state.row.identity,
            status=state.status,
            message=state.reason,
            seconds=state.seconds,
            attempts=state.attempts,
        )
        if state.status == "failed":
            self._console.note(f"{state.row.identity} failed: {' '.join(state.reason.split())}")

    def _renew(self) -> None:
        """Write summary.csv, index.html and batch.json as things stand."""
        self._renewed = time.monotonic()
        seconds, ended = self._renewed - self._started, self._ended()
        left = seconds / ended * (len(self._todo) - ended) if ended else None
        judge(self._states)
        write_whole(self._output / "summary.csv", csv_text(self._states))
        write_whole(self._output / "index.html", page(self._states, self._plan.title, seconds, left, self._plan.links))
        if self._facts["threads"] is None:
            before = json_object(self._output / "batch.json") or {}
            self._facts = {name: before.get(name) for name in self._facts}
        facts = {
            "schema": 1,
            "version": __version__,
            **self._facts,
            **counts(self._states),
            "seconds": round(seconds, 1),
        }
        write_whole(self._output / "batch.json", json.dumps(facts, indent=1))


def _absolute(request: PairRequest) -> PairRequest:
    """The request with paths that mean the same on every machine that sees the same disks."""
    from dataclasses import replace

    from .pair import inputs_of

    job = request.job
    paths: dict[str, Any] = {name: os.path.abspath(path) for name, path in inputs_of(job).items()}
    options: dict[str, Any] = {name: paths.pop(name) for name in ("initial", "weights") if name in paths}
    job = replace(job, **paths, output=os.path.abspath(job.output), options=replace(job.options, **options))
    return replace(request, job=job)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Nobody else's batch in ``folder``; yields the lock's file descriptor, which workers inherit, or -1.

    The system itself lets go of the lock when this process and all workers that inherited it have ended,
    however they end.

    Raises:
        InputError: another batch works there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(
            f"output folder '{folder}' cannot be written ({error.strerror}).", "Choose another with -o."
        ) from None
    try:
        until = time.monotonic() + LOCK_SECONDS
        while not (got := _lock(handle)):
            if time.monotonic() > until:
                raise InputError(
                    f"another batch is at work in '{folder}'.",
                    "Wait for it, end its processes (symreg batch, symreg worker), or choose another folder.",
                )
            time.sleep(0.2)
        yield handle if got == "shared by children" else -1
    finally:
        os.close(handle)


def _lock(handle: int) -> str:
    """How the lock was got; an empty text when another process has it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return ""
        return "alone"
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError:  # a file system without locks
        return "no locks here"
    return "shared by children"
