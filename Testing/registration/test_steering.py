"""Landmarks and labels that pull, regions that confine: what they reach, what they leave alone, what they refuse."""

from dataclasses import replace

import numpy as np
import pairs
import pytest
import torch

from SymRegistrationLib import fields
from SymRegistrationLib.geometry.points import PointSet
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.pipeline import register
from SymRegistrationLib.registration import continuing
from SymRegistrationLib.registration.extras import Extras
from SymRegistrationLib.registration.guide import Region
from SymRegistrationLib.registration.live import Watch
from SymRegistrationLib.registration.optimisers import syn
from SymRegistrationLib.registration.schedule import Schedule
from SymRegistrationLib.registration.steering import LabelChannels, LandmarkPairs, Steering, spread

QUICK = Options(preset="fast", initial="none")
PULLED = Options(preset="fast", initial="none", landmark_weight=1.0)


@pytest.fixture(scope="module")
def scans():
    (a, grid), (b, _) = pairs.scan(), pairs.scan(shift=6.0)
    return Volume(a, grid, "fixed"), Volume(b, grid, "moving")


@pytest.fixture(scope="module")
def finished(scans):
    return register(*scans, QUICK, Extras(keep_state=True))


def marks(result, offsets, moves):
    """Landmarks about the middle, and partners ``moves`` mm from where the result takes them."""
    centre = result.fixed.grid.centre
    fixed = PointSet(centre + np.array(offsets, float), tuple("abcdef"[: len(offsets)]))
    return fixed, fixed.moved(result.forward.map_points(fixed.points) + np.array(moves, float))


def test_a_kernel_field_takes_its_vectors_and_does_not_fold():
    centres = torch.tensor([[10.0, 12, 14], [20, 12, 14]], dtype=torch.float64)
    vectors = torch.tensor([[0.5, 0, 0], [0, -0.5, 0.2]], dtype=torch.float64)
    field = spread(centres, vectors, 3.0, (32, 30, 28))
    found = fields.sample_at(field.double(), centres[None])[0]
    assert float((found - vectors).abs().max()) < 0.06
    long = spread(centres, 50 * vectors, 3.0, (32, 30, 28))
    assert float(fields.jacobian_determinant(long).min()) > 0.2


def test_landmarks_pull_symmetrically_and_the_rest_follows():
    print("seed", pairs.SEED)
    moving, fixed, u = pairs.known_pair((36, 40, 32), 6.0, 6.0)
    generator = torch.Generator().manual_seed(1)
    where = (fixed[0, 0] > 0.2).nonzero()
    p = where[torch.randperm(len(where), generator=generator)[:30]].double()
    q = p + fields.sample_at(u.double(), p[None])[0]
    blank = torch.full_like(fixed, 0.5)  # no image tells where to go
    schedule = Schedule(shrink=(2, 1), iterations=(12, 6))

    def run(a, b, first, second):
        steering = Steering((36, 40, 32), LandmarkPairs(first[:20], second[:20], torch.full((20,), 0.5).double()))
        return syn.optimise(a, b, schedule, "mse", steering=steering)

    pair = run(blank, blank, p, q)
    error = (p + fields.sample_at(pair.fixed_to_moving.double(), p[None])[0] - q).norm(dim=1)
    assert float(error[:20].max()) < 0.5 and float(error[20:].mean()) < 0.7 * float((q - p).norm(dim=1)[20:].mean())
    assert float(fields.jacobian_determinant(pair.fixed_to_moving).min()) > 0 and pair.residual < 0.3
    swapped = run(blank, blank, q, p)
    torch.testing.assert_close(swapped.moving_to_fixed, pair.fixed_to_moving, atol=2e-3, rtol=0)


def test_labels_pull_where_images_say_nothing():
    shape = (32, 32, 32)
    places = fields.identity(shape)
    balls = [
        ((places - torch.tensor(c).view(1, 3, 1, 1, 1)).square().sum(1, keepdim=True) < 49).float()
        for c in ((15.0, 15, 13), (15.0, 15, 18))
    ]
    blank = torch.full((1, 1, *shape), 0.5)
    steering = Steering(shape, labels=LabelChannels(torch.cat(balls), 1.0))
    pair = syn.optimise(blank, blank, Schedule(shrink=(2, 1), iterations=(25, 15)), "mse", steering=steering)
    warped = fields.warp(balls[1], pair.fixed_to_moving)
    overlap = [float(2 * (balls[0] * b).sum() / (balls[0] + b).sum()) for b in (balls[1], warped)]
    print("Dice", overlap)
    assert overlap[0] < 0.55 and overlap[1] > 0.93
    assert float(fields.jacobian_determinant(pair.fixed_to_moving).min()) > 0


