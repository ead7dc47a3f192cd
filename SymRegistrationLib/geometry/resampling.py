"""Images, label maps and points carried through ITK transforms of any kind.

A transform T pulls back: it maps points of the output (fixed) space to the input (moving) space, LPS mm. So an
image is resampled with T itself, while a *point* of the moving scan needs the inverse of T.

ITK lets a displacement grid end in zero displacement. Our grids hold the initial alignment, so that would tear the
image apart at the rim; everything here extends a grid by its border value instead, as Slicer does.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
import torch

from ..fields import sample
from .grid import Grid
from .lattice import affine_grid
from .volumes import Volume, grid_of, to_itk, whole_numbers

INTERPOLATIONS = {"nearest": sitk.sitkNearestNeighbor, "linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline}


def resample_image(volume: Volume, transform: sitk.Transform, grid: Grid, interpolation: str = "linear") -> np.ndarray:
    """``volume`` on ``grid``: out(p) = volume(T(p)).

    Args:
        volume: what to move.
        transform: points of ``grid``'s space -> points of the volume's space.
        grid: where the result is wanted.
        interpolation: a key of ``INTERPOLATIONS``.

    Returns:
        (D, H, W) of the volume's type, integers rounded; outside the volume its lowest value.
    """
    exact = interpolation == "nearest" or np.issubdtype(volume.array.dtype, np.floating)
    array = volume.array if exact else volume.array.astype(np.float32)
    outside = float(volume.array.min())
    image = sitk.Resample(
        to_itk(array, volume.grid),
        _reference(grid),
        covering(transform, grid),
        INTERPOLATIONS[interpolation],
        outside,
        sitk.sitkUnknown,
    )
    result = sitk.GetArrayFromImage(image)
    return result.astype(volume.array.dtype) if exact else whole_numbers(result, volume.array.dtype)


def resample_labels(volume: Volume, transform: sitk.Transform, grid: Grid, smooth: bool = False) -> np.ndarray:
    """A label map on ``grid``; labels are never mixed, 0 outside.

    Args:
        volume: the label map.
        transform: points of ``grid``'s space -> points of the volume's space.
        grid: where the result is wanted.
        smooth: instead of the nearest voxel's, the label with the largest share of the eight voxels around the point
            (Schaerer, Roche, Belaroussi, "A generic interpolator for multi-label images", Insight Journal 2014):
            boundaries follow the anatomy between voxels instead of forming steps.

    Returns:
        (D, H, W) of the volume's type.
    """
    interpolation = sitk.sitkLabelLinear if smooth else sitk.sitkNearestNeighbor
    image = sitk.Resample(volume.to_itk(), _reference(grid), covering(transform, grid), interpolation, 0)
    return sitk.GetArrayFromImage(image).astype(volume.array.dtype)


def nearest(array: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """(D, H, W): values of the nearest voxels, for two grids with the same axes; beyond the source its border."""
    matrix = source.inverse @ target.matrix
    index = [
        np.clip(np.round(matrix[axis, axis] * np.arange(n) + matrix[axis, 3]).astype(int), 0, array.shape[axis] - 1)
        for axis, n in enumerate(target.shape)
    ]
    return array[np.ix_(*index)]


def linear(array: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """(D, H, W) float32 of a map on another grid, interpolated; beyond the source its border."""
    values = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None, None]
    return sample(values, affine_grid(target.shape, source.inverse @ target.matrix, values))[0, 0].numpy()


def map_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """(n, 3) LPS mm of the output space -> (n, 3) LPS mm of the input space."""
    points = np.asarray(points, float).reshape(-1, 3)
    if transform.GetTransformEnum() == sitk.sitkDisplacementField and len(points):
        rim = _field_grid(transform)
        inside = rim.points(np.clip(rim.indices(points), 0, np.array(rim.shape) - 1))
        return points + np.array([transform.TransformPoint(p) for p in inside.tolist()]) - inside
    return np.array([transform.TransformPoint(p) for p in points.tolist()]).reshape(-1, 3)


def outside_field(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """(n,) bool: the points beyond the displacement grid of a transform; all False for other kinds."""
    if transform.GetTransformEnum() != sitk.sitkDisplacementField:
        return np.zeros(len(points), bool)
    grid = _field_grid(transform)
    indices = grid.indices(points)
    return np.asarray(((indices < -0.5) | (indices > np.array(grid.shape) - 0.5)).any(axis=1))


def invert_points(
    transform: sitk.Transform, points: np.ndarray, iterations: int = 50, tolerance: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """The points q with T(q) = p, by damped Newton steps from the transform's best affine.

    Args:
        transform: any; linear ones are inverted exactly.
        points: (n, 3) LPS mm.
        iterations: most steps a point gets.
        tolerance: stop below this residual, mm.

    Returns:
        (n, 3) LPS mm and (n,) the residuals |T(q) - p| in mm, measured.
    """
    points = np.asarray(points, float).reshape(-1, 3)
    if transform.IsLinear():
        inverse = map_points(transform.GetInverse(), points)
        return inverse, np.linalg.norm(map_points(transform, inverse) - points, axis=1)
    matrix, shift = _best_affine(transform, points)
    best = np.linalg.solve(matrix, (points - shift).T).T
    error = map_points(transform, best) - points
    size = np.linalg.norm(error, axis=1)
    damping = np.ones(len(points))
    step = 0.05 * np.eye(3)
    for _ in range(iterations):
        active = np.flatnonzero(size > tolerance)
        if not len(active):
            break
        here = best[active]
        slope = np.stack(
            [(map_points(transform, here + e) - map_points(transform, here - e)) / 0.1 for e in step], axis=2
        )
        slope[np.abs(np.linalg.det(slope)) < 1e-3] = matrix
        trial = here - damping[active, None] * np.linalg.solve(slope, error[active][..., None])[..., 0]
        trial_error = map_points(transform, trial) - points[active]
        trial_size = np.linalg.norm(trial_error, axis=1)
        good = trial_size < size[active]
        best[active[good]], error[active[good]], size[active[good]] = trial[good], trial_error[good], trial_size[good]
        damping[active] = np.where(good, np.minimum(1.0, damping[active] * 2), damping[active] / 2)
    return best, size


def _best_affine(transform: sitk.Transform, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares (3, 3) and (3,) of a transform over its grid, or around ``points`` when it has none."""
    if transform.GetTransformEnum() == sitk.sitkDisplacementField:
        grid = _field_grid(transform)
        axes = [np.linspace(0, n - 1, 9) for n in grid.shape]
        lattice = grid.points(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))
    else:
        axis = np.linspace(-100, 100, 7)
        lattice = points.mean(axis=0) + np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    homogeneous = np.c_[lattice, np.ones(len(lattice))]
    solution = np.linalg.lstsq(homogeneous, map_points(transform, lattice), rcond=None)[0]
    return solution[:3].T, solution[3]


def covering(transform: sitk.Transform, grid: Grid) -> sitk.Transform:
    """The same transform, a displacement grid extended by its border values where ``grid`` reaches beyond it."""
    if transform.GetTransformEnum() != sitk.sitkDisplacementField:
        return transform
    field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
    rim = grid_of(field)
    indices = rim.indices(grid.corners())
    before = np.maximum(0, np.ceil(-indices.min(axis=0) - 0.499)).astype(int)
    after = np.maximum(0, np.ceil(indices.max(axis=0) - np.array(rim.shape) + 0.501)).astype(int)
    if not before.any() and not after.any():
        return transform
    array = np.pad(sitk.GetArrayFromImage(field), [*zip(before, after), (0, 0)], mode="edge")
    image = to_itk(array, rim.cropped(-before, np.array(rim.shape) + after), vector=True)
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))


def _field_grid(transform: sitk.Transform) -> Grid:
    return grid_of(sitk.DisplacementFieldTransform(transform).GetDisplacementField())


def _reference(grid: Grid) -> sitk.Image:
    return to_itk(np.broadcast_to(np.uint8(0), grid.shape), grid)
