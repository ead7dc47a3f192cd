"""Transforms in millimetres: compact and dense, what can be done with them, and their files.

A transform maps points of its output space to points of its input space (ITK's resampling direction; Slicer's
*FromParent*). Vectors are LPS mm.

* **Compact** (:class:`CompactTransform`), what a registration delivers: affine, displacement lattice about as fine as
  the working voxel, affine. The lattice ends in zero, so that beyond it everything continues affinely, in every
  program: ITK takes zero for displacement outside of a grid, Slicer the value at its border.
* **Dense** (:class:`DenseTransform`), on request and in files of earlier releases: one displacement per voxel of a
  scan, alignment included.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import determinant, gradient, sample
from .folds import folded_cells
from .grid import Grid, transform_points
from .interpolation import interpolate
from .lattice import affine_displacement, affine_grid
from .volumes import Volume, to_itk, whole_numbers

#: Voxels handled at once when a whole volume is mapped, so that memory stays flat.
SLAB = 4_000_000
#: Where a transform leads is first looked at in every so many voxels an axis.
EVERY = 4


@dataclass(frozen=True, eq=False)
class DenseTransform:
    """A displacement grid in mm: point p -> p + displacement(p); linear inside, border value outside.

    Attributes:
        grid: where the vectors sit.
        displacement: (D, H, W, 3) float32, LPS mm (x, y, z).
    """

    grid: Grid
    displacement: np.ndarray

    def __post_init__(self) -> None:
        if self.displacement.shape != (*self.grid.shape, 3):
            raise ValueError(f"displacement {self.displacement.shape} does not fit the grid {self.grid.shape}")

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) LPS mm -> (n, 3) LPS mm, computed in float64."""
        points = np.atleast_2d(np.asarray(points, float))
        return points + interpolate(self.displacement, self.grid.indices(points))

    def on(self, grid: Grid) -> Tensor:
        """(3, D, H, W) float32: the displacement (x, y, z in mm) at every voxel of another grid."""
        field = torch.from_numpy(np.moveaxis(self.displacement, -1, 0))
        matrix = self.grid.inverse @ grid.matrix
        start = np.round(matrix[:3, 3]).astype(int)
        stop = start + grid.shape
        part = np.eye(4)
        part[:3, 3] = start
        if np.allclose(matrix, part, atol=1e-6) and (start >= 0).all() and (stop <= self.grid.shape).all():
            return field[
                :, start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]
            ]  # the same voxels: nothing to interpolate
        return sample(field[None], affine_grid(grid.shape, matrix, field[None]))[0]

    def resampled(self, grid: Grid) -> DenseTransform:
        """The same map stored on another grid, so that many uses there interpolate once."""
        return DenseTransform(grid, np.ascontiguousarray(self.on(grid).permute(1, 2, 3, 0).numpy()))

    def displaced(self, points: Tensor) -> Tensor:
        """(3, D, H, W) LPS mm points -> their displacements in mm."""
        field = torch.from_numpy(np.moveaxis(self.displacement, -1, 0)).to(points)
        return sample(field[None], _coordinates(self.grid.inverse, points, self.grid.shape))[0]

    def to_itk(self) -> sitk.DisplacementFieldTransform:
        """The same as SimpleITK's transform (double precision; zero displacement outside, unlike here)."""
        return sitk.DisplacementFieldTransform(to_itk(self.displacement.astype(np.float64), self.grid, vector=True))


