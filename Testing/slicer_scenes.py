"""Nodes with known geometry for the Slicer tests; also starts workers that are the real ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import slicer
import slicer_harness
import vtk
import vtk.util.numpy_support

slicer_harness.pythonqtStyle(__name__)


def rotation(degrees=(20.0, -15.0, 30.0)):
    """(3, 3), about x, then y, then z."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def vtkMatrix(array):
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(np.asarray(array, float).ravel().tolist())
    return matrix


def volume(scene, array, ijkToRas, name="volume", kind="vtkMRMLScalarVolumeNode"):
    """A volume node built with MRML's and VTK's own calls, not with the module's."""
    image = vtk.vtkImageData()
    image.SetDimensions(array.shape[::-1])
    scalars = vtk.util.numpy_support.numpy_to_vtk(np.ascontiguousarray(array).ravel(), deep=1)
    image.GetPointData().SetScalars(scalars)
    node = scene.AddNewNodeByClass(kind, name)
    node.SetIJKToRASMatrix(vtkMatrix(ijkToRas))
    node.SetAndObserveImageData(image)
    node.CreateDefaultDisplayNodes()
    return node


def body(ijkToRas, shape, move=lambda ras: ras):
    """int16 (K, J, I): a structured body around RAS (5, -8, 12), seen through ``move`` (points (n, 3) RAS -> RAS)."""
    k, j, i = np.meshgrid(*map(np.arange, shape), indexing="ij")
    ras = np.stack([i, j, k], -1).reshape(-1, 3) @ ijkToRas[:3, :3].T + ijkToRas[:3, 3]
    x, y, z = ((move(ras) - (5, -8, 12)) / (1, 1, 1)).T
    radius = np.sqrt((x / 30) ** 2 + (y / 38) ** 2 + (z / 34) ** 2)
    value = 600 / (1 + np.exp(12 * (radius - 1))) * (1 + 0.4 * np.sin(x / 7 + 1) * np.cos(y / 8) * np.sin(z / 9 + 0.5))
    value += 300 * np.exp(-((x - 12) ** 2 + (y + 9) ** 2 + z**2) / 80) + 200 * np.exp(
        -((x + 5) ** 2 + (y - 15) ** 2 + (z - 9) ** 2) / 60
    )
    return value.reshape(shape).astype(np.int16)


def geometry(shape, spacing, axes, center=(5, -8, 12)):
    """(4, 4) IJK to RAS of a grid around ``center``; ``axes`` (3, 3): unit RAS columns of I, J, K."""
    matrix = np.eye(4)
    matrix[:3, :3] = axes * np.asarray(spacing)
    matrix[:3, 3] = np.asarray(center) - matrix[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return matrix


def linearTransform(scene, matrix, name="parent"):
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    node.SetMatrixTransformToParent(vtkMatrix(matrix))
    return node


def shift(ras):
    """The difference between the scans of :func:`pair`: fixed point -> moving point, RAS mm."""
    out = ras + (4.0, -3.0, 2.0)
    out[:, 0] += 2.5 * np.sin(ras[:, 1] / 18)
    out[:, 2] += 2.0 * np.cos(ras[:, 0] / 16)
    return out


def pair(scene, spacing=3.0, oblique=False):
    """(fixed, moving): two small scans whose correspondence is :func:`shift`."""
    axes = [
        np.diag([-1.0, -1.0, 1.0]),
        rotation() @ np.diag([1.0, 1.0, -1.0]) if oblique else np.diag([-1.0, -1.0, 1.0]),
    ]
    shapes = [tuple(round(n * 3.0 / spacing) for n in shape) for shape in ((34, 36, 32), (30, 38, 36))]
    grids = [
        geometry(shape, np.array([1.0, 1.1, 0.9]) * spacing if oblique else [spacing] * 3, axis)
        for shape, axis in zip(shapes, axes)
    ]
    fixed = volume(scene, body(grids[0], shapes[0], shift), grids[0], "Fixed scan")
    moving = volume(scene, body(grids[1], shapes[1]), grids[1], "Moving scan")
    return fixed, moving


def fiducials(scene, ras, name="points"):
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
    for index, place in enumerate(np.asarray(ras, float)):
        node.AddControlPoint(place.tolist(), f"P{index + 1}")
    return node


def positions(node):
    """(n, 3) RAS mm in world."""
    place, out = [0.0, 0.0, 0.0], []
    for index in range(node.GetNumberOfControlPoints()):
        node.GetNthControlPointPositionWorld(index, place)
        out.append(list(place))
    return np.array(out)


def segmentation(scene, reference, masks, name="Segmentation", segments=()):
    """A segmentation node with one segment per boolean mask on the grid of ``reference``, named by ``segments``."""
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(reference)
    matrix = vtk.vtkMatrix4x4()
    reference.GetIJKToRASMatrix(matrix)
    table = [[matrix.GetElement(r, c) for c in range(4)] for r in range(4)]
    for index, mask in enumerate(masks):
        identity = node.GetSegmentation().AddEmptySegment("", segments[index] if segments else f"part {index + 1}")
        labels = volume(scene, mask.astype(np.uint8), np.array(table), "tmp", "vtkMRMLLabelMapVolumeNode")
        labels.SetAndObserveTransformNodeID(reference.GetTransformNodeID())
        one = vtk.vtkStringArray()
        one.InsertNextValue(identity)
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, node, one)
        scene.RemoveNode(labels.GetDisplayNode())
        scene.RemoveNode(labels)
    return node


