"""AD-RegNet's two attentions: across the scans (BCAM) and over regions (RAA); see
:mod:`SymRegistrationLib.networks.ad_regnet`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import window_attention

#: Lattice cells that count as one in the inputs of heads and gates: offsets and displacements there are of order one.
UNIT = 8.0
_WINDOW = 4


def positions(shape: Sequence[int], channels: int, device: torch.device) -> Tensor:
    """(1, D, H, W, C): sines and cosines of the three coordinates, wavelengths from 4 to 256 cells;
    spare channels 0."""
    count = channels // 6
    rates = 2 * torch.pi / (4 * 64 ** (torch.arange(count, device=device) / max(count - 1, 1)))
    out = torch.zeros((1, *shape, channels), device=device)
    for axis, n in enumerate(shape):
        angle = torch.arange(n, device=device)[:, None] * rates
        wave = torch.cat([angle.sin(), angle.cos()], 1).view([n if k == axis else 1 for k in range(3)] + [-1])
        out[0, ..., 2 * count * axis : 2 * count * (axis + 1)] = wave
    return out


class CrossAttention(nn.Module):
    """BCAM: six projections, two attentions, one learned mixture."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.kind, self.heads = kind, max(channels // 32, 1)
        self.norm = nn.LayerNorm(channels)
        # Index 0: role of the moving image, 1: of the fixed one.
        self.query, self.key, self.value = (
            nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(2)) for _ in range(3)
        )
        with torch.no_grad():
            for query in self.query:  # gain 1: a perfect match stands out from the noise
                nn.init.orthogonal_(query.weight)
            self.key[1].weight.copy_(self.query[0].weight)
            self.key[0].weight.copy_(self.query[1].weight)
        self.mix = nn.Parameter(torch.zeros(()))

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, D, H, W) twice -> A of the same size, and every head's offset to the match (N, 3 heads, D,
        H, W), cells."""
        shape = moving.shape[2:]
        place = positions(shape, moving.shape[1], moving.device)
        axes = [torch.arange(n, device=moving.device, dtype=torch.float32) / UNIT for n in shape]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None].expand(len(moving), -1, -1, -1, -1)
        normed = [self.norm(x.permute(0, 2, 3, 4, 1)) for x in (moving, fixed)]
        q, k = ([p(x + place) for p, x in zip(group, normed)] for group in (self.query, self.key))
        v = [p(x) for p, x in zip(self.value, normed)]
        a_m, o_m = self._attend(q[0], k[1], v[1], cells)
        a_f, o_f = self._attend(q[1], k[0], v[0], cells)
        alpha = self.mix.sigmoid()
        # Seen from the fixed grid the offset is the displacement itself, from the moving grid about its negative.
        a, offset = alpha * a_m + (1 - alpha) * a_f, (1 - alpha) * o_f - alpha * o_m
        return a.permute(0, 4, 1, 2, 3), UNIT * offset.permute(0, 4, 1, 2, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Attended values (N, D, H, W, C) and offsets (N, D, H, W, 3 heads)."""
        shape, each = q.shape[:-1], q.shape[-1] // self.heads
        q, k, v = (x.unflatten(-1, (self.heads, each)) for x in (q, k, v))
        spots = cells.to(v.dtype).unsqueeze(-2).expand(*shape, self.heads, 3)
        if self.kind == "window":
            v = torch.cat([v, spots], -1)
            out = window_attention(q.flatten(-2), k.flatten(-2), v.flatten(-2), self.heads, _WINDOW)
            out = out.unflatten(-1, (self.heads, -1))
        else:
            # One common width, a multiple of eight, lets the fused kernels run, which never hold the N x N matrix.
            spare = -(each + 3) % 8
            q, k = (F.pad(x, (0, 3 + spare)) for x in (q, k))
            v = F.pad(torch.cat([v, spots], -1), (0, spare))
            q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=each**-0.5)
            out = out.transpose(1, 2).reshape(*shape, self.heads, -1)
        return out[..., :each].flatten(-2), (out[..., each : each + 3] - spots).flatten(-2)


class RegionalAttention(nn.Module):
    """RAA: a weight per region from self-attention over region means, softmax over regions, mean 1."""

    def __init__(self, channels: int, cells: int):
        super().__init__()
        self.cells, self.heads = cells, max(channels // 32, 1)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.score = nn.Linear(channels, 1)
        nn.init.normal_(self.score.weight, 0.0, 1e-2)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> the map M (N, 1, D, H, W) that multiplies it."""
        pooled = F.avg_pool3d(x, self.cells, ceil_mode=True, count_include_pad=False)
        n, c, *regions = pooled.shape
        tokens = self.norm(pooled.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).view(n, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
        weights = self.score(tokens).float().softmax(1) * tokens.shape[1]
        weights = weights.transpose(1, 2).reshape(n, 1, *regions)
        if self.cells > 1:
            weights = F.interpolate(weights, scale_factor=float(self.cells), mode="trilinear", align_corners=False)
        d, h, w = x.shape[2:]
        return weights[:, :, :d, :h, :w]
