"""Whether a registration did any good, by a measure that knows no contrast and estimates its own noise.

The scans as their headers lay them, after the alignment and after the method are compared on one grid by normalised
mutual information. The gain of one state over another is summed over blocks of the grid; how much the blocks disagree
is its noise. A state that is worse than an earlier one beyond the noise is not delivered.

Information can also agree by chance, or because two silhouettes overlap. Therefore the inside alone, where both scans
show something, is compared with the same scans moved apart by a few voxels in six directions: anatomy that corresponds
loses information then, anatomy that does not loses none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..fields import FieldPair, sample_at, warp
from ..geometry.grid import transform_points
from ..losses import joint_histograms
from .working_grid import Scan, WorkingPair, resample

#: Grey levels of the histograms, and voxels of the grid that are looked at (more are thinned out evenly).
BINS, VOXELS = 24, 150_000
#: Blocks per axis over which gains are summed.
BLOCKS = 6
#: A gain counts from so many standard errors on.
CLEAR = 2.0
#: A deformation between two contrasts counts from so many on: what it fits of their noise grows, too. Measured with
#: known warps of kirby113 and none (RESULTS.md): where errors fell 11.5 to 17.9, where there was no warp at most 4.9.
CLEAR_BETWEEN_CONTRASTS = 8.0
#: Normalised mutual information that interpolation alone moves; no noise is taken for smaller.
LEAST_NOISE = 1e-3
#: Brightness (of the robust range) above which a scan shows something.
SHOWN = 0.1
#: The inside is moved apart by this share of its extent, at least two voxels.
APART = 0.06
#: Fewer samples of the inside than this cannot be judged.
LEAST_INSIDE = 500

#: Detail in the deformation between scans of one contrast must add this share of mutual information to what the
#: alignment shares. Measured (results/contrasts.md): two visits of one patient 0.13 to 0.18, where detail took the
#: result away from the truth; breathing livers 0.20 to 0.69, brains and heads of two people 0.46 to 0.77.
DETAIL = 0.19

STATES = ("as scanned", "aligned", "registered")


@dataclass(frozen=True)
class Evidence:
    """What speaks for a result.

    Attributes:
        before, aligned, after: normalised mutual information minus 1 of the three states on one grid; 0..1.
        gain_aligned, gain_after: how many standard errors the aligned state is ahead of the scanned one, and the
            registered one of the aligned.
        gain: the same of the registered one over the scanned one.
        structure: by how many standard errors the inside of the best state agrees better than moved apart, in the
            direction where that costs least; None when there is too little inside.
        covered: share of the smaller content that lies on content of the other scan in the best state, within the
            fields of view.
        shared: share of one scan's content that lies on content of the other at the pose of the best state, within the
            fields of view; of the scan with the smaller share. Half of it is missing when one scan is half empty.
        best: of :data:`STATES`.
    """

    before: float
    aligned: float
    after: float
    gain_aligned: float
    gain_after: float
    gain: float
    structure: float | None
    covered: float
    shared: float
    best: str


@torch.no_grad()
def weigh(scans: Sequence[Scan], space: WorkingPair, pair: FieldPair, two_contrasts: bool = False) -> Evidence:
    """Compare the three states of a run.

    Args:
        scans: fixed and moving, prepared.
        space: the working pair at its alignment.
        pair: the method's result on it.
        two_contrasts: a deformation must then be clearly better than the alignment, because the similarity that drove
            it is noisy (a warp of kirby113 T1 <- T2 went from 0.78 mm aligned to 1.03 mm); else it must not be worse.
    """
    stride = max(1, round((space.fixed.numel() / VOXELS) ** (1 / 3)))
    thin = (..., *(slice(None, None, stride),) * 3)
    headers, known = resample(scans[1], space.grid, space.mid_to_fixed)
    states, weights = [headers, space.moving], [known, None if space.weight is None else space.weight[1:]]
    states.append(warp(space.moving, pair.fixed_to_moving))
    weights.append(None if weights[1] is None else warp(weights[1], pair.fixed_to_moving, padding="zeros"))
    fixed, own = space.fixed[thin], None if space.weight is None else space.weight[:1][thin]
    states = [state[thin] for state in states]
    weights = [_product(own, None if w is None else w[thin]) for w in weights]
    (headers_value, aligned_value, after_value), maps = zip(
        *(_information(fixed, state, weight) for state, weight in zip(states, weights))
    )
    gains = {(k, m): _z(maps[m] - maps[k]) for k, m in ((0, 1), (1, 2), (0, 2))}
    best = 2 if gains[1, 2] > (CLEAR_BETWEEN_CONTRASTS if two_contrasts else -CLEAR) else 1
    if gains[0, best] < -CLEAR:
        best = 0
    return Evidence(
        headers_value,
        aligned_value,
        after_value,
        gain_aligned=gains[0, 1],
        gain_after=gains[1, 2],
        gain=gains[0, 2],
        structure=_structure(fixed, states[best], weights[best]),
        covered=_covered(fixed, states[best], weights[best]),
        shared=_shared(scans, space.mid_to_moving @ np.linalg.inv(space.mid_to_fixed) if best else np.eye(4)),
        best=STATES[best],
    )


@torch.no_grad()
def detail_is_noise(space: WorkingPair, halves: Tensor) -> bool:
    """Whether half-way fields (2, 3, D, H, W) add so little to what the aligned scans share that their detail follows
    noise and partial volume rather than anatomy: less than :data:`DETAIL` of the mutual information.

    Never where something slides, or where further contrasts say more."""
    if space.regions is not None or space.contrasts:
        return False
    stride = max(1, round((space.fixed.numel() / VOXELS) ** (1 / 3)))
    thin = (..., *(slice(None, None, stride),) * 3)
    images = torch.cat([space.fixed, space.moving])
    aligned, bent = (
        _information(pair[:1][thin], pair[1:][thin], None if known is None else known.prod(0, keepdim=True)[thin])[0]
        for pair, known in (
            (images, space.weight),
            (warp(images, halves), None if space.weight is None else warp(space.weight, halves, padding="zeros")),
        )
    )
    return bent < (1 + DETAIL) * aligned


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _information(a: Tensor, b: Tensor, weight: Tensor | None) -> tuple[float, Tensor]:
    """Normalised mutual information minus 1 of two volumes, and a map whose sum is that number, voxel by voxel what
    each says of the other."""
    x, y = a.flatten()[None], b.flatten()[None]
    w = torch.ones_like(x) if weight is None else weight.flatten()[None]
    joint = joint_histograms(x, y, w, BINS)[0]
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    said = ((joint + 1e-12) / (apart + 1e-12)).log()
    at = [(v[0].clamp(0, 1) * (BINS - 1)).round().long() for v in (x, y)]
    entropy = -(joint * (joint + 1e-12).log()).sum().clamp_max(-1e-6)
    share = said[at[0], at[1]] * w[0] / (w.sum().clamp_min(1) * entropy)
    return float((joint * said).sum() / entropy), share.view_as(a)


def _z(values: Tensor) -> float:
    """The sum of a map in standard errors, estimated from how much its blocks differ."""
    edges = [torch.linspace(0, n, min(BLOCKS, n) + 1).round().long().tolist() for n in values.shape[2:]]
    sums = torch.stack(
        [
            values[0, 0, a:b, c:d, e:f].sum()
            for (a, b), (c, d), (e, f) in itertools.product(*(itertools.pairwise(one) for one in edges))
        ]
    )
    sums = sums[sums != 0]
    if len(sums) < 4:
        return 0.0
    return float(sums.sum() / (len(sums) * sums.var()).sqrt().clamp_min(LEAST_NOISE))


def _structure(a: Tensor, b: Tensor, weight: Tensor | None) -> float | None:
    """See :class:`Evidence`; the direction that loses least counts, because a pose that is off gains in one."""
    inside = (a > SHOWN) & (b > SHOWN) & (True if weight is None else weight > 0.5)
    if int(inside.sum()) < LEAST_INSIDE:
        return None
    extent = max(float(where.max() - where.min()) for where in inside[0, 0].nonzero().T)
    step = max(2, round(APART * extent))
    here, lost = _information(a, b, inside.to(a))[1], []
    for axis, sign in itertools.product((2, 3, 4), (-1, 1)):
        moved = b.roll(sign * step, axis)
        both = inside & (moved > SHOWN)
        lost.append(_z(here - _information(a, moved, both.to(a))[1]))
    return min(lost)


def _covered(a: Tensor, b: Tensor, weight: Tensor | None) -> float:
    known = torch.ones_like(a, dtype=torch.bool) if weight is None else weight > 0.5
    x, y = (a > SHOWN) & known, (b > SHOWN) & known
    return float((x & y).sum() / torch.minimum(x.sum(), y.sum()).clamp_min(1))


def _shared(scans: Sequence[Scan], pose: np.ndarray) -> float:
    """See :class:`Evidence`; ``pose`` is (4, 4) LPS mm, fixed -> moving."""
    (fixed, moving), shares = scans, []
    for here, there, to in ((fixed, moving, pose), (moving, fixed, np.linalg.inv(pose))):
        index = transform_points(there.grid.inverse @ to, here.inside)
        value = sample_at(there.image, torch.from_numpy(index)[None].to(there.image))[0, :, 0]
        within = ((index >= 0) & (index <= np.array(there.grid.shape) - 1)).all(1)
        known = torch.from_numpy(within if there.cut else np.ones_like(within)).to(value.device)
        shown = (value > SHOWN / 2) & torch.from_numpy(within).to(value.device)
        shares.append(float(shown[known].float().mean()) if bool(known.any()) else 0.0)
    return min(shares)
