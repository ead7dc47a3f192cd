"""Linear interpolation of arrays at single points, in float64 by NumPy; whole volumes go through torch (``fields``)."""

from __future__ import annotations

import numpy as np


def interpolate(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Values between voxels, linear along every axis; beyond the border the border value.

    Args:
        array: (D, H, W[, C]), or (H, W[, C]) with two indices a point.
        index: (..., k) voxel positions along the first ``k`` axes of ``array``.

    Returns:
        (...[, C]) float64.
    """
    count = index.shape[-1]
    last = np.asarray(array.shape[:count]) - 1
    index = np.clip(index, 0, last)
    low = np.minimum(np.floor(index).astype(int), np.maximum(last - 1, 0))
    part = index - low
    out = np.zeros((*index.shape[:-1], *array.shape[count:]))
    for corner in np.ndindex(*[2] * count):
        at = np.minimum(low + corner, last)
        share = np.prod(np.where(corner, part, 1 - part), axis=-1)
        out += share.reshape(*share.shape, *[1] * (array.ndim - count)) * array[tuple(np.moveaxis(at, -1, 0))]
    return out