def test_an_update_meets_new_landmarks_within_their_tolerance(scans, finished):
    fixed, moving = marks(finished, [[0, 0, 0], [15, 0, 0], [0, -15, 6]], [[0, 5, 0], [0, 0, -4], [0, 0, 0]])
    options = Options(preset="fast", initial="none", landmark_weight=1.0, landmark_tolerance="1.5,2,1")
    result = register(*scans, options, Extras(start=finished.state, fixed_points=fixed, moving_points=moving))
    told = result.metrics["steering"]
    assert told["from"] == "update" and told["landmarks"]["met"] == 3 and not told["landmarks"]["unmet"]
    assert all(r <= t for r, t in zip(told["landmarks"]["residual_mm"], (1.5, 2, 1)))
    assert result.metrics["quality"]["folded_voxels"] == 0 and result.metrics["quality"]["ice_p95_mm"] < 0.3
    back = result.inverse.map_points(moving.points)
    assert np.linalg.norm(back - fixed.points, axis=1).max() < 2.2


def test_what_cannot_be_met_is_named(scans, finished):
    fixed, moving = marks(finished, [[0, 0, 0], [6, 0, 0]], [[10, 0, 0], [-9, 0, 0]])
    result = register(*scans, PULLED, Extras(start=finished.state, fixed_points=fixed, moving_points=moving))
    told = result.metrics["steering"]["landmarks"]
    assert told["unmet"] and result.metrics["quality"]["folded_voxels"] == 0
    assert any("cannot be met" in note for note in result.metrics["notes"])


@pytest.mark.parametrize(
    "fixed, moving, words",
    [
        ([[0, 0, 0], [0.5, 0, 0]], [[0, 0, 0], [20, 0, 0]], "1 \\(a\\) and 2 \\(b\\) contradict each other"),
        ([[0, 0, 0], [500, 0, 0]], [[0, 0, 0], [500, 0, 0]], "landmark 2 \\(b\\) lies outside both scans"),
    ],
)
def test_impossible_landmarks_are_refused(scans, fixed, moving, words):
    centre = scans[0].grid.centre
    points = [PointSet(centre + np.array(p, float), ("a", "b")) for p in (fixed, moving)]
    with pytest.raises(InputError, match=words):
        register(*scans, PULLED, Extras(fixed_points=points[0], moving_points=points[1]))


def test_labels_that_are_empty_or_missing_are_said(scans):
    empty = Volume(np.zeros(scans[0].grid.shape, np.uint8), scans[0].grid, "empty.nii.gz")
    some = Volume((scans[0].array > 300).astype(np.uint8), scans[0].grid, "some.nii.gz")
    driving = Options(preset="fast", initial="none", drive_labels="all")
    with pytest.raises(InputError, match="'empty.nii.gz' has no labels"):
        register(*scans, driving, Extras(fixed_labels=some, moving_labels=empty))
    with pytest.raises(InputError, match="label 7 is empty in both"):
        register(*scans, Options(drive_labels="7"), Extras(fixed_labels=some, moving_labels=some))
    with pytest.raises(InputError, match="no list of labels"):
        register(*scans, Options(drive_labels="liver"), Extras(fixed_labels=some, moving_labels=some))
    with pytest.raises(InputError, match="labels shall pull but none"):
        register(*scans, driving)


