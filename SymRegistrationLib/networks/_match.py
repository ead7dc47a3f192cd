"""Learned matching: which way every place has to go, read off a comparison of descriptors instead of
guessed by convolutions.

Both scans pass one small encoder, which sees self-similarity (MIND-SSC) instead of brightness, so that another contrast
looks much the same. Its descriptors are compared at opposite shifts about every place of a mean frame, and the expected
shift is the half-way velocity there. The principle is that of correlation layers and discrete displacement
networks (PDD-Net: Heinrich, MICCAI 2019); written from the idea. A comparison hardly has to be learned, so this
goes the right way before any training, and is of use after some hundred steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import compose, exponentiate, gaussian, no_autocast, warp
from ..losses import mind
from ._attention import up_blocks
from ._blocks import Conv3d

#: Per round: cells of the input's voxels, and the longest shift to each side in half cells.
_ROUNDS = ((4, 2), (2, 1), (2, 1), (2, 1), (2, 1))
#: So many of them are enough in front of a method that goes on by itself, pass by pass (RESULTS.md).
ROUNDS_BEFORE_PASSES = 3
#: Voxels of the input per cell of the resulting fields.
CELL = 2
#: Squarings of a round's velocity: of two cells at most, 1/16 at a time is fine enough.
_SQUARINGS = 5
#: Smoothing of the evidence and of the shift, cells.
_SMOOTH = 1.0


def normed_block(a: int, b: int) -> nn.Sequential:
    """Convolution, instance normalisation, LeakyReLU."""
    return nn.Sequential(Conv3d(a, b, 3, padding=1, bias=False), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU(0.2))


@dataclass(frozen=True, eq=False)
class Halves:
    """Two half-way maps from a mean frame, (N, 3, d, h, w) in cells, and the steps they were made of, in order.

    ``to_moving`` = exp(v_1) o exp(v_2) o ..., ``to_fixed`` = exp(-v_1) o exp(-v_2) o ...; step k is exp(v_k) and
    exp(-v_k).
    """

    to_moving: Tensor
    to_fixed: Tensor
    steps: tuple[tuple[Tensor, Tensor], ...]

    def inverse(self, side: int) -> Tensor:
        """The inverse of ``to_moving`` (+1) or ``to_fixed`` (-1), cells."""
        *before, total = (back if side > 0 else there for there, back in self.steps)
        for step in reversed(before):
            total = compose(total, step)
        return total


class Match(nn.Module):
    """Descriptors at 1/4 and 1/2, compared in rounds. Exchanging the scans exchanges the maps exactly.

    Args:
        channels: of the descriptors.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        self.shallow = nn.Sequential(normed_block(12, 16), normed_block(16, 24))
        self.deep = nn.Sequential(normed_block(24, 48), normed_block(48, 48))
        self.coarse = Conv3d(48, channels, 1)
        self.fine = nn.Sequential(normed_block(72, 32), Conv3d(32, channels, 1))
        self.sharpness = nn.Parameter(torch.full((len(_ROUNDS),), 3.0))

    def descriptors(self, images: Tensor) -> dict[int, Tensor]:
        """(N, 1, D, H, W) -> {4: at 1/4, 2: at 1/2}, (N, C, d, h, w) of length one, float32."""
        with torch.no_grad():
            likeness = F.avg_pool3d(mind(images, dilation=1), 2)
        x = self.shallow(likeness)
        y = self.deep(F.avg_pool3d(x, 2))
        up = F.interpolate(y.float(), scale_factor=2.0, mode="trilinear", align_corners=False)
        return {4: F.normalize(self.coarse(y).float()), 2: F.normalize(self.fine(torch.cat([up, x], 1)).float())}

    def forward(
        self,
        moving: Tensor,
        fixed: Tensor,
        rounds: int | None = None,
        precision: AbstractContextManager = nullcontext(),
    ) -> Halves:
        """Axes of the scans are multiples of 4; ``rounds``: only the first ones; ``precision`` of the convolutions."""
        with no_autocast(moving), precision:
            both = self.descriptors(torch.cat([moving, fixed]).float())
        parts = {cell: x.chunk(2) for cell, x in both.items()}
        to_moving = to_fixed = None
        steps = []
        for (cell, reach), sharp in zip(_ROUNDS[:rounds], self.sharpness):
            m, f = parts[cell]
            if to_moving is not None:
                m, f = warp(m, to_moving), warp(f, to_fixed)
            v = up_blocks(half_shift(m, f, reach, sharp.exp()), cell // CELL)
            there, back = exponentiate(v, _SQUARINGS), exponentiate(-v, _SQUARINGS)
            steps.append((there, back))
            to_moving = there if to_moving is None else compose(to_moving, there)
            to_fixed = back if to_fixed is None else compose(to_fixed, back)
        return Halves(to_moving, to_fixed, tuple(steps))


def half_shift(moving: Tensor, fixed: Tensor, reach: int, sharpness: Tensor) -> Tensor:
    """The expected v for which moving(x + v) and fixed(x - v) match, cells; v runs over half cells.

    Sums run in both orders, so that exchanging the arguments gives -v bit by bit.

    Args:
        moving, fixed: (N, C, d, h, w) descriptors.
        reach: longest shift per axis, half cells.
        sharpness: factor of the correlation before the softmax.
    """
    shifts = list(product(range(-reach, reach + 1), repeat=3))
    evidence = _Correlation.apply(reach, *_half_cells(moving, reach), *_half_cells(fixed, reach))
    evidence = sharpness * gaussian(evidence, _SMOOTH)
    weight = (evidence - evidence.amax(1, keepdim=True)).exp()
    mirrored = weight.flip(1)
    steps = torch.tensor(shifts, dtype=weight.dtype, device=weight.device).T / 2
    pull = torch.einsum("ck,nkdhw->ncdhw", steps, weight) - torch.einsum("ck,nkdhw->ncdhw", steps, mirrored)
    return gaussian(pull / (weight.sum(1, keepdim=True) + mirrored.sum(1, keepdim=True)), _SMOOTH)


def _half_cells(x: Tensor, reach: int) -> list[Tensor]:
    """(N, C, d, h, w) continued at its border by the cells that ``reach`` half cells need, and half a cell on along
    every set of axes: eight lattices in the order of ``product((0, 1), repeat=3)``."""
    parts = [F.pad(x, (_cells(reach),) * 6, mode="replicate")]
    for axis in (2, 3, 4):
        parts = [y for part in parts for y in (part, _between(part, axis))]
    return parts


def _cells(reach: int) -> int:
    return -(-reach // 2)


def _between(x: Tensor, axis: int) -> Tensor:
    n = x.shape[axis] - 1
    return (x.narrow(axis, 0, n) + x.narrow(axis, 1, n)) / 2


class _Correlation(torch.autograd.Function):
    """:func:`_half_cells` of both -> (N, shifts, d, h, w): products of both at opposite shifts, summed over channels.

    Autograd would fill a volume with zeros for each of the slices; this adds in place and keeps only the inputs.
    """

    @staticmethod
    def forward(ctx, reach: int, *lattices: Tensor) -> Tensor:
        ctx.save_for_backward(*lattices)
        ctx.reach = reach
        return torch.stack([(m * f).sum(1) for m, f in zip(*_opposite(lattices, reach))], 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        lattices = ctx.saved_tensors
        slopes = [torch.zeros_like(x) for x in lattices]
        views = zip(*_opposite(lattices, ctx.reach), *_opposite(slopes, ctx.reach))
        for (m, f, to_m, to_f), g in zip(views, gradient.unbind(1)):
            to_m.addcmul_(g[:, None], f)
            to_f.addcmul_(g[:, None], m)
        return None, *slopes


def _opposite(lattices: Sequence[Tensor], reach: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the first eight lattices show at every shift, and what the last eight show at its opposite."""
    start = _cells(reach)
    shape = [n - 2 * start for n in lattices[0].shape[2:]]
    both: tuple[list[Tensor], list[Tensor]] = ([], [])
    for shift in product(range(-reach, reach + 1), repeat=3):
        for found, own, side in zip(both, (lattices[:8], lattices[8:]), (1, -1)):
            ends = [side * s for s in shift]
            view = own[sum(s % 2 << (2 - axis) for axis, s in enumerate(ends))]
            for axis, (s, n) in enumerate(zip(ends, shape), 2):
                view = view.narrow(axis, start + s // 2, n)
            found.append(view)
    return both
