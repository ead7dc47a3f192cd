"""Linear interpolation of arrays at single points, in float64 by NumPy; whole volumes go through torch (``fields``)."""

from __future__ import annotations

import math

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
    part = np.moveaxis(index - low, -1, 0)
    strides = np.cumprod([1, *array.shape[count - 1 : 0 : -1]])[::-1]
    first, steps = low @ strides, np.where(last > 0, strides, 0)
    voxels = array.reshape(-1, *array.shape[count:])
    out = np.zeros((*index.shape[:-1], *array.shape[count:]))
    for corner in np.ndindex(*[2] * count):
        share = math.prod(p if far else 1 - p for p, far in zip(part, corner))
        out += share.reshape(*share.shape, *[1] * (array.ndim - count)) * voxels[first + steps @ corner]
    return out
