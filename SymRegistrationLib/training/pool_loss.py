"""What a step on a pair of a pool sees, and what it minimises."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import warp
from ..losses import diffusion, lncc
from ..networks._passes import CELL, HalfFields
from .pool import PoolPair, brain_labels
from .synthetic import Draw


def turned(pair: PoolPair, mirrored: bool, exchanged: bool) -> PoolPair:
    """The pair mirrored along its last axis (left and right), its scans exchanged, or as it is."""
    values = {
        name: getattr(pair, name)
        for name in ("moving", "fixed", "moving_labels", "fixed_labels", "to_moving", "to_fixed")
    }
    if exchanged:
        swap = {
            "moving": "fixed",
            "fixed": "moving",
            "moving_labels": "fixed_labels",
            "fixed_labels": "moving_labels",
            "to_moving": "to_fixed",
            "to_fixed": "to_moving",
        }
        values = {name: values[swap[name]] for name in values}
    if mirrored:
        sign = torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1, 1)
        values = {name: v.flip(4) * sign if v.shape[1] == 3 else v.flip(4) for name, v in values.items()}
    return replace(pair, **values)


def brightened(pair: PoolPair, draw: Draw) -> PoolPair:
    """Each scan with another gamma and a little noise."""
    values = {}
    for name in ("moving", "fixed"):
        image = getattr(pair, name).clamp_min(1e-4) ** math.exp(draw.uniform(-0.2, 0.2))
        values[name] = (image + draw.uniform(0, 0.02) * draw.normal(*image.shape)).clamp(0, 1)
    return replace(pair, **values)


def blocked(
    pair: PoolPair, fields: HalfFields, block: tuple[int, int, int] | None, draw: Draw
) -> tuple[PoolPair, HalfFields]:
    """A block of the pair and of the fields, drawn where the middle of the volume is likelier; all of
    them without ``block``."""
    if block is None:
        return pair, fields
    low = []
    for n, size in zip(pair.moving.shape[2:], block):
        room = max(n - size, 0) // CELL
        low.append(CELL * round(room * (draw.uniform() + draw.uniform()) / 2))
    voxels = (..., *(slice(a, a + size) for a, size in zip(low, block)))
    cells = (..., *(slice(a // CELL, (a + size) // CELL) for a, size in zip(low, block)))
    kept = {name: getattr(pair, name)[voxels] for name in ("moving", "fixed", "moving_labels", "fixed_labels")}
    kept |= {name: getattr(pair, name)[cells] for name in ("to_moving", "to_fixed")}
    return replace(pair, **kept), HalfFields(*(None if u is None else u[cells] for u in vars(fields).values()))


#: Cells at the border of a block that are not judged: what lies outside of it may be missing there.
_BORDER = 2


def _inside(image: Tensor, border: int = _BORDER) -> Tensor:
    return image[..., border:-border, border:-border, border:-border]


def indicators(pair: PoolPair) -> tuple[Tensor, Tensor]:
    """(1, K, d, h, w) of moving and fixed: share of each structure in the blocks of a cell."""
    chosen = brain_labels(pair.values)
    return tuple(
        F.avg_pool3d(torch.cat([x == k for k in chosen], 1).float(), CELL)
        for x in (pair.moving_labels, pair.fixed_labels)
    )


def _content(pair: PoolPair) -> Tensor:
    return (F.avg_pool3d(torch.maximum(pair.moving, pair.fixed), CELL) > 0.1).float()


def teacher_terms(fields: HalfFields, pair: PoolPair, magnitude: float) -> dict[str, Tensor]:
    """Phase A: distance of the half fields' difference from the teacher's, cells, and L_smc."""
    seen = _inside(_content(pair))
    apart = _inside((fields.to_moving - fields.to_fixed) - (pair.to_moving - pair.to_fixed))
    return {
        "teacher": (apart.abs() * seen).sum() / seen.sum().clamp_min(1) / 3 + 0.05 * apart.abs().mean(),
        "smooth": 0.1 * (diffusion(fields.to_moving) + diffusion(fields.to_fixed)),
        "magnitude": magnitude * 16 * (fields.to_moving + fields.to_fixed).square().mean(),
    }


def free_terms(fields: HalfFields, pair: PoolPair, hot: tuple[Tensor, Tensor], magnitude: float) -> dict[str, Tensor]:
    """Phase B: local correlation half-way, diffusion, soft Dice of the structures that are seen, L_smc in mm^2."""
    x, y = (_inside(image, CELL * _BORDER) for image in fields.warped(pair.moving, pair.fixed))
    moved, stayed = (_inside(warp(h, u, padding="zeros")) for h, u in zip(hot, (fields.to_moving, fields.to_fixed)))
    common, sizes = 2 * (moved * stayed).sum((2, 3, 4)), (moved * moved + stayed * stayed).sum((2, 3, 4))
    shown = (sizes.detach() > 8).float()
    dice = 1 - (shown * common / sizes.clamp_min(1e-6)).sum() / shown.sum().clamp_min(1)
    # A cell's field changes per cell as the voxels' field does per voxel: the diffusion is the same number on
    # both lattices.
    return {
        "similarity": lncc(x, y, 7),
        "smooth": diffusion(fields.to_moving) + diffusion(fields.to_fixed),
        "dice": dice,
        "magnitude": magnitude * 16 * (fields.to_moving + fields.to_fixed).square().mean(),
    }
