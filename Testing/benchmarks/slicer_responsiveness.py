"""How long the Slicer module takes beyond the method itself, and for how long it blocks the application,
on 256^3 scans.

    python Testing/benchmarks/slicer_responsiveness.py

A worker that needs no time for the registration reads both scans and writes results of the sizes that a real run has.
Clocks decide here, so this is a measurement and no test; on a busy machine, times of waiting for a processor are left
out of the blocks, and the load is printed beside the numbers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import slicer
import slicer_harness
import slicer_scenes as scenes
import vtk
import vtk.util.numpy_support

slicer_harness.pythonqtStyle(__name__)

INSTANT = """import sys, time, numpy as np
from types import SimpleNamespace
from SymRegistrationLib import read_volume
from SymRegistrationLib.commands import worker
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.jobs import register

def field(volume):
    grid = volume.grid.resampled(volume.grid.spacing * 2)
    return DenseTransform(grid, np.zeros((*grid.shape, 3), np.float32))

def run(job, progress, write):
    fixed, moving = read_volume(job.fixed), read_volume(job.moving)
    ones = np.ones(fixed.grid.shape, np.float32)
    result = SimpleNamespace(fixed=fixed, moving=moving, forward=field(fixed), inverse=field(moving),
                             warped_moving=moving.array, warped_fixed=fixed.array, jacobian=ones, ice_mm=ones,
                             uncertainty=None)
    for k in range(20):
        progress("method", k / 20, "waiting")
        time.sleep(0.02)
    with register.destination(job.output) as folder:
        files = write(folder, job, result)
    return {"files": files, "seconds": {"total": 0.4}, "job": {}, "quality": {}, "notes": []}

register.run = run
worker.judged = lambda metrics: {"level": "good", "words": "", "checks": []}
sys.exit(worker.main(["--own-group"]))
"""
#: Seconds that INSTANT itself sleeps.
METHOD = 0.4
ATTEMPTS = 3


class Heartbeat:
    """Longest time in seconds between two beats of a 2 ms timer on the application's thread,
    as scenes.ownTime() counts.
    """

    def __init__(self):
        import qt

        self.longest, self._last = 0.0, None
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
        return self.longest


def large(scene):
    """Two 256^3 scans of 16-bit voxels."""
    array = np.random.default_rng(3).integers(0, 1000, (256, 256, 256)).astype(np.int16)
    place = scenes.geometry((256, 256, 256), (1, 1, 1), np.eye(3))
    return [scenes.volume(scene, array, place, name) for name in ("Large fixed", "Large moving")]


def opened():
    """The module with the instant worker, warm."""
    slicer_harness.start()
    from SymRegistrationGui import logic, processes
    from SymRegistrationGui.client import WorkerClient

    program, _arguments, environment, folder = processes.workerCommand()
    client = WorkerClient(command=lambda: (program, ["-c", INSTANT], environment, folder))
    logic.WorkerClient = lambda: client
    module = scenes.Opened(None, None)
    ready = []
    client.request("ping", {}, ready.append, ready.append)
    module.app.wait(lambda: ready, 120)
    return module


def main():
    module = opened()
    print("load:", os.getloadavg()[0])
    fixed, moving = large(module.scene)
    module.choose(fixed, moving)
    for _attempt in range(ATTEMPTS):
        beat, started = Heartbeat(), time.perf_counter()
        run = module.register()
        seconds = time.perf_counter() - started - METHOD
        print(f"register: {seconds:.2f} s beyond the method, longest block {1000 * beat.stop():.0f} ms")
    module.click("blendButton")
    for _attempt in range(ATTEMPTS):
        beat = Heartbeat()
        module.click("checkerboardButton")
        module.app.wait(lambda: not module.panel.results.views._steps.busy, 60)
        module.click("checkerboardButton")
        print(f"checkerboard: longest block {1000 * beat.stop():.0f} ms")
    points = np.random.default_rng(4).normal(0, 40, (400_000, 3))
    model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "Large model")
    mesh, cloud = vtk.vtkPolyData(), vtk.vtkPoints()
    cloud.SetData(vtk.util.numpy_support.numpy_to_vtk(points, deep=1))
    mesh.SetPoints(cloud)
    model.SetAndObserveMesh(mesh)
    for _attempt in range(ATTEMPTS):
        beat = Heartbeat()
        module.engine.wait(module.engine.apply(run, [model]))
        print(f"400 000 points carried along: longest block {1000 * beat.stop():.0f} ms")
    slicer_harness.unloadModule(module.app)
    seconds = []
    for _attempt in range(4):  # the first one pays for PySide6 reading its signatures, which PythonQt does not do
        started = time.perf_counter()
        other = scenes.Opened(None, None, reimport=True)
        seconds.append(round(time.perf_counter() - started, 3))
        slicer_harness.unloadModule(other.app)
    print("seconds to open the module:", seconds)
    print("load:", os.getloadavg()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
