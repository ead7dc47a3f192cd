"""The symmetric optimiser: its force is a true gradient, known warps are found, exchange exchanges."""

import pairs
import pytest
import torch

from SymRegistrationLib import fields
from SymRegistrationLib.fields import inversion
from SymRegistrationLib.losses import lncc_map, ncc
from SymRegistrationLib.registration.optimisers import syn
from SymRegistrationLib.registration.schedule import Schedule

SHAPE = (40, 44, 36)
QUICK = Schedule(shrink=(2, 1), iterations=(40, 40))
FINEST = Schedule(shrink=(1,), iterations=(40,))
FINEST_STEPS = Schedule(shrink=(2,), iterations=(6,))


@pytest.fixture(scope="module")
def known():
    print("seed", pairs.SEED)
    return pairs.known_pair(SHAPE, size=4.0, sigma=6.0)


def images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [fields.gaussian(torch.rand((1, 1, 10, 12, 14), generator=generator, dtype=dtype), 1.0) for _ in range(2)]


@pytest.mark.parametrize("weighted", [False, True])
def test_lncc_force_is_the_gradient_of_the_sum(weighted):
    a, b = (x.requires_grad_() for x in images())
    weight = None
    if weighted:
        weight = torch.zeros_like(a)
        weight[..., 3:9, 2:9, 4:11] = 1
    total = (lncc_map(a, b, 5) * (1 if weight is None else weight)).sum()
    expected = torch.cat(torch.autograd.grad(total, (a, b)))
    force, value = syn._FORCES["lncc"](a.detach(), b.detach(), 5, weight)
    torch.testing.assert_close(force, expected, rtol=1e-6, atol=1e-9)
    total = total.detach()
    assert value == pytest.approx(float(total) / float(a.numel() if weight is None else weight.sum()), rel=1e-6)


