"""Where RAS meets LPS, and what travels to the worker: real MRML nodes against SimpleITK and against brute force."""

import gzip
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import slicer_harness
import slicer_scenes as scenes
import vtk

SEED = 20261121
slicer_harness.pythonqtStyle(__name__)


@pytest.fixture
def app():
    return slicer_harness.start()


def exported(node, folder):
    from SymRegistrationGui import exchange, nodes
    from SymRegistrationGui.steps import complete

    path = str(Path(folder) / "export.nrrd")
    complete(exchange.writeVolume(path, *nodes.worldVolume(node)))
    return sitk.ReadImage(path)


OBLIQUE = scenes.rotation() @ np.diag([-1.0, 1.0, 1.0])
SHAPE = (12, 14, 16)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_exported_voxels_lie_where_mrml_says(app, tmp_path, dtype):
    rng = np.random.default_rng(SEED)
    array = rng.integers(0, 100, SHAPE).astype(dtype)
    matrix = scenes.geometry(SHAPE, (0.7, 1.9, 3.1), OBLIQUE)
    image = exported(scenes.volume(app.scene, array, matrix), tmp_path)
    assert np.array_equal(sitk.GetArrayFromImage(image), array) and sitk.GetArrayFromImage(image).dtype == dtype
    for k, j, i in rng.integers(0, SHAPE, (20, 3)).tolist():
        ras = (matrix @ (i, j, k, 1))[:3]
        assert np.allclose(image.TransformIndexToPhysicalPoint((i, j, k)), (-ras[0], -ras[1], ras[2]), atol=1e-9), (
            f"seed {SEED}"
        )


def test_the_file_is_the_one_that_slicer_itself_would_write(app, tmp_path):
    array = np.random.default_rng(SEED).integers(-500, 500, SHAPE).astype(np.int16)
    node = scenes.volume(app.scene, array, scenes.geometry(SHAPE, (1.0, 1.2, 2.5), OBLIQUE))
    storage = slicer.vtkMRMLNRRDStorageNode()
    storage.SetFileName(str(tmp_path / "slicer.nrrd"))
    assert storage.WriteData(node)
    theirs, ours = sitk.ReadImage(str(tmp_path / "slicer.nrrd")), exported(node, tmp_path)
    assert np.array_equal(sitk.GetArrayFromImage(theirs), sitk.GetArrayFromImage(ours))
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert np.allclose(getattr(theirs, get)(), getattr(ours, get)(), atol=1e-6)


def test_linear_parents_become_part_of_the_grid(app, tmp_path):
    array = np.zeros(SHAPE, np.int16)
    array[5, 6, 7] = 1000
    matrix = scenes.geometry(SHAPE, (2, 2, 2), OBLIQUE)
    inner, outer = np.eye(4), np.eye(4)
    inner[:3, :3], inner[:3, 3] = scenes.rotation((5, 10, -20)), (3, -9, 14)
    outer[:3, :3] = np.diag([1.2, 0.9, 1.1])
    parents = [scenes.linearTransform(app.scene, m) for m in (inner, outer)]
    parents[0].SetAndObserveTransformNodeID(parents[1].GetID())
    node = scenes.volume(app.scene, array, matrix)
    node.SetAndObserveTransformNodeID(parents[0].GetID())
    image = exported(node, tmp_path)
    expected = (outer @ inner @ matrix @ (7, 6, 5, 1))[:3]
    assert np.allclose(image.TransformIndexToPhysicalPoint((7, 6, 5)), expected * (-1, -1, 1), atol=1e-9)


def warp(scene, grid, vector):
    """A transform node with one constant FromParent displacement (RAS mm), built with VTK's own calls."""
    image = vtk.vtkImageData()
    image.SetDimensions(8, 8, 8)
    image.SetOrigin(-120, -120, -120)
    image.SetSpacing(36, 36, 36)
    image.AllocateScalars(vtk.VTK_FLOAT, 3)
    vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())[:] = vector
    transform = slicer.vtkOrientedGridTransform()
    transform.SetDisplacementGridData(image)
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "warp")
    node.SetAndObserveTransformFromParent(transform)
    return node


