"""Scores whose values are known beforehand: shifts, scalings, folds, on oblique grids."""

import numpy as np
import pytest
import SimpleITK as sitk

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import PointSet, write_points
from SymRegistrationLib.geometry.transform_files import write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import write_volume
from SymRegistrationLib.job import InputError
from SymRegistrationLib.jobs.evaluate import Evaluation, evaluate, evaluation_table

ANGLE = np.radians(30)
DIRECTION = (np.cos(ANGLE), -np.sin(ANGLE), 0, np.sin(ANGLE), np.cos(ANGLE), 0, 0, 0, 1)
GRID = Grid.from_itk((22, 20, 18), (2.0, 2.0, 3.0), (5, -8, 12), DIRECTION)


def _points(grid):
    return grid.points(np.moveaxis(np.indices(grid.shape), 0, -1))


def _write(path, move, grid=GRID):
    points = _points(grid)
    write_transform(path, DenseTransform(grid, (move(points) - points).astype(np.float32)))
    return str(path)


@pytest.fixture
def cube(tmp_path):
    """Two label maps, the second moved by exactly two voxels along the third array axis; label 5 only in the second."""
    fixed, moving = np.zeros(GRID.shape, np.uint8), np.zeros(GRID.shape, np.uint8)
    fixed[4:12, 4:12, 4:12] = 3
    moving[4:12, 4:12, 6:14] = 3
    fixed[14:16, 14:16, 4:8] = 9
    moving[14:16, 14:16, 6:10] = 9
    moving[1:3, 15:18, 15:18] = 5
    for name, labels in (("f", fixed), ("m", moving)):
        write_volume(tmp_path / f"{name}.nii.gz", labels, GRID)
    return {"fixed_labels": str(tmp_path / "f.nii.gz"), "moving_labels": str(tmp_path / "m.nii.gz")}


def _shift(voxels):
    return lambda p: p + GRID.matrix[:3, :3] @ np.array([0, 0, voxels])


def test_dice_of_a_known_shift(tmp_path, cube):
    before = evaluate(Evaluation(**cube))["labels"]
    assert before["per_label"]["3"]["before"] == pytest.approx(0.75)
    assert before["per_label"]["9"]["before"] == pytest.approx(0.5)
    assert before["per_label"]["5"]["before"] == 0, "in one map only: no overlap"
    after = evaluate(Evaluation(transform=_write(tmp_path / "t.h5", _shift(2)), **cube))["labels"]
    assert after["per_label"]["3"] == {"before": pytest.approx(0.75), "after": 1.0}
    assert after["mean_after"] == pytest.approx(2 / 3) and set(after["per_label"]) == {"3", "5", "9"}


def test_landmark_error_in_mm_and_its_direction(tmp_path):
    fixed = GRID.points([[4, 5, 6], [10, 9, 8], [7, 12, 11]])
    write_points(tmp_path / "f.csv", PointSet(fixed, ("a", "b", "c")))
    write_points(tmp_path / "m.csv", PointSet(_shift(2)(fixed) + [0, 0, 0.5], ("a", "b", "c")))
    points = {"fixed_points": str(tmp_path / "f.csv"), "moving_points": str(tmp_path / "m.csv")}
    marks = evaluate(Evaluation(transform=_write(tmp_path / "t.h5", _shift(2)), **points))["landmarks"]
    assert marks["mean_before_mm"] == pytest.approx(np.hypot(4, 0.5), abs=1e-4)
    assert marks["after_mm"] == pytest.approx([0.5] * 3, abs=1e-4) and marks["labels"] == ["a", "b", "c"]
    wrong = evaluate(Evaluation(transform=_write(tmp_path / "w.h5", _shift(-2)), **points))["landmarks"]
    assert wrong["mean_after_mm"] == pytest.approx(np.hypot(8, 0.5), abs=1e-4)


