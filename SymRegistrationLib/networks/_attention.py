"""What the two dual-stream attention methods share: windowed cross-attention, block-aligned upsampling, and the way two
independently predicted directions become one pair of inverse maps."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..fields import FieldPair, compose, no_autocast, settled, square_sum
from ..fields.inversion import invert
from ._base import measured_pair

#: Bytes of gathered keys and values that one slab of windows may take.
_SLAB_BYTES = 96 * 2**20


def up_blocks(u: Tensor, factor: int) -> Tensor:
    """A displacement on a ``factor`` times finer lattice, values times ``factor``.

    A cell of a strided 2 x 2 x 2 convolution lies in the middle of its block, not on its first voxel; this is the exact
    change of coordinates for that layout.
    """
    if factor == 1:
        return u
    u = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
    with no_autocast(u):  # three small matrix products: a quarter of the time of PyTorch's interpolation on a CPU
        depth, height, width = (_finer(n, factor, u.device, u.dtype) for n in u.shape[2:])
        out = height @ (u @ (factor * width.T))
        return (depth @ out.flatten(3)).unflatten(3, out.shape[3:])


@lru_cache(maxsize=64)
def _finer(n: int, factor: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(factor n, n): linear interpolation of one axis between the middles of blocks, border value outside."""
    cells = torch.eye(n, device=device, dtype=dtype)[None]
    return F.interpolate(cells, scale_factor=float(factor), mode="linear", align_corners=False)[0].T.contiguous()


# ---------------------------------------------------------------------------------------------- windows


