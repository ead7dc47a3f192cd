"""NaN and infinity of NIfTI files. ITK reads them as 0 without a word, which is water in a CT and tissue in a map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ..job import InputError
from .file_checks import nifti_reals


class NotFinite:
    """Finds the voxels of a NIfTI file that are no finite numbers while its bytes go by.

    Args:
        path: of any image file; only NIfTI in floating point has such voxels that get lost.
    """

    def __init__(self, path: Path):
        self._path = path
        kind = nifti_reals(path)
        self.possible = kind is not None
        name, self._skip = kind or ("<f4", 0)
        self._dtype: np.dtype = np.dtype(name)
        self._rest, self._count = b"", 0
        self._where: list[np.ndarray] = []

    def look(self, block: bytes) -> None:
        """Take the next bytes of the unpacked file."""
        skipped = min(self._skip, len(block))
        self._skip -= skipped
        data = self._rest + block[skipped:]
        whole = len(data) - len(data) % self._dtype.itemsize
        self._rest = data[whole:]
        values = np.frombuffer(data[:whole], self._dtype)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            self._where.append(bad + self._count)
        self._count += len(values)

    def restored(self, image: sitk.Image, what: str) -> sitk.Image:
        """What ITK read of the file, with NaN where the file holds no finite number. Raises InputError: vectors do."""
        if self.possible and not self._count:  # not packed, so nothing went by yet
            self.look(self._path.read_bytes())
        if not self._where:
            return image
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise InputError(f"{what} '{self._path}' holds numbers that are not finite.", "Make or export it again.")
        array = sitk.GetArrayFromImage(image)
        where = np.concatenate(self._where)
        array.reshape(-1)[where[where < array.size]] = np.nan  # bytes may follow the voxels
        restored = sitk.GetImageFromArray(array)
        restored.CopyInformation(image)
        return restored