def test_non_linear_parents_are_applied_to_a_copy(app, tmp_path):
    matrix = scenes.geometry((40, 40, 40), (2, 2, 2), np.eye(3), (0, 0, 0))
    k, j, i = np.mgrid[:40, :40, :40]
    blob = (1000 * np.exp(-((i - 20) ** 2 + (j - 18) ** 2 + (k - 22) ** 2) / 12)).astype(np.int16)
    node = scenes.volume(app.scene, blob, matrix)
    node.SetAndObserveTransformNodeID(warp(app.scene, matrix, (6.0, -4.0, 2.0)).GetID())
    before = scenes.names(app.scene)
    image = exported(node, tmp_path)
    assert scenes.names(app.scene) == before, "the copy stayed in the scene"
    assert np.array_equal(slicer.util.arrayFromVolume(node), blob), "the scan itself was changed"
    values = sitk.GetArrayFromImage(image).astype(float)
    points = np.array(
        [image.TransformIndexToPhysicalPoint(tuple(p)) for p in np.argwhere(values > 20)[:, ::-1].tolist()]
    )
    center = (points * values[values > 20][:, None]).sum(0) / values[values > 20].sum() * (-1, -1, 1)
    # FromParent (6, -4, 2) takes world points to the volume: the blob shows up at the opposite side
    expected = (matrix @ (20, 18, 22, 1))[:3] - (6, -4, 2)
    assert np.abs(center - expected).max() < 0.15


@pytest.mark.parametrize("transformed", [False, True])
def test_fields_go_in_and_out_and_map_points_as_itk_does(app, tmp_path, transformed):
    from SymRegistrationGui import exporting, nodes
    from SymRegistrationGui.exchange import writeVolume
    from SymRegistrationGui.steps import complete

    rng = np.random.default_rng(SEED)
    grid = nodes.gridFromIjk(SHAPE, scenes.geometry(SHAPE, (3, 4, 5), OBLIQUE))
    field = rng.normal(0, 3, (*SHAPE, 3)).astype(np.float32)
    node = app.scene.AddNewNodeByClass("vtkMRMLTransformNode", "field")
    complete(nodes.gridTransformFiller(field.copy(), grid))(node)
    back, backGrid, *around = complete(nodes.fieldOf(node))
    assert around == [None, None]
    assert np.array_equal(back, field) and backGrid.same_as(grid, 1e-9)
    complete(writeVolume(tmp_path / "field.nrrd", field, grid))
    itk = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "field.nrrd"), sitk.sitkVectorFloat64))
    complete(exporting.exportField(node, tmp_path / "again.h5"))
    again = sitk.DisplacementFieldTransform(sitk.ReadTransform(str(tmp_path / "again.h5"))).GetDisplacementField()
    assert np.array_equal(sitk.GetArrayFromImage(again), field)
    storage = slicer.vtkMRMLTransformStorageNode()
    storage.SetFileName(str(tmp_path / "slicer.h5"))
    assert storage.WriteData(node)
    stored = sitk.ReadTransform(str(tmp_path / "slicer.h5"))
    for _ in range(30):
        lps = grid.points(rng.uniform(0.5, np.array(SHAPE) - 1.5))
        expected = np.array(itk.TransformPoint(lps))
        ras = np.array(node.GetTransformFromParent().TransformPoint(lps * (-1, -1, 1)))
        assert np.abs(ras * (-1, -1, 1) - expected).max() < 1e-3, f"seed {SEED}"
        assert np.abs(np.array(stored.TransformPoint(lps)) - expected).max() < 1e-3


def test_a_lattice_between_affines_goes_in_out_and_through_a_saved_scene(app, tmp_path):
    from SymRegistrationGui import exporting, nodes
    from SymRegistrationGui.steps import complete

    from SymRegistrationLib.geometry.transforms import CompactTransform

    rng = np.random.default_rng(SEED)
    grid = nodes.gridFromIjk(SHAPE, scenes.geometry(SHAPE, (3, 4, 5), OBLIQUE))
    inner = np.zeros((*SHAPE, 1), np.float32)
    inner[1:-1, 1:-1, 1:-1] = 1
    field = inner * rng.normal(0, 2, (*SHAPE, 3)).astype(np.float32)
    affines = [np.eye(4), np.eye(4)]
    for matrix in affines:
        matrix[:3, :3] += 0.05 * rng.normal(size=(3, 3))
        matrix[:3, 3] = rng.normal(0, 5, 3)
    whole = CompactTransform(grid, field, *affines)
    node = app.scene.AddNewNodeByClass("vtkMRMLTransformNode", "compact")
    complete(nodes.gridTransformFiller(field.copy(), grid, *affines))(node)
    points = grid.points(rng.uniform(-0.5, 1.5, (60, 3)) * SHAPE)
    truth = whole.map_points(points)
    flip = np.array([-1, -1, 1])

    def through(transform):
        return np.array([transform.TransformPoint(*(p * flip)) for p in points]) * flip

    np.testing.assert_allclose(through(node.GetTransformFromParent()), truth, atol=1e-3)
    complete(exporting.exportField(node, tmp_path / "again.h5"))
    read = sitk.ReadTransform(str(tmp_path / "again.h5"))
    np.testing.assert_allclose([read.TransformPoint(p) for p in points.tolist()], truth, atol=1e-4)
    storage = slicer.vtkMRMLTransformStorageNode()
    storage.SetFileName(str(tmp_path / "slicer.h5"))
    assert storage.WriteData(node)
    loaded = app.scene.AddNewNodeByClass("vtkMRMLTransformNode", "loaded")
    assert storage.ReadData(loaded)
    back, backGrid, before, after = complete(nodes.fieldOf(loaded))
    np.testing.assert_allclose(back, field, atol=1e-5)
    assert backGrid.same_as(grid) and np.allclose(before, affines[0]) and np.allclose(after, affines[1])


