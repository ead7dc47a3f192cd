"""Field mathematics against closed forms (mathematics.md, 1 and 2)."""

import pytest
import torch
import torch.nn.functional as F

from SymRegistrationLib import fields
from SymRegistrationLib.fields import inversion

SHAPE = (20, 26, 32)
SEED = 7


def smooth(size: float, sigma: float = 5.0, shape=SHAPE, dtype=torch.float32, seed: int = SEED) -> torch.Tensor:
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    u = fields.gaussian(torch.randn((1, 3, *shape), generator=generator, dtype=dtype), sigma)
    return u * size / u.abs().max()


def test_zero_field_changes_nothing():
    image = torch.rand(2, 1, *SHAPE)
    zero = torch.zeros(2, 3, *SHAPE)
    # grid_sample's normalised float32 coordinates cannot name every voxel centre exactly: 1e-5 of a voxel remains
    torch.testing.assert_close(fields.warp(image, zero), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(fields.warp(image.double(), zero.double()), image.double(), atol=1e-13, rtol=0)
    assert torch.equal(fields.jacobian_determinant(zero), torch.ones(2, 1, *SHAPE))
    assert fields.sd_log_jacobian(fields.jacobian_determinant(zero)) == 0
    assert fields.exponentiate(zero).abs().max() == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift_moves_content_the_other_way_along_its_own_axis(axis):
    image = torch.rand(1, 1, *SHAPE)
    u = torch.zeros(1, 3, *SHAPE)
    u[:, axis] = 3
    expected = torch.roll(image, -3, dims=axis + 2)
    inner = tuple(slice(0, n - 3) for n in SHAPE)
    torch.testing.assert_close(fields.warp(image, u)[0, 0][inner], expected[0, 0][inner], atol=1e-5, rtol=0)


def test_values_at_points_are_those_of_a_linear_ramp_between_voxels_and_of_the_border_outside():
    shape = (5, 1, 9)
    ramp = torch.cat([fields.identity(shape, dtype=torch.float64), fields.identity(shape, dtype=torch.float64) + 2.0])
    points = torch.tensor([[1.25, 0.0, 7.5], [4.0, 0.0, 0.0], [-3.0, 6.0, 11.0]]).expand(2, 3, 3)
    at = fields.sample_at(ramp, points)
    expected = torch.tensor([[1.25, 0, 7.5], [4, 0, 0], [0, 0, 8]], dtype=torch.float64)
    torch.testing.assert_close(at, torch.stack([expected, expected + 2]), atol=1e-12, rtol=0)


def test_one_volume_is_sampled_by_all_threads_also_when_its_depth_is_odd(monkeypatch):
    """torch's kernel shares out the batch only, so parts of the volume must be one: (parts, layers of each)."""
    image, u, calls = torch.rand(1, 1, *SHAPE), smooth(2.0, shape=(21, 8, 9)), []
    once = F.grid_sample

    def counted(image, grid, **how):
        calls.append(tuple(grid.shape[:2]))
        return once(image, grid, **how)

    monkeypatch.setattr(F, "grid_sample", counted)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(fields.warp(image, u))
    finally:
        torch.set_num_threads(threads)
    assert calls == [(1, 21), (2, 10), (1, 1)] and torch.equal(*found)


def test_warping_by_a_composition_is_warping_twice():
    first, then = smooth(3), smooth(2, seed=8)
    ramp = fields.identity(SHAPE)  # linear interpolation is exact on a ramp, so both sides must agree
    twice = fields.warp(fields.warp(ramp, first), then)
    once = fields.warp(ramp, fields.compose(first, then))
    inner = (slice(None), slice(None), *(slice(5, n - 5) for n in SHAPE))
    torch.testing.assert_close(once[inner], twice[inner], atol=1e-4, rtol=0)


def test_small_steps_are_composed_as_all_are():
    """Along one axis alone exactly; along several, what is missing is the product of two components."""
    first = smooth(3)
    step = torch.zeros_like(first)
    for axis in range(3):
        alone = step.clone()
        alone[:, axis] = smooth(1.0, seed=8)[:, axis]
        torch.testing.assert_close(fields.compose_step(first, alone), fields.compose(first, alone), atol=2e-5, rtol=0)
    step = smooth(0.5, seed=8)
    apart = fields.compose_step(first, step) - fields.compose(first, step)
    mixed = sum(fields.gradient(fields.gradient(first, a), b).abs().max() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert 0 < float(apart.abs().max()) < 0.5**2 * float(mixed)


def test_exponential_of_minus_v_is_the_inverse():
    v = smooth(4, sigma=6)
    residual = fields.inverse_consistency(fields.exponentiate(v), fields.exponentiate(-v))
    assert float(residual[..., 3:-3, 3:-3, 3:-3].max()) < 0.05
    assert float(fields.jacobian_determinant(fields.exponentiate(v)).min()) > 0


def test_exponential_of_a_constant_velocity_is_that_shift():
    v = torch.ones(1, 3, 12, 12, 12) * torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(fields.exponentiate(v), v, atol=1e-5, rtol=0)


def test_resizing_keeps_maps():
    u = torch.zeros(1, 3, 11, 11, 11)
    u[:, 1] = 2.0
    finer = fields.resize_field(u, (21, 31, 11))
    torch.testing.assert_close(finer[:, 1], torch.full((1, 21, 31, 11), 6.0))  # (31 - 1) / (11 - 1) = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_determinant_of_an_affine_field(dtype):
    g = torch.tensor([[0.1, 0.2, 0.0], [-0.1, -0.2, 0.3], [0.05, 0.0, 0.15]], dtype=dtype)
    u = torch.einsum("ca,nadhw->ncdhw", g, fields.identity((6, 7, 8), dtype=dtype))
    expected = float(torch.linalg.det(torch.eye(3, dtype=dtype) + g))
    assert torch.allclose(fields.jacobian_determinant(u), torch.tensor(expected, dtype=dtype), atol=1e-5)
    # in mm: displacement vectors Q g index, with Q the index-to-mm matrix, have the same determinant
    q = torch.tensor([[0.0, 0.0, 1.2], [0.0, 1.5, 0.0], [3.0, 0.0, 0.0]], dtype=dtype)
    mm = torch.einsum("ca,nadhw->ncdhw", q, u)
    assert torch.allclose(fields.jacobian_determinant(mm, q), torch.tensor(expected, dtype=dtype), atol=1e-5)


@pytest.mark.parametrize("factor, det, folded", [(-0.5, 0.125, 0.0), (-1.5, -0.125, 1.0)])
def test_shrinking_and_turning_inside_out(factor, det, folded):
    determinant = fields.jacobian_determinant(factor * fields.identity((6, 7, 8)))
    assert torch.allclose(determinant, torch.tensor(det), atol=1e-5)
    assert float((determinant <= 0).float().mean()) == folded


def test_filters_are_what_they_say():
    image = torch.rand(2, 3, *SHAPE)
    weights = torch.ones(3, 1, 5, 5, 5) / 125
    expected = F.conv3d(image, weights, padding=2, groups=3)
    torch.testing.assert_close(fields.box_mean(image, 5), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(fields.gaussian(torch.ones(1, 1, *SHAPE), 2.0), torch.ones(1, 1, *SHAPE))
    spot = torch.zeros(1, 1, 41, 41, 41, dtype=torch.float64)
    spot[..., 20, 20, 20] = 1
    blurred = fields.gaussian(spot, 2.0)
    x = torch.arange(41) - 20.0
    assert float((blurred.sum((2, 3, 4)) - 1).abs()) < 1e-9
    assert float((blurred[0, 0].sum((1, 2)) * x**2).sum()) == pytest.approx(4.0, rel=0.01)  # variance = sigma^2


def test_batches_and_gradients():
    u = torch.cat([smooth(2), smooth(3, seed=9)]).requires_grad_()
    image = torch.rand(2, 2, *SHAPE)
    together = fields.warp(image, u)
    alone = torch.cat([fields.warp(image[k : k + 1], u[k : k + 1]) for k in range(2)])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    together.sum().backward()
    assert float(u.grad.abs().sum()) > 0


def test_gradient_of_composition_is_right_in_float64():
    first, then = (smooth(1.5, 2.0, (5, 6, 7), torch.float64, s).requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(lambda a, b: fields.compose(a, b).sum((1, 2)), (first, then), eps=1e-6, atol=1e-6)


def test_arguments_are_left_alone_and_wrong_ones_refused():
    u, image = smooth(2), torch.rand(1, 1, *SHAPE)
    before = u.clone(), image.clone()
    fields.warp(image, u), inversion.invert(u), fields.exponentiate(u), fields.gaussian(image, 1.0)
    assert torch.equal(before[0], u) and torch.equal(before[1], image)
    with pytest.raises(ValueError, match=r"\(N, 3, D, H, W\)"):
        fields.warp(image, image)
    with pytest.raises(ValueError, match="N = 1 or 1"):
        fields.warp(torch.rand(2, 1, *SHAPE), u)
