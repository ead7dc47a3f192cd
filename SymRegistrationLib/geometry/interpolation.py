"""Linear interpolation of arrays at single points, in float64 by NumPy; whole volumes go through torch (``fields``)."""

from __future__ import annotations

import functools

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
    shares = [(1 - part, part) for part in np.moveaxis(index - low, -1, 0)]
    places = [(at, np.minimum(at + 1, end)) for at, end in zip(np.moveaxis(low, -1, 0), last)]
    out = np.zeros((*index.shape[:-1], *array.shape[count:]))
    for corner in np.ndindex(*[2] * count):
        share = functools.reduce(np.multiply, (pair[side] for pair, side in zip(shares, corner)))
        at = tuple(pair[side] for pair, side in zip(places, corner))
        out += share.reshape(*share.shape, *[1] * (array.ndim - count)) * array[at]
    return out