def _blocks(x: Tensor, window: int) -> Tensor:
    """(N, D, H, W, C), axes multiples of ``window`` -> (N, D/w, H/w, W/w, w^3, C)."""
    n, d, h, w, c = x.shape
    x = x.reshape(n, d // window, window, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(n, d // window, h // window, w // window, window**3, c)


def _from_blocks(x: Tensor, window: int) -> Tensor:
    """The way back of :func:`_blocks`."""
    n, d, h, w, _, c = x.shape
    x = x.reshape(n, d, h, w, window, window, window, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(n, d * window, h * window, w * window, c)


def _neighbours(blocks: Tensor) -> Tensor:
    """(N, a + 2, b + 2, c + 2, T, C) -> (N a b c, 27 T, C): every block with its 26 neighbours, z slowest."""
    n, a, b, c, t, channels = blocks.shape
    view = blocks.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)
    view = view.permute(0, 1, 2, 3, 6, 7, 8, 4, 5)
    return view.reshape(n * (a - 2) * (b - 2) * (c - 2), 27 * t, channels)


def _slab(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor | None, heads: int, scale: float) -> Tensor:
    """Attention of the windows of one slab: blocks of queries, ringed blocks of keys and values -> blocks."""
    shape = q.shape[:-1]
    q = q.reshape(-1, q.shape[-2], heads, q.shape[-1] // heads).transpose(1, 2)
    k, v = (_neighbours(x) for x in (k, v))
    k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (k, v))
    logits = torch.matmul(q * scale, k.transpose(-1, -2))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    outside = ~_neighbours(valid).squeeze(-1)
    outside = outside.repeat(len(logits) // len(outside), 1)
    logits = logits.masked_fill(outside[:, None, None], float("-inf"))
    out = torch.matmul(logits.softmax(-1), v)
    return out.transpose(1, 2).reshape(*shape, -1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, window: int, bias: Tensor | None = None) -> Tensor:
    """Cross-attention of base windows to search windows three times as wide (XMorpher's window area).

    Every token of a ``window``^3 block attends to the tokens of that block and its 26 neighbours; tokens outside the
    volume take no part. Only a slab of the gathered keys and values, 27 times the map, exists at a time; in training
    slabs are computed again in the backward pass.

    Args:
        q, k: (N, D, H, W, heads * c). v: (N, D, H, W, heads * c_v).
        heads: number of heads.
        window: edge of the base windows, tokens.
        bias: (heads, window^3, 27 window^3) added to the logits; keys are ordered by :func:`key_offsets`.

    Returns:
        (N, D, H, W, heads * c_v).
    """
    shape = q.shape[1:4]
    scale = (q.shape[-1] // heads) ** -0.5
    pad = [0, 0]
    for n in reversed(shape):
        pad += [0, -n % window]
    valid = F.pad(q.new_ones((1, *shape, 1), dtype=torch.bool), pad)
    q, k, v = (F.pad(x, pad) for x in (q, k, v))
    q, k, v, valid = (_blocks(x, window) for x in (q, k, v, valid))
    ring = (0, 0, 0, 0, 1, 1, 1, 1, 1, 1)
    k, v, valid = (F.pad(x, ring) for x in (k, v, valid))
    rows = q.shape[1]
    per_row = q[:, 0].numel() // q.shape[-1] * 27 * (k.shape[-1] + v.shape[-1]) * q.element_size()
    step = min(max(int(_SLAB_BYTES // max(per_row, 1)), 1), rows)
    out = []
    for z in range(0, rows, step):
        part = (
            q[:, z : z + step],
            k[:, z : z + step + 2],
            v[:, z : z + step + 2],
            valid[:, z : z + step + 2],
            bias,
            heads,
            scale,
        )
        if torch.is_grad_enabled():
            out.append(checkpoint(_slab, *part, use_reentrant=False))
        else:
            out.append(_slab(*part))
    result = _from_blocks(torch.cat(out, 1), window)
    return result[:, : shape[0], : shape[1], : shape[2]]


def key_offsets(window: int) -> Tensor:
    """(w^3, 27 w^3, 3): search token minus base token, in tokens, in the order :func:`window_attention` uses."""
    within = torch.cartesian_prod(*[torch.arange(window)] * 3)
    block = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3) * window
    keys = (block[:, None] + within[None]).reshape(-1, 3)
    return keys[None] - within[:, None]


# ---------------------------------------------------------------------------------------------- directions


def balanced_pair(u: Tensor, w: Tensor, tolerance: float = 0.05, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """Two directions predicted one by one, made inverse to each other without preferring either.

    What ``u + w o (id + u)`` and ``w + u o (id + w)`` leave over is shared half and half, again and again: a
    fixed-point iteration for both at once, whose error shrinks by about ``|grad u| / 2`` a step. Exchanging ``u`` and
    ``w`` exchanges the results exactly. Not differentiable.

    Args:
        u: (N, 3, D, H, W) voxels, fixed to moving. w: the same, moving to fixed.
        tolerance: stop when the largest residual of both orders is below, voxels; the best pair met is returned.
    """
    best, least = (u, w), u.new_full((), float("inf"), dtype=torch.float64)
    ended = torch.zeros_like(least, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(iterations + 1):
            left, right = compose(w, u), compose(u, w)
            worst = torch.maximum(square_sum(left).max(), square_sum(right).max()).double().sqrt()
            better = (worst < least) & ~ended
            best = torch.where(better, u, best[0]), torch.where(better, w, best[1])
            least = torch.where(better, worst, least)
            ended = least < tolerance
            if settled(ended):
                break
            u, w = u - left / 2, w - right / 2
    return best


def finished_pair(u: Tensor, w: Tensor | None, inverse: str, scale: int) -> FieldPair:
    """The pair on the input's grid from fields on a lattice ``scale`` times coarser.

    Args:
        u: fixed to moving. w: moving to fixed as the network predicts it, or ``None``.
        inverse: ``balanced``, ``fixed_point`` (``w`` is not used) or ``swapped`` (both as they are).
    """
    if inverse == "fixed_point":
        u = up_blocks(u.detach(), scale)
        return measured_pair(u, invert(u).field, "fixed_point")
    if inverse == "swapped":
        return measured_pair(up_blocks(u, scale), up_blocks(w, scale), "symmetric")
    u, w = balanced_pair(u.detach(), w.detach(), tolerance=0.05 / scale)
    if scale > 1:  # interpolating both maps leaves a little over
        u, w = balanced_pair(up_blocks(u, scale), up_blocks(w, scale), iterations=4)
    return measured_pair(u, w, "fixed_point")
