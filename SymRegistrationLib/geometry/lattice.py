"""Affine maps evaluated on whole lattices: displacements in mm, and coordinates for torch's ``grid_sample``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .grid import Grid


def affine_displacement(matrix: np.ndarray, grid: Grid) -> Tensor:
    """(3, D, H, W) float32 mm: ``matrix p - p`` at every voxel point p of ``grid``."""
    relative = (matrix - np.eye(4)) @ grid.matrix
    steps = [torch.arange(n, dtype=torch.float64) for n in grid.shape]
    parts = []
    for row in range(3):
        plane = relative[row, 0] * steps[0][:, None] + relative[row, 1] * steps[1] + relative[row, 3]
        parts.append(plane.float()[:, :, None] + (relative[row, 2] * steps[2]).float())
    return torch.stack(parts)


def affine_grid(shape: Sequence[int], matrix: np.ndarray, image: Tensor) -> Tensor:
    """(1, D, H, W, 3) grid_sample coordinates: index of a lattice of ``shape`` -> (4, 4) -> index of ``image``."""
    size = np.asarray(image.shape[2:], float)
    scale = np.where(size > 1, 2 / np.maximum(size - 1, 1), 0.0)
    linear, offset = matrix[:3, :3] * scale[:, None], matrix[:3, 3] * scale - np.where(size > 1, 1.0, 0.0)
    out = image.new_empty((1, *shape, 3))
    steps = [torch.arange(n, device=image.device, dtype=torch.float64) for n in shape]
    for axis in range(3):
        d, h, w = (linear[axis, k] * steps[k] for k in range(3))
        plane = (d[:, None] + h[None, :] + offset[axis]).to(image.dtype)
        torch.add(plane[:, :, None], w.to(image.dtype)[None, None, :], out=out[0, ..., 2 - axis])
    return out
