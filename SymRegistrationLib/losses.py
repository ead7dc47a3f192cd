"""Similarity and regularity as plain functions of (N, C, D, H, W) tensors (mathematics.md, 3 and 4).

Every similarity is a loss: smaller is better. All are computed in float32 or better, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fields import box_mean, jacobian_determinant, no_autocast


def _full_precision(*images: Tensor) -> tuple[Tensor, ...]:
    return tuple(image.float() if image.dtype in (torch.float16, torch.bfloat16) else image for image in images)


def local_moments(a: Tensor, b: Tensor, window: int) -> tuple[Tensor, ...]:
    """Local means, variances and covariance over a cube: (mean_a, mean_b, var_a, var_b, cov), variances >= 0."""
    n = a.shape[1]
    mean_a, mean_b, aa, bb, ab = box_mean(torch.cat([a, b, a * a, b * b, a * b], 1), window).split(n, 1)
    return (
        mean_a,
        mean_b,
        (aa - mean_a * mean_a).clamp_min(0),
        (bb - mean_b * mean_b).clamp_min(0),
        ab - mean_a * mean_b,
    )


def lncc_map(a: Tensor, b: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Squared local correlation, 0..1, over a cube of ``window`` voxels (mathematics.md, 3.2)."""
    a, b = _full_precision(a, b)
    with no_autocast(a):
        _, _, var_a, var_b, cov = local_moments(a, b, window)
        return cov * cov / (var_a * var_b + eps)


def lncc(a: Tensor, b: Tensor, window: int = 9, eps: float = 1e-5, mask: Tensor | None = None) -> Tensor:
    """-mean of :func:`lncc_map` over all voxels, or weighted by ``mask``; -1 is perfect."""
    return -_mean(lncc_map(a, b, window, eps), mask)


