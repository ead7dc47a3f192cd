"""How a batch hands pairs to its workers: what is tried again, who leaves when, and how many there are."""

import queue
import threading
import time

import pytest

from SymRegistrationLib.cohort import run as batch
from SymRegistrationLib.cohort.pair import PairRequest
from SymRegistrationLib.cohort.workers import Pool, Slot, WorkerLost
from SymRegistrationLib.console import Console
from SymRegistrationLib.job import Job, Options, RegistrationError


class Fake:
    """A worker that does what the test says: ``script(identity) -> "done" | "lost" | exception``."""

    def __init__(self, script):
        self.script = script
        self.ended = queue.Queue()

    def ready(self):
        return {"devices": []}

    def ask(self, command, fields, worker_timeout_s, progress):
        outcome = self.script(fields["pair"]["job"]["fixed"])
        if outcome == "wait":
            self.ended.get(timeout=600)
            outcome = "lost"
        if outcome == "lost":
            raise WorkerLost("the worker was killed")
        if isinstance(outcome, Exception):
            raise outcome
        return {"fixed": fields["pair"]["job"]["fixed"]}

    def kill(self):
        self.ended.put(None)

    close = kill


def pool(script, count, slots=2):
    made, events = [], []

    def start():
        made.append(Fake(script))
        return made[-1]

    requests = [PairRequest(Job(f"p{k}", "m", "o")) for k in range(count)]
    Pool([Slot()] * slots, 1.0, start).run(requests, events.append)
    return events, made


def test_a_pair_that_kills_every_worker_is_tried_twice_and_listed():
    events, made = pool(lambda name: "lost" if name == "p3" else "done", 6)
    assert [e.index for e in events if e.kind == "failed"] == [3] and len([e for e in events if e.kind == "done"]) == 5
    failed = next(e for e in events if e.kind == "failed")
    assert failed.attempts == 2 and "killed, 2 times" in failed.message and len(made) <= 4


def test_errors_of_a_pair_are_not_tried_again():
    events, made = pool(lambda name: RegistrationError("no overlap.", "Look.") if name == "p1" else "done", 4)
    assert [(e.index, e.message) for e in events if e.kind == "failed"] == [(1, "no overlap. Look.")] and len(made) <= 2


def test_no_slot_leaves_while_a_lost_pair_may_come_back():
    lost = threading.Event()

    def script(name):
        if name == "p0" and not lost.is_set():
            time.sleep(0.3)
            lost.set()
            return "lost"
        return "done"

    assert sorted(e.index for e in pool(script, 2)[0] if e.kind == "done") == [0, 1]


def test_stopping_ends_waiting_workers():
    def tell(event):
        raise KeyboardInterrupt

    made = []

    def start():
        made.append(Fake(lambda name: "wait" if name != "p0" else "done"))
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        Pool([Slot()] * 2, 1.0, start).run([PairRequest(Job(f"p{k}", "m", "o")) for k in range(5)], tell)


def test_workers_follow_memory_processors_and_gpus(tmp_path, monkeypatch):
    class Needs:
        def memory_gb(self, job):
            return 3.0

    monkeypatch.setattr(batch, "cores", lambda: 16)
    cpu = {"name": "cpu", "memory_gb": 64, "free_gb": 20.0}
    gpus = [{"name": f"cuda:{k}", "memory_gb": 80} for k in range(2)]

    def slots(devices, count=40, workers=None, **options):
        plan = batch.CohortPlan(str(tmp_path), workers)
        run = batch._Run([], plan, Console(quiet=True), Needs(), -1)
        return run._slots([PairRequest(Job("f", "m", "o", options=Options(**options)))] * count, devices)

    assert len(slots([cpu])) == 5 and slots([cpu])[0].threads == 3, (
        "0.8 x 20 GB hold five workers of 3 GB; 16 cores over 5"
    )
    assert len(slots([cpu], count=2)) == 2 and len(slots([cpu], workers=7)) == 7
    assert len(slots([{**cpu, "free_gb": 1.0}])) == 1
    assert [slot.device for slot in slots([cpu, *gpus])] == ["cuda:0", "cuda:1"]
    assert [slot.device for slot in slots([cpu, *gpus], workers=3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {slot.device for slot in slots([cpu, *gpus], device="cpu")} == {None}
    assert slots([cpu], threads=2)[0].threads == 2 and slots([cpu], memory_gb=4.0)[0].memory_gb == 4.0
    (tmp_path / "batch.json").write_text('{"threads": 6, "memory_gb": 1.5}')
    assert (slots([cpu])[0].threads, slots([cpu])[0].memory_gb) == (6, 1.5), "a resumed batch computes as it began"
