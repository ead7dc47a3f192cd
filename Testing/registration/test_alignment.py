"""The initial alignment finds the pose wherever the header says the head is (errors in mm over the
head's own voxels)."""

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import moved, movement, turn

from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError
from SymRegistrationLib.registration import alignment, mirror, working_grid


def error(found: np.ndarray, true: np.ndarray, volume: Volume) -> float:
    """Mean distance in mm over the content."""
    points = working_grid.prepare(volume).inside
    return float(np.linalg.norm(transform_points(found, points) - transform_points(true, points), axis=1).mean())


@pytest.fixture(scope="module", autouse=True)
def no_mirror_image():
    """A third of each alignment asks for the mirror image, which changes no pose: one test here asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "mirrored_gain", lambda *_: float("nan"))
        yield


def solve(fixed, moving, kind="affine", **more):
    return alignment.align(working_grid.prepare(fixed), working_grid.prepare(moving), kind, **more)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -2, 0.5)])
@pytest.mark.parametrize("degrees, shift", [(30, (50, 0, 0)), (90, (0, -50, 0)), (90, (20, 20, -40))])
def test_every_pose_ends_in_the_same_basin(head, axis, degrees, shift):
    true = movement(head.grid.centre, turn(axis, degrees), shift)
    found = solve(head, moved(head, true), "rigid")
    assert error(found.matrix, true, head) < 0.5
    assert not found.unsure


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_scale(head, scale):
    true = movement(head.grid.centre, turn((1, 1, 0), 25), (30, 0, 10), scale)
    assert error(solve(head, moved(head, true)).matrix, true, head) < 0.5


@pytest.mark.parametrize("order, flip", [((2, 0, 1), (1, -1, 1)), ((1, 2, 0), (-1, 1, 1))])
def test_axis_order_and_flips_of_storage_do_not_matter(head, order, flip):
    matrix = head.grid.matrix.copy()
    steps = matrix[:3, list(order)] * np.array(flip)
    array = head.array.transpose(order)
    first = matrix[:3, 3] - sum(steps[:, k] * (array.shape[k] - 1) for k in range(3) if flip[k] < 0)
    stored = np.eye(4)
    stored[:3, :3], stored[:3, 3] = steps, first
    array = array[tuple(slice(None, None, f) for f in flip)]
    same = Volume(np.ascontiguousarray(array), Grid(array.shape, stored), "re-stored")
    assert error(solve(head, same).matrix, np.eye(4), head) < 0.3


@pytest.mark.parametrize("start, stop", [((18, 0, 0), (99, 99, 99)), ((0, 0, 0), (99, 50, 99))])
def test_partial_overlap(head, start, stop):
    stop = np.minimum(stop, head.array.shape)
    part = head.array[tuple(slice(a, b) for a, b in zip(start, stop))].copy()
    cut = Volume(part, head.grid.cropped(start, stop), "cut head")
    true = movement(head.grid.centre, turn((1, 0.3, 0.2), 30), (20, 10, 0))
    assert error(solve(head, moved(cut, true), "rigid").matrix, true, cut) < 1.5


def test_another_contrast_is_found_by_mutual_information(head):
    array = np.where(head.array > 20, head.array.max() - head.array, 0).astype(np.float32)
    inverted = Volume(array, head.grid, "inverted")
    true = movement(head.grid.centre, turn((0, 1, 1), 50), (10, 0, -30))
    assert error(solve(head, moved(inverted, true), "rigid", measure="mi").matrix, true, head) < 2.0


@pytest.fixture(scope="module")
def there(head):
    """The head somewhere else, and the alignment with it."""
    other = moved(head, movement(head.grid.centre, turn((1, 2, 0), 40), (10, -20, 5), 1.05))
    return other, solve(head, other)


def test_exchange_of_scans_gives_the_inverse(head, there):
    other, there = there
    back = solve(other, head)
    assert error(back.matrix @ there.matrix, np.eye(4), head) < 0.05
    np.testing.assert_allclose(there.mid_to_fixed, back.mid_to_moving, atol=0.05)


def test_same_seed_same_matrix(head, there):
    other, first = there
    assert np.array_equal(first.matrix, solve(head, other).matrix)


def test_a_ball_has_no_pose_and_that_is_said():
    grid = Grid.centred((40, 40, 40), 4.0, (0, 0, 0))
    index = np.indices(grid.shape) - 19.5
    ball = Volume((np.linalg.norm(index, axis=0) < 14).astype(np.float32), grid, "ball")
    assert solve(ball, ball, "rigid").unsure


def test_landmarks_and_files_start_it(head, tmp_path):
    true = movement(head.grid.centre, turn((1, 0, 1), 70), (5, 50, 0))
    points = np.random.default_rng(4).normal(head.grid.centre, 40, (6, 3))
    np.testing.assert_allclose(
        alignment.from_landmarks(points, transform_points(true, points), affine=False), true, atol=1e-6
    )
    np.testing.assert_allclose(
        alignment.from_landmarks(points, transform_points(true, points), affine=True), true, atol=1e-6
    )
    guided = solve(head, moved(head, true), "rigid", landmarks=(points, transform_points(true, points)))
    assert error(guided.matrix, true, head) < 0.5
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(true[:3, :3].ravel().tolist()), affine.SetTranslation(true[:3, 3].tolist())
    for name in ("start.tfm", "start.h5", "start.mat"):
        sitk.WriteTransform(affine, str(tmp_path / name))
        np.testing.assert_allclose(solve(head, head, str(tmp_path / name)).matrix, true, atol=1e-6)


def test_bad_starts_are_refused(head, tmp_path):
    (tmp_path / "words.tfm").write_text("not a transform")
    with pytest.raises(InputError, match="could not be read"):
        solve(head, head, str(tmp_path / "words.tfm"))
    field = sitk.DisplacementFieldTransform(sitk.Image([4, 4, 4], sitk.sitkVectorFloat64, 3))
    sitk.WriteTransform(field, str(tmp_path / "field.h5"))
    with pytest.raises(InputError, match="not linear"):
        solve(head, head, str(tmp_path / "field.h5"))
    with pytest.raises(InputError, match="at least 3"):
        alignment.from_landmarks(np.zeros((2, 3)), np.zeros((2, 3)), affine=False)


def other_contrast(volume: Volume) -> Volume:
    """The same anatomy with another order of brightness: bright tissue dark, dark tissue brightest, air dark."""
    top = np.percentile(volume.array, 99.5)
    share = np.clip(volume.array / top, 0, 1)
    array = np.where(share > 0.08, 0.25 + 0.75 * np.abs(share - 0.75) ** 0.7, 0)
    return Volume((array * 800).astype(np.float32), volume.grid, "other contrast")


@pytest.mark.parametrize("degrees, shift", [(0, (0, 0, 0)), (85, (30, -20, 25))])
def test_two_contrasts_are_seen_and_one_patient_stays_rigid(head, degrees, shift):
    true = movement(head.grid.centre, turn((1, -1, 0.5), degrees), shift)
    found = solve(head, moved(other_contrast(head), true))
    assert (found.measure, found.kind) == ("mi", "rigid")
    assert error(found.matrix, true, head) < 1.0
    assert found.likeness < alignment.ONE_CONTRAST
    headers, *others, taken = found.candidates
    np.testing.assert_allclose(headers.matrix, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(taken.matrix, found.matrix, atol=1e-9)
    assert abs(headers.degrees - degrees) < 1 and max(taken.degrees, taken.mm) < 1e-4
    assert taken.score > 1.05 * max(one.score for one in (headers, *others) if one.degrees > 20 or one.mm > 20)
    contrasts, pose, freedom = found.reasons
    assert contrasts.startswith("Two contrasts") and freedom.startswith("Rigid, as one patient is")
    assert pose.startswith("The search's pose" if degrees else "The headers' own pose was refined and kept")


def test_two_contrasts_of_different_size_are_stretched(head):
    true = movement(head.grid.centre, turn((1, 0, 0.5), 20), (10, 0, 5), 1.1)
    found = solve(head, moved(other_contrast(head), true))
    assert found.kind == "affine" and error(found.matrix, true, head) < 1.5


@pytest.mark.parametrize("kind", ["none", "centre"])
def test_contrast_is_seen_at_starts_that_compare_nothing(head, kind):
    near = movement(head.grid.centre, turn((1, 0, 0), 6), (4, 0, 0))
    for other, one in ((head, True), (other_contrast(head), False)):
        scans = working_grid.prepare(head), working_grid.prepare(moved(other, near))
        assert alignment.shows_one_contrast(*scans, alignment.align(*scans, kind)) is one


def test_landmarks_guide_every_start_or_are_refused(head, tmp_path):
    true = movement(head.grid.centre, turn((1, 0, 1), 70), (5, 50, 0))
    points = np.random.default_rng(4).normal(head.grid.centre, 40, (6, 3))
    pairs = points, transform_points(true, points)
    for kind in ("none", "centre"):
        found = solve(head, moved(head, true), kind, landmarks=pairs)
        np.testing.assert_allclose(found.matrix, true, atol=1e-4)
    guided = solve(head, moved(other_contrast(head), true), "affine", landmarks=pairs)
    assert guided.measure == "mi" and error(guided.matrix, true, head) < 1.0
    sitk.WriteTransform(sitk.AffineTransform(3), str(tmp_path / "start.tfm"))
    with pytest.raises(InputError, match="both landmarks and the file"):
        solve(head, head, str(tmp_path / "start.tfm"), landmarks=pairs)


def test_a_mirrored_scan_is_told_from_a_right_one(head, monkeypatch):
    monkeypatch.setattr(alignment, "mirrored_gain", mirror.mirrored_gain)
    uneven = head.array.copy()
    uneven[: head.array.shape[0] * 2 // 3, :, : head.array.shape[2] // 3] *= 0.4  # one side is ill
    one = Volume(uneven, head.grid, "uneven")
    other = other_contrast(one)
    flipped = Volume(np.ascontiguousarray(other.array[:, :, ::-1]), head.grid, "mirrored")
    away = movement(head.grid.centre, turn((1, -0.5, 1), 70), (20, 10, 0))  # its header calls something else left
    assert solve(one, other, "rigid", measure="mi").mirrored_gain < 0
    assert solve(one, moved(flipped, away), "rigid", measure="mi").mirrored_gain > 0.04
