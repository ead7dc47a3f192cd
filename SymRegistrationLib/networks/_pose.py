"""A learned pose: key points, and the affine map that carries one scan's onto the other's.

Convolutions see a few voxels at a time, so a turn of 40 degrees or a shift of 50 mm costs them far more training than
all the detail that follows. Key points need far less: a small network marks the same places in both scans, and
their affine map has a closed form (KeyMorph: Yu, Wang, Dalca, Sabuncu, MIDL 2022, is the idea; formulas and code are ours).

With weights w, points p_f and p_m, means c_f and c_m, the generator L minimises::

    sum w |d - L q|^2 + RIDGE |L|^2      d = (p_m - c_m) - (p_f - c_f),  q = ((p_m - c_m) + (p_f - c_f)) / 2

and, with N(y) = L/2 (y - (c_m + c_f)/2) + (c_m - c_f)/2, the scans meet in a mean frame: y + N(y) lies in the moving scan,
y - N(y) in the fixed one. Exchanging the scans turns N into -N exactly; nothing has to be inverted but a 3 x 3 matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import identity, sample
from ._blocks import Conv3d
from ._match import normed_block

#: Voxels that count as one in the closed form, and the pull of the generator towards zero.
_UNIT, _RIDGE = 32.0, 0.002
#: Longest (Frobenius) symmetric and skew part of the generator: a stretch by about 2.3, a turn by about 93 degrees.
_STRETCH, _TURN = 0.8, 3.0
#: Voxels of the input per cell of the key points' lattice.
_CELL = 4


class KeyPoints(nn.Module):
    """One scan -> the same places in every scan, and how surely each was seen.

    Args:
        count: of key points.
        widths: channels at 1/2, 1/4, 1/8 and 1/16 of the input.
    """

    def __init__(self, count: int, widths: tuple[int, int, int, int] = (16, 32, 64, 64)):
        super().__init__()
        a, b, c, d = widths
        deeper = (nn.Sequential(normed_block(p, q), normed_block(q, q)) for p, q in ((a, b), (b, c), (c, d)))
        self.down = nn.ModuleList([normed_block(1, a), *deeper])
        self.up = nn.ModuleList([normed_block(c + d, c), normed_block(b + c, c)])
        self.places, self.sight = Conv3d(c, count, 1), Conv3d(c, count, 1)
        nn.init.normal_(self.places.weight, 0.0, 0.3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, D, H, W) -> (N, K, 3) voxel positions, (N, K) in (0, 1)."""
        x, maps = image, []
        for part in self.down:
            x = part(F.avg_pool3d(x, 2))
            maps.append(x)
        for part, finer in zip(self.up, (maps[2], maps[1])):
            x = part(torch.cat([F.interpolate(x, size=finer.shape[2:], mode="trilinear"), finer], 1))
        share = self.places(x).flatten(2).softmax(2)
        cells = identity(x.shape[2:], x.device).flatten(2)[0]
        where = _CELL * (share @ cells.T + 0.5) - 0.5
        return where, (share * self.sight(x).flatten(2)).sum(2).sigmoid()


@dataclass(frozen=True, eq=False)
class Pose:
    """N(y) = ``linear`` (y - ``centre``) + ``push``, voxels: (N, 3, 3), (N, 3), (N, 3)."""

    linear: Tensor
    centre: Tensor
    push: Tensor

    def offset(self, points: Tensor) -> Tensor:
        """N at (N, 3, D, H, W) voxel positions."""
        return _apply(self.linear, points - _spread(self.centre)) + _spread(self.push)

    def forward(self, points: Tensor) -> Tensor:
        """Where positions of the fixed scan lie in the moving one."""
        met = self.to_mean(points, -1)
        return met + self.offset(met)

    def to_mean(self, points: Tensor, side: int) -> Tensor:
        """Where positions of the moving (+1) or fixed (-1) scan lie in the mean frame: solves y + side N(y) = x."""
        matrix = torch.linalg.inv(torch.eye(3, device=points.device) + side * self.linear)
        return _apply(matrix, points - _spread(self.centre + side * self.push)) + _spread(self.centre)


