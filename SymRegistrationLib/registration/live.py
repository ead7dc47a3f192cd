"""A look while a run is on: after each level the warped scan, small, how alike, how folded; and an early end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..fields import compose, jacobian_determinant, resize_field, sample
from ..fields.inversion import invert
from ..geometry.grid import Grid
from ..geometry.lattice import affine_grid
from .steering import Observer
from .working_grid import Scan, WorkingPair, shrink

#: Most voxels along the longest side of the fixed scan, and of the fields, for a look.
LOOK_VOXELS, FIELD_VOXELS = 64, 40


@dataclass(frozen=True, eq=False)
class Look:
    """What there is to see after one level.

    Attributes:
        level, levels: from 1, coarse to fine.
        similarity: what the optimiser maximises, larger is better; comparable within one level only.
        folded_percent: share of the content's voxels with a Jacobian determinant of 0 or less, on a coarse lattice.
        image: (d, h, w) float32 in [0, 1], the moving scan warped onto ``grid``.
        grid: the fixed scan's field of view in coarse voxels, LPS mm.
    """

    level: int
    levels: int
    similarity: float
    folded_percent: float
    image: np.ndarray
    grid: Grid


@dataclass(frozen=True)
class Watch:
    """Who wants to look.

    Attributes:
        show: gets a :class:`Look` after each level, and should return soon; None = nobody looks.
        enough: asked before each step; True ends the optimisation there. The result is complete and valid.
    """

    show: Callable[[Look], None] | None = None
    enough: Callable[[], bool] = field(default=lambda: False)


def observer(watch: Watch, space: WorkingPair, moving: Scan, fixed: Grid) -> Observer:
    """An observer of the optimiser on ``space`` that makes the looks; ``fixed`` is the grid of the fixed scan."""
    extent = np.asarray(fixed.shape) * fixed.spacing
    grid = fixed.resampled(np.maximum(fixed.spacing, extent.max() / LOOK_VOXELS))
    small = shrink(moving, float(grid.spacing.max()))
    to_middle = space.grid.inverse @ np.linalg.inv(space.mid_to_fixed) @ grid.matrix
    to_moving = torch.from_numpy(small.grid.inverse @ space.mid_to_moving @ space.grid.matrix)

    def seen(halves: Tensor, value: float, level: int, levels: int) -> None:
        if watch.show is None:
            return
        shape = [min(n, max(8, round(n * FIELD_VOXELS / max(halves.shape[2:])))) for n in halves.shape[2:]]
        coarse = resize_field(halves, shape)
        forward = compose(coarse[1:], invert(coarse[:1], tolerance=0.05, iterations=20).field)
        folded = 100 * float((jacobian_determinant(forward) <= 0).float().mean())
        scale = [(n - 1) / max(m - 1, 1) for n, m in zip(space.grid.shape, shape)]
        at = affine_grid(grid.shape, to_middle, space.fixed)
        vectors = sample(forward, at)[0] * torch.tensor(scale).to(forward).view(3, 1, 1, 1)
        size = torch.tensor(space.grid.shape).to(forward) - 1
        index = (at[0].flip(-1) + 1) / 2 * size + vectors.permute(1, 2, 3, 0)
        index = index @ to_moving[:3, :3].T.to(forward) + to_moving[:3, 3].to(forward)
        last = (torch.tensor(small.grid.shape).to(forward) - 1).clamp_min(1)
        image = sample(small.image, (2 * index / last - 1).flip(-1)[None], padding="zeros")[0, 0]
        watch.show(Look(level, levels, value, folded, image.cpu().numpy(), grid))

    return Observer(seen, watch.enough)
