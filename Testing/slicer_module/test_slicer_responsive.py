"""Nobody waits for the module: long work on the application's thread is cut into small pieces, and heavy
things stay outside.

What is counted here are pieces, bytes and turns of the event loop, which are the same on every machine; the times that
follow from them are measured by Testing/benchmarks/slicer_responsiveness.py.
"""

import subprocess
import sys

import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)
#: Bytes of one piece in these tests; small scans stand for large ones.
SMALL = 16 << 10


@pytest.fixture
def pieces(monkeypatch):
    """The module steps, where every piece of work takes as long as the event loop may have to wait."""
    slicer_harness.start()
    from SymRegistrationGui import steps

    monkeypatch.setattr(steps, "PIECE", SMALL)
    ticks = iter(range(1 << 30))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(ticks) * steps.BUDGET)
    return steps


def counted(runner):
    """Count the steps of a StepRunner's work in the list that is returned, and the turns of the event
    loop between them.
    """
    done, start = [], runner.start

    def counting(steps):
        value = None
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                value = stop.value
                break
            done.append(1)
            yield
        return value

    runner.start = lambda steps, onDone, onError: start(counting(steps), onDone, onError)
    return done


def test_the_event_loop_gets_its_turn_after_each_budget(pieces):
    app = slicer.app
    from PySide6 import QtCore

    runner, order = pieces.StepRunner(), []

    def work():
        for k in range(5):
            order.append(f"piece {k}")
            QtCore.QTimer.singleShot(0, lambda n=k: order.append(f"turn {n}"))
            yield
        return "result"

    results = []
    runner.start(work(), results.append, results.append)
    app.wait(lambda: results, 20, "the result")
    app.processEvents()
    assert results == ["result"] and [entry for entry in order if entry.startswith("piece")] == [
        f"piece {k}" for k in range(5)
    ]
    assert order.index("turn 0") < order.index("piece 2"), "another timer fires before the work goes on for two budgets"


@pytest.mark.parametrize("count, each", [(256, 2 * 256 * 256), (7, 100 << 20), (10_000_000, 1), (1, 0)])
def test_pieces_are_small_and_cover_everything(count, each):
    slicer_harness.start()
    from SymRegistrationGui.steps import PIECE, pieces

    ranges = list(pieces(count, each))
    assert ranges[0][0] == 0 and ranges[-1][1] == count and all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    assert all((stop - start) * each <= PIECE or stop - start == 1 for start, stop in ranges)
    assert PIECE <= 4 << 20


def test_a_registration_hands_over_and_takes_back_in_pieces(module, monkeypatch):
    """As many steps as the volumes have pieces, on the way out and on the way back."""
    from SymRegistrationGui import steps

    monkeypatch.setattr(steps, "PIECE", SMALL)
    done = counted(module.engine._steps)
    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    out = sum(slicer.util.arrayFromVolume(node).nbytes for node in (fixed, moving))
    phases = []
    progress = module.panel._progress
    module.panel._progress = lambda stage, *rest: (phases.append((stage, len(done))), progress(stage, *rest))
    run = module.register()
    at = dict(phases)
    assert at["import"] >= out // SMALL, "the scans leave in pieces"
    back = sum(
        slicer.util.arrayFromVolume(run.node(part)).nbytes
        for part in ("warped_moving", "jacobian", "inverse_consistency")
    )
    assert len(done) - at["import"] >= 2 * back // SMALL, "the results are read, and then filled in, in pieces"


def test_views_work_in_pieces(module, monkeypatch):
    from SymRegistrationGui import steps

    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    assert module.register() is not None
    module.settle()
    monkeypatch.setattr(steps, "PIECE", SMALL)
    views = module.panel.results.views
    done = counted(views._steps)
    module.click("checkerboardButton")
    module.app.wait(lambda: not views._steps.busy, 60)
    assert len(done) >= 4 * slicer.util.arrayFromVolume(fixed).size // SMALL


def test_the_library_is_not_imported_by_the_application():
    """torch in the application's own process would cost seconds and memory; everything heavy is in the worker."""
    code = (
        "import sys; sys.path.insert(0, 'Testing'); import slicer_harness; app = slicer_harness.start();"
        "w = slicer_harness.openModule(app); slicer_harness.unloadModule(app);"
        "print([n for n in ('torch', 'SimpleITK', 'psutil') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=slicer_harness.REPOSITORY, capture_output=True, check=False, text=True
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