def names(scene):
    """Names of all nodes, to see that a scene is as it was."""
    return sorted(
        f"{scene.GetNthNode(k).GetClassName()} {scene.GetNthNode(k).GetName()}" for k in range(scene.GetNumberOfNodes())
    )


def queued(pid=None):
    """Seconds for which a thread was ready to run while the system gave the processor to others; 0 where that
    is not told.

    Args:
        pid: a process, for its main thread; None = the calling thread.
    """
    task = threading.get_native_id() if pid is None else pid
    try:
        return int(Path(f"/proc/{pid or 'self'}/task/{task}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def ownTime():
    """A clock for the calling thread, in seconds, that counts its work and its waiting but not what a busy machine
    takes away.
    """
    return time.perf_counter() - queued()


class Opened:
    """The module, opened, with a worker that stays warm between tests.

    Attributes:
        app: the harness application. ui, panel, engine: of the module. state: the parameter node.
    """

    def __init__(self, client, monkeypatch, reimport=False):
        self.app = slicer_harness.start(reimport)
        import SymRegistrationGui.logic

        if client is not None:
            monkeypatch.setattr(SymRegistrationGui.logic, "WorkerClient", lambda: client)
        slicer_harness.openModule(self.app)
        self.scene = self.app.scene

    @property
    def widget(self):
        """The module's widget, also after a Reload."""
        return slicer.modules.SymRegistrationWidget

    ui = property(lambda self: self.widget.ui)
    panel = property(lambda self: self.widget.panel)
    engine = property(lambda self: self.widget.logic.engine)
    state = property(lambda self: self.panel.parameters)

    def choose(self, fixed, moving, quick=True):
        """Select two scans as a user does, with settings that take a second."""
        self.ui.fixedSelector.setCurrentNode(fixed)
        self.ui.movingSelector.setCurrentNode(moving)
        if quick:
            self.state.preset, self.state.initial = "fast", "centre"

    def click(self, name):
        button = getattr(self.ui, name)
        assert button.enabled, f"{name} cannot be pressed: {button.toolTip}"
        button.click()

    def register(self, seconds=90):
        """Press Register and wait; returns the run, or None when it failed."""
        before = self.state.resultTable.GetMTime() if self.state.resultTable is not None else 0
        self.click("registerButton")
        self.app.wait(lambda: not self.engine.busy, seconds, "the end of the registration")
        run = self.panel.results.run
        return run if run is not None and run.table.GetMTime() != before else None

    def workers(self):
        """The worker processes that run now, without their launchers."""
        return workers()

    def settle(self):
        """Wait for the report, which comes after the nodes."""
        self.app.wait(lambda: not self.engine.client.busy, 60, "the report")


def workers():
    """psutil.Process of every worker below this process; its parent PythonSlicer, the launcher, is not among them, nor
    is what other tests leave to Python, such as the resource tracker of multiprocessing."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            ours = Path(words[0]).name.startswith("python") and {"SymRegistrationLib", "worker"} < set(words)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, IndexError):  # it is just going
            continue
    return found


def keptClient():
    """A worker client that a module's cleanup does not stop."""
    from SymRegistrationGui.client import WorkerClient

    class Kept(WorkerClient):
        def stop(self):
            pass

    return Kept()


def folders():
    """Private folders of this process that exist now."""
    import os
    import tempfile

    return sorted(str(p) for p in Path(tempfile.gettempdir()).glob(f"SymRegistration-{os.getpid()}-*"))


@pytest.fixture(scope="module", name="client")
def clientFixture():
    """A worker that stays warm for all tests of a file."""
    slicer_harness.start()
    client = keptClient()
    client.start()
    yield client
    client.cancel()


@pytest.fixture(name="module")
def moduleFixture(client, monkeypatch):
    """The module, opened on an empty scene."""
    opened = Opened(client, monkeypatch)
    yield opened
    opened.app.wait(lambda: not client.busy, 60)
    slicer_harness.unloadModule(opened.app)
    assert folders() == [], "a private folder was left behind"


@pytest.fixture(name="done")
def doneFixture(module):
    """(module, run) of two small oblique scans, registered."""
    module.choose(*pair(module.scene, oblique=True))
    run = module.register()
    module.settle()
    return module, run
