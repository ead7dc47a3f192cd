"""Where voxels are: the one place that ties array indices to millimetres.

Numpy only. A grid is an array shape and one matrix. Everything about axis order, spacing, flips and
obliqueness is in that matrix, so nothing downstream has to know about it.

* **index**: (d, h, w), the position in a numpy or torch array; may be fractional; voxel centres are integers.
* **point**: (x, y, z) in mm, LPS (ITK's world; DICOM's patient axes).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular lattice in physical space.

    Attributes:
        shape: (D, H, W), the array shape.
        matrix: (4, 4) float64, index (d, h, w, 1) -> LPS mm (x, y, z, 1).
    """

    shape: tuple[int, int, int]
    matrix: np.ndarray

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (4, 4) or len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(
                f"a grid needs a shape of 3 positive sizes and a 4x4 matrix, got {self.shape}, {matrix.shape}"
            )
        steps = np.linalg.norm(matrix[:3, :3], axis=0)
        # Judged by the axes' directions: voxels of 10 nm make a small determinant, but no flat grid.
        if not np.isfinite(matrix).all() or min(steps) < 1e-9 or abs(np.linalg.det(matrix[:3, :3] / steps)) < 1e-9:
            raise ValueError("the index-to-point matrix is singular or not finite")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @classmethod
    def from_itk(cls, size: Sequence[int], spacing: ArrayLike, origin: ArrayLike, direction: ArrayLike) -> Grid:
        """From ITK's (x, y, z)-ordered size, spacing (mm), origin (LPS mm) and row-major direction (9 numbers)."""
        columns = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)
        matrix = np.eye(4)
        matrix[:3, :3] = columns[:, ::-1]
        matrix[:3, 3] = origin
        width, height, depth = size
        return cls((depth, height, width), matrix)

    @classmethod
    def centred(cls, shape: Sequence[int], spacing: float, centre: ArrayLike, axes: np.ndarray | None = None) -> Grid:
        """An isotropic grid of ``spacing`` mm whose middle is the LPS point ``centre``; ``axes`` (3, 3): a unit column
        per array axis."""
        axes = np.eye(3)[:, ::-1] if axes is None else np.asarray(axes, float)
        matrix = np.eye(4)
        matrix[:3, :3] = axes * spacing
        matrix[:3, 3] = np.asarray(centre, float) - matrix[:3, :3] @ ((np.asarray(shape) - 1) / 2)
        depth, height, width = shape
        return cls((depth, height, width), matrix)

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm per index step along D, H, W."""
        return np.linalg.norm(self.matrix[:3, :3], axis=0)

    @property
    def axes(self) -> np.ndarray:
        """(3, 3) unit LPS vectors of the D, H and W axes, as columns."""
        return self.matrix[:3, :3] / self.spacing

    @property
    def itk(self) -> tuple[tuple, tuple, tuple, tuple]:
        """(size, spacing, origin, direction) in ITK's order, for SimpleITK's setters."""
        direction = self.axes[:, ::-1]
        return (self.shape[::-1], tuple(self.spacing[::-1]), tuple(self.matrix[:3, 3]), tuple(direction.ravel()))

    @property
    def inverse(self) -> np.ndarray:
        """(4, 4), LPS mm -> index."""
        return np.linalg.inv(self.matrix)

    @property
    def centre(self) -> np.ndarray:
        """(3,) LPS mm of the middle of the grid."""
        return self.points((np.asarray(self.shape) - 1) / 2)

    @property
    def volume(self) -> float:
        """mm^3 that the voxels fill."""
        return float(abs(np.linalg.det(self.matrix[:3, :3])) * np.prod(self.shape))

    def points(self, indices: ArrayLike) -> np.ndarray:
        """(..., 3) indices -> (..., 3) LPS mm."""
        return transform_points(self.matrix, indices)

    def indices(self, points: ArrayLike) -> np.ndarray:
        """(..., 3) LPS mm -> (..., 3) fractional indices."""
        return transform_points(self.inverse, points)

    def corners(self) -> np.ndarray:
        """(8, 3) LPS mm: the centres of the corner voxels."""
        return self.points(list(itertools.product(*((0, n - 1) for n in self.shape))))

    def cropped(self, start: ArrayLike, stop: ArrayLike) -> Grid:
        """The grid of ``array[start:stop]``; negative starts and stops beyond the shape grow it
        (half-open, index units)."""
        start, stop = np.floor(start).astype(int), np.ceil(stop).astype(int)
        matrix = self.matrix.copy()
        matrix[:3, 3] = self.points(start)
        return Grid(tuple(stop - start), matrix)

    def padded(self, millimetres: float) -> Grid:
        """Grown on all six sides by at least ``millimetres``; voxel centres stay where they were."""
        extra = np.ceil(millimetres / self.spacing)
        return self.cropped(-extra, np.asarray(self.shape) + extra)

    def resampled(self, spacing: ArrayLike) -> Grid:
        """The same field of view (outer voxel faces) with about ``spacing`` mm per axis; at least one voxel an axis."""
        spacing = np.broadcast_to(np.asarray(spacing, float), (3,))
        shape = np.maximum(1, np.round(np.asarray(self.shape) * self.spacing / spacing)).astype(int)
        factor = np.asarray(self.shape) / shape
        matrix = self.matrix.copy()
        matrix[:3, :3] = self.matrix[:3, :3] * factor
        matrix[:3, 3] = self.points((factor - 1) / 2)
        return Grid(tuple(shape), matrix)

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """True when the shapes agree and no corner is further than ``tolerance`` mm, or a tenth of a voxel, away."""
        tolerance = min(tolerance, 0.1 * float(self.spacing.min()))
        return self.shape == other.shape and bool(np.abs(self.corners() - other.corners()).max() <= tolerance)


def transform_points(matrix: np.ndarray, points: ArrayLike) -> np.ndarray:
    """An affine (4, 4) on (..., 3) points or indices."""
    return np.asarray(points, float) @ matrix[:3, :3].T + matrix[:3, 3]


def index_map(source: Grid, between: np.ndarray, target: Grid) -> np.ndarray:
    """(4, 4): index of ``source`` -> LPS point -> ``between`` (4, 4 in mm) -> index of ``target``."""
    return target.inverse @ between @ source.matrix


def canonical_axes(axes: np.ndarray) -> np.ndarray:
    """Columns permuted and flipped so that array axes D, H, W run closest to +S, +P, +L; handedness is free.

    Two scans of one head stored in different axis orders get the same canonical axes.
    """
    best = max(itertools.permutations(range(3)), key=lambda order: sum(abs(axes[2 - k, order[k]]) for k in range(3)))
    ordered = axes[:, list(best)]
    signs = np.sign([ordered[2 - k, k] for k in range(3)])
    return ordered * np.where(signs == 0, 1, signs)
