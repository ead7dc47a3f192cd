"""Learned matching: which way every place has to go, read off a comparison of descriptors instead of
guessed by convolutions.

Both scans pass one small encoder, which sees self-similarity (MIND-SSC) instead of brightness, so that another contrast
looks much the same. Its descriptors are compared at opposite shifts about every place of a mean frame, and the expected
shift is the half-way velocity there. The principle is that of correlation layers and discrete displacement
networks (PDD-Net: Heinrich, MICCAI 2019); written from the idea. A comparison hardly has to be learned, so this
goes the right way before any training, and is of use after some hundred steps.
"""

from __future__ import annotations

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
        """(N, 1, D, H, W) -> {4: at 1/4, 2: at 1/2}, (N, C, d, h, w) of length one."""
        with torch.no_grad():
            likeness = F.avg_pool3d(mind(images, dilation=1), 2)
        x = self.shallow(likeness)
        y = self.deep(F.avg_pool3d(x, 2))
        up = F.interpolate(y, scale_factor=2.0, mode="trilinear", align_corners=False)
        return {4: F.normalize(self.coarse(y)), 2: F.normalize(self.fine(torch.cat([up, x], 1)))}

    def forward(self, moving: Tensor, fixed: Tensor, rounds: int | None = None) -> Halves:
        """Axes of the scans are multiples of 4; ``rounds``: only the first ones."""
        with no_autocast(moving):
            both = self.descriptors(torch.cat([moving, fixed]).float())
        parts = {cell: x.chunk(2) for cell, x in both.items()}
        to_moving = to_fixed = None
        steps = []
        for (cell, reach), sharp in zip(_ROUNDS[:rounds], self.sharpness):
            m, f = parts[cell]
            if to_moving is not None:
                m, f = warp(m, to_moving), warp(f, to_fixed)
            v = up_blocks(half_shift(m, f, reach, sharp.exp()), cell // CELL)
            there, back = exponentiate(v), exponentiate(-v)
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
    shape = moving.shape[2:]
    m, f = (
        F.pad(
            F.interpolate(x, size=[2 * n - 1 for n in shape], mode="trilinear", align_corners=True),
            (reach,) * 6,
            mode="replicate",
        )
        for x in (moving, fixed)
    )
    shifts = list(product(range(-reach, reach + 1), repeat=3))
    evidence = _Correlation.apply(m, f, reach)
    evidence = sharpness * gaussian(evidence, _SMOOTH)
    weight = (evidence - evidence.amax(1, keepdim=True)).exp()
    mirrored = weight.flip(1)
    steps = torch.tensor(shifts, dtype=weight.dtype, device=weight.device).T / 2
    pull = torch.einsum("ck,nkdhw->ncdhw", steps, weight) - torch.einsum("ck,nkdhw->ncdhw", steps, mirrored)
    return gaussian(pull / (weight.sum(1, keepdim=True) + mirrored.sum(1, keepdim=True)), _SMOOTH)


class _Correlation(torch.autograd.Function):
    """(N, C, 2 n - 1 + 2 reach, ...) twice -> (N, shifts, n, ...): products of both at opposite shifts,
    summed over channels.

    Autograd would fill a volume with zeros for each of the slices; this adds in place and keeps only the inputs.
    """

    @staticmethod
    def forward(ctx, m: Tensor, f: Tensor, reach: int) -> Tensor:
        ctx.save_for_backward(m, f)
        ctx.reach = reach
        return torch.stack([(m[a] * f[b]).sum(1) for a, b in _opposite(m, reach)], 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        m, f = ctx.saved_tensors
        to_m, to_f = torch.zeros_like(m), torch.zeros_like(f)
        for (a, b), g in zip(_opposite(m, ctx.reach), gradient.unbind(1)):
            to_m[a].addcmul_(g[:, None], f[b])
            to_f[b].addcmul_(g[:, None], m[a])
        return to_m, to_f, None


def _opposite(x: Tensor, reach: int) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Index of the lattice seen at a shift and at its opposite, for every shift."""
    pairs = []
    for shift in product(range(-reach, reach + 1), repeat=3):
        sides = [
            [slice(reach + side * s, n - reach + side * s, 2) for s, n in zip(shift, x.shape[2:])] for side in (1, -1)
        ]
        pairs.append(tuple((slice(None), slice(None), *side) for side in sides))
    return pairs
