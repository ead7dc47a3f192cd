"""Images on disk and in memory, always with their place in space (SimpleITK underneath)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from ..job import InputError, existing_file
from .dicom import read_series, series_files
from .file_checks import check_written, is_intact, itk_reason, mgh_fault, nifti_fault, quiet, size_fault
from .grid import Grid
from .lost_values import NotFinite

_MOST_LABEL = 2**31 - 1
#: Share of neighbours with one value above the background: 0.67 to 0.94 in label maps of heads and lungs (3 and 1 mm),
#: 0.01 to 0.19 in scans of heads, lungs and livers.
_UNIFORM = 0.5
FORMATS_HINT = "Readable are NIfTI, NRRD, MHA/MHD, MGZ (with nibabel) and a folder with one DICOM series."


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D scalar image.

    Attributes:
        array: (D, H, W), any real type.
        grid: where the voxels are, LPS mm.
        name: for messages, the file or node.
        notes: what had to be repaired when it was read.
    """

    array: np.ndarray
    grid: Grid
    name: str = "volume"
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape:
            raise ValueError(f"{self.name}: array {self.array.shape} and grid {self.grid.shape} differ")

    def to_itk(self) -> sitk.Image:
        """The same image as SimpleITK's; the voxels are copied."""
        return to_itk(self.array, self.grid)


def to_itk(array: np.ndarray, grid: Grid, vector: bool = False) -> sitk.Image:
    """(D, H, W) or, with ``vector``, (D, H, W, C) array to a SimpleITK image on ``grid``."""
    array = array.astype(np.uint8) if array.dtype == bool else array
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=vector)
    _, spacing, origin, direction = grid.itk
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def grid_of(image: sitk.Image) -> Grid:
    """The grid of a 3-D SimpleITK image."""
    return Grid.from_itk(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def read_volume(path: str | os.PathLike, what: str = "image") -> Volume:
    """Read and check one scan.

    Args:
        path: a file, or a folder with a DICOM series.
        what: its part in the run, for messages ("fixed image").

    Raises:
        InputError: missing, unreadable, not 3-D scalar, singular direction, empty, constant, or without finite voxels.
    """
    volume = _read(path, what)
    array, notes = volume.array, list(volume.notes)
    if np.issubdtype(array.dtype, np.floating):
        bad = ~np.isfinite(array)
        if bad.all():
            raise InputError(f"{what} '{path}' has no finite voxel.", "Export it again.")
        if bad.any():
            array = np.where(bad, array[~bad].min(), array)
            notes.append(f"{what}: {int(bad.sum())} NaN or infinite voxels were set to the lowest finite value")
    if array.min() == array.max():
        raise InputError(
            f"{what} '{path}' is constant ({array.flat[0]}).", "There is nothing to align; check the export."
        )
    return Volume(array, volume.grid, volume.name, tuple(notes))


def read_map(path: str | os.PathLike, what: str = "map") -> Volume:
    """Read a volume that may be constant or hold any values, such as a map of ours. Raises InputError when
    it is none."""
    return _read(path, what)


def read_labels(path: str | os.PathLike, what: str = "label map") -> Volume:
    """Read a label map as int32. Raises InputError as :func:`read_volume`, or when values are not whole numbers."""
    volume = _read(path, what)
    array = volume.array
    if np.issubdtype(array.dtype, np.floating) and (
        not np.isfinite(array).all() or np.abs(array - np.round(array)).max() > 1e-3
    ):
        raise InputError(f"{what} '{path}' holds values that are not whole numbers.", "Give a label map, not an image.")
    if array.min() < -_MOST_LABEL or array.max() > _MOST_LABEL:
        raise InputError(f"{what} '{path}' holds labels that are too large.", f"Number them from 1 to {_MOST_LABEL}.")
    return Volume(np.round(array).astype(np.int32), volume.grid, volume.name, volume.notes)


def read_shape(path: str | os.PathLike, what: str = "image") -> tuple[int, int, int]:
    """(D, H, W) of a scan from its header alone, in milliseconds; what only the voxels can tell is not checked.

    Raises:
        InputError: missing, unreadable, cut off, not 3-D, or a folder without exactly one DICOM series.
    """
    path = existing_file(path, what)
    if path.is_dir():
        files = series_files(path, what, FORMATS_HINT)
        columns, rows, *_ = _header(Path(files[0]), what).GetSize()
        return len(files), rows, columns
    if path.name.lower().endswith((".mgz", ".mgh")):
        size, values = _load_mgz(path, what).shape, 1
    else:
        reader = _header(path, what)
        size, values = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) == 4 and size[3] == 1:
        size = size[:3]
    if len(size) != 3 or values != 1:
        raise InputError(
            f"{what} '{path}' is {len(size)}-D with {values} values a voxel.",
            "A 3-D scalar volume is needed; extract one first.",
        )
    depth, height, width = (int(n) for n in size[::-1])
    return depth, height, width