def test_a_repair_mends_its_region_and_leaves_the_rest(scans, finished):
    state = finished.state
    grid, centre = state.grid, finished.fixed.grid.centre
    places = grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
    bump = torch.from_numpy(np.exp(-0.5 * (np.linalg.norm(places - centre, axis=-1) / 8) ** 2)).float()
    warp = torch.zeros(1, 3, *grid.shape)
    warp[0, 1] = bump * (8 / float(grid.spacing[0]))
    halves = torch.cat([state.halves[:1], fields.compose(warp, state.halves[1:])])
    bad = type(state)(halves, grid, state.pose, state.similarity, state.inputs)
    shown = register(*scans, QUICK, Extras(start=bad, restore=True))
    mended = register(*scans, QUICK, Extras(start=bad, region=Region(None, tuple(centre), 18.0, 12.0)))
    fields_mm = [r.forward.resampled(scans[0].grid).displacement for r in (finished, shown, mended)]
    wrong, left = (np.linalg.norm(f - fields_mm[0], axis=-1) for f in fields_mm[1:])
    inside = wrong > 2
    print(f"spoilt {wrong.max():.2f} mm, mended {left[inside].mean():.2f} mean, {left[inside].max():.2f} largest")
    assert wrong.max() > 6 and left[inside].mean() < 1.5
    every = scans[0].grid.points(np.stack(np.meshgrid(*map(np.arange, scans[0].grid.shape), indexing="ij"), -1))
    far = np.linalg.norm(every - centre, axis=-1) > 30
    assert np.linalg.norm(fields_mm[2] - fields_mm[1], axis=-1)[far].max() < 0.05
    back = [r.inverse.map_points(every.reshape(-1, 3)) for r in (shown, mended)]
    far = np.linalg.norm(back[0] - centre, axis=1) > 30
    assert np.linalg.norm(back[1] - back[0], axis=1)[far].max() < 0.05
    assert mended.metrics["quality"]["folded_voxels"] == 0


@pytest.mark.parametrize("what", ["repair", "update"])
def test_a_step_from_memory_is_that_from_the_file_and_leaves_the_rest_bit_for_bit(scans, finished, what, monkeypatch):
    monkeypatch.setattr(continuing, "LANDMARK_REACH", 3.0)  # the scans are small
    cold = replace(finished.state, finished=None)
    assert finished.state.finished is not None
    if what == "repair":
        options, given = Options(preset="fast", initial="none", stiffness=2.0), {}
        given["region"] = Region(None, tuple(finished.fixed.grid.centre), 10.0, 8.0)
    else:
        fixed, moving = marks(finished, [[0, 0, 0], [9, 0, 0]], [[0, 4, 0], [0, 0, 0]])
        options, given = PULLED, {"fixed_points": fixed, "moving_points": moving}
    warm, anew = (
        register(*scans, options, Extras(start=state, keep_state=True, **given)) for state in (finished.state, cold)
    )
    before, grid = finished.state.finished, scans[0].grid
    assert warm.state.finished.space is before.space
    assert "changed" in warm.state.finished.pair.details
    for direction in ("forward", "inverse"):
        one, other, old = (getattr(r, direction).displacement for r in (warm, anew, finished))
        moved, apart = np.linalg.norm(one - old, axis=-1), np.linalg.norm(one - other, axis=-1)
        same = float((moved == 0).mean())
        print(f"{what}, {direction}: moved {moved.max():.3f} mm, apart {apart.max():.4f} mm, same {same:.2f}")
        # Inverses are found to 0.005 voxel, from another first guess.
        assert moved.max() > 0.05 and same > 0.3 and apart.max() < 0.02 * before.space.grid.spacing[0]
    bright = 0.02 * float(scans[0].array.max())
    for name, least in (("jacobian", 0.04), ("ice_mm", 0.06), ("warped_moving", bright), ("warped_fixed", bright)):
        apart = np.abs(getattr(warm, name).astype(float) - getattr(anew, name)).max()
        print(f"{name} apart {apart:.4f}")
        assert apart <= least, name
    for group, names in (("quality", ("jacobian_min", "jacobian_median", "ice_mean_mm")), ("similarity", ("after",))):
        for name in names:
            assert warm.metrics[group][name] == pytest.approx(anew.metrics[group][name], rel=0.02, abs=5e-3), name
    again = register(*scans, QUICK, Extras(start=warm.state, restore=True))
    np.testing.assert_array_equal(again.forward.map_points(grid.corners()), warm.forward.map_points(grid.corners()))
    np.testing.assert_array_equal(again.jacobian, warm.jacobian)


def test_what_lies_in_memory_is_not_used_for_other_masks_or_a_finer_grid(scans, finished):
    region = Region(None, tuple(finished.fixed.grid.centre), 10.0, 8.0)
    mask = np.ones(scans[0].grid.shape, bool)
    masked = register(*scans, QUICK, Extras(start=finished.state, region=region, fixed_mask=mask, keep_state=True))
    assert "changed" not in masked.state.finished.pair.details
    finer = Options(preset="fast", initial="none", spacing=0.8 * float(finished.state.grid.spacing[0]))
    result = register(*scans, finer, Extras(start=finished.state, region=region, keep_state=True))
    assert result.state.grid.shape[0] > finished.state.grid.shape[0]
    assert result.state.finished.pair.fixed_to_moving.shape[2:] == result.state.grid.shape


