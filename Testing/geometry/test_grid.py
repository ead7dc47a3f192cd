"""Index, point, axis order: checked against SimpleITK's own arithmetic."""

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import turn

from SymRegistrationLib.geometry.grid import Grid, canonical_axes, index_map
from SymRegistrationLib.geometry.volumes import grid_of, to_itk


def test_index_to_point_is_simpleitks(oblique):
    image = to_itk(np.zeros(oblique.shape, np.uint8), oblique)
    for index in ((0, 0, 0), (17, 0, 0), (0, 23, 0), (0, 0, 29), (3.5, 7.25, 11)):
        expected = image.TransformContinuousIndexToPhysicalPoint([float(i) for i in index[::-1]])
        np.testing.assert_allclose(oblique.points(index), expected, atol=1e-9)
    assert grid_of(image).same_as(oblique, 1e-9)


def test_points_and_indices_are_inverse(oblique):
    index = np.random.default_rng(1).uniform(-5, 30, (50, 3))
    np.testing.assert_allclose(oblique.indices(oblique.points(index)), index, atol=1e-9)
    np.testing.assert_allclose(oblique.spacing, [3.0, 1.5, 1.2], atol=1e-12)


def test_crop_pad_and_resample_keep_space(oblique):
    part = oblique.cropped((2, 3, 4), (10, 20, 30))
    np.testing.assert_allclose(part.points((1, 1, 1)), oblique.points((3, 4, 5)), atol=1e-9)
    wide = oblique.padded(5.0)
    assert wide.shape == (18 + 4, 24 + 8, 30 + 10)  # ceil(5 / spacing) voxels on each side
    np.testing.assert_allclose(wide.points((2, 4, 5)), oblique.points((0, 0, 0)), atol=1e-9)
    coarse = oblique.resampled(3.0)
    np.testing.assert_allclose(coarse.points((-0.5,) * 3), oblique.points((-0.5,) * 3), atol=1e-9)
    np.testing.assert_allclose(coarse.centre, oblique.centre, atol=1e-9)
    assert coarse.volume == pytest.approx(oblique.volume)


def test_index_map_goes_through_space(oblique):
    other = Grid.centred((10, 10, 10), 2.0, (0, 0, 0))
    between = np.eye(4)
    between[:3, 3] = (1, 2, 3)
    got = index_map(oblique, between, other) @ np.array([4, 5, 6, 1])
    np.testing.assert_allclose(other.points(got[:3]), oblique.points((4, 5, 6)) + (1, 2, 3), atol=1e-9)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_canonical_axes_undo_storage_order_and_flips(order):
    tilted = turn((1, 1, 0), 12) @ np.eye(3)[:, ::-1]
    stored = tilted[:, list(order)] * np.array([1, -1, 1])
    np.testing.assert_allclose(canonical_axes(stored), tilted, atol=1e-12)


def test_grids_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="singular"):
        Grid((4, 4, 4), np.diag([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="3 positive sizes"):
        Grid((4, 0, 4), np.eye(4))


def test_a_grid_of_10_nm_is_one_and_is_compared_by_its_voxels():
    tiny = Grid.centred((8, 8, 8), 1e-5, (0, 0, 0))
    shifted = Grid.centred((8, 8, 8), 1e-5, (5e-6, 0, 0))
    np.testing.assert_allclose(tiny.indices(tiny.points([1, 2, 3])), [1, 2, 3], atol=1e-9)
    assert tiny.same_as(Grid.centred((8, 8, 8), 1e-5, (1e-7, 0, 0))) and not tiny.same_as(shifted)
    with pytest.raises(ValueError, match="singular"):
        Grid((4, 4, 4), np.array([[1, 1, 0, 0], [1, 1 + 1e-12, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))


def test_oblique_header_survives_a_file(oblique, tmp_path):
    array = np.random.default_rng(0).normal(size=oblique.shape).astype(np.float32)
    sitk.WriteImage(to_itk(array, oblique), str(tmp_path / "a.nii.gz"))
    again = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert grid_of(again).same_as(oblique, 1e-3)