def read_modality(path: str | os.PathLike, what: str = "image") -> str:
    """Modality that a header states (DICOM: ``CT``, ``MR``, ``US``, ``PT``, ...), "" where it states none.

    Raises:
        InputError: missing, or a folder without exactly one DICOM series.
    """
    path = existing_file(path, what)
    reader = sitk.ImageFileReader()
    reader.SetFileName(series_files(path, what, FORMATS_HINT)[0] if path.is_dir() else str(path))
    try:
        with quiet():
            reader.ReadImageInformation()
        return reader.GetMetaData("0008|0060").strip().upper()
    except RuntimeError:  # no DICOM, or no such entry
        return ""


def read_mask(path: str | os.PathLike, grid: Grid, what: str = "mask") -> np.ndarray:
    """Read a mask onto ``grid`` (nearest neighbour through physical space when it lies on another grid).

    Returns:
        (D, H, W) bool.

    Raises:
        InputError: unreadable, or no voxel set inside the image.
    """
    volume = _read(path, what)
    mask = volume.array > 0
    if not mask.any():
        raise InputError(f"{what} '{path}' is empty.", "Draw something into it, or leave the mask out.")
    if not volume.grid.same_as(grid):
        mask = labels_on_grid(Volume(mask.astype(np.uint8), volume.grid), grid) > 0
        if not mask.any():
            raise InputError(f"{what} '{path}' lies wholly outside its image.", "Check that the two belong together.")
    return mask