def test_regions_that_are_empty_or_elsewhere_are_refused(scans, finished):
    grid = scans[0].grid
    empty = Volume(np.zeros(grid.shape, np.uint8), grid, "paint.nii.gz")
    for region, words in (
        (Region(empty), "'paint.nii.gz' is empty"),
        (Region(None, (900.0, 0, 0), 10.0), "outside the fixed scan"),
    ):
        with pytest.raises(InputError, match=words):
            register(*scans, QUICK, Extras(start=finished.state, region=region))


def test_other_scans_cannot_go_on_from_a_state(scans, finished):
    changed = Volume(scans[1].array + np.int16(1), scans[1].grid, "moving.nii.gz")
    with pytest.raises(InputError, match="'moving.nii.gz' is not the scan that was registered"):
        register(scans[0], changed, QUICK, Extras(start=finished.state))


def test_a_look_after_each_level_and_a_good_enough_result(scans, finished):
    looks = []
    watched = register(*scans, QUICK, Extras(watch=Watch(looks.append)))
    assert [look.level for look in looks] == [1, 2, 3] and looks[0].levels == 3
    assert looks[-1].image.shape == looks[-1].grid.shape and 0.5 < looks[-1].image.max() < 1.001
    assert all(look.folded_percent == 0 for look in looks)
    corners = scans[0].grid.corners() * 0.8
    np.testing.assert_array_equal(watched.forward.map_points(corners), finished.forward.map_points(corners))
    early = []
    short = register(*scans, QUICK, Extras(watch=Watch(early.append, lambda: bool(early))))
    assert len(early) == 1 and short.metrics["quality"]["folded_voxels"] == 0
    alike = [run.metrics["similarity"] for run in (short, finished)]
    assert alike[0]["aligned"] < alike[0]["after"] <= alike[1]["after"]


@pytest.mark.parametrize("kind", ["rigid", "similarity", "affine"])
def test_linear_methods_find_a_known_pose_and_are_exactly_inverse(scans, kind):
    angle, grid = np.radians(25), scans[0].grid
    known = np.eye(4)
    known[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    known[:3, :3] *= 1.0 if kind == "rigid" else 1.08
    known[:3, 3] = [12, -7, 9]
    posed = Volume(scans[0].array, type(grid)(grid.shape, known @ grid.matrix), "posed")
    result = register(scans[0], posed, Options(method=kind, preset="fast"), Extras(keep_state=True))
    matrix = result.transforms.matrix
    corners = np.concatenate([grid.corners(), np.ones((8, 1))], 1)
    assert np.linalg.norm((corners @ (matrix - known).T)[:, :3], axis=1).max() < 0.6
    assert result.linear and 0 <= result.metrics["alignment"]["confidence"] <= 1
    turned = matrix[:3, :3] @ matrix[:3, :3].T
    if kind != "affine":
        np.testing.assert_allclose(turned / turned[0, 0], np.eye(3), atol=1e-9)
    if kind == "rigid":
        assert turned[0, 0] == pytest.approx(1, abs=1e-9)
    assert not bool(result.state.halves.any())


def test_a_linear_method_snaps_from_a_given_pose_and_refuses_what_bends(scans, tmp_path):
    from SymRegistrationLib.geometry.linear import write_linear

    near = np.eye(4)
    near[:3, 3] = [4, -3, 2]
    write_linear(tmp_path / "near.tfm", near)
    options = Options(method="rigid", preset="fast", initial=str(tmp_path / "near.tfm"))
    snapped = register(scans[0], scans[0], options)
    assert np.abs(snapped.transforms.matrix - np.eye(4)).max() < 0.3 and snapped.metrics["alignment"]["confidence"] == 1
    for bad in (Options(method="rigid", uncertainty=2), Options(method="affine", landmark_weight=1.0)):
        with pytest.raises(InputError, match="does not bend"):
            register(*scans, bad)
    with pytest.raises(InputError, match="cannot be part of an ensemble"):
        register(*scans, Options(ensemble="rigid"))
