"""Millimetres and files: every reader maps the same points, and known movements are recovered on oblique grids."""

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import torch
from conftest import movement, turn

from SymRegistrationLib import fields
from SymRegistrationLib.geometry import transform_files, transforms
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.lattice import affine_displacement
from SymRegistrationLib.geometry.resampling import resample_image
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError
from SymRegistrationLib.quality.metrics import label_overlap
from SymRegistrationLib.registration import physical as physical_space
from SymRegistrationLib.registration.physical import dense_grid, to_physical
from SymRegistrationLib.registration.working_grid import WorkingPair

SEED = 11
RAS = np.diag([-1.0, -1, 1])
AFFINE = movement((5, -20, 30), turn((1, -1, 2), 17), (6, -4, 3), 1.08)


@pytest.fixture
def dense(oblique) -> DenseTransform:
    print("seed", SEED)
    noise = torch.randn((1, 3, *oblique.shape), generator=torch.Generator().manual_seed(SEED))
    u = fields.gaussian(noise, 3.0)
    vectors = (u * 4 / u.abs().max())[0].permute(1, 2, 3, 0).numpy()
    grid = oblique.padded(6)
    wide = np.pad(vectors, [((a - b) // 2,) * 2 for a, b in zip(grid.shape, oblique.shape)] + [(0, 0)], mode="edge")
    moved = wide + affine_displacement(AFFINE, grid).permute(1, 2, 3, 0).numpy()
    return DenseTransform(grid, np.ascontiguousarray(moved))


@pytest.fixture
def points(oblique):
    index = np.random.default_rng(SEED).uniform(0.5, np.array(oblique.shape) - 1.5, (200, 3))
    return oblique.points(index)


def slicer_map(path, points, linear=True):
    """Points through Slicer's own storage and transform classes: FromParent of what the file holds, RAS mm.

    Slicer interpolates grids with cubic splines, ITK linearly: they agree on the grid's nodes, and between them when
    Slicer is told to be linear too.
    """
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    storage = scene.AddNewNodeByClass("vtkMRMLTransformStorageNode")
    storage.SetFileName(str(path))
    assert storage.ReadData(node) == 1
    transform = node.GetTransformFromParent()
    parts = [transform]
    if transform.IsA("vtkGeneralTransform"):
        parts = [transform.GetConcatenatedTransform(k) for k in range(transform.GetNumberOfConcatenatedTransforms())]
    for part in parts:
        if linear and part.IsA("vtkGridTransform"):
            part.SetInterpolationModeToLinear()
    return np.array([transform.TransformPoint(*(RAS @ p)) for p in points]) @ RAS


def test_dense_transform_equals_simpleitks(dense, points):
    itk = dense.to_itk()
    expected = [itk.TransformPoint(p.tolist()) for p in points]
    np.testing.assert_allclose(dense.map_points(points), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["t.h5", "t.nrrd", "t.nii.gz"])
def test_files_map_the_same_points_everywhere(name, dense, points, tmp_path):
    path = tmp_path / name
    transform_files.write_transform(path, dense)
    truth = dense.map_points(points)
    read = transform_files.read_transform(path)
    np.testing.assert_allclose([read.TransformPoint(p.tolist()) for p in points], truth, atol=1e-3)
    np.testing.assert_allclose(slicer_map(path, points), truth, atol=1e-3)


def test_nifti_is_five_dimensional_ras_with_the_right_intent(dense, points, tmp_path):
    transform_files.write_transform(tmp_path / "t.nii.gz", dense)
    image = nibabel.load(tmp_path / "t.nii.gz")
    assert image.shape == (*dense.grid.shape[::-1], 1, 3)
    assert image.header["intent_code"] == 1006
    index = np.round(nibabel.affines.apply_affine(np.linalg.inv(image.affine), points @ RAS)).astype(int)
    centres = nibabel.affines.apply_affine(image.affine, index) @ RAS
    vectors = np.asarray(image.dataobj)[index[:, 0], index[:, 1], index[:, 2], 0] @ RAS
    np.testing.assert_allclose(centres + vectors, dense.map_points(centres), atol=1e-3)


def test_composite_sums_to_the_same_map(dense, points, tmp_path):
    transform_files.write_transform(tmp_path / "c.h5", dense, AFFINE)
    read = sitk.ReadTransform(str(tmp_path / "c.h5"))
    assert sitk.CompositeTransform(read).GetNumberOfTransforms() == 2
    mapped = np.array([read.TransformPoint(p.tolist()) for p in points])
    # the affine scales the grid's interpolation, nothing else differs
    np.testing.assert_allclose(mapped, dense.map_points(points), atol=1e-3)
    np.testing.assert_allclose(slicer_map(tmp_path / "c.h5", points), dense.map_points(points), atol=1e-3)


def test_outside_the_grid_the_border_counts(dense):
    corner = dense.grid.points((0, 0, 0))
    away = dense.grid.points((-7, -7, -7))
    np.testing.assert_allclose(dense.map_points(away) - away, dense.map_points(corner) - corner, atol=1e-5)


def workspace(spacing=2.0):
    """A working grid half-way of AFFINE."""
    values, vectors = np.linalg.eig(AFFINE)
    half = (vectors @ np.diag(np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)).real
    grid = Grid.centred((56, 60, 58), spacing, transform_points(half, (12, -30, 44)), turn((0, 1, 1), 10))
    empty = torch.zeros(1, 1, *grid.shape)
    return WorkingPair(empty, empty, None, grid, np.linalg.inv(half), half)


def test_known_affine_and_warp_arrive_in_millimetres(oblique, points, monkeypatch):
    """Field pair on the working grid -> forward and inverse in mm equals the maps written out point by point."""
    monkeypatch.setattr(physical_space, "ENOUGH_NODES", 0)  # the lattice is not refined
    space = workspace()
    v = fields.gaussian(torch.randn((1, 3, *space.grid.shape), generator=torch.Generator().manual_seed(SEED)), 6.0)
    v = v * 2.5 / v.abs().max()
    pair = fields.FieldPair(fields.exponentiate(v), fields.exponentiate(-v), "svf", 0.0)
    physical = to_physical(pair, space)
    np.testing.assert_allclose(physical.matrix, AFFINE, atol=1e-9)

    def through(u, before, after, at):
        index = space.grid.indices(transform_points(np.linalg.inv(before), at))
        field = DenseTransform(Grid(space.grid.shape, np.eye(4)), u[0].permute(1, 2, 3, 0).numpy())
        return transform_points(after, space.grid.points(field.map_points(index)))

    expected = through(pair.fixed_to_moving, space.mid_to_fixed, space.mid_to_moving, points)
    at = space.grid.indices(transform_points(np.linalg.inv(space.mid_to_fixed), points))
    seen = ((at >= 0) & (at <= np.array(space.grid.shape) - 1)).all(1)  # beyond the working grid the field fades
    points, expected = points[seen], expected[seen]
    assert len(points) > 190
    # nothing is interpolated on the way, only rounded to 1/4096 mm
    np.testing.assert_allclose(physical.forward.map_points(points), expected, atol=2e-3)
    there_and_back = physical.inverse.map_points(physical.forward.map_points(points))
    assert np.linalg.norm(there_and_back - points, axis=1).mean() < 0.06
    dense = physical.forward.resampled(dense_grid(oblique, float(space.grid.spacing[0])))
    apart = np.linalg.norm(dense.map_points(points) - expected, axis=1)
    assert apart.mean() < 0.02 and np.percentile(apart, 95) < 0.1


def test_dense_grids_reach_six_millimetres_further_but_not_from_a_tiny_scan():
    scan = Grid.centred((40, 32, 36), 1.5, (3, 4, 5), turn((1, 1, 0), 20))
    for corner in itertools.product((-0.5, 1), repeat=3):
        outside = scan.points([-0.5 if end < 0 else n - 0.5 for end, n in zip(corner, scan.shape)])
        grid = dense_grid(scan, 2.0)
        room = np.minimum(grid.indices(outside), np.array(grid.shape) - 1 - grid.indices(outside)) * grid.spacing
        assert (room > 4.4).all() and (room < 9).all(), room
    # 10 um voxels: 6 mm on every side would be 1200 voxels; an eighth of 40 voxels it is
    assert dense_grid(Grid.centred((40, 32, 36), 0.01, (3, 4, 5)), 0.01).shape == (50, 42, 46)


def test_large_labels_and_large_numbers_go_through_unchanged():
    """Labels of the Allen mouse brain exceed 2^24, from where float32 skips numbers."""
    grid = Grid.centred((6, 6, 6), 1.0, (0, 0, 0))
    labels = np.zeros(grid.shape, np.int32)
    labels[1:3], labels[3:5] = 614454277, 614454279
    moved = transforms.resample_through(Volume(labels, grid), np.eye(4), grid, "nearest")
    assert np.array_equal(moved, labels)
    assert label_overlap(Volume(labels, grid), Volume(labels, grid), np.eye(4)) == {614454277: 1.0, 614454279: 1.0}
    for kind in (np.int32, np.uint32):
        array = np.zeros(grid.shape, kind)
        array[3] = np.iinfo(kind).max
        assert np.array_equal(transforms.resample_through(Volume(array, grid), np.eye(4), grid), array)
        assert np.array_equal(resample_image(Volume(array, grid), sitk.Transform(), grid), array)


def test_volume_through_a_transform_equals_simpleitk(dense, oblique):
    def by_simpleitk(volume, interpolator):
        target = Volume(np.zeros(oblique.shape, np.uint8), oblique).to_itk()
        return sitk.GetArrayFromImage(sitk.Resample(volume.to_itk(), target, dense.to_itk(), interpolator, 0.0))

    rng = np.random.default_rng(2)
    source = Grid.centred((50, 60, 55), 1.5, transform_points(AFFINE, oblique.centre), turn((1, 1, 0), 40))
    image = Volume(rng.uniform(10, 100, source.shape).astype(np.float32), source, "noise")
    got = transforms.resample_through(image, dense, oblique, outside=0.0)
    want = by_simpleitk(image, sitk.sitkLinear)
    inner = want > 0
    assert inner.mean() > 0.5
    assert np.abs(got - want)[inner].mean() < 0.02
    labels = Volume(rng.integers(0, 5, source.shape).astype(np.int16), source, "labels")
    got = transforms.resample_through(labels, dense, oblique, "nearest")
    want = by_simpleitk(labels, sitk.sitkNearestNeighbor)
    assert got.dtype == np.int16 and (got == want)[inner].mean() > 0.999


def test_jacobian_in_mm_of_an_affine_is_its_determinant(oblique):
    grid = oblique.padded(6)
    plain = DenseTransform(grid, affine_displacement(AFFINE, grid).permute(1, 2, 3, 0).contiguous().numpy())
    np.testing.assert_allclose(transforms.jacobian_on(plain, oblique), np.linalg.det(AFFINE[:3, :3]), rtol=1e-3)
    back = np.linalg.inv(AFFINE)
    target = Grid.centred((90, 90, 90), 2.0, transform_points(AFFINE, oblique.centre))
    inverse = DenseTransform(target, affine_displacement(back, target).permute(1, 2, 3, 0).contiguous().numpy())
    assert transforms.inverse_consistency_on(plain, inverse, oblique).max() < 1e-3


def test_slabs_change_nothing(dense, oblique, monkeypatch):
    whole = transforms.jacobian_on(dense, oblique)
    monkeypatch.setattr(transforms, "SLAB", 24 * 30 * 4)
    np.testing.assert_allclose(transforms.jacobian_on(dense, oblique)[1:-1], whole[1:-1], atol=1e-5)


def test_wrong_files_are_refused(tmp_path, oblique):
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(InputError, match="could not be read"):
        transform_files.read_transform(tmp_path / "x.h5")
    with pytest.raises(InputError, match="does not exist"):
        transform_files.read_transform(tmp_path / "nothing.h5")
    sitk.WriteImage(Volume(np.ones(oblique.shape, np.float32), oblique).to_itk(), str(tmp_path / "scan.nii.gz"))
    with pytest.raises(InputError, match="not a displacement grid"):
        transform_files.read_transform(tmp_path / "scan.nii.gz")