def lncc_force(a: Tensor, b: Tensor, window: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exact gradient of sum(cc) with respect to both images (adjoint of the box filters included), and the mean of cc.

    cc = cov^2 / (va vb + eps); its adjoint needs the box means of A = 2 cov / den, B = -cc vb / den and C = -cc va /
    den and of their products with the local means (mathematics.md, 3.2).

    Args:
        a, b: (N, 1, D, H, W). window: odd, voxels. weight: (N, 1, D, H, W), or ``None`` = everywhere.

    Returns:
        (2 N, 1, D, H, W): derivatives with respect to ``a`` and, behind them, to ``b``, not differentiable itself; and
        the mean of cc, a scalar on their device.
    """
    terms = a.new_empty(a.shape[0], 5, *a.shape[2:])
    for term, (one, other) in zip(terms[:, 2:].split(1, 1), ((a, a), (b, b), (a, b))):
        torch.mul(one, other, out=term)
    terms[:, :1], terms[:, 1:2] = a, b
    mean_a, mean_b, var_a, var_b, cov = box_mean(terms, window).split(1, 1)
    var_a.addcmul_(mean_a, mean_a, value=-1).clamp_min_(0)
    var_b.addcmul_(mean_b, mean_b, value=-1).clamp_min_(0)
    cov.addcmul_(mean_a, mean_b, value=-1)
    p = (2 * cov).div_((var_a * var_b).add_(1e-5))  # A; cc = p cov / 2, B = -p p vb / 4, C = -p p va / 4
    quarter = (p * p).mul_(-0.25)
    if weight is None:
        value = cov.mul_(p).mean() / 2
    else:
        value = cov.mul_(p).mul_(weight).sum() / (2 * weight.sum()).clamp_min(1e-6)
        p, quarter = p.mul_(weight), quarter.mul_(weight)
    terms[:, :1] = p
    torch.mul(quarter, var_b, out=terms[:, 1:2])
    torch.mul(quarter, var_a, out=terms[:, 2:3])
    torch.mul(p, mean_b, out=terms[:, 3:4]).addcmul_(terms[:, 1:2], mean_a, value=2)
    torch.mul(p, mean_a, out=terms[:, 4:]).addcmul_(terms[:, 2:3], mean_b, value=2)
    p, q, r, ab, ba = box_mean(terms, window).split(1, 1)
    force = torch.cat([ab, ba]).neg_()
    force[: len(a)].addcmul_(b, p).addcmul_(a, q, value=2)
    force[len(a) :].addcmul_(a, p).addcmul_(b, r, value=2)
    return force, value


def mse(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference."""
    a, b = _full_precision(a, b)
    return _mean((a - b) ** 2, mask)


def ncc(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - Pearson correlation over the volume, mean over the batch (AD-RegNet eq. 20); 0 is perfect."""
    a, b = _full_precision(a, b)
    weight = torch.ones_like(a) if mask is None else mask.to(a).expand_as(a)
    total = weight.flatten(1).sum(1).clamp_min(1e-6).view(-1, 1, 1, 1, 1)

    def centred(x: Tensor) -> Tensor:
        return x - (x * weight).flatten(1).sum(1).view(-1, 1, 1, 1, 1) / total

    a, b = centred(a), centred(b)
    cov = (weight * a * b).flatten(1).sum(1)
    var = (weight * a * a).flatten(1).sum(1) * (weight * b * b).flatten(1).sum(1)
    return (1 - cov / (var.sqrt() + 1e-6)).mean()


def ssim(a: Tensor, b: Tensor, window: int = 7, mask: Tensor | None = None) -> Tensor:
    """1 - mean local structural similarity (AD-RegNet eq. 22), cube window, C1 = 0.01^2, C2 = 0.03^2 for
    [0, 1] data."""
    a, b = _full_precision(a, b)
    with no_autocast(a):
        mean_a, mean_b, var_a, var_b, cov = local_moments(a, b, window)
        c1, c2 = 0.01**2, 0.03**2
        value = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
        value = value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        return 1 - _mean(value, mask)


def mind(image: Tensor, radius: int = 1, dilation: int = 2) -> Tensor:
    """MIND-SSC: 12 self-similarity channels that do not depend on the contrast (Heinrich 2013).

    Patch distances between the pairs of six neighbours that are not opposite each other, divided by their local mean.

    Returns:
        (N, 12, D, H, W), each channel 0..1.
    """
    (image,) = _full_precision(image)
    with no_autocast(image):
        shifts = [tuple(s if axis == k else 0 for k in range(3)) for axis in range(3) for s in (-dilation, dilation)]
        padded = F.pad(image, (dilation,) * 6, mode="replicate")
        shape = image.shape[2:]

        def moved(shift: Sequence[int]) -> Tensor:
            part = padded
            for axis, (s, n) in enumerate(zip(shift, shape)):
                part = part.narrow(axis + 2, dilation + s, n)
            return part

        views = [moved(shift) for shift in shifts]
        distances = torch.cat([(views[i] - views[j]) ** 2 for i in range(6) for j in range(i) if i // 2 != j // 2], 1)
        distances = box_mean(distances, 2 * radius + 1)
        distances = distances - distances.amin(1, keepdim=True)
        variance = distances.mean(1, keepdim=True)
        floor = variance.mean((2, 3, 4), keepdim=True)
        return torch.exp(-distances / variance.clamp(min=1e-3 * floor, max=1e3 * floor).clamp_min(1e-12))


def mind_ssd(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of MIND-SSC features: works across contrasts; 0 is perfect."""
    return _mean((mind(a) - mind(b)) ** 2, mask)


def joint_histograms(a: Tensor, b: Tensor, weight: Tensor | None = None, bins: int = 32) -> Tensor:
    """(K, bins, bins) joint distributions of K pairs of samples (K, n) in [0, 1]; each sample is spread linearly over
    its 2 x 2 nearest bins, so that it is differentiable."""
    xs, ys = (v.clamp(0, 1) * (bins - 1) for v in (a, b))
    x0, y0 = (v.detach().floor().clamp(max=bins - 2) for v in (xs, ys))
    fx, fy = xs - x0, ys - y0
    base = torch.arange(len(a), device=a.device)[:, None] * bins * bins + (x0 * bins + y0).long()
    joint = a.new_zeros(len(a) * bins * bins)
    gx = 1 - fx if weight is None else (1 - fx) * weight
    fx = fx if weight is None else fx * weight
    for dx, wx in ((0, gx), (1, fx)):
        right = wx * fy
        joint = joint.index_add(0, (base + dx * bins).flatten(), (wx - right).flatten())
        joint = joint.index_add(0, (base + dx * bins + 1).flatten(), right.flatten())
    joint = joint.view(-1, bins, bins)
    return joint / joint.sum((1, 2), keepdim=True).clamp_min(1e-12)


def diffusion(u: Tensor) -> Tensor:
    """Mean squared forward difference of a field, averaged over the three axes (mathematics.md, 4.1), voxel units."""
    terms = [(u.narrow(d, 1, u.shape[d] - 1) - u.narrow(d, 0, u.shape[d] - 1)).square().mean() for d in (2, 3, 4)]
    return (terms[0] + terms[1] + terms[2]) / 3


def negative_jacobian(u: Tensor) -> Tensor:
    """Mean of relu(-det(I + grad u)): zero without folding (AD-RegNet's L_jac)."""
    return F.relu(-jacobian_determinant(u)).mean()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weight = mask.to(values).expand(values.shape[0], 1, *values.shape[2:])
    return (values * weight).sum() / (weight.sum() * values.shape[1]).clamp_min(1e-6)
