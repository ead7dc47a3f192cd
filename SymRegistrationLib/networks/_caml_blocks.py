"""CAML's blocks: windowed cross-attention, stages, skips, hand-over and the ends that make a field
(see :mod:`SymRegistrationLib.networks.caml`). Maps are (N, D, H, W, C) unless it is said otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import key_offsets, up_blocks, window_attention
from ._blocks import Conv3d, space_to_depth, zero_init
from ._passes import begin_as_step

_WINDOW = 2


def last(x: Tensor) -> Tensor:
    """Channels last."""
    return x.permute(0, 2, 3, 4, 1)


def first(x: Tensor) -> Tensor:
    """Channels first."""
    return x.permute(0, 4, 1, 2, 3)


class CrossBlock(nn.Module):
    """Windowed cross-attention from a base to search maps, then an MLP (CAT); maps are (N, D, H, W, C)."""

    def __init__(self, c: int, bias: bool = True):
        super().__init__()
        self.heads = max(c // 16, 1)
        self.norm, self.norm_mlp = nn.LayerNorm(c), nn.LayerNorm(c)
        self.query, self.key_value, self.out = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        reach = 4 * _WINDOW - 1
        self.table = nn.Parameter(0.02 * torch.randn(self.heads, reach**3)) if bias else None
        offsets = key_offsets(_WINDOW) + 2 * _WINDOW - 1
        index = (offsets * torch.tensor([reach**2, reach, 1])).sum(-1)
        self.register_buffer("index", index, persistent=False)

    def attend(self, base: Tensor, search: Tensor) -> Tensor:
        """What ``base`` gathers from ``search``, before the residual; both of one size."""
        k, v = self.key_value(self.norm(search)).chunk(2, -1)
        bias = None if self.table is None else self.table[:, self.index]
        return self.out(window_attention(self.query(self.norm(base)), k, v, self.heads, _WINDOW, bias))

    def forward(self, base: Tensor, searches: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
        """``searches[0]`` counts fully, the others times their gate."""
        total = base + self.attend(base, searches[0])
        for gate, search in zip(gates, searches[1:]):
            total = total + gate * self.attend(base, search)
        return total + self.mlp(self.norm_mlp(total))


class CrossStage(nn.Module):
    """Blocks of one scale for both streams; ``finer`` are the channels of the finer levels attended
    to, nearest first."""

    def __init__(self, c: int, depth: int, finer: Sequence[int], bias: bool):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(c, bias) for _ in range(depth))
        self.lift = nn.ModuleList(nn.Sequential(nn.LayerNorm(f), nn.Linear(f, c)) for f in finer)
        self.gates = nn.Parameter(torch.zeros(depth, len(finer))) if finer else None

    def forward(self, m: Tensor, f: Tensor, finer: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
        extra_m, extra_f = ([lift(self._pooled(x, m)) for lift, x in zip(self.lift, maps)] for maps in finer)
        for index, block in enumerate(self.blocks):
            gates = [] if self.gates is None else list(self.gates[index])
            m, f = block(m, [f, *extra_f], gates), block(f, [m, *extra_m], gates)
        return m, f

    @staticmethod
    def _pooled(x: Tensor, like: Tensor) -> Tensor:
        x = first(x)
        while x.shape[2] > like.shape[1] or x.shape[3] > like.shape[2] or x.shape[4] > like.shape[3]:
            x = F.max_pool3d(x, 2, ceil_mode=True)
        return last(x)


class Down(nn.Module):
    """Half the size, rounded up, and other channels."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv, self.norm = Conv3d(a, b, 2, stride=2), nn.LayerNorm(b)

    def forward(self, x: Tensor) -> Tensor:
        pad = [0, 0]
        for n in reversed(x.shape[1:4]):
            pad += [0, n % 2]
        return self.norm(last(self.conv(first(F.pad(x, pad)))))


class Up(nn.Module):
    """Twice the size, cut to that of ``like``."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose3d(a, b, 2, stride=2), nn.LayerNorm(b)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        d, h, w = like.shape[1:4]
        return self.norm(last(self.conv(first(x)))[:, :d, :h, :w])


class Residual(nn.Module):
    """conv-InstanceNorm-LeakyReLU-conv-InstanceNorm, plus identity, LeakyReLU; (N, D, H, W, C)."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(
            Conv3d(c, c, 3, padding=1, bias=False),
            nn.InstanceNorm3d(c, affine=True),
            nn.LeakyReLU(0.2),
            Conv3d(c, c, 3, padding=1, bias=False),
            nn.InstanceNorm3d(c, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = first(x)
        return last(F.leaky_relu(x + self.body(x), 0.2))


class HandOver(nn.Module):
    """The cascade's attention: a residual block times one sigmoid weight per token."""

    def __init__(self, c: int):
        super().__init__()
        self.body, self.weight = Residual(c), nn.Linear(c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x * self.weight(x).sigmoid()


class TransposedTail(nn.Module):
    """XMorpher's end: full resolution from one transposed convolution. ``scale`` is the lattice of the result."""

    scale = 1

    def __init__(self, c: int):
        super().__init__()
        self.norm, self.grow = nn.LayerNorm(2 * c), nn.ConvTranspose3d(2 * c, c // 2, 4, stride=4)
        self.head = zero_init(Conv3d(c // 2, 3, 3, padding=1))

    def forward(self, m: Tensor, f: Tensor, moving: Tensor, fixed: Tensor, force: Tensor | None = None) -> Tensor:
        return self.head(self.grow(first(self.norm(torch.cat([m, f], -1))))).float()


class SmoothTail(nn.Module):
    """A field at 1/4 plus one at 1/2, where the images' own blocks join in."""

    scale = 2

    def __init__(self, c: int, force: bool = False):
        super().__init__()
        self.force = force
        self.contrast, self.norm = nn.LayerNorm(c), nn.LayerNorm(c)
        self.mixed = Conv3d(2 * c, c, 3, padding=1)
        self.coarse = zero_init(Conv3d(c, 3, 3, padding=1))
        self.skip = Conv3d(19 if force else 16, 16, 3, padding=1)
        self.joined = Conv3d(c + 16, 16, 3, padding=1)
        self.head = zero_init(Conv3d(16, 3, 3, padding=1))
        if force:
            begin_as_step([self.skip, self.joined, self.head], 16, [c, 0], 0.5)  # half of it goes to each side

    def forward(self, m: Tensor, f: Tensor, moving: Tensor, fixed: Tensor, force: Tensor | None = None) -> Tensor:
        x = torch.cat([self.contrast(m - f), self.norm(m + f)], -1)
        x = F.leaky_relu(self.mixed(first(x)), 0.2)
        blocks = space_to_depth(torch.cat([moving, fixed], 1))
        if self.force:
            blocks = torch.cat([blocks, torch.zeros_like(blocks[:, :3]) if force is None else force], 1)
        blocks = F.leaky_relu(self.skip(blocks), 0.2)
        fine = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
        fine = F.leaky_relu(self.joined(torch.cat([fine, blocks], 1)), 0.2)
        return up_blocks(self.coarse(x).float(), 2) + self.head(fine).float()