def test_outside_the_grid_the_border_holds(app):
    from SymRegistrationGui import nodes
    from SymRegistrationGui.steps import complete

    grid = nodes.gridFromIjk(SHAPE, scenes.geometry(SHAPE, (3, 3, 3), np.eye(3)))
    field = np.zeros((*SHAPE, 3), np.float32)
    field[..., 0] = 5.0
    node = app.scene.AddNewNodeByClass("vtkMRMLTransformNode", "field")
    complete(nodes.gridTransformFiller(field, grid))(node)
    assert np.allclose(node.GetTransformFromParent().TransformPoint(500, 0, 0), (495, 0, 0))


def test_points_cross_from_ras_to_lps_in_world(app):
    from SymRegistrationGui import nodes

    ras = np.array([(1, 2, 3), (-40, 5, 60.0)])
    node = scenes.fiducials(app.scene, ras)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scenes.rotation(), (10, 20, 30)
    node.SetAndObserveTransformNodeID(scenes.linearTransform(app.scene, matrix).GetID())
    points, labels = nodes.worldPoints(node)
    assert np.allclose(points, (ras @ matrix[:3, :3].T + matrix[:3, 3]) * (-1, -1, 1)) and labels == ["P1", "P2"]


def test_segmentations_become_labels_on_the_scan_also_under_a_parent(app, tmp_path):
    from SymRegistrationGui import nodes

    fixed, _moving = scenes.pair(app.scene)
    masks = np.zeros((2, 34, 36, 32), bool)
    masks[0, 8:20, 10:25, 5:15] = True
    masks[1, 8:20, 10:25, 18:28] = True
    segmentation = scenes.segmentation(app.scene, fixed, masks)
    matrix = np.eye(4)
    matrix[:3, 3] = (30, 0, 0)
    parent = scenes.linearTransform(app.scene, matrix)
    before = scenes.names(app.scene)
    for under in (False, True):
        for node in (fixed, segmentation):
            node.SetAndObserveTransformNodeID(parent.GetID() if under else None)
        array, grid = nodes.worldLabels(segmentation, fixed)
        assert grid.same_as(nodes.worldVolume(fixed)[1], 1e-6)
        assert np.array_equal(array, masks[0] + 2 * masks[1])
    assert scenes.names(app.scene) == before


def test_a_rotated_region_is_the_box_that_mrml_draws(app):
    from SymRegistrationGui import nodes
    from SymRegistrationGui.steps import complete

    fixed, _moving = scenes.pair(app.scene)
    roi = app.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scenes.rotation(), (5, -8, 12)
    roi.SetSize(40, 30, 24)
    roi.SetAndObserveObjectToNodeMatrix(scenes.vtkMatrix(matrix))
    grid = nodes.worldVolume(fixed)[1]
    mask = complete(nodes.roiMask(roi, grid))
    index = np.argwhere(np.ones(grid.shape))
    ras = grid.points(index) * (-1, -1, 1)
    inBox = np.abs((ras - (5, -8, 12)) @ matrix[:3, :3]) <= np.array([20, 15, 12]) + 1e-4
    assert np.array_equal(mask.astype(bool).ravel(), inBox.all(1))
    planes = vtk.vtkPlanes()
    roi.GetPlanesWorld(planes)
    inside = np.array([planes.EvaluateFunction(p) < 0 for p in ras[::97]])
    assert (inside != mask.ravel()[::97].astype(bool)).mean() < 0.002


def test_start_transform_is_what_brings_the_moving_scan_near(app):
    from SymRegistrationGui import nodes

    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scenes.rotation(), (7, -3, 11)
    node = scenes.linearTransform(app.scene, matrix)
    start = nodes.startMatrix(node)
    moving = np.array([12.0, -30.0, 5.0])
    fixed = matrix[:3, :3] @ moving + matrix[:3, 3]
    flip = np.array([-1, -1, 1])
    assert np.allclose(start[:3, :3] @ (fixed * flip) + start[:3, 3], moving * flip)