def labels_on_grid(volume: Volume, grid: Grid) -> np.ndarray:
    """(D, H, W) of ``volume`` at the voxels of ``grid``, nearest neighbour, 0 outside."""
    reference = to_itk(np.zeros(grid.shape, np.uint8), grid)
    return sitk.GetArrayFromImage(
        sitk.Resample(volume.to_itk(), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    )


def looks_like_labels(volume: Volume) -> bool:
    """Whether a volume is more like a label map than like a scan: whole numbers, most neighbours equal."""
    middle = volume.grid.shape[0] // 2
    array = volume.array[max(0, middle - 16) : middle + 16]
    low = volume.array.min()
    inside = array[..., 1:] > low
    if not inside.any() or not np.array_equal(array, np.round(array)):
        return False
    return bool((array[..., 1:] == array[..., :-1])[inside].mean() > _UNIFORM)


def write_volume(path: str | os.PathLike, array: np.ndarray, grid: Grid) -> None:
    """Write an array with its grid; the format follows the file name (.nii.gz, .nrrd, .mha).

    Raises:
        OSError, RuntimeError: it could not be written whole, most often because the disk is full.
    """
    with quiet():
        sitk.WriteImage(to_itk(array, grid), str(path), useCompression=True, compressionLevel=1)
    check_written(Path(path), array.nbytes)


def whole_numbers(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``values`` rounded to an integer type, those beyond its range to its ends."""
    limits = np.iinfo(dtype)
    if (
        limits.bits > 16
    ):  # float32 rounds the ends of a longer type up, out of its range, and so does float64 with 64 bits
        top = limits.max if limits.bits < 64 else np.nextafter(float(limits.max), 0)
        return np.clip(np.rint(values.astype(np.float64)), limits.min, top).astype(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


def foreground(array: np.ndarray) -> np.ndarray:
    """(D, H, W) bool: where the scan holds something; Otsu's threshold on a robust range, loosened by half.

    Air and padding are dark in CT and MR alike, so the brighter side counts.
    """
    low, high = robust_range(array)
    sample = array[:: max(1, array.shape[0] // 64), ::2, ::2]
    sample = np.clip(sample.astype(np.float32), low, high)
    counts, edges = np.histogram(sample, bins=128)
    middles = (edges[1:] + edges[:-1]) / 2
    weight = np.cumsum(counts)
    mean = np.cumsum(counts * middles)
    total, whole = weight[-1], mean[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (whole * weight - mean * total) ** 2 / (weight * (total - weight))
    if not np.isfinite(between).any():  # a single value but for a few voxels
        return array > low
    threshold = middles[int(np.nanargmax(between))]
    return array > low + 0.5 * (threshold - low)


def robust_range(array: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float]:
    """Intensity range that a few outliers cannot stretch.

    The lower end is the 0.5 percentile, the upper end the 99.5 percentile of the voxels above it, so that a large
    empty background does not squeeze the anatomy. Falls back to minimum and maximum for nearly constant scans.
    """
    values = array[mask] if mask is not None else array
    values = values.ravel()
    values = values[:: max(1, values.size // 500_000)].astype(np.float32)
    low = float(np.percentile(values, 0.5))
    bright = values[values > low]
    high = float(np.percentile(bright, 99.5)) if bright.size else low
    if not high > low:
        low, high = float(array.min()), float(array.max())
    return low, high


def _read(path: str | os.PathLike, what: str) -> Volume:
    path = existing_file(path, what)
    if path.is_dir():
        image = read_series(path, what, FORMATS_HINT)
    elif path.name.lower().endswith((".mgz", ".mgh")):
        return _read_mgz(path, what)
    else:
        image = read_image(path, what)
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{what} '{path}' is {image.GetDimension()}-D with {image.GetNumberOfComponentsPerPixel()} values a voxel.",
            "A 3-D scalar volume is needed; extract one first.",
        )
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"{what} '{path}' holds complex numbers.", "Export magnitude or phase as an image of its own.")
    notes = [] if min(image.GetSize()) > 1 else [f"{what}: one of its axes has a single voxel"]
    try:
        grid = grid_of(image)
    except ValueError:
        raise InputError(f"{what} '{path}' has a singular orientation in its header.", "Export it again.") from None
    return Volume(sitk.GetArrayFromImage(image), grid, str(path), tuple(notes))


def read_image(path: Path, what: str, hint: str = FORMATS_HINT) -> sitk.Image:
    """An image file as ITK reads it, after its header and its checksums were found good.

    Args:
        path: of the file; MGZ and DICOM folders are read elsewhere.
        what: its part in the run, for messages.
        hint: what to do about a file that cannot be read.

    Raises:
        InputError: unreadable, damaged, cut off, or a header that cannot be true.
    """
    reader = _header(path, what, hint)
    lost = NotFinite(path)
    if not is_intact(path, lost.look if lost.possible else None):
        raise InputError(
            f"{what} '{path}' is damaged: its compressed data do not have their checksum.", "Copy or export it again."
        )
    with itk_errors_as_input_errors(path, what, hint):
        return lost.restored(reader.Execute(), what)


def _header(path: Path, what: str, hint: str = FORMATS_HINT) -> sitk.ImageFileReader:
    """A reader that has read the header; voxels that are not all there, and sizes that cannot be, are refused."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with itk_errors_as_input_errors(path, what, hint):
        fault = nifti_fault(path)
        if not fault:
            reader.ReadImageInformation()
            voxels = float(np.prod(reader.GetSize(), dtype=float))
            if voxels == 0:
                raise InputError(f"{what} '{path}' has no voxels.", FORMATS_HINT)
            fault = size_fault(path, voxels)
    if fault:
        raise InputError(f"{what} '{path}' {fault}.", "The file is damaged; copy or export it again.")
    return reader


@contextlib.contextmanager
def itk_errors_as_input_errors(path: Path, what: str, hint: str = FORMATS_HINT) -> Iterator[None]:
    """Errors of ITK in words, and nothing else of what it says."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_intact(path):
            raise InputError(f"{what} '{path}' is damaged.", "Copy or export it again.") from None
        why = itk_reason(error)
        if "right angles" in why:
            hint = "Resample it onto a grid without shear."
        raise InputError(f"{what} '{path}' could not be read as an image ({why}).", hint) from None


def _load_mgz(path: Path, what: str) -> Any:
    """nibabel's image, voxels not yet read."""
    try:
        import nibabel
    except ImportError:
        raise InputError(
            f"{what} '{path}' is an MGZ file, which needs nibabel.", "pip install nibabel, or convert to NIfTI."
        ) from None
    fault = mgh_fault(path)
    if fault:
        raise InputError(f"{what} '{path}' {fault}.", "The file is damaged; copy or export it again.")
    try:
        return nibabel.load(str(path))
    except Exception as error:  # nibabel raises many kinds; all of them mean an unreadable file
        raise InputError(f"{what} '{path}' could not be read ({error}).", FORMATS_HINT) from None


def _read_mgz(path: Path, what: str) -> Volume:
    image = _load_mgz(path, what)
    try:
        array = np.asarray(image.dataobj)
    except Exception as error:  # as above
        raise InputError(f"{what} '{path}' could not be read ({error}).", FORMATS_HINT) from None
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise InputError(f"{what} '{path}' is {array.ndim}-D.", "A 3-D scalar volume is needed.")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = lps[:3, 2::-1], lps[:3, 3]
    array = array.transpose(2, 1, 0)
    try:
        return Volume(array.astype(array.dtype.newbyteorder("=")), Grid(array.shape, matrix), str(path))
    except ValueError:
        raise InputError(f"{what} '{path}' has a singular orientation in its header.", "Export it again.") from None
