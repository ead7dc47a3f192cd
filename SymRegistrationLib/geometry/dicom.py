"""A DICOM series in a folder as one volume, and why some are none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ..job import InputError
from .file_checks import itk_reason, quiet

#: Folders below that are asked for a series when one is missing.
_MOST_FOLDERS = 50


@contextlib.contextmanager
def _no_itk_warnings() -> Iterator[None]:
    """ITK prints warnings of its own to stderr; what matters of them is told by our errors."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def series_files(folder: Path, what: str, hint: str) -> tuple[str, ...]:
    """Files of the one DICOM series of a folder, in order.

    Args:
        what: its part in the run, for messages.
        hint: what to do where neither a series nor anything like a scan is there.

    Raises:
        InputError: none, or several.
    """
    series = _series(folder)
    if not series:
        raise InputError(f"{what} folder '{folder}' holds no DICOM series.", _instead(folder) or hint)
    if len(series) > 1:
        raise InputError(
            f"{what} folder '{folder}' holds {len(series)} DICOM series.", "Put one series into its own folder."
        )
    return sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])


def _series(folder: Path) -> tuple[str, ...]:
    with _no_itk_warnings(), quiet():
        return sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))


def _instead(folder: Path) -> str:
    """What to give in place of a folder without a series: a scan in it, or a folder below; "" without either."""
    scans = sorted(p.name for p in folder.iterdir() if p.name.lower().endswith((".nii", ".nii.gz", ".nrrd", ".mha")))
    if scans:
        return f"Give one of its files, such as '{folder / scans[0]}'."
    below = [Path(place) for place, _, files in os.walk(folder) if files and Path(place) != folder]
    found = next((place for place in sorted(below)[:_MOST_FOLDERS] if _series(place)), None)
    return f"Give a folder below, such as '{found}'." if found else ""


def read_series(folder: Path, what: str, hint: str) -> sitk.Image:
    """The one series of a folder as ITK stacks it; see :func:`series_files`. Raises InputError also where its slices
    make no volume."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(series_files(folder, what, hint))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        with quiet():
            image = reader.Execute()
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"{what} folder '{folder}' could not be read ({itk_reason(error)}).", "Export the series again."
        ) from None
    keys = "0020|0032", "0020|0037"  # image position and orientation (patient)
    tags = (
        [
            [reader.GetMetaData(k, key) for key in keys]
            for k in range(image.GetSize()[-1])
            if all(reader.HasMetaDataKey(k, key) for key in keys)
        ]
        if image.GetDimension() == 3
        else []
    )
    fault = slices_fault(tags)
    if fault:
        raise InputError(
            f"{what} folder '{folder}' {fault}.",
            "Export the series again, or convert it to one volume (dcm2niix, Slicer).",
        )
    return image


def slices_fault(tags: Sequence[Sequence[str]]) -> str:
    """Why slices do not make a volume, or ''; ITK would stack them at their mean distance all the same.

    Args:
        tags: image position and image orientation of every slice in order, as DICOM writes them.
    """
    try:
        places = np.array([[float(v) for v in position.split("\\")] for position, _ in tags])
        rows = np.array([float(v) for v in tags[0][1].split("\\")]).reshape(2, 3)
    except (ValueError, IndexError):  # no positions: nothing is known against it
        return ""
    if len(places) < 2 or places.shape[1] != 3:
        return ""
    steps = np.diff(places, axis=0)
    along = np.abs(steps @ np.cross(*rows))
    aside = np.linalg.norm(steps @ rows.T, axis=1)
    if along.min() < 0.01 * max(along.max(), 1e-6):
        return "holds several images at one place (a series over time, or several echoes)"
    if along.max() > 1.2 * along.min():
        return (
            f"has slices at uneven distances ({along.min():.3g} to {along.max():.3g} mm): some are missing, or it "
            f"is two series in one"
        )
    if np.median(aside / along) > 0.05:
        return "has slices that are shifted against each other (a tilted gantry)"
    return ""
