"""Places on a map: its connected regions, as a list that a user can walk through, and its value at points."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import SimpleITK as sitk

from .grid import Grid
from .interpolation import interpolate


@dataclass(frozen=True)
class Region:
    """One connected region.

    Attributes:
        centre: LPS mm of a voxel of the region nearest to its centroid, so that jumping there shows the region.
        centroid: LPS mm.
        voxels: number of voxels.
        ml: volume in millilitres.
        worst: most extreme value of the map inside.
    """

    centre: tuple[float, float, float]
    centroid: tuple[float, float, float]
    voxels: int
    ml: float
    worst: float

    def plain(self) -> dict:
        """As JSON-ready data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def regions(
    mask: np.ndarray, values: np.ndarray, grid: Grid, most: int = 20, highest: bool = True
) -> tuple[list[Region], int]:
    """The connected regions of a mask, largest first.

    Args:
        mask: (D, H, W) bool; voxels that share a face, an edge or a corner are connected.
        values: (D, H, W), for :attr:`Region.worst`.
        grid: of both.
        most: list at most so many.
        highest: whether high values or low ones are the extreme ones.

    Returns:
        The list, and how many regions there are in all.
    """
    if not mask.any():
        return [], 0
    image = sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8)), True)
    image = sitk.RelabelComponent(image, sortByObjectSize=True)
    labels = sitk.GetArrayViewFromImage(image)
    where = np.flatnonzero(labels)
    numbers = labels.ravel()[where]
    order = np.argsort(numbers, kind="stable")
    where, ends = where[order], np.cumsum(np.bincount(numbers)[1:])
    found = []
    for start, stop in zip(np.concatenate([[0], ends[:-1]])[:most], ends[:most]):
        indices = np.stack(np.unravel_index(where[start:stop], mask.shape), 1)
        middle = indices.mean(0)
        nearest = indices[np.argmin(np.square((indices - middle) * grid.spacing).sum(1))]
        inside = values.ravel()[where[start:stop]]
        found.append(
            Region(
                _rounded(grid.points(nearest)),
                _rounded(grid.points(middle)),
                int(stop - start),
                float((stop - start) * _voxel_ml(grid)),
                float(inside.max() if highest else inside.min()),
            )
        )
    return found, len(ends)


def values_at(array: np.ndarray, grid: Grid, points: np.ndarray) -> np.ndarray:
    """(n,) trilinear values of a (D, H, W) map at (n, 3) LPS mm; nan outside its field of view (outer voxel faces)."""
    shape = np.asarray(grid.shape)
    index = grid.indices(np.atleast_2d(np.asarray(points, float)))
    outside = ((index < -0.5) | (index > shape - 0.5)).any(axis=1)
    return np.where(outside, np.nan, interpolate(array, index))


def _rounded(point: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (round(float(x), 2) for x in point)
    return x, y, z


def _voxel_ml(grid: Grid) -> float:
    return abs(float(np.linalg.det(grid.matrix[:3, :3]))) / 1000
