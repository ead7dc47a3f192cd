"""Nobody waits for the module: the application stays responsive, and what it adds to the method's own time is small."""

import sys
import time

import numpy as np
import psutil
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes

slicer_harness.pythonqtStyle(__name__)

#: A worker that needs no time for the registration itself, so that everything measured is ours: it reads both scans and
#: writes results of the sizes that a 256^3 pair has, with the real worker's reading and writing.
INSTANT = """import sys, time, numpy as np
from types import SimpleNamespace
from SymRegistrationLib import outputs, worker, read_volume
from SymRegistrationLib.transforms import DenseTransform

def run(job, progress, write):
    fixed, moving = read_volume(job.fixed), read_volume(job.moving)
    fields = [DenseTransform(v.grid.resampled(v.grid.spacing * 2), np.zeros((*v.grid.resampled(v.grid.spacing * 2).shape, 3), np.float32))
              for v in (fixed, moving)]
    ones = np.ones(fixed.grid.shape, np.float32)
    result = SimpleNamespace(fixed=fixed, moving=moving, forward=fields[0], inverse=fields[1], warped_moving=moving.array,
                             warped_fixed=fixed.array, jacobian=ones, ice_mm=ones, uncertainty=None)
    for k in range(20):
        progress("method", k / 20, "waiting")
        time.sleep(0.02)
    with outputs.destination(job.output) as folder:
        files = write(folder, job, result)
    return {"files": files, "seconds": {"total": 0.4}, "job": {}, "quality": {}, "notes": []}

outputs.run = run
worker.judged = lambda metrics: {"level": "good", "words": "", "checks": []}
sys.exit(worker.main(["--own-group"]))
"""


#: Seconds at a stretch for which the application may be blocked: less is not felt. Where other programs fight for the
#: processor, its caches and the disk, the same work takes up to twice as long.
FELT, FELT_BUSY = 0.05, 0.1
ATTEMPTS = 3


class Heartbeat:
    """Longest time between two beats of a 2 ms timer on the application's thread, as :func:`slicer_scenes.ownTime`
    counts.

    Attributes:
        longest: in units of what is allowed, FELT or FELT_BUSY.
        busy: True when the system kept this thread waiting for a processor for more than a tenth of the time.
    """

    def __init__(self):
        import qt

        self.longest, self.busy = 0.0, False
        self._last, self._started, self._queued = None, time.perf_counter(), scenes.queued()
        self._timer = qt.QTimer()
        self._timer.interval = 2
        self._timer.timeout.connect(self._beat)
        self._timer.start()

    def _beat(self):
        now = scenes.ownTime()
        if self._last is not None:
            self.longest = max(self.longest, now - self._last)
        self._last = now

    def stop(self):
        self._timer.stop()
        self.busy = scenes.queued() - self._queued > 0.1 * (time.perf_counter() - self._started)
        return self.longest / (FELT_BUSY if self.busy else FELT)


@pytest.fixture
def instant(monkeypatch):
    slicer_harness.start()
    from SymRegistrationGui.client import WorkerClient
    from SymRegistrationGui.processes import workerCommand

    program, _arguments, environment = workerCommand()
    client = WorkerClient(command=lambda: (program, ["-c", INSTANT], environment))
    opened = scenes.Opened(client, monkeypatch)
    ready = []
    client.request("ping", {}, ready.append, ready.append)
    opened.app.wait(lambda: ready, 60)
    yield opened
    opened.widget.cleanup()


def large(scene):
    """Two 256^3 scans of 16-bit voxels."""
    rng = np.random.default_rng(3)
    array = rng.integers(0, 1000, (256, 256, 256)).astype(np.int16)
    return [
        scenes.volume(scene, array, scenes.geometry((256, 256, 256), (1, 1, 1), np.eye(3)), name)
        for name in ("Large fixed", "Large moving")
    ]


def test_the_heartbeat_feels_work_and_waiting():
    app = slicer_harness.start()
    for block in (
        lambda until: time.sleep(0.2),
        lambda until: [None for _ in iter(lambda: time.thread_time() < until, False)],
    ):
        beat = Heartbeat()
        for _event in range(20):
            app.processEvents()
            time.sleep(0.003)
        block(time.thread_time() + 0.2)
        for _event in range(5):
            app.processEvents()
            time.sleep(0.003)
        beat.stop()
        assert 0.15 < beat.longest < 0.6


def _work(worker):
    """Seconds of processor time that this thread and the worker have used."""
    spent = psutil.Process(worker).cpu_times()
    return time.thread_time() + spent.user + spent.system


def test_256_cubed_click_to_nodes_within_the_method_and_1_5_seconds_and_never_blocked(instant):
    instant.choose(*large(instant.scene))
    worker = instant.engine.client._process._process.processId()
    best = (9.0, 9.0)
    for _attempt in range(ATTEMPTS):
        beat = Heartbeat()
        wall, work = time.perf_counter(), _work(worker)
        run = instant.register()
        wall, work, block = time.perf_counter() - wall - 0.4, _work(worker) - work, beat.stop()
        # On a quiet machine the clock counts. On a busy one it says how busy; there the work of both processes counts,
        # and takes up to twice as long.
        extra = work / 2 if beat.busy else wall
        print(
            f"beyond the method {wall:.2f} s, {work:.2f} s of work; longest block {1000 * beat.longest:.0f} ms; busy {beat.busy}"
        )
        best = min(best[0], extra), min(best[1], block)
        assert run.node("jacobian").GetImageData().GetDimensions() == (256, 256, 256) and instant.app.shown == []
    assert best[0] < 1.5 and best[1] < 1


def test_views_and_carrying_along_do_not_block_either(instant):
    fixed, moving = large(instant.scene)
    instant.choose(fixed, moving)
    run = instant.register()
    instant.click("blendButton")
    best = 9.0
    for _attempt in range(ATTEMPTS):
        beat = Heartbeat()
        instant.click("checkerboardButton")
        instant.app.wait(lambda: not instant.panel.results.views._steps.busy, 60)
        node = run.node("comparison")
        assert node.GetImageData().GetDimensions() == (256, 256, 256)
        instant.click("checkerboardButton")
        best = min(best, beat.stop())
    print(f"checkerboard: longest block {best:.2f} of what is allowed")
    assert best < 1
    points = np.random.default_rng(4).normal(0, 40, (400_000, 3))
    model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "Large model")
    import vtk

    mesh, cloud = vtk.vtkPolyData(), vtk.vtkPoints()
    cloud.SetData(vtk.util.numpy_support.numpy_to_vtk(points, deep=1))
    mesh.SetPoints(cloud)
    model.SetAndObserveMesh(mesh)
    best = 9.0
    for _attempt in range(ATTEMPTS):
        beat = Heartbeat()
        made = instant.engine.wait(instant.engine.apply(run, [model]))
        best = min(best, beat.stop())
    assert np.allclose(slicer.util.arrayFromModelPoints(made[0]), points, atol=1e-3)
    print(f"400 000 points: longest block {best:.2f} of what is allowed")
    assert best < 1


def test_the_library_is_not_imported_by_the_application():
    """torch in the application's own process would cost seconds and memory; everything heavy is in the worker."""
    import subprocess

    code = (
        "import sys; sys.path.insert(0, 'Testing'); import slicer_harness; app = slicer_harness.start();"
        "p, m = slicer_harness.loadModule(app); w = m.SymRegistrationWidget(); w.cleanup();"
        "print([n for n in ('torch', 'SimpleITK', 'psutil') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=slicer_harness.REPOSITORY, capture_output=True, check=False, text=True
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
