"""Volumes that a deformation changes, and where it folds."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..geometry.grid import Grid
from ..geometry.regions import regions

#: A length of 3-D normal vectors at 68 % is this many standard deviations along one axis.
AXES_68 = 1.8779


def folding_regions(jacobian: np.ndarray, grid: Grid) -> Any:
    """Connected regions of folded voxels: ``count`` of all and ``regions``, the 20 largest (see
    :class:`SymRegistrationLib.geometry.regions.Region`)."""
    found, count = regions(jacobian <= 0, jacobian, grid, most=20, highest=False)
    return {"count": count, "regions": [region.plain() for region in found]}


def volume_changes(
    labels: np.ndarray, jacobian: np.ndarray, grid: Grid, radius: np.ndarray | None = None, patch_mm: float = 0.0
) -> dict[str, dict]:
    """How much larger or smaller each label is where the transform takes it: the integral of the Jacobian determinant.

    The confidence treats the border as patches of ``patch_mm`` whose errors are independent, each moving it in or out
    by one axis of the local uncertainty: ``sigma = sqrt(sum over patches of (area * sigma_axis)^2)``.

    Args:
        labels: (D, H, W) whole numbers on ``grid``, 0 = background.
        jacobian: (D, H, W), determinant of the forward map.
        grid: of both, the fixed scan's.
        radius: (D, H, W) mm, calibrated radius at 68 %; ``None`` = no confidence.
        patch_mm: see :class:`SymRegistrationLib.uncertainty.calibration.Calibration`; 0 = no confidence.

    Returns:
        Per label as text: ``fixed_ml``, ``moving_ml``, ``change_ml``, ``change_percent`` and ``plus_minus_ml`` (68 %,
            or None).
    """
    known, short = np.unique(
        np.append(np.maximum(labels, 0), 0), return_inverse=True
    )  # counted under short names: 0 is 0
    labels = short[:-1].reshape(labels.shape)
    voxel = abs(float(np.linalg.det(grid.matrix[:3, :3]))) / 1000
    sizes = np.bincount(labels.ravel()) * voxel
    there = np.bincount(labels.ravel(), jacobian.ravel()) * voxel
    sigma = None if radius is None or not patch_mm > 0 else _border_sigma(labels, grid, radius, patch_mm)
    table = {}
    for n in np.flatnonzero(sizes):
        if n:
            change = float(there[n] - sizes[n])
            table[str(int(known[n]))] = {
                "fixed_ml": float(sizes[n]),
                "moving_ml": float(there[n]),
                "change_ml": change,
                "change_percent": 100 * change / float(sizes[n]),
                "plus_minus_ml": None if sigma is None else float(sigma[n]),
            }
    return table


def _border_sigma(labels: np.ndarray, grid: Grid, radius: np.ndarray, patch_mm: float) -> np.ndarray:
    """(labels,) ml: standard deviation of each label's volume from what its border may have moved."""
    area, moved = np.zeros(labels.max() + 1), np.zeros(labels.max() + 1)
    for axis in range(3):
        face = abs(float(np.linalg.det(grid.matrix[:3, :3]))) / grid.spacing[axis]
        low, high = (np.moveaxis(labels, axis, 0)[part] for part in (slice(None, -1), slice(1, None)))
        border = low != high
        between = sum(np.moveaxis(radius, axis, 0)[part][border] for part in (slice(None, -1), slice(1, None))) / 2
        for side in (low, high):
            area += np.bincount(side[border], minlength=len(area)) * face
            moved += np.bincount(side[border], between**2, minlength=len(area)) * face
    area, moved = (
        area / 1.5,
        moved / 1.5,
    )  # the faces of a voxelised surface have 1.5 times its area, averaged over directions
    patches = np.maximum(area / patch_mm**2, 1)
    return np.sqrt(np.maximum(area * moved, 0) / patches) / AXES_68 / 1000
