"""Affine, lattice, affine: the same points in every reader, affine beyond the lattice, small on disk."""

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import vtk
from conftest import turn

from SymRegistrationLib.geometry import itk_hdf5, transform_files, transforms
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.resampling import map_points, outside_field
from SymRegistrationLib.geometry.transforms import CompactTransform, DenseTransform
from SymRegistrationLib.geometry.volumes import Volume, grid_of, to_itk

RAS = np.diag([-1.0, -1.0, 1.0])
SEED = 5


def affine(seed: int) -> np.ndarray:
    draw, matrix = np.random.default_rng(seed), np.eye(4)
    matrix[:3, :3] += 0.05 * draw.normal(size=(3, 3))
    matrix[:3, 3] = 4 * draw.normal(size=3)
    return matrix


@pytest.fixture(scope="module")
def compact() -> CompactTransform:
    """Smooth, a few mm, zero on the faces of an oblique lattice."""
    grid = Grid.centred((36, 40, 44), 2.0, (10, -20, 30), turn((1, 2, 3), 25))
    axes = [np.sin(np.linspace(0, np.pi, n)) ** 2 for n in grid.shape]
    bump = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    field = 3 * bump[..., None] * np.sin(grid.points(np.moveaxis(np.indices(grid.shape), 0, -1)) / 15)
    for axis in range(3):
        np.moveaxis(field, axis, 0)[[0, -1]] = 0
    return CompactTransform(grid, field.astype(np.float32), affine(1), affine(2))


@pytest.fixture(scope="module")
def points(compact) -> np.ndarray:
    """LPS mm of the output space: half of them beyond the lattice."""
    inside = np.random.default_rng(SEED).uniform(-0.5, 1.5, size=(400, 3)) * np.array(compact.grid.shape)
    return transform_points(np.linalg.inv(compact.before), compact.grid.points(inside))


def in_slicer(path, points) -> np.ndarray:
    """The points through the file as Slicer reads it, grids interpolated linearly."""
    scene = slicer.vtkMRMLScene()
    node, storage = (scene.AddNewNodeByClass(f"vtkMRMLTransform{kind}Node") for kind in ("", "Storage"))
    storage.SetFileName(str(path))
    assert storage.ReadData(node) == 1
    parts = vtk.vtkCollection()
    node.FlattenGeneralTransform(parts, node.GetTransformFromParent())
    assert parts.GetNumberOfItems() == 3
    parts.GetItemAsObject(1).SetInterpolationModeToLinear()
    transform = node.GetTransformFromParent()
    return np.array([transform.TransformPoint(*(RAS @ p)) for p in points]) @ RAS


def test_every_reader_maps_the_same_points_inside_and_outside(compact, points, tmp_path):
    truth = compact.map_points(points)
    transform_files.write_transform(tmp_path / "t.h5", compact)
    read = transform_files.read_transform(tmp_path / "t.h5")
    np.testing.assert_allclose(map_points(read, points), truth, atol=1e-5)
    np.testing.assert_allclose(in_slicer(tmp_path / "t.h5", points), truth, atol=1e-4)
    again = transform_files.physical(read, None)
    assert isinstance(again, CompactTransform)
    np.testing.assert_array_equal(again.displacement, compact.displacement)
    np.testing.assert_allclose(again.map_points(points), truth, atol=1e-9)
    assert not outside_field(read, points).any()  # it knows what to do with every point


def test_beyond_the_lattice_it_is_affine_without_a_step(compact):
    far = compact.grid.points([(-20, 5, 5), (50, 60, 70), (18, 20, -0.01), (18, 20, 43.01)])
    far = transform_points(np.linalg.inv(compact.before), far)
    np.testing.assert_allclose(compact.map_points(far), transform_points(compact.matrix, far), atol=1e-9)
    line = transform_points(
        np.linalg.inv(compact.before), compact.grid.points([(18, 20, 42 + k / 10) for k in range(30)])
    )
    steps = np.diff(compact.map_points(line), axis=0)
    assert np.abs(np.diff(steps, axis=0)).max() < 0.01


