"""A result on the scans' own grids: transforms, warped scans and maps, all of it or only where something changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from ..fields import FieldPair
from ..geometry.grid import Grid
from ..geometry.transforms import (
    CompactTransform,
    TransformPair,
    inverse_consistency_on,
    jacobian_on,
    mark_folds,
    resample_through,
    seen,
)
from ..geometry.volumes import Volume
from .physical import map_grid, to_physical, to_physical_again
from .working_grid import WorkingPair


@dataclass(frozen=True, eq=False)
class Carried:
    """The parts of a result that lie on the scans' grids, see :class:`SymRegistrationLib.pipeline.Result`."""

    transforms: TransformPair
    warped_moving: np.ndarray
    warped_fixed: np.ndarray
    map_grid: Grid
    jacobian: np.ndarray
    ice_mm: np.ndarray


def carry(fixed: Volume, moving: Volume, pair: FieldPair, space: WorkingPair) -> Carried:
    """Both directions of a working pair on the grids of the two scans."""
    transforms = to_physical(pair, space)
    grid = map_grid(fixed.grid, float(space.grid.spacing.min()))
    jacobian = jacobian_on(transforms.forward, grid)
    mark_folds(jacobian, transforms.forward, grid)
    return Carried(
        transforms,
        resample_through(moving, transforms.forward, fixed.grid),
        resample_through(fixed, transforms.inverse, moving.grid),
        grid,
        jacobian,
        inverse_consistency_on(transforms.forward, transforms.inverse, grid),
    )


def carry_again(before: Carried, fixed: Volume, moving: Volume, pair: FieldPair, space: WorkingPair) -> Carried:
    """:func:`carry` for a pair whose ``details["changed"]`` say where it differs from that of ``before``.

    What lies elsewhere is copied, so it stays as it was to the last bit. Where nothing is known of what changed, or it
    reaches the border of the working grid, everything is made anew.
    """
    found = to_physical_again(before.transforms, pair, space) if "changed" in pair.details else None
    if found is None:
        return carry(fixed, moving, pair, space)
    transforms, boxes = found
    forward, inverse = (cast(CompactTransform, one) for one in (transforms.forward, transforms.inverse))
    there = seen(fixed.grid, forward, boxes[0])
    back = seen(moving.grid, inverse, boxes[1])
    on_map = seen(before.map_grid, forward, boxes[0])
    warped_moving, warped_fixed = before.warped_moving.copy(), before.warped_fixed.copy()
    jacobian, ice = before.jacobian.copy(), before.ice_mm.copy()
    if there[0].stop > there[0].start:
        warped_moving[there] = resample_through(moving, forward, _crop(fixed.grid, there))
    if back[0].stop > back[0].start:
        warped_fixed[back] = resample_through(fixed, inverse, _crop(moving.grid, back))
    if on_map[0].stop > on_map[0].start:
        # Differences need their neighbours: one voxel more on every side, which is left out again.
        wide = _grown(on_map, 1, before.map_grid.shape)
        inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(on_map, wide))
        jacobian[on_map] = jacobian_on(forward, _crop(before.map_grid, wide))[inner]
        ice[on_map] = inverse_consistency_on(forward, inverse, _crop(before.map_grid, on_map))
    mark_folds(jacobian, forward, before.map_grid, _grown(boxes[0], 3, forward.grid.shape))
    return Carried(transforms, warped_moving, warped_fixed, before.map_grid, jacobian, ice)


def _grown(box: Sequence[slice], voxels: int, shape: Sequence[int]) -> tuple[slice, slice, slice]:
    d, h, w = (slice(max(0, part.start - voxels), min(n, part.stop + voxels)) for part, n in zip(box, shape))
    return d, h, w


def _crop(grid: Grid, box: Sequence[slice]) -> Grid:
    return grid.cropped([part.start for part in box], [part.stop for part in box])
