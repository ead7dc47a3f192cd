"""Linear transforms as files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .file_checks import check_written, quiet


def write_linear(path: str | os.PathLike, matrix: np.ndarray) -> None:
    """Write a (4, 4) matrix, LPS mm, output point -> input point, as an ITK affine transform: ``.tfm`` or ``.h5``.

    ITK keeps the 12 numbers in double precision, so a matrix and its inverse in two files cancel to 1e-9 mm.

    Raises:
        RuntimeError: the disk does not take it.
    """
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(np.asarray(matrix, float)[:3, :3].ravel().tolist())
    affine.SetTranslation(np.asarray(matrix, float)[:3, 3].tolist())
    with quiet():
        sitk.WriteTransform(affine, str(path))
    check_written(Path(path), 0)