def test_a_lattice_with_a_border_is_refused_and_read_as_what_it_is(compact, points, tmp_path):
    field = compact.displacement + np.float32(1)
    with pytest.raises(ValueError, match="zero on its faces"):
        CompactTransform(compact.grid, field, compact.before, compact.after)
    parts = itk_hdf5.compact_parts(compact.grid, field, compact.before, compact.after)
    itk_hdf5.write_transforms(tmp_path / "t.h5", parts)
    read = transform_files.read_transform(tmp_path / "t.h5")
    grid = Grid.centred((40, 44, 48), 2.5, (8, -18, 30))
    dense = transform_files.physical(read, grid)
    assert isinstance(dense, DenseTransform) and dense.grid.same_as(grid)


@pytest.mark.parametrize("shape", [(3, 3, 3), (40, 50, 45), (61, 120, 130)])
@pytest.mark.parametrize("level", [0, 1, 4])
def test_single_precision_packed_arrays_are_read_bit_by_bit(shape, level, tmp_path):
    field = np.cumsum(np.random.default_rng(SEED).normal(size=(*shape, 3)), axis=2).astype(np.float32) / 8
    grid = Grid.centred(shape, 1.5, (3, 4, 5), turn((0, 1, 1), 30))
    itk_hdf5.write_transforms(tmp_path / "g.h5", [itk_hdf5.grid_part(grid, field)], level)
    read = sitk.DisplacementFieldTransform(sitk.ReadTransform(str(tmp_path / "g.h5"))).GetDisplacementField()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), field)
    np.testing.assert_allclose(grid_of(read).corners(), grid.corners(), atol=1e-9)
    size = (tmp_path / "g.h5").stat().st_size
    assert size < 1.1 * field.nbytes + 20_000 and (not level or field.nbytes < 1e6 or size < 0.97 * field.nbytes)


def test_images_maps_and_composition_agree_with_the_dense_form(compact):
    source = Grid.centred((44, 40, 42), 2.1, transform_points(compact.matrix, compact.grid.centre), turn((0, 0, 1), 15))
    grid = Grid.centred((50, 48, 46), 1.8, transform_points(np.linalg.inv(compact.before), compact.grid.centre))
    dense = compact.resampled(grid)
    image = Volume(np.random.default_rng(3).uniform(10, 90, source.shape).astype(np.float32), source)
    for mode in ("bilinear", "nearest"):
        one, other = (transforms.resample_through(image, t, grid, mode, outside=0.0) for t in (compact, dense))
        assert np.mean(np.abs(one - other) > 1e-2) < 1e-3
    np.testing.assert_allclose(transforms.jacobian_on(compact, grid), transforms.jacobian_on(dense, grid), atol=1e-3)
    back = CompactTransform(
        compact.grid, -compact.displacement, np.linalg.inv(compact.after), np.linalg.inv(compact.before)
    )
    ice = transforms.inverse_consistency_on(compact, back, grid)
    at = grid.points(np.moveaxis(np.indices(grid.shape), 0, -1)).reshape(-1, 3)
    truth = np.linalg.norm(back.map_points(compact.map_points(at)) - at, axis=1).reshape(grid.shape)
    np.testing.assert_allclose(ice, truth, atol=2e-3)


def test_maps_are_affine_beyond_what_sees_the_lattice(compact, monkeypatch):
    """Only a box of a large grid is looked at; the map is the same as when all of it is."""
    grid = Grid.centred((70, 60, 50), 3.0, compact.grid.centre + 9.0)
    back = transforms.CompactTransform(
        compact.grid, -compact.displacement, np.linalg.inv(compact.after), np.linalg.inv(compact.before)
    )
    box = transforms.seen(grid, compact)
    assert np.prod([side.stop - side.start for side in box]) < 0.5 * np.prod(grid.shape)
    maps = [transforms.jacobian_on(compact, grid), transforms.inverse_consistency_on(compact, back, grid)]
    monkeypatch.setattr(transforms, "seen", lambda grid, transform: tuple(slice(0, n) for n in grid.shape))
    whole = [transforms.jacobian_on(compact, grid), transforms.inverse_consistency_on(compact, back, grid)]
    for ours, full in zip(maps, whole):
        np.testing.assert_allclose(ours, full, atol=1e-4)
    away = np.ones(grid.shape, bool)
    away[box] = False
    assert away.any() and float(np.ptp(maps[0][away])) < 1e-5 and float(maps[1][away].max()) == 0
    far = Grid.centred((4, 5, 6), 2.0, compact.grid.centre + 1e4)
    assert float(np.ptp(transforms.jacobian_on(compact, far))) < 1e-4
    assert float(transforms.inverse_consistency_on(compact, back, far).max()) < 1e-2


