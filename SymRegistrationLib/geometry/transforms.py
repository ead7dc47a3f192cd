"""From voxels of the working grid to millimetres of the two scans, and to files: the only place where both meet.

A transform file maps points of its output space to points of its input space (ITK's resampling direction;
Slicer's *FromParent*). Vectors are LPS mm.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from ..fields import gradient, sample
from ..job import InputError, existing_file
from .file_checks import check_written, quiet
from .grid import Grid, transform_points
from .lattice import affine_grid
from .volumes import Volume, grid_of, itk_reason, read_image, to_itk, whole_numbers

#: Voxels handled at once when a whole volume is mapped, so that memory stays flat.
SLAB = 4_000_000


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
        index = np.clip(self.grid.indices(points), 0, np.asarray(self.grid.shape) - 1)
        low = np.minimum(np.floor(index).astype(int), np.maximum(np.asarray(self.grid.shape) - 2, 0))
        part = index - low
        moved = points.copy()
        for corner in np.ndindex(2, 2, 2):
            at = np.minimum(low + corner, np.asarray(self.grid.shape) - 1)
            share = np.prod(np.where(corner, part, 1 - part), axis=1)
            moved += share[:, None] * self.displacement[at[:, 0], at[:, 1], at[:, 2]]
        return moved

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

    def to_itk(self) -> sitk.DisplacementFieldTransform:
        """The same as SimpleITK's transform (double precision; zero displacement outside, unlike here)."""
        return sitk.DisplacementFieldTransform(to_itk(self.displacement.astype(np.float64), self.grid, vector=True))


@dataclass(frozen=True, eq=False)
class TransformPair:
    """Both physical transforms of one registration, initial alignment included.

    Attributes:
        forward: on the fixed scan's grid plus margin, fixed point -> moving point: brings the moving scan onto the
            fixed.
        inverse: on the moving scan's grid plus margin, moving point -> fixed point.
        matrix: (4, 4) LPS mm, the initial alignment alone, fixed -> moving.
    """

    forward: DenseTransform
    inverse: DenseTransform
    matrix: np.ndarray


# ---------------------------------------------------------------------------------------------- using a transform