@dataclass(frozen=True, eq=False)
class CompactTransform:
    """``p -> after (q + d(q))`` with ``q = before p``: a lattice between two affines; beyond the lattice ``after
    before p``.

    Attributes:
        grid: of the lattice, in the space between the two affines (half-way between the scans), LPS mm.
        displacement: (D, H, W, 3) float32, LPS mm (x, y, z), zero on the six faces, so that no border shows.
        before: (4, 4), LPS mm, point of the output space -> between.
        after: (4, 4), LPS mm, between -> point of the input space.
    """

    grid: Grid
    displacement: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def __post_init__(self) -> None:
        if self.displacement.shape != (*self.grid.shape, 3):
            raise ValueError(f"displacement {self.displacement.shape} does not fit the grid {self.grid.shape}")
        faces = (self.displacement.take(end, axis=axis) for axis in range(3) for end in (0, -1))
        if any(face.any() for face in faces):
            raise ValueError("the lattice of a compact transform must be zero on its faces")

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4) LPS mm: the affine that holds beyond the lattice."""
        return self.after @ self.before

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) LPS mm -> (n, 3) LPS mm, computed in float64."""
        inner = DenseTransform(self.grid, self.displacement)
        return transform_points(self.after, inner.map_points(transform_points(self.before, np.atleast_2d(points))))

    def between(self, grid: Grid) -> Tensor:
        """(3, D, H, W) float32 mm: what the lattice alone displaces, between the affines, at every voxel of a grid of
        the output space."""
        field = torch.from_numpy(np.moveaxis(self.displacement, -1, 0))[None]
        return sample(field, affine_grid(grid.shape, self.grid.inverse @ self.before @ grid.matrix, field))[0]

    def on(self, grid: Grid) -> Tensor:
        """(3, D, H, W) float32: the displacement (x, y, z in mm) at every voxel of a grid of the output space."""
        moved = torch.from_numpy(self.after[:3, :3].astype(np.float32)) @ self.between(grid).reshape(3, -1)
        return affine_displacement(self.matrix, grid).add_(moved.view(3, *grid.shape))

    def displaced(self, points: Tensor) -> Tensor:
        """(3, D, H, W) LPS mm points -> their displacements in mm."""
        field = torch.from_numpy(np.moveaxis(self.displacement, -1, 0)).to(points)
        vectors = sample(field[None], _coordinates(self.grid.inverse @ self.before, points, self.grid.shape))[0]
        out = torch.from_numpy(self.after[:3, :3]).to(points) @ vectors.reshape(3, -1)
        change = torch.from_numpy(self.matrix - np.eye(4)).to(points)
        return (out + change[:3, :3] @ points.reshape(3, -1) + change[:3, 3:]).view_as(points)

    def resampled(self, grid: Grid) -> DenseTransform:
        """The same map stored voxel by voxel on a grid of the output space."""
        return DenseTransform(grid, np.ascontiguousarray(self.on(grid).permute(1, 2, 3, 0).numpy()))

    def to_itk(self) -> sitk.CompositeTransform:
        """The same map as SimpleITK's transform (double precision), also beyond the lattice."""
        lattice = sitk.DisplacementFieldTransform(to_itk(self.displacement.astype(np.float64), self.grid, vector=True))
        return sitk.CompositeTransform([itk_affine(self.after), lattice, itk_affine(self.before)])

    def folds(self, box: Sequence[slice] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The cells of the lattice that fold at one of their eight corners.

        Args:
            box: three slices of the lattice; only the cells within are looked at.

        Returns:
            (n, 3) their first voxels and (n,) the smallest Jacobian determinant at their corners, without
            the two affines.
        """
        steps = np.linalg.inv(self.grid.matrix[:3, :3]).astype(np.float32)
        part = self.displacement if box is None else self.displacement[tuple(box)]
        voxels = torch.from_numpy(np.moveaxis(part @ steps.T, -1, 0))
        cells, determinants = folded_cells(voxels[None])
        first = 0 if box is None else np.array([side.start for side in box])
        return cells[:, 1:].numpy() + first, determinants.numpy()


#: What a registration delivers, or a file holds.
Transform = CompactTransform | DenseTransform


def _coordinates(matrix: np.ndarray, points: Tensor, shape: Sequence[int]) -> Tensor:
    """(1, D, H, W, 3) grid_sample coordinates in an array of ``shape``: (3, D, H, W) mm points -> (4, 4) -> index."""
    scale = 2 / np.maximum(np.asarray(shape) - 1, 1)
    whole = torch.from_numpy(np.column_stack([matrix[:3, :3], matrix[:3, 3]]) * scale[:, None]).to(points)
    out = whole[:, :3] @ points.reshape(3, -1) + (whole[:, 3:] - 1)
    return out.flip(0).view_as(points).permute(1, 2, 3, 0)[None]


def itk_affine(matrix: np.ndarray) -> sitk.AffineTransform:
    """A (4, 4) matrix in LPS mm as SimpleITK's transform."""
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(matrix[:3, :3].ravel().tolist())
    affine.SetTranslation(matrix[:3, 3].tolist())
    return affine


@dataclass(frozen=True, eq=False)
class TransformPair:
    """Both physical transforms of one registration, initial alignment included.

    Attributes:
        forward: fixed point -> moving point: brings the moving scan onto the fixed.
        inverse: moving point -> fixed point.
        matrix: (4, 4) LPS mm, the initial alignment alone, fixed -> moving.
    """

    forward: Transform
    inverse: Transform
    matrix: np.ndarray


# ---------------------------------------------------------------------------------------------- using a transform


def resample_through(
    volume: Volume,
    transform: Transform | np.ndarray,
    grid: Grid,
    mode: str = "bilinear",
    outside: float | None = None,
) -> np.ndarray:
    """Pull a volume back onto ``grid``.

    Args:
        volume: the input image or label map.
        transform: compact, dense, or a (4, 4) matrix in LPS mm; output point -> input point.
        mode: ``bilinear`` or ``nearest``.
        outside: value beyond the field of view; default: the volume's minimum for images, 0 for ``nearest``.

    Returns:
        (D, H, W) in the volume's own type; whole numbers are rounded.
    """
    if outside is None:
        outside = 0.0 if mode == "nearest" else float(volume.array.min())
    whole = np.issubdtype(volume.array.dtype, np.integer)
    if whole and mode == "nearest" and max(int(volume.array.max()), -int(volume.array.min())) >= 2**24:
        # float32 does not tell such labels apart, so their places in the list of labels travel instead.
        known, places = np.unique(np.append(volume.array, volume.array.dtype.type(outside)), return_inverse=True)
        short = Volume(places[:-1].reshape(volume.array.shape).astype(np.int32), volume.grid)
        return known[resample_through(short, transform, grid, mode, float(places[-1]))]
    out = np.full(grid.shape, outside, volume.array.dtype)
    filled = _filled(volume.array, outside)
    if filled is None:
        return out
    origin = volume.grid.cropped([part.start for part in filled], [part.stop for part in filled])
    source = torch.from_numpy(volume.array[filled].astype(np.float32))[None, None].sub_(outside)
    for box in _reached(transform, grid, origin, volume.array[filled] != volume.array.dtype.type(outside)):
        part = grid.cropped([side.start for side in box], [side.stop for side in box])
        values = sample(source, point_coordinates(transform, part, origin), mode, "zeros")[0, 0].add_(outside).numpy()
        out[box] = whole_numbers(values, out.dtype) if whole else values
    return out


def _filled(array: np.ndarray, outside: float) -> tuple[slice, slice, slice] | None:
    """Where anything differs from ``outside``, one voxel more on every side; None when nothing does."""
    differs = array != array.dtype.type(outside)
    found = []
    for axis in range(3):
        where = np.flatnonzero(differs.any(axis=tuple(k for k in range(3) if k != axis)))
        if not len(where):
            return None
        found.append(slice(max(0, int(where[0]) - 1), min(array.shape[axis], int(where[-1]) + 2)))
    return found[0], found[1], found[2]


def _reached(
    transform: Transform | np.ndarray, grid: Grid, source: Grid, content: np.ndarray
) -> Iterator[tuple[slice, slice, slice]]:
    """Boxes of ``grid``, layer by layer, that hold every voxel which the transform takes to content of ``source``.

    Looks at every fourth voxel, and around each cell of these as far again as its own corners lie apart.

    Args:
        content: (D, H, W) bool on ``source``.
    """
    depth, height, width = shape = tuple(-(-(n - 1) // EVERY) + 1 for n in grid.shape)
    matrix = grid.matrix.copy()
    matrix[:3, :3] *= EVERY
    at = point_coordinates(transform, Grid((depth, height, width), matrix), source)[0].permute(3, 0, 1, 2).flip(0)
    index = (at + 1) * (torch.tensor(source.shape).view(3, 1, 1, 1) - 1) / 2
    cell = [min(2, n) for n in shape]
    low, high = -F.max_pool3d(-index, cell, 1), F.max_pool3d(index, cell, 1)
    apart = high - low + 1  # interpolation looks one voxel further
    inside = _any_within(content, low - apart, high + apart)
    layers = max(1, min(4, SLAB // (EVERY * grid.shape[1] * grid.shape[2])))
    for start in range(0, len(inside), layers):
        _, *sides = (torch.unique(where) for where in inside[start : start + layers].nonzero().T)
        if len(sides[0]):
            ends = [(start, start + layers), *((side[0], side[-1] + 1) for side in sides)]
            # Neighbouring layers share the voxels between them.
            d, h, w = (slice(EVERY * int(a), min(n, EVERY * int(b) + 1)) for (a, b), n in zip(ends, grid.shape))
            yield d, h, w


def _any_within(content: np.ndarray, low: Tensor, high: Tensor) -> Tensor:
    """(...) bool: whether any voxel of ``content`` lies in each box from ``low`` to ``high`` (3, ...), voxels; at most
    :data:`EVERY` voxels beyond it count, too."""
    blocks = content
    for axis, n in enumerate(content.shape):
        blocks = np.logical_or.reduceat(blocks, np.arange(0, n, EVERY), axis)
    sums = F.pad(torch.from_numpy(blocks).to(torch.int32), (1, 0) * 3).cumsum(0).cumsum(1).cumsum(2)
    size = torch.tensor(blocks.shape).view(3, *[1] * (low.dim() - 1))
    first = torch.minimum((low / EVERY).floor().clamp(min=0).long(), size)
    last = torch.minimum((high / EVERY).floor().clamp(min=-1).long() + 1, size)
    last = torch.maximum(first, last)
    count = torch.zeros_like(first[0])
    for corner in itertools.product((0, 1), repeat=3):
        d, h, w = ((first, last)[end][axis] for axis, end in enumerate(corner))
        count += (-1) ** (3 - sum(corner)) * sums[d, h, w]
    return count > 0


def slabs(grid: Grid) -> Iterator[tuple[int, int, Grid]]:
    """(start, stop, sub-grid) along D, each about :data:`SLAB` voxels."""
    step = max(1, SLAB // max(1, grid.shape[1] * grid.shape[2]))
    for start in range(0, grid.shape[0], step):
        stop = min(grid.shape[0], start + step)
        yield start, stop, grid.cropped((start, 0, 0), (stop, *grid.shape[1:]))


def point_coordinates(transform: Transform | np.ndarray, grid: Grid, source: Grid) -> Tensor:
    """(1, D, H, W, 3) grid_sample coordinates in ``source`` of the mapped voxel points of ``grid``."""
    like = torch.empty(1, 1, *source.shape)
    if isinstance(transform, np.ndarray):
        return affine_grid(grid.shape, source.inverse @ transform @ grid.matrix, like)
    if isinstance(transform, CompactTransform):
        vectors, affine, turn = transform.between(grid), transform.matrix, transform.after[:3, :3]
    else:
        vectors, affine, turn = transform.on(grid), np.eye(4), np.eye(3)
    out = affine_grid(grid.shape, source.inverse @ affine @ grid.matrix, like)
    linear = (source.inverse[:3, :3] @ turn * (2 / np.maximum(np.asarray(source.shape) - 1, 1))[:, None])[::-1].copy()
    moved = torch.from_numpy(linear).float() @ vectors.reshape(3, -1)
    for axis in range(3):
        out[0, ..., axis].add_(moved[axis].view(grid.shape))
    return out


def seen(grid: Grid, transform: Transform, box: Sequence[slice] | None = None) -> tuple[slice, slice, slice]:
    """The box of a grid of the output space outside of which a transform is affine, also between neighbouring voxels.

    Args:
        box: three slices of the lattice of a compact transform; only what lies within is looked for.

    Returns:
        Three slices, all empty when there is no such voxel; the whole grid for a dense transform.
    """
    low, high = np.zeros(3, int), np.array(grid.shape)
    if isinstance(transform, CompactTransform):
        within = [slice(0, n) for n in transform.grid.shape] if box is None else box
        corners = list(itertools.product(*((side.start - 1, side.stop) for side in within)))
        points = transform_points(np.linalg.inv(transform.before), transform.grid.points(corners))
        index = grid.indices(points)
        low = np.clip(np.floor(index.min(0)).astype(int) - 1, 0, grid.shape)
        high = np.clip(np.ceil(index.max(0)).astype(int) + 2, 0, grid.shape)
        low, high = (low, high) if (low < high).all() else (low, low)
    d, h, w = (slice(int(a), int(b)) for a, b in zip(low, high))
    return d, h, w


def jacobian_on(transform: Transform, grid: Grid) -> np.ndarray:
    """(D, H, W) float32: determinant of the physical map at the voxels of ``grid``, central differences there."""
    around = float(np.linalg.det(transform.matrix[:3, :3])) if isinstance(transform, CompactTransform) else 0.0
    out = np.full(grid.shape, around, np.float32)
    # One voxel more than what is bent: the differences at its border then meet the affine, on which all agree.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in seen(grid, transform))
    target = out[box]
    part = grid.cropped([side.start for side in box], np.array([side.start for side in box]) + target.shape)
    steps = grid.matrix[:3, :3]  # mm per index: det(I + dU/dx) = det(M + dU/di) / det(M) with M = steps
    for start, stop, _ in slabs(part):
        low, high = max(0, start - 1), min(part.shape[0], stop + 1)
        u = transform.on(part.cropped((low, 0, 0), (high, *part.shape[1:]))).contiguous()[None]
        rows = [
            [gradient(u[:, r : r + 1], axis)[0, 0].add_(float(steps[r, axis])) for axis in range(3)] for r in range(3)
        ]
        det = determinant(rows).div_(float(np.linalg.det(steps)))
        target[start:stop] = det[start - low : start - low + stop - start].numpy()
    return out


def mark_folds(jacobian: np.ndarray, transform: Transform, grid: Grid, box: Sequence[slice] | None = None) -> None:
    """Bring folds of single lattice cells, which central differences can miss, into a map of determinants, in place.

    Args:
        jacobian: (D, H, W) on ``grid``, see :func:`jacobian_on`.
        transform: of which it is the map; a dense one has nothing to add.
        grid: of the map, in the transform's output space.
        box: three slices of the transform's lattice; only the cells within are looked at.
    """
    if not isinstance(transform, CompactTransform):
        return
    cells, determinants = transform.folds(box)
    if len(cells):
        points = transform_points(np.linalg.inv(transform.before), transform.grid.points(cells + 0.5))
        at = np.clip(np.round(grid.indices(points)).astype(int), 0, np.asarray(grid.shape) - 1)
        np.minimum.at(jacobian, tuple(at.T), determinants * np.float32(np.linalg.det(transform.matrix[:3, :3])))


def inverse_consistency_on(forward: Transform, inverse: Transform, grid: Grid) -> np.ndarray:
    """(D, H, W) float32 mm: how far each voxel point of ``grid`` lies from itself after forward, then inverse."""
    out = np.zeros(grid.shape, np.float32)
    box = seen(grid, forward) if _both_of_one(forward, inverse) else tuple(slice(0, n) for n in grid.shape)
    target = out[box]
    if not target.size:
        return out
    for start, stop, part in slabs(grid.cropped([side.start for side in box], [side.stop for side in box])):
        there = forward.on(part)
        points = there + affine_displacement(np.zeros((4, 4)), part).neg_()
        target[start:stop] = (there + inverse.displaced(points)).square_().sum(0).sqrt_().numpy()
    return out


def _both_of_one(forward: Transform, inverse: Transform) -> bool:
    """Whether two transforms are the two directions of one registration: where neither is bent, they cancel."""
    if not (isinstance(forward, CompactTransform) and isinstance(inverse, CompactTransform)):
        return False
    meet = np.allclose(inverse.before @ forward.after, np.eye(4), atol=1e-6)
    return (
        meet
        and np.allclose(inverse.matrix @ forward.matrix, np.eye(4), atol=1e-6)
        and forward.grid.same_as(inverse.grid)
    )
