"""A learned pose: key points, and the affine map that carries one scan's onto the other's.

Convolutions see a few voxels at a time, so a turn of 40 degrees or a shift of 50 mm costs them far more training than
all the detail that follows. Key points need far less: a small network marks the same places in both scans, and
their affine map has a closed form (KeyMorph: Yu, Wang, Dalca, Sabuncu, MIDL 2022, is the idea; formulas and code are
ours). The network sees self-similarity (MIND-SSC) instead of brightness: inverting a contrast changes nothing.

With weights w, points p_f and p_m, means c_f and c_m, the generator L minimises::

    sum w |d - L q|^2 + RIDGE |L|^2      d = (p_m - c_m) - (p_f - c_f),  q = ((p_m - c_m) + (p_f - c_f)) / 2

and, with N(y) = L/2 (y - (c_m + c_f)/2) + (c_m - c_f)/2, the scans meet in a mean frame: y + N(y) lies in the
moving scan, y - N(y) in the fixed one. Exchanging the scans turns N into -N exactly; nothing has to be inverted but
a 3 x 3 matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import identity, sample_at, settled, warp
from ..losses import mind
from ._blocks import Conv3d
from ._match import normed_block

#: Voxels that count as one in the closed form, and the pull of the generator towards zero.
_UNIT, _RIDGE = 32.0, 0.002
#: Longest (Frobenius) symmetric and skew part of the generator: a stretch by about 2.3, a turn by about 93 degrees.
_STRETCH, _TURN = 0.8, 3.0
#: Reach of the self-similarity that stands for the image, in voxels of half the input's resolution.
_DILATIONS = (1, 2)
#: Turns that a pose is looked for from, degrees either way: about each axis, and about each diagonal.
_AXIS_TURN, _DIAGONAL_TURN = 50.0, 60.0
#: Key points that meet within so many voxels on average need no further search: those of two people at the right
#: pose do.
_MEET = 1.6
#: Key points further apart than this were not found: on other organs than the training's, say.
_LOST = 3.0
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
        self.down = nn.ModuleList([normed_block(12 * len(_DILATIONS), a), *deeper])
        self.up = nn.ModuleList([normed_block(c + d, c), normed_block(b + c, c)])
        self.places, self.sight = Conv3d(c, count, 1), Conv3d(c, count, 1)
        nn.init.normal_(self.places.weight, 0.0, 0.3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, D, H, W) -> (N, K, 3) voxel positions, (N, K) in (0, 1)."""
        return self.from_half(F.avg_pool3d(image, 2))

    def from_half(self, half: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, of an image averaged over 2 x 2 x 2 voxels; positions are in voxels of the whole image."""
        with torch.no_grad():
            likeness = torch.cat([mind(half, dilation=d) for d in _DILATIONS], 1)
        maps = [self.down[0](likeness)]
        for part in self.down[1:]:
            maps.append(part(F.avg_pool3d(maps[-1], 2)))
        x = maps[-1]
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

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """``linear``, ``centre``, ``push``."""
        return self.linear, self.centre, self.push

    def offset(self, points: Tensor) -> Tensor:
        """N at (N, 3, D, H, W) voxel positions."""
        return _apply(self.linear, points - _spread(self.centre)) + _spread(self.push)

    def forward(self, points: Tensor) -> Tensor:
        """Where positions of the fixed scan lie in the moving one."""
        met = self.to_mean(points, -1)
        return met + self.offset(met)

    def to_mean(self, points: Tensor, side: int) -> Tensor:
        """Where positions of the moving (+1) or fixed (-1) scan lie in the mean frame: solves y + side N(y) = x."""
        matrix = torch.linalg.inv_ex(torch.eye(3, device=points.device) + side * self.linear).inverse
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
    generator = torch.linalg.solve_ex(scatter, (w * q).transpose(1, 2) @ d).result.transpose(1, 2)
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


# ---------------------------------------------------------------------------------------------- looking for a pose


def found_pose(points: KeyPoints, moving: Tensor, fixed: Tensor) -> Pose:
    """The pose of one pair, also far beyond the turns that training showed: not differentiable.

    Key points are sought with the scans as they lie and, unless they meet well, with both turned half-way into a number
    of poses; the pose in which they meet best is where the next look starts. Where they meet nowhere, the scans stay as
    they lie. Exchanging the scans exchanges the result exactly.

    Args:
        moving, fixed: (1, 1, D, H, W).
    """
    halves = [F.avg_pool3d(x.float(), 2) for x in (moving, fixed)]
    here = 2 * identity(halves[0].shape[2:], moving.device) + 0.5
    best, apart = _seen_from(None, points, *halves, here)
    met = apart <= _MEET
    if not settled(met):
        best, apart = _better((best, apart), _seen_from(best, points, *halves, here), met)
    met = apart <= _MEET
    for there, back in [] if settled(met) else _starts(here.flatten(2).mean(2)):
        for start in (there, back):
            best, apart = _better((best, apart), _seen_from(start, points, *halves, here), met)
        best, apart = _better((best, apart), _seen_from(best, points, *halves, here), met)
        met = apart <= _MEET  # asked after both ways of a turn, so that exchanging the scans ends at the same one
        if settled(met):
            break
    return _chosen(apart <= _LOST, best, Pose(*(torch.zeros_like(part) for part in best.parts)))


def _chosen(first: Tensor, one: Pose, other: Pose) -> Pose:
    """``one`` where the tensor () is true, else ``other``."""
    return Pose(*(torch.where(first, a, b) for a, b in zip(one.parts, other.parts)))


def _better(one: tuple[Pose, Tensor], other: tuple[Pose, Tensor], closed: Tensor | None = None) -> tuple[Pose, Tensor]:
    """The one of two (pose, how far apart) whose key points are nearer; the first one where ``closed``."""
    better = other[1] < one[1]
    if closed is not None:
        better = better & ~closed
    return _chosen(better, other[0], one[0]), torch.where(better, other[1], one[1])


def _starts(centre: Tensor) -> list[tuple[Pose, Pose]]:
    """Pure turns about ``centre`` (1, 3), voxels, each with its inverse."""
    diagonals = [[1.0, a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    starts = []
    for axis, degrees in (
        *((axis, _AXIS_TURN) for axis in torch.eye(3).tolist()),
        *((axis, _DIAGONAL_TURN) for axis in diagonals),
    ):
        # Cayley: (I + L)(I - L)^-1 turns by twice the angle whose tangent is |L|.
        z, y, x = (c / math.sqrt(sum(c * c for c in axis)) * math.tan(math.radians(degrees) / 2) for c in axis)
        linear = torch.tensor([[[0.0, -x, y], [x, 0.0, -z], [-y, z, 0.0]]], device=centre.device)
        starts.append(tuple(Pose(sign * linear, centre, torch.zeros_like(centre)) for sign in (1, -1)))
    return starts


def _seen_from(
    start: Pose | None, points: KeyPoints, moving: Tensor, fixed: Tensor, here: Tensor
) -> tuple[Pose, Tensor]:
    """The pose that fits key points sought in the frame of ``start``, and how far apart they stay, voxels, ().

    Args:
        moving, fixed: scans at half resolution. here: (1, 3, d, h, w), where its voxels lie in the whole image.
    """
    if start is not None:
        u = start.offset(here) / 2
        moving, fixed = warp(moving, u, padding="zeros"), warp(fixed, -u, padding="zeros")
    (m, f), (sure_m, sure_f) = (x.chunk(2) for x in points.from_half(torch.cat([moving, fixed])))
    m, f = (x.transpose(1, 2)[..., None, None] for x in (m, f))
    if start is not None:
        m, f = m + start.offset(m), f - start.offset(f)
    sure = sure_m * sure_f + 1e-4
    pose = fitted_pose(*(x[..., 0, 0].transpose(1, 2) for x in (m, f)), sure)
    apart = _length(pose.to_mean(m, 1) - pose.to_mean(f, -1))[:, 0, :, 0, 0]
    return pose, ((apart * sure).sum() / sure.sum()).double()


def pose_terms(pose: Pose, points: tuple[Tensor, Tensor], sure: Tensor, pair: Any) -> dict[str, Tensor] | None:
    """Distances in voxels / 10 of mapped places, key points and label centroids from where they belong.

    Args:
        points: (moving, fixed) key points. sure: (N, K), how surely both were seen.
        pair: a ``synthetic.Pair``; ``None`` is returned when it knows neither true map nor labels.
    """
    if pair.fixed_to_moving is None:
        return _centroid_terms(pose, pair) if pair.fixed_labels is not None else None
    m, f = points
    here, true = (
        x[..., ::_CELL, ::_CELL, ::_CELL] for x in (identity(pair.fixed.shape[2:], m.device), pair.fixed_to_moving)
    )
    seen = (pair.fixed[..., ::_CELL, ::_CELL, ::_CELL] > 0.05).float()
    error = _length(pose.forward(here) - here - true)
    at = sample_at(pair.fixed_to_moving, f)
    apart = (f + at - m).square().sum(-1).add(1e-6).sqrt()
    sure = sure.detach()
    return {
        "pose": 0.1 * (error * seen).sum() / seen.sum().clamp_min(1),
        "key_points": 0.02 * (apart * sure).sum() / sure.sum(),
    }


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