def resample_through(
    volume: Volume,
    transform: DenseTransform | np.ndarray,
    grid: Grid,
    mode: str = "bilinear",
    outside: float | None = None,
) -> np.ndarray:
    """Pull a volume back onto ``grid``.

    Args:
        volume: the input image or label map.
        transform: dense, or a (4, 4) matrix in LPS mm; output point -> input point.
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
    source = torch.from_numpy(np.ascontiguousarray(volume.array, dtype=np.float32))[None, None] - outside
    out = np.empty(grid.shape, volume.array.dtype)
    for start, stop, part in slabs(grid):
        coordinates = point_coordinates(transform, part, volume.grid)
        values = sample(source, coordinates, mode, "zeros")[0, 0] + outside
        out[start:stop] = whole_numbers(values.numpy(), out.dtype) if whole else values.numpy()
    return out


def slabs(grid: Grid):
    """(start, stop, sub-grid) along D, each about :data:`SLAB` voxels."""
    step = max(1, SLAB // max(1, grid.shape[1] * grid.shape[2]))
    for start in range(0, grid.shape[0], step):
        stop = min(grid.shape[0], start + step)
        yield start, stop, grid.cropped((start, 0, 0), (stop, *grid.shape[1:]))


def point_coordinates(transform: DenseTransform | np.ndarray, grid: Grid, source: Grid) -> Tensor:
    """(1, D, H, W, 3) grid_sample coordinates in ``source`` of the mapped voxel points of ``grid``."""
    like = torch.empty(1, 1, *source.shape)
    if isinstance(transform, np.ndarray):
        return affine_grid(grid.shape, source.inverse @ transform @ grid.matrix, like)
    base = affine_grid(grid.shape, source.inverse @ grid.matrix, like)
    size = np.maximum(np.asarray(source.shape) - 1, 1)
    linear = (source.inverse[:3, :3] * (2 / size)[:, None])[::-1].copy()
    moved = torch.from_numpy(linear).float() @ transform.on(grid).reshape(3, -1)
    return base + moved.view(3, *grid.shape).permute(1, 2, 3, 0)


def jacobian_on(transform: DenseTransform, grid: Grid) -> np.ndarray:
    """(D, H, W) float32: determinant of the physical map at the voxels of ``grid``, central differences there."""
    out = np.empty(grid.shape, np.float32)
    steps = grid.matrix[:3, :3]  # mm per index: det(I + dU/dx) = det(M + dU/di) / det(M) with M = steps
    for start, stop, _ in slabs(grid):
        low, high = max(0, start - 1), min(grid.shape[0], stop + 1)
        u = transform.on(grid.cropped((low, 0, 0), (high, *grid.shape[1:]))).contiguous()[None]
        rows = [
            [gradient(u[:, r : r + 1], axis)[0, 0].add_(float(steps[r, axis])) for axis in range(3)] for r in range(3)
        ]
        (a, b, c), (d, e, f), (g, h, i) = rows
        det = (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)) / float(np.linalg.det(steps))
        out[start:stop] = det[start - low : start - low + stop - start].numpy()
    return out


def inverse_consistency_on(forward: DenseTransform, inverse: DenseTransform, grid: Grid) -> np.ndarray:
    """(D, H, W) float32 mm: how far each voxel point of ``grid`` lies from itself after forward, then inverse."""
    out = np.empty(grid.shape, np.float32)
    field = torch.from_numpy(np.moveaxis(inverse.displacement, -1, 0))[None]
    for start, stop, part in slabs(grid):
        there = forward.on(part)
        back = sample(field, point_coordinates(forward, part, inverse.grid))[0]
        out[start:stop] = (there + back).square_().sum(0).sqrt_().numpy()
    return out


# ---------------------------------------------------------------------------------------------- files


def write_transform(path: str | os.PathLike, transform: DenseTransform, matrix: np.ndarray | None = None) -> None:
    """Write a transform: ``.h5`` (ITK), ``.nrrd`` or ``.nii.gz`` (5-D, intent 1006).

    Args:
        matrix: (4, 4) LPS mm; when given, ``.h5`` holds a composite: first a grid, then this affine, with the same sum.
    """
    path = str(path)
    if path.endswith(".h5"):
        if matrix is None:
            with quiet():
                sitk.WriteTransform(transform.to_itk(), path)
            check_written(Path(path), 0)
            return
        affine = sitk.AffineTransform(3)
        affine.SetMatrix(matrix[:3, :3].ravel().tolist())
        affine.SetTranslation(matrix[:3, 3].tolist())
        with quiet():
            sitk.WriteTransform(sitk.CompositeTransform([affine, _remainder(transform, matrix).to_itk()]), path)
        check_written(Path(path), 0)
        return
    if path.endswith(".nii.gz"):
        _write_nifti(path, transform)
        return
    image = to_itk(transform.displacement, transform.grid, vector=True)
    with quiet():
        sitk.WriteImage(image, path, useCompression=True, compressionLevel=1)
    check_written(Path(path), transform.displacement.nbytes)


def _write_nifti(path: str, transform: DenseTransform) -> None:
    """A NIfTI-1 displacement field as ITK and Slicer expect it: (I, J, K, 1, 3) float32, intent 1006, vectors in RAS.

    Written here because SimpleITK cannot set the intent on a vector image.
    """
    grid = transform.grid
    flip = np.array([-1.0, -1.0, 1.0])
    matrix = np.column_stack([grid.matrix[:3, [2, 1, 0]], grid.matrix[:3, 3]]) * flip[:, None]
    header = np.zeros((), _NIFTI_HEADER)
    header["sizeof_hdr"], header["dim"] = 348, [5, *grid.shape[::-1], 1, 3, 1, 1]
    header["intent_code"], header["datatype"], header["bitpix"] = 1006, 16, 32
    header["pixdim"], header["vox_offset"], header["xyzt_units"] = [1, *grid.spacing[::-1], 1, 1, 0, 0], 352, 2
    header["scl_slope"], header["sform_code"], header["srow"], header["magic"] = 1, 1, matrix, b"n+1"
    vectors = np.moveaxis(transform.displacement * flip.astype(np.float32), -1, 0)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobytes() + bytes(4))
        file.write(np.ascontiguousarray(vectors, "<f4").tobytes())


_NIFTI_HEADER = np.dtype(
    {
        "names": [
            "sizeof_hdr",
            "dim",
            "intent_code",
            "datatype",
            "bitpix",
            "pixdim",
            "vox_offset",
            "scl_slope",
            "xyzt_units",
            "sform_code",
            "srow",
            "magic",
        ],
        "formats": [
            "<i4",
            ("<i2", 8),
            "<i2",
            "<i2",
            "<i2",
            ("<f4", 8),
            "<f4",
            "<f4",
            "u1",
            "<i2",
            ("<f4", (3, 4)),
            "S4",
        ],
        "offsets": [0, 40, 68, 70, 72, 76, 108, 112, 123, 254, 280, 344],
        "itemsize": 348,
    }
)


def _remainder(transform: DenseTransform, matrix: np.ndarray) -> DenseTransform:
    """The grid that, followed by the affine, equals ``transform``."""
    grid = transform.grid
    points = grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
    moved = transform_points(np.linalg.inv(matrix), points + transform.displacement)
    return DenseTransform(grid, (moved - points).astype(np.float32))


def read_transform(path: str | os.PathLike) -> sitk.Transform:
    """Read any transform file that maps points: ITK .h5/.tfm/.txt/.mat, or a displacement image .nrrd/.nii(.gz)/.mha.

    Raises:
        InputError: missing, unreadable, an image that is not a displacement field, not 3-D, or not finite.
    """
    path = existing_file(path, "transform")
    hint = "Give an ITK transform (.h5, .tfm, .mat, .txt) or a displacement grid (.nrrd, .nii.gz)."
    if path.is_dir():
        raise InputError(f"transform '{path}' is a folder.", hint)
    if path.name.lower().endswith((".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd")):
        image = read_image(path, "transform", hint)
        vectors = image.GetNumberOfComponentsPerPixel() == 3 and "float" in image.GetPixelIDTypeAsString()
        if image.GetDimension() != 3 or not vectors:
            raise InputError(
                f"transform '{path}' is an image, not a displacement grid.", "Give the transform, not the scan."
            )
        transform: sitk.Transform = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    else:
        try:
            with quiet():
                transform = sitk.ReadTransform(str(path))
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"transform '{path}' could not be read ({itk_reason(error)}).", hint) from None
    if transform.GetDimension() != 3:
        raise InputError(f"transform '{path}' is {transform.GetDimension()}-D.", "Give one for 3-D scans.")
    if not _is_finite(transform):
        raise InputError(f"transform '{path}' holds numbers that are not finite.", "Make or export it again.")
    return transform


def _is_finite(transform: sitk.Transform) -> bool:
    """False when a parameter or a vector is NaN or infinite."""
    if transform.GetName() == "CompositeTransform":
        whole = sitk.CompositeTransform(transform)
        return all(_is_finite(whole.GetNthTransform(k)) for k in range(whole.GetNumberOfTransforms()))
    if transform.GetName() == "DisplacementFieldTransform":
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        return bool(np.isfinite(sitk.GetArrayViewFromImage(field).sum()))  # not-a-number and infinity survive a sum
    return bool(np.isfinite(transform.GetParameters()).all() and np.isfinite(transform.GetFixedParameters()).all())


def dense(transform: sitk.Transform, grid: Grid) -> DenseTransform:
    """Any SimpleITK transform as a dense one on ``grid``; a displacement field keeps its own grid."""
    if transform.GetName() == "DisplacementFieldTransform":
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        return DenseTransform(grid_of(image), sitk.GetArrayFromImage(image).astype(np.float32))
    size, spacing, origin, direction = grid.itk
    image = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat32, size, origin, spacing, direction)
    return DenseTransform(grid, sitk.GetArrayFromImage(image))
