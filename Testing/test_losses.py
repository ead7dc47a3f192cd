"""Similarities against loops written out by hand, and their invariances (mathematics.md, 3)."""

import pytest
import torch

from SymRegistrationLib import fields, losses

SHAPE = (12, 14, 16)


def mutual_information(a, b):
    """Minus the mutual information in nats of two images, from the joint histogram that poses are scored with."""
    joint = losses.joint_histograms(a.flatten(1), b.flatten(1))
    marginal = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    return -(joint * ((joint + 1e-12) / (marginal + 1e-12)).log()).sum((1, 2)).mean()


SIMILARITIES = {
    "lncc": losses.lncc,
    "mse": losses.mse,
    "ncc": losses.ncc,
    "ssim": losses.ssim,
    "mind": losses.mind_ssd,
    "mi": mutual_information,
}


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    a = fields.gaussian(torch.rand((1, 1, *SHAPE), generator=generator), 1.0)
    b = fields.gaussian(torch.rand((1, 1, *SHAPE), generator=generator), 1.0)
    return [(x - x.min()) / (x.max() - x.min()) for x in (a, b)]


def test_lncc_equals_the_written_out_sum(images):
    a, b = (x[0, 0].double() for x in images)
    d, h, w = 5, 6, 7
    cube = (slice(d - 2, d + 3), slice(h - 2, h + 3), slice(w - 2, w + 3))
    p, q = a[cube] - a[cube].mean(), b[cube] - b[cube].mean()
    expected = (p * q).mean() ** 2 / ((p**2).mean() * (q**2).mean() + 1e-5)
    assert float(losses.lncc_map(*images, window=5)[0, 0, d, h, w]) == pytest.approx(float(expected), rel=1e-3)


def test_lncc_of_an_image_with_itself_and_with_any_contrast_of_it(images):
    a = 10 * images[0]  # variance far above eps everywhere
    inner = (0, 0, *(slice(3, n - 3) for n in SHAPE))
    assert float(losses.lncc_map(a, a, 5)[inner].min()) > 0.999
    assert float(losses.lncc_map(a, 3 - 2 * a, 5)[inner].min()) > 0.999
    flat = torch.full_like(a, 0.4).requires_grad_()
    value = losses.lncc(flat, images[1])
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(flat.grad).all()


def test_lncc_keeps_full_precision_under_autocast(images):
    plain = losses.lncc(*images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = losses.lncc(*images)
    assert mixed.dtype == torch.float32 and float((plain - mixed).abs()) < 1e-6


def test_global_ncc_is_pearson(images):
    a, b = (x.flatten() for x in images)
    expected = 1 - torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert float(losses.ncc(*images)) == pytest.approx(float(expected), abs=1e-4)
    assert float(losses.ncc(images[0], 2 * images[0] + 1)) == pytest.approx(0, abs=1e-4)


def test_masked_similarity_sees_only_the_mask(images):
    a, b = images
    mask = torch.zeros_like(a)
    mask[..., :8] = 1
    other = b.clone()
    other[..., 8:] = 0.77
    for name in ("mse", "ncc"):
        assert float(SIMILARITIES[name](a, b, mask=mask)) == pytest.approx(
            float(SIMILARITIES[name](a, other, mask=mask)), abs=1e-6
        )


def test_mind_and_mutual_information_ignore_contrast(images):
    a, b = images
    assert float(losses.mind_ssd(a, 1 - a)) < 1e-6 < 0.01 < float(losses.mind_ssd(a, b))
    same, inverted, other = (float(mutual_information(a, x)) for x in (a, 1 - a, b))
    assert inverted == pytest.approx(same, rel=0.02) and same < 5 * other < 0


def test_ssim_of_equal_images_is_perfect_and_of_shifted_brightness_is_not(images):
    a = images[0]
    assert float(losses.ssim(a, a)) == pytest.approx(0, abs=1e-5)
    assert float(losses.ssim(a, 0.5 * a)) > 0.1


@pytest.mark.parametrize("name", sorted(SIMILARITIES))
def test_analytic_gradient(name, images):
    if name == "mi":  # its windows are piecewise linear: compare with a finite step instead of gradcheck
        a, b = ((0.1 + 0.8 * x.double()).requires_grad_() for x in images)  # off the kinks at 0 and 1
        mutual_information(a, b).backward()
        direction = fields.gaussian(torch.randn_like(a.detach()), 1.0)
        step = 1e-8
        finite = (
            mutual_information(a.detach() + step * direction, b.detach())
            - mutual_information(a.detach() - step * direction, b.detach())
        ) / (2 * step)
        assert float((a.grad * direction).sum()) == pytest.approx(float(finite), rel=0.05)
        return
    a, b = (x[..., :6, :6, :6].double().clone().requires_grad_() for x in images)
    assert torch.autograd.gradcheck(SIMILARITIES[name], (a, b), eps=1e-6, atol=1e-5, rtol=1e-3)


def test_diffusion_of_a_ramp():
    u = 0.5 * fields.identity(
        (6, 7, 8)
    )  # each channel rises 0.5 a voxel along its own axis: mean square 0.25 / 3 per axis
    assert float(losses.diffusion(u)) == pytest.approx(0.25 / 3, rel=1e-5)


def test_negative_jacobian_counts_only_folding():
    assert float(losses.negative_jacobian(-0.5 * fields.identity((6, 6, 6)))) == 0
    assert float(losses.negative_jacobian(-1.5 * fields.identity((6, 6, 6)))) == pytest.approx(0.125, rel=1e-4)
