"""How good a registration is, in numbers that can be defended.

Distances in mm, determinants of the physical map, overlap per label. Nothing here looks at the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..geometry.grid import Grid
from ..geometry.transforms import Transform, inverse_consistency_on, jacobian_on, mark_folds, resample_through
from ..geometry.volumes import Volume
from ..losses import lncc_map

#: Label numbers up to here are counted directly.
_MOST_COUNTED = 1 << 20


def dice(a: np.ndarray, b: np.ndarray, labels: Sequence[int] | None = None) -> dict[int, float]:
    """Overlap per label of two maps on one grid (mathematics.md, 15.1).

    Args:
        labels: which; default all non-zero labels of either map. A label absent from both is left out, absent from one
            counts 0.
    """
    a, b = np.maximum(a, 0).ravel(), np.maximum(b, 0).ravel()
    if max(a.max(), b.max()) > _MOST_COUNTED:
        # Counting takes memory for every number up to the largest: large ones are counted under short names.
        known, short = np.unique(np.concatenate([a, b]), return_inverse=True)
        table = dice(short[: a.size] + 1, short[a.size :] + 1)
        table = {int(known[n - 1]): value for n, value in table.items() if known[n - 1]}
        return table if labels is None else {n: table[n] for n in labels if n in table}
    top = int(max(a.max(), b.max())) + 1
    sizes = np.bincount(a, minlength=top) + np.bincount(b, minlength=top)
    common = np.bincount(a[a == b], minlength=top)
    wanted = (
        np.flatnonzero(sizes)[np.flatnonzero(sizes) > 0]
        if labels is None
        else [n for n in labels if n < top and sizes[n]]
    )
    return {int(n): float(2 * common[n] / sizes[n]) for n in wanted}


def label_overlap(fixed: Volume, moving: Volume, transform: Transform | np.ndarray) -> dict[int, float]:
    """Dice of the fixed labels with the moving labels pulled onto them (nearest neighbour)."""
    return dice(fixed.array, resample_through(moving, transform, fixed.grid, "nearest"))


def target_registration_error(
    transform: Transform | np.ndarray, fixed_points: np.ndarray, moving_points: np.ndarray
) -> np.ndarray:
    """(n,) mm: distance of each mapped fixed landmark from its moving partner (mathematics.md, 15.2)."""
    if isinstance(transform, np.ndarray):
        mapped = np.asarray(fixed_points, float) @ transform[:3, :3].T + transform[:3, 3]
    else:
        mapped = transform.map_points(fixed_points)
    return np.linalg.norm(mapped - moving_points, axis=1)


def jacobian_map(transform: Transform, grid: Grid | None = None) -> np.ndarray:
    """(D, H, W) determinant of the physical map on ``grid`` (default: the transform's own); <= 0 is folding.

    Central differences between the voxels of ``grid``; where a cell of a compact transform's lattice folds at one of
    its eight corners, the determinant there.
    """
    grid = grid or transform.grid
    jacobian = jacobian_on(transform, grid)
    mark_folds(jacobian, transform, grid)
    return jacobian


def inverse_consistency_map(forward: Transform, inverse: Transform, grid: Grid | None = None) -> np.ndarray:
    """(D, H, W) mm on ``grid`` (default: the forward transform's own): |inverse(forward(x)) - x|."""
    return inverse_consistency_on(forward, inverse, grid or forward.grid)


def jacobian_summary(determinant: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """Folding (det <= 0) over all voxels and inside the mask; the rest inside the mask (mathematics.md, 2.4)."""
    values = determinant[mask] if mask is not None and mask.any() else determinant.ravel()
    folded = determinant <= 0
    return {
        "folded_voxels": int(folded.sum()),
        "folded_percent": float(100 * folded.mean()),
        "folded_percent_content": float(100 * (values <= 0).mean()),
        "jacobian_min": float(values.min()),
        "jacobian_median": float(np.median(values)),
        "jacobian_max": float(values.max()),
        "sd_log_jacobian": float(np.log(np.maximum(values, 1e-9)).std()),
    }


def ice_summary(ice_mm: np.ndarray, mask: np.ndarray | None = None, voxel_mm: float = 1.0) -> dict[str, float]:
    """Inverse consistency error inside the mask: mean, 95th percentile and maximum in mm, mean in voxels."""
    values = ice_mm[mask] if mask is not None and mask.any() else ice_mm.ravel()
    return {
        "ice_mean_mm": float(values.mean()),
        "ice_p95_mm": float(np.percentile(values, 95)),
        "ice_max_mm": float(values.max()),
        "ice_mean_voxel": float(values.mean() / voxel_mm),
    }


def similarity(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """Mean squared local correlation (window 9) of two images on one grid where either shows something; 0..1."""
    shown = ((a > 0.02) | (b > 0.02)).to(a)
    if weight is not None:
        shown = shown * weight
    return float((lncc_map(a, b) * shown).sum() / shown.sum().clamp_min(1))


def mean(values: Mapping[int, float]) -> float:
    """Plain mean of a table of numbers; nan when empty."""
    return float(np.mean(list(values.values()))) if values else float("nan")