def test_only_what_differs_from_the_background_is_looked_up(compact):
    """A box of content in much air, far off the middle: nothing of it may be lost at the box that is computed."""
    source = Grid.centred((90, 80, 70), 1.5, transform_points(compact.matrix, compact.grid.centre))
    grid = Grid.centred((70, 72, 74), 1.7, transform_points(np.linalg.inv(compact.before), compact.grid.centre))
    array = np.full(source.shape, -7, np.int16)
    array[60:70, 4:12, 30:50] = 100
    got = transforms.resample_through(Volume(array, source), compact, grid)
    reference = to_itk(np.zeros(grid.shape, np.uint8), grid)
    image = to_itk(array.astype(np.float32), source)
    want = sitk.GetArrayFromImage(sitk.Resample(image, reference, compact.to_itk(), sitk.sitkLinear, -7.0))
    assert (got > 0).sum() > 500 and np.mean(np.abs(got - want) > 1) < 1e-4
    empty = transforms.resample_through(Volume(np.full(source.shape, 3.5, np.float32), source), compact, grid)
    assert (empty == 3.5).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_boxes_looked_at_hold_every_voxel_that_meets_the_content_and_not_much_more(seed):
    """Smooth displacements, up to 9 mm an axis, at voxels of 1.5 mm between two affines; the source is a box within,
    its content a block in a corner of it."""
    print("seed", seed)
    random = np.random.default_rng(seed)
    lattice = Grid.centred((14, 15, 13), 8.0, (3.0, -2.0, 4.0))
    waves = [np.sin(np.linspace(0, np.pi, n)) for n in lattice.shape]
    bump = np.einsum("d,h,w->dhw", *waves)
    for wave in waves:
        wave[[0, -1]] = 0
    inner = np.einsum("d,h,w->dhw", *waves)
    vectors = (random.uniform(-5, 5, 3) + 4 * bump[..., None] * random.uniform(-1, 1, 3)) * inner[..., None]
    transform = CompactTransform(lattice, vectors.astype(np.float32), affine(seed), affine(seed + 9))
    source = Grid.centred((20, 24, 18), 1.5, transform.map_points(np.zeros((1, 3)))[0])
    grid = Grid.centred((70, 66, 62), 1.5, (0.0, 0.0, 0.0))
    content = np.zeros(source.shape, bool)
    content[3:13, 10:, :9] = True
    index = source.indices(transform.map_points(grid.points(np.argwhere(np.ones(grid.shape)))))
    met = ((index > [2, 9, -1]) & (index < [13, 24, 9])).all(1).reshape(grid.shape)
    looked, boxes = np.zeros(grid.shape, bool), list(transforms._reached(transform, grid, source, content))
    for box in boxes:
        looked[box] = True
    assert met.sum() > 500
    assert looked[met].all()
    for d, h, w in boxes:
        # On either side at most the cell looked at, another one as slack, and the blocks that content is looked up in.
        near = np.argwhere(met[max(0, d.start - 12) : d.stop + 12])
        assert len(near) and ([h.stop - h.start, w.stop - w.start] <= np.ptp(near, axis=0)[1:] + 1 + 2 * 4 * 4).all()


def test_a_fold_in_one_cell_is_seen(compact):
    field = compact.displacement.copy()
    field[18, 20, 22] += compact.grid.matrix[:3, 2] * 1.3  # a voxel past its neighbour
    folded = CompactTransform(compact.grid, field, compact.before, compact.after)
    assert not len(compact.folds()[0]) and len(folded.folds()[0])
    grid = Grid.centred((30, 30, 30), 4.0, transform_points(np.linalg.inv(compact.before), compact.grid.centre))
    jacobian = transforms.jacobian_on(folded, grid)
    transforms.mark_folds(jacobian, folded, grid)
    assert (jacobian <= 0).any()
