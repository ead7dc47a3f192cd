"""Nobody waits for the module: the application stays responsive, and what it adds to the method's own time is small."""

import sys
import time

import numpy as np
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


class Heartbeat:
    """Longest time between two beats of a 2 ms timer on the application's thread: wall clock, and processor time.

    On a busy machine the system takes the processor away for longer than 50 ms; the second number does not count that.
    """

    def __init__(self):
        import qt

        self.wall = self.cpu = 0.0
        self._last = None
        self._timer = qt.QTimer()
        self._timer.interval = 2
        self._timer.timeout.connect(self._beat)
        self._timer.start()

    def _beat(self):
        now = time.perf_counter(), time.thread_time()
        if self._last is not None:
            self.wall, self.cpu = max(self.wall, now[0] - self._last[0]), max(self.cpu, now[1] - self._last[1])
        self._last = now

    def stop(self):
        self._timer.stop()
        return self.wall, self.cpu


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
    return [scenes.volume(scene, array, scenes.geometry((256, 256, 256), (1, 1, 1), np.eye(3)), name) for name in ("Large fixed", "Large moving")]


def test_256_cubed_click_to_nodes_within_the_method_and_1_5_seconds_and_never_blocked(instant):
    instant.choose(*large(instant.scene))
    best = (9.0, 9.0, 9.0)
    for _attempt in range(3):
        beat = Heartbeat()
        started = time.perf_counter()
        run = instant.register()
        extra = time.perf_counter() - started - 0.4
        wall, cpu = beat.stop()
        print(f"beyond the method {extra:.2f} s; longest block {1000 * wall:.0f} ms ({1000 * cpu:.0f} ms of processor time)")
        best = min(best[0], extra), min(best[1], wall), min(best[2], cpu)
        assert run.node("jacobian").GetImageData().GetDimensions() == (256, 256, 256) and instant.app.shown == []
    extra, wall, cpu = best
    assert extra < 1.5 and wall < 0.05 and cpu < 0.05


def test_views_and_carrying_along_do_not_block_either(instant):
    fixed, moving = large(instant.scene)
    instant.choose(fixed, moving)
    run = instant.register()
    instant.click("blendButton")
    best = 9.0
    for _attempt in range(3):
        beat = Heartbeat()
        instant.click("checkerboardButton")
        instant.app.wait(lambda: not instant.panel.results.views._steps.busy, 60)
        node = run.node("comparison")
        assert node.GetImageData().GetDimensions() == (256, 256, 256)
        instant.click("checkerboardButton")
        best = min(best, beat.stop()[0])
    print(f"checkerboard: longest block {1000 * best:.0f} ms")
    assert best < 0.05
    points = np.random.default_rng(4).normal(0, 40, (400_000, 3))
    model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "Large model")
    import vtk

    mesh, cloud = vtk.vtkPolyData(), vtk.vtkPoints()
    cloud.SetData(vtk.util.numpy_support.numpy_to_vtk(points, deep=1))
    mesh.SetPoints(cloud)
    model.SetAndObserveMesh(mesh)
    best = 9.0
    for _attempt in range(3):
        beat = Heartbeat()
        made = instant.engine.wait(instant.engine.apply(run, [model]))
        best = min(best, beat.stop()[0])
    assert np.allclose(slicer.util.arrayFromModelPoints(made[0]), points, atol=1e-3)
    print(f"400 000 points: longest block {1000 * best:.0f} ms")
    assert best < 0.05


def test_the_library_is_not_imported_by_the_application():
    """torch in the application's own process would cost seconds and memory; everything heavy is in the worker."""
    import subprocess

    code = ("import sys; sys.path.insert(0, 'Testing'); import slicer_harness; app = slicer_harness.start();"
            "p, m = slicer_harness.loadModule(app); w = m.SymRegistrationWidget(); w.cleanup();"
            "print([n for n in ('torch', 'SimpleITK', 'psutil') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=slicer_harness.REPOSITORY, capture_output=True, check=False, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
