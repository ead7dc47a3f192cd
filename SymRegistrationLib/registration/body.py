"""What lies where in a trunk, coarsely: the lungs of a chest CT; for smoothing, not for measuring volumes."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from ..geometry.grid import Grid
from ..geometry.resampling import linear
from ..geometry.volumes import Volume

#: Everything below is air or lung, Hounsfield units.
NOT_TISSUE = -500
#: Inflated lung has this median; gas in the trachea or bowel lies below, Hounsfield units.
LUNG = (-950, -600)
#: Voxels of the search in mm, and how far trachea and main bronchi are cut off, and vessels closed, mm.
VOXEL, CUT, CLOSED = 4.0, 4.0, 8.0
#: A lung has at least so many litres, and so much of the larger one.
LITRES, SHARE = 0.15, 0.1


def lungs(volume: Volume) -> tuple[np.ndarray, Grid]:
    """Both lungs with their vessels, of a CT in Hounsfield units.

    The body is what is denser than air, filled slice by slice across the patient's long axis, so that lungs that the
    field of view cuts are inside too. What is air in there is opened (trachea and bronchi fall off) and closed (vessels
    belong to it).

    Returns:
        (D, H, W) bool and its grid, of the scan's field of view; all False when there are none.
    """
    array, grid, along = _coarse(volume)
    inside = _by_slice(array >= NOT_TISSUE, along) & (array < NOT_TISSUE)
    voxel = float(grid.spacing.min())
    parts, sizes = _parts(sitk.BinaryMorphologicalOpening(_image(inside), _ball(CUT, voxel)))
    kept = np.zeros(parts.shape, bool)
    for n in range(1, len(sizes)):
        if sizes[n] * float(np.prod(grid.spacing)) / 1e6 < LITRES or sizes[n] < SHARE * sizes[1]:
            break
        part = parts == n
        if LUNG[0] < np.median(array[part]) < LUNG[1]:
            kept |= part
    if not kept.any():
        return kept, grid
    pad = round(CLOSED / voxel) + 1
    closed = sitk.BinaryMorphologicalClosing(_image(np.pad(kept, pad)), _ball(CLOSED, voxel))
    return sitk.GetArrayFromImage(closed)[(slice(pad, -pad),) * 3] > 0, grid


def _coarse(volume: Volume) -> tuple[np.ndarray, Grid, int]:
    """The scan in coarse voxels, its grid, and the axis that runs along the patient."""
    grid = volume.grid.resampled(np.maximum(volume.grid.spacing, VOXEL))
    return linear(volume.array, volume.grid, grid), grid, int(np.argmax(np.abs(grid.axes[2])))


def _by_slice(body: np.ndarray, along: int) -> np.ndarray:
    """A body without its holes, slice by slice across an axis."""
    planes = [_filled(plane) for plane in np.moveaxis(body, along, 0)]
    return np.moveaxis(np.stack(planes), 0, along)


def _filled(plane: np.ndarray) -> np.ndarray:
    opened = sitk.BinaryMorphologicalOpening(_image(plane), [1, 1])
    return sitk.GetArrayFromImage(sitk.BinaryFillhole(opened)) > 0


def _parts(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts numbered from the largest on, and the voxels of each number."""
    labels = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(image), sortByObjectSize=True))
    return labels, np.bincount(labels.ravel())


def _image(mask: np.ndarray) -> sitk.Image:
    return sitk.GetImageFromArray(np.ascontiguousarray(mask).astype(np.uint8))


def _ball(radius: float, voxel: float) -> list[int]:
    return [max(1, round(radius / voxel))] * 3
