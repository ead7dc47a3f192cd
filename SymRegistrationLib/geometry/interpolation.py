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
    voxels = array.reshape(-1, *array.shape[count:])
    first, parts, steps = np.zeros(index.shape[:-1], int), [], []
    for axis in range(count):
        place = np.clip(index[..., axis], 0, last[axis])
        low = np.minimum(place.astype(int), max(last[axis] - 1, 0))
        step = math.prod(array.shape[axis + 1 : count])
        first += low * step
        parts.append((place - low).reshape(*low.shape, *[1] * (array.ndim - count)))
        steps.append(step if last[axis] > 0 else 0)

    def between(axis: int, at: np.ndarray) -> np.ndarray:
        """Values interpolated along this axis and those behind it."""
        if axis == count:
            return voxels[at].astype(float)
        low, high = between(axis + 1, at), between(axis + 1, at + steps[axis])
        high -= low
        high *= parts[axis]
        high += low
        return high

    return between(0, first)