def test_jacobian_and_inverse_consistency_of_a_scaling(tmp_path):
    middle = GRID.centre
    forward = _write(tmp_path / "f.h5", lambda p: middle + 1.1 * (p - middle), GRID.padded(4))
    exact = _write(tmp_path / "i.h5", lambda p: middle + (p - middle) / 1.1, GRID.padded(15))
    off = _write(tmp_path / "o.h5", lambda p: middle + (p - middle) / 1.1 + [0.3, 0, 0.4], GRID.padded(15))
    write_volume(tmp_path / "v.nii.gz", np.arange(np.prod(GRID.shape), dtype=np.float32).reshape(GRID.shape), GRID)
    fixed = str(tmp_path / "v.nii.gz")
    quality = evaluate(Evaluation(transform=forward, inverse=exact, fixed=fixed))["quality"]
    for name in ("min", "median", "max"):
        assert quality[f"jacobian_{name}"] == pytest.approx(1.331, abs=1e-3)
    assert quality["folded_voxels"] == 0 and quality["sd_log_jacobian"] < 1e-3 and quality["ice_max_mm"] < 1e-3
    quality = evaluate(Evaluation(transform=forward, inverse=off, fixed=fixed))["quality"]
    assert quality["ice_mean_mm"] == pytest.approx(0.5, abs=1e-3)
    assert quality["ice_mean_voxel"] == pytest.approx(0.5 / 12 ** (1 / 3), abs=1e-3)


def test_folds_are_counted_where_they_are(tmp_path):
    half = GRID.shape[2] // 2
    along = GRID.axes[:, 2]

    def mirror(p):
        """Beyond the middle plane of the third axis space runs backwards."""
        index = GRID.indices(p)[..., 2]
        return p - along * np.maximum(index - half, 0)[..., None] * 2 * GRID.spacing[2]

    transform = _write(tmp_path / "t.h5", mirror)
    quality = evaluate(Evaluation(transform=transform))["quality"]
    columns = GRID.shape[2] - half  # at the fold itself the central difference is exactly 0
    assert quality["folded_voxels"] == columns * GRID.shape[0] * GRID.shape[1]
    assert quality["jacobian_min"] == pytest.approx(-1, abs=1e-3)
    mask = np.zeros(GRID.shape, np.uint8)
    mask[:, :, : half - 1] = 1
    write_volume(tmp_path / "mask.nii.gz", mask, GRID)
    quality = evaluate(Evaluation(transform=transform, fixed_mask=str(tmp_path / "mask.nii.gz")))["quality"]
    assert quality["folded_percent_content"] == 0 and quality["jacobian_min"] == pytest.approx(1, abs=1e-3)


def test_an_affine_file_needs_a_grid(tmp_path, cube):
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(np.diag([1.2, 1.0, 1.0]).ravel())
    sitk.WriteTransform(affine, str(tmp_path / "a.tfm"))
    with pytest.raises(InputError, match="has no grid of its own. Add --fixed"):
        evaluate(Evaluation(transform=str(tmp_path / "a.tfm")))
    result = evaluate(Evaluation(transform=str(tmp_path / "a.tfm"), fixed=cube["moving_labels"]))
    assert result["quality"]["jacobian_median"] == pytest.approx(1.2, abs=1e-3)


def test_the_table_says_it_all(tmp_path, cube):
    text = evaluation_table(evaluate(Evaluation(transform=_write(tmp_path / "t.h5", _shift(2)), **cube)))
    assert "label 3   0.750  1.000" in text and "folded voxels" in text and "0 (0.0000 %)" in text


@pytest.mark.parametrize(
    "change, part",
    [
        ({}, "nothing to evaluate"),
        ({"inverse": "i.h5"}, "without its transform"),
        ({"fixed_labels": "a"}, "Add --moving-labels"),
        ({"moving_points": "a"}, "Add --fixed-points"),
        ({"transform": "nowhere.h5"}, "transform 'nowhere.h5' does not exist"),
        ({"speed": "x"}, "must be an object of paths"),
        ({"transform": 3}, "must be text"),
    ],
)
def test_bad_requests_are_refused(change, part):
    with pytest.raises(InputError, match=part):
        evaluate(Evaluation.from_dict(change))