def test_what_cannot_be_used_is_refused_by_name(app):
    from SymRegistrationGui import nodes

    from SymRegistrationLib.job import InputError

    hollow = app.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Hollow")
    flat = scenes.volume(app.scene, np.zeros((1, 8, 8), np.int16), np.eye(4), "Flat")
    singular = scenes.volume(app.scene, np.zeros((8, 8, 8), np.int16), np.diag([1.0, 0.0, 1.0, 1.0]), "Singular")
    for node, said in (
        (hollow, "'Hollow' has no voxels"),
        (flat, "'Flat' is a single slice"),
        (singular, "'Singular' has a singular"),
    ):
        with pytest.raises(InputError, match=said):
            nodes.worldVolume(node)
    fixed, _moving = scenes.pair(app.scene)
    empty = app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Empty")
    with pytest.raises(InputError, match="'Empty' has no segment"):
        nodes.worldLabels(empty, fixed)
    empty.GetSegmentation().AddEmptySegment("", "nothing")
    with pytest.raises(InputError, match="'Empty' is empty"):
        nodes.worldLabels(empty, fixed)
    with pytest.raises(InputError, match="has no points"):
        nodes.worldPoints(app.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "none"))
    with pytest.raises(InputError, match="not linear"):
        nodes.startMatrix(warp(app.scene, None, (1, 1, 1)))
    with pytest.raises(InputError, match="not a result"):
        nodes.gridTransform(scenes.linearTransform(app.scene, np.eye(4)))


# ------------------------------------------------------------------------------------------------ files


def test_compressed_and_damaged_files(app, tmp_path):
    from SymRegistrationGui.exchange import readVolume
    from SymRegistrationGui.steps import complete

    from SymRegistrationLib.job import RegistrationError

    array = np.zeros((40, 200, 200), np.float32)
    array[3:9] = np.random.default_rng(SEED).normal(size=(6, 200, 200))
    image = sitk.GetImageFromArray(array)
    image.SetOrigin((1.5, -2.25, 1e-3))
    sitk.WriteImage(image, str(tmp_path / "c.nrrd"), useCompression=True)
    assert b"gzip" in (tmp_path / "c.nrrd").read_bytes()[:800]
    back, grid = complete(readVolume(tmp_path / "c.nrrd"))
    assert np.array_equal(back, array) and np.allclose(grid.matrix[:3, 3], (1.5, -2.25, 1e-3), atol=1e-9)
    for compressed in (True, False):
        sitk.WriteImage(image, str(tmp_path / "d.nrrd"), useCompression=compressed)
        content = (tmp_path / "d.nrrd").read_bytes()
        (tmp_path / "d.nrrd").write_bytes(content[: len(content) - 5000])
        with pytest.raises(RegistrationError, match="cut short"):
            complete(readVolume(tmp_path / "d.nrrd"))
    (tmp_path / "e.nrrd").write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(RegistrationError, match="not NRRD"):
        complete(readVolume(tmp_path / "e.nrrd"))


def test_the_folder_is_private_and_always_removed(app):
    from SymRegistrationGui import exchange

    folder = exchange.PrivateFolder()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    Path(folder.file("scan.nrrd")).write_bytes(b"secret")
    leftover = Path(tempfile.mkdtemp(prefix=f"{exchange.PREFIX}4194303-"))  # of a process that cannot exist any more
    (leftover / "scan.nrrd").write_bytes(b"secret")
    exchange.PrivateFolder().remove()
    assert not leftover.exists() and folder.path.exists()
    folder.remove()
    assert not folder.path.exists()


def test_a_full_disk_is_told_in_words(app, monkeypatch):
    from SymRegistrationGui import exchange
    from SymRegistrationGui.steps import complete

    from SymRegistrationLib.geometry.grid import Grid
    from SymRegistrationLib.job import RegistrationError

    array, grid = np.zeros((64, 256, 256), np.float32), Grid.centred((64, 256, 256), 1.0, (0, 0, 0))
    if os.path.exists("/dev/full"):
        with pytest.raises(RegistrationError, match="No space left"):
            complete(exchange.writeVolume("/dev/full", array, grid))
    with pytest.raises(RegistrationError, match="handed over"):
        complete(exchange.writeVolume("/nowhere/at/all.nrrd", array, grid))
    with pytest.raises(RegistrationError, match="cannot be exchanged"):
        complete(exchange.writeVolume("/dev/null", array.astype(np.complex64), grid))