def fitted_pose(moving: Tensor, fixed: Tensor, weight: Tensor) -> Pose:
    """The pose that carries key points onto each other; see the file's docstring.

    Args:
        moving, fixed: (N, K, 3) voxels. weight: (N, K), positive.
    """
    m, f = moving / _UNIT, fixed / _UNIT
    w = (weight / weight.sum(1, keepdim=True))[..., None]
    c_m, c_f = (w * m).sum(1, keepdim=True), (w * f).sum(1, keepdim=True)
    d, q = (m - c_m) - (f - c_f), ((m - c_m) + (f - c_f)) / 2
    scatter = (w * q).transpose(1, 2) @ q + _RIDGE * torch.eye(3, device=m.device)
    generator = torch.linalg.solve(scatter, (w * q).transpose(1, 2) @ d).transpose(1, 2)
    even, odd = (generator + generator.transpose(1, 2)) / 2, (generator - generator.transpose(1, 2)) / 2
    generator = _bounded(even, _STRETCH) + _bounded(odd, _TURN)
    return Pose(generator / 2, _UNIT * (c_m + c_f)[:, 0] / 2, _UNIT * (c_m - c_f)[:, 0] / 2)


def _bounded(matrix: Tensor, longest: float) -> Tensor:
    length = matrix.square().sum((1, 2), keepdim=True).add(1e-12).sqrt()
    return matrix * (longest / length).clamp(max=1.0)


def _spread(vector: Tensor) -> Tensor:
    return vector[:, :, None, None, None]


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    return torch.einsum("nij,njdhw->nidhw", matrix, points)


def pose_terms(pose: Pose, points: tuple[Tensor, Tensor], sure: Tensor, pair: Any) -> dict[str, Tensor] | None:
    """Distances in voxels / 10 of mapped places, key points and label centroids from where they belong.

    Args:
        points: (moving, fixed) key points. sure: (N, K), how surely both were seen.
        pair: a ``synthetic.Pair``; ``None`` is returned when it knows neither true map nor labels.
    """
    if pair.fixed_to_moving is None:
        return _centroid_terms(pose, pair) if pair.fixed_labels is not None else None
    m, f = points
    here, true = (x[..., ::_CELL, ::_CELL, ::_CELL] for x in (identity(pair.fixed.shape[2:], m.device), pair.fixed_to_moving))
    seen = (pair.fixed[..., ::_CELL, ::_CELL, ::_CELL] > 0.05).float()
    error = _length(pose.forward(here) - here - true)
    grid = [2 * f[..., axis] / max(n - 1, 1) - 1 for axis, n in enumerate(pair.fixed.shape[2:])]
    at = sample(pair.fixed_to_moving, torch.stack(grid[::-1], -1)[:, :, None, None])[..., 0, 0].transpose(1, 2)
    apart = (f + at - m).square().sum(-1).add(1e-6).sqrt()
    sure = sure.detach()
    return {"pose": 0.1 * (error * seen).sum() / seen.sum().clamp_min(1), "key_points": 0.02 * (apart * sure).sum() / sure.sum()}


def _length(u: Tensor) -> Tensor:
    return u.square().sum(1, keepdim=True).add(1e-6).sqrt()


def _centroid_terms(pose: Pose, pair: Any) -> dict[str, Tensor]:
    """Of two people's scans only the labels are known: their centroids belong together, large labels more surely."""
    (f, many_f), (m, many_m) = (_centroids(x, len(pair.values)) for x in (pair.fixed_labels, pair.moving_labels))
    labelled = torch.tensor([v != 0 for v in pair.values], device=f.device)
    weight = torch.minimum(many_f, many_m).clamp(max=200.0) * labelled
    error = _length(pose.forward(f.T[None, :, :, None, None]) - m.T[None, :, :, None, None])[0, 0, :, 0, 0]
    return {"pose": 0.1 * (error * weight).sum() / weight.sum().clamp_min(1)}


def _centroids(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(K, 3) voxels and (K,) sizes of labels (1, 1, D, H, W), seen at every second voxel."""
    thin = labels[0, 0, ::2, ::2, ::2]
    cells = 2 * identity(thin.shape, labels.device)[0].flatten(1)
    index = thin.flatten().long()
    sizes = torch.bincount(index, minlength=count).float()
    sums = torch.stack([torch.bincount(index, cells[axis], minlength=count) for axis in range(3)], 1)
    return sums.float() / sizes.clamp_min(1)[:, None], sizes
