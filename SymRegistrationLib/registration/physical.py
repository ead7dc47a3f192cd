"""From voxels of the working grid to millimetres of the two scans: the only place where both meet."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..fields import FieldPair, sample
from ..geometry.grid import Grid
from ..geometry.lattice import affine_displacement, affine_grid
from ..geometry.transforms import DenseTransform, TransformPair
from .working_grid import WorkingPair

#: Transforms reach so far beyond the scan, mm, but not further than this part of its longest side: 6 mm around a scan
#: of 2 mm would be a thousand times its volume.
MARGIN_MM, MARGIN_SHARE = 6.0, 1 / 8


def to_physical(pair: FieldPair, space: WorkingPair, fixed: Grid, moving: Grid) -> TransformPair:
    """Carry a field pair from the working grid to the scans.

    The lattice of each transform follows its scan's axes and field of view, larger on all sides (``MARGIN_MM``), and is
    as fine as the scan or as 0.6 of the working voxel, whichever is coarser: finer only repeats the same information
    (measured on brains: inverse consistency 0.061 mm at 1, 0.045 at 2/3, 0.041 at 1/2 of the working voxel).
    """
    spacing = float(space.grid.spacing[0]) * 0.6
    lattices = []
    for grid in (fixed, moving):
        grown = grid.padded(min(MARGIN_MM, MARGIN_SHARE * float((np.asarray(grid.shape) * grid.spacing).max())))
        lattices.append(
            grown if (grid.spacing > 0.8 * spacing).all() else grown.resampled(np.maximum(grid.spacing, spacing))
        )
    to_fixed, to_moving = space.mid_to_fixed, space.mid_to_moving
    forward = _physical(pair.fixed_to_moving, space.grid, lattices[0], np.linalg.inv(to_fixed), to_moving)
    inverse = _physical(pair.moving_to_fixed, space.grid, lattices[1], np.linalg.inv(to_moving), to_fixed)
    return TransformPair(forward, inverse, to_moving @ np.linalg.inv(to_fixed))


def _physical(u: Tensor, working: Grid, lattice: Grid, before: np.ndarray, after: np.ndarray) -> DenseTransform:
    """``after o (id + u) o before`` as displacement in mm on ``lattice``."""
    at = affine_grid(lattice.shape, working.inverse @ before @ lattice.matrix, u)
    vectors = sample(u, at)[0]
    linear = torch.from_numpy((after @ working.matrix)[:3, :3]).to(vectors)
    moved = (linear @ vectors.reshape(3, -1)).view(3, *lattice.shape)
    moved += affine_displacement(after @ before, lattice).to(moved.device)
    return DenseTransform(lattice, np.ascontiguousarray(moved.permute(1, 2, 3, 0).cpu().numpy()))
