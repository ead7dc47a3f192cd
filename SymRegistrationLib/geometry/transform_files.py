"""Transforms on disk: ITK's .h5 and displacement grids written, anything that maps points read."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from ..job import InputError, existing_file
from .file_checks import check_written, itk_reason, quiet
from .grid import Grid, transform_points
from .itk_hdf5 import COMPOSITE, affine_part, compact_parts, grid_part, write_transforms
from .transforms import CompactTransform, DenseTransform, Transform, itk_affine
from .volumes import grid_of, read_image, to_itk


def write_transform(path: str | os.PathLike, transform: Transform, matrix: np.ndarray | None = None) -> None:
    """Write a transform: ``.h5`` (ITK, single precision, packed), ``.nrrd`` or ``.nii.gz`` (5-D, intent 1006).

    Args:
        transform: a compact one can only be written as ``.h5``; as a grid it would lose its affines.
        matrix: (4, 4) LPS mm; with a dense transform, ``.h5`` holds a composite: first a grid, then this affine, with
            the same sum.

    Raises:
        OSError: the disk is full, or the folder closed.
        RuntimeError: the same, told by ITK.
    """
    path = str(path)
    if path.endswith(".h5"):
        write_transforms(path, _parts(transform, matrix))
        return
    if isinstance(transform, CompactTransform):
        raise ValueError(f"a compact transform is written as .h5, not as '{path}'")
    if path.endswith(".nii.gz"):
        _write_nifti(path, transform)
        return
    image = to_itk(transform.displacement, transform.grid, vector=True)
    with quiet():
        sitk.WriteImage(image, path, useCompression=True, compressionLevel=1)
    check_written(Path(path), transform.displacement.nbytes)


def _parts(transform: Transform, matrix: np.ndarray | None) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What an ITK file lists: the last transform of a composite is applied first."""
    if isinstance(transform, CompactTransform):
        return compact_parts(transform.grid, transform.displacement, transform.before, transform.after)
    if matrix is None:
        return [grid_part(transform.grid, transform.displacement)]
    return [COMPOSITE, affine_part(matrix), grid_part(transform.grid, _remainder(transform, matrix).displacement)]


def _write_nifti(path: str, transform: DenseTransform) -> None:
    """A NIfTI-1 displacement field as ITK and Slicer expect it: (I, J, K, 1, 3) float32, intent 1006, vectors in RAS.

    Written here because SimpleITK cannot set the intent on a vector image.
    """
    grid = transform.grid
    flip = np.array([-1.0, -1.0, 1.0])
    matrix = np.column_stack([grid.matrix[:3, [2, 1, 0]], grid.matrix[:3, 3]]) * flip[:, None]
    header = np.zeros((), NIFTI_HEADER)
    header["sizeof_hdr"], header["dim"] = 348, [5, *grid.shape[::-1], 1, 3, 1, 1]
    header["intent_code"], header["datatype"], header["bitpix"] = 1006, 16, 32
    header["pixdim"], header["vox_offset"], header["xyzt_units"] = [1, *grid.spacing[::-1], 1, 1, 0, 0], 352, 2
    header["scl_slope"], header["sform_code"], header["srow"], header["magic"] = 1, 1, matrix, b"n+1"
    vectors = np.moveaxis(transform.displacement * flip.astype(np.float32), -1, 0)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobytes() + bytes(4))
        file.write(np.ascontiguousarray(vectors, "<f4").tobytes())


_FIELDS: tuple[tuple[str, Any, int], ...] = (
    ("sizeof_hdr", "<i4", 0),
    ("dim", ("<i2", 8), 40),
    ("intent_code", "<i2", 68),
    ("datatype", "<i2", 70),
    ("bitpix", "<i2", 72),
    ("pixdim", ("<f4", 8), 76),
    ("vox_offset", "<f4", 108),
    ("scl_slope", "<f4", 112),
    ("scl_inter", "<f4", 116),
    ("xyzt_units", "u1", 123),
    ("qform_code", "<i2", 252),
    ("sform_code", "<i2", 254),
    ("quatern", ("<f4", 3), 256),
    ("qoffset", ("<f4", 3), 268),
    ("srow", ("<f4", (3, 4)), 280),
    ("magic", "S4", 344),
)
#: The fields of a NIfTI-1 header that are of use here, little-endian, at their places.
NIFTI_HEADER = np.dtype(
    {
        "names": [name for name, _, _ in _FIELDS],
        "formats": [kind for _, kind, _ in _FIELDS],
        "offsets": [offset for _, _, offset in _FIELDS],
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
        if image.HasMetaDataKey("before") and image.HasMetaDataKey("after"):  # what the worker hands to Slicer
            before, after = (
                np.array(image.GetMetaData(key).split(), float).reshape(4, 4) for key in ("before", "after")
            )
            transform = sitk.CompositeTransform([itk_affine(after), transform, itk_affine(before)])
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


def physical(transform: sitk.Transform, grid: Grid | None) -> Transform:
    """Any SimpleITK transform as one of ours, without loss where it can be.

    Args:
        transform: a displacement field keeps its own grid; affines around one lattice stay apart from it.
        grid: where everything else is sampled; ``None`` is refused for those.

    Raises:
        ValueError: the transform has no lattice of its own and there is no grid.
    """
    if transform.GetName() == "DisplacementFieldTransform":
        return DenseTransform(*_lattice(transform))
    found = _compact(transform)
    if found is not None:
        return found
    if grid is None:
        raise ValueError("a transform without a grid of its own needs one")
    return dense(transform, grid)


def _lattice(transform: sitk.Transform) -> tuple[Grid, np.ndarray]:
    image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
    return grid_of(image), sitk.GetArrayFromImage(image).astype(np.float32)


def _compact(transform: sitk.Transform) -> CompactTransform | None:
    """The affines before and after the one lattice of a composite, or None for anything else."""
    if transform.GetName() != "CompositeTransform":
        return None
    whole = sitk.CompositeTransform(transform)
    before = after = np.eye(4)
    inner = None
    for k in reversed(range(whole.GetNumberOfTransforms())):  # in the order in which they are applied
        part = whole.GetNthTransform(k)
        if part.GetName() == "DisplacementFieldTransform" and inner is None:
            inner = _lattice(part)
        elif part.IsLinear():
            matrix = linear_matrix(part)
            before, after = (matrix @ before, after) if inner is None else (before, matrix @ after)
        else:
            return None
    if inner is None:
        return None
    try:
        return CompactTransform(*inner, before, after)
    except ValueError:  # its lattice does not end in zero
        return None


def linear_matrix(transform: sitk.Transform) -> np.ndarray:
    """(4, 4) LPS mm of a linear transform."""
    columns = np.array([transform.TransformPoint(p) for p in ((0.0, 0, 0), (1.0, 0, 0), (0.0, 1, 0), (0.0, 0, 1))])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (columns[1:] - columns[0]).T, columns[0]
    return matrix


def dense(transform: sitk.Transform, grid: Grid) -> DenseTransform:
    """Any SimpleITK transform as a dense one on ``grid``; a displacement field keeps its own grid."""
    if transform.GetName() == "DisplacementFieldTransform":
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        return DenseTransform(grid_of(image), sitk.GetArrayFromImage(image).astype(np.float32))
    size, spacing, origin, direction = grid.itk
    image = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat32, size, origin, spacing, direction)
    return DenseTransform(grid, sitk.GetArrayFromImage(image))