def test_global_force_is_the_gradient_of_the_correlation():
    a, b = (x.requires_grad_() for x in images())
    expected = torch.cat(torch.autograd.grad(1 - ncc(a, b), (a, b)))
    force, _ = syn._FORCES["ncc"](a.detach(), b.detach(), 5, None)
    torch.testing.assert_close(force, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("similarity, bound", [("lncc", 0.3), ("mse", 0.45), ("mind", 0.55)])
def test_known_warp_is_found(known, similarity, bound):
    moving, fixed, u = known
    before = pairs.end_point_error(torch.zeros_like(u), u, fixed)
    pair = syn.optimise(fixed, moving, QUICK, similarity)
    after = pairs.end_point_error(pair.fixed_to_moving, u, fixed)
    print(f"{similarity}: end-point error {before:.2f} -> {after:.2f} voxels, residual {pair.residual:.3f}")
    assert after < bound * before
    assert float(fields.jacobian_determinant(pair.fixed_to_moving).min()) > 0
    inside = fixed > 0.1
    error = fields.inverse_consistency(pair.fixed_to_moving, pair.moving_to_fixed)[inside]
    assert float(error.mean()) < 0.05


def test_contrast_may_differ_with_mind(known):
    moving, fixed, u = known
    inverted = torch.where(moving > 0.05, 1.05 - moving, moving)
    pair = syn.optimise(fixed, inverted, QUICK, "mind")
    assert pairs.end_point_error(pair.fixed_to_moving, u, fixed) < 0.6 * pairs.end_point_error(
        torch.zeros_like(u), u, fixed
    )


def test_two_contrasts_of_one_patient_with_noise_of_their_own(known):
    """A smooth force finds the warp that a detailed one buries under noise."""
    moving, fixed, u = known
    generator = torch.Generator().manual_seed(pairs.SEED)
    other = torch.where(moving > 0.05, 1.05 - moving, moving) + 0.06 * torch.randn(moving.shape, generator=generator)
    fixed = fixed + 0.06 * torch.randn(moving.shape, generator=generator)
    before = pairs.end_point_error(torch.zeros_like(u), u, fixed)
    plain, smooth = (
        pairs.end_point_error(syn.optimise(fixed, other, schedule, "mind").fixed_to_moving, u, fixed)
        for schedule in (QUICK, Schedule(QUICK.shrink, QUICK.iterations, smooth_update=3.0, smooth_total=1.2))
    )
    print(f"end-point error {before:.2f}, detailed {plain:.2f}, smooth {smooth:.2f} voxels")
    assert smooth < 0.9 * plain and smooth < 0.6 * before
    assert QUICK.for_one_patient().smooth_update > QUICK.smooth_update


def test_contrasts_that_each_show_half_find_the_whole(known):
    """Every contrast is empty in one half; together, and not alone, they find the warp everywhere."""
    moving, fixed, u = known
    left = torch.zeros_like(fixed)
    left[..., : SHAPE[2] // 2] = 1
    both = [torch.cat([image * left, image * (1 - left)], 1) for image in (fixed, moving)]
    errors = [
        pairs.end_point_error(syn.optimise(*images, QUICK, shares=shares).fixed_to_moving, u, fixed)
        for images, shares in ((both, ()), (both, (1.0, 0.0)), ([image[:, :1] for image in both], ()))
    ]
    print("end-point error with both, with no weight for the second, with one:", errors)
    assert errors[0] < 0.6 * errors[2] and errors[1] == pytest.approx(errors[2], rel=1e-3)


@pytest.mark.parametrize("similarity", ["lncc", "mind", "mse", "ncc"])
def test_the_same_contrast_twice_is_that_contrast(known, similarity):
    moving, fixed, _ = known
    weight = torch.ones(2, 1, *SHAPE)
    weight[..., :6] = 0
    one = syn.optimise(fixed, moving, FINEST_STEPS, similarity, weight)
    two = syn.optimise(fixed.repeat(1, 2, 1, 1, 1), moving.repeat(1, 2, 1, 1, 1), FINEST_STEPS, similarity, weight)
    apart = float((one.fixed_to_moving - two.fixed_to_moving).abs().max())
    assert apart < 0.02, apart


def test_exchanging_the_scans_exchanges_the_results(known):
    moving, fixed, _ = known
    there = syn.optimise(fixed, moving, QUICK)
    back = syn.optimise(moving, fixed, QUICK)
    difference = (there.fixed_to_moving - back.moving_to_fixed).abs().max()
    assert float(difference) < 0.02, "voxels; rounding alone differs"
    assert float((there.moving_to_fixed - back.fixed_to_moving).abs().max()) < 0.02


def test_same_input_same_output_bit_by_bit(known):
    moving, fixed, _ = known
    one, two = (syn.optimise(fixed, moving, FINEST) for _ in range(2))
    assert torch.equal(one.fixed_to_moving, two.fixed_to_moving)


def test_identical_scans_stay_where_they_are(known):
    fixed = known[1]
    assert float(syn.optimise(fixed, fixed, QUICK).fixed_to_moving.abs().max()) < 0.01


def test_outside_the_weight_nothing_pulls(known):
    moving, fixed, u = known
    weight = torch.zeros(2, 1, *SHAPE)
    weight[..., : SHAPE[2] // 2] = 1
    pair = syn.optimise(fixed, moving, QUICK, weight=weight)
    length = fields.square_sum(pair.fixed_to_moving).sqrt()
    far, near = float(length[..., -4:].mean()), float(length[..., 6:14].mean())
    assert near > 0.5 and far < 0.25 * near  # what little remains there is the smoothness of the field


def test_starting_from_a_result_splits_and_joins_it(known):
    moving, fixed, u = known
    inverse = inversion.invert(u)
    pair = fields.FieldPair(u, inverse.field, "fixed_point", inverse.residual)
    again = syn.compose_halves(syn.split_halves(pair))
    inside = fixed > 0.1
    difference = fields.square_sum(again.fixed_to_moving - u).sqrt()[inside]
    assert float(difference.mean()) < 0.03 and float(difference.quantile(0.99)) < 0.15
    refined = syn.optimise(fixed, moving, FINEST, start=pair)
    assert pairs.end_point_error(refined.fixed_to_moving, u, fixed) < 0.3


def test_a_start_that_is_right_stays_right_when_the_first_level_is_coarse(known):
    moving, fixed, u = known
    inverse = inversion.invert(u)
    start = fields.FieldPair(u, inverse.field, "fixed_point", inverse.residual)
    refined = syn.optimise(fixed, moving, Schedule(shrink=(2, 1), iterations=(3, 3)), start=start)
    assert pairs.end_point_error(refined.fixed_to_moving, u, fixed) < 0.3


def test_easing_undoes_folds():
    u = -1.6 * (fields.identity((16, 16, 16)) - 7.5)
    u = u * torch.exp(-fields.square_sum(fields.identity((16, 16, 16)) - 7.5) / 8)
    assert float(fields.jacobian_determinant(u).min()) < 0
    assert float(fields.jacobian_determinant(syn.regularise_folds(u, 0.3, rounds=20)).min()) > 0.1


def test_easing_a_place_is_easing_there_within_the_whole():
    """Two squeezed places: the same as smoothing everywhere by the share of what is squeezed around each voxel."""
    x = fields.identity((48, 20, 24))
    dents = [-1.6 * (x - c) * torch.exp(-fields.square_sum(x - c) / 8) for c in (11.0, 9.0)]
    u = torch.cat([dents[0], dents[1].roll(20, 2)]) + 0.3 * torch.sin(x / 3)
    eased = u
    for _ in range(2):
        squeezed = (fields.jacobian_determinant(eased) < 0.3).to(u)
        assert squeezed.any()
        blend = fields.gaussian(squeezed, 1.5).mul(4).clamp(max=1)
        eased = eased + blend * (fields.gaussian(eased, 1.5) - eased)
    found = syn.regularise_folds(u, 0.3, rounds=2)
    torch.testing.assert_close(found, eased, atol=1e-5, rtol=0)
    assert float((found - u).abs().max()) > 0.1 and torch.equal(found[..., 44:, :, :], u[..., 44:, :, :])


def test_progress_rises_to_the_end(known):
    moving, fixed, _ = known
    told = []
    syn.optimise(fixed, moving, QUICK, progress=lambda stage, fraction, text: told.append(fraction))
    assert len(told) >= 2 and told == sorted(told) and told[-1] <= 1
