"""Makes files that no program should swallow: a corpus of damaged scans, tables, transforms and weights, by code.

``make(folder)`` fills ``folder/good`` with a small correct set and ``folder/bad`` with what is derived from it by one
defect each, so that a refusal can only be due to that defect.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from SymRegistrationLib.geometry.points import PointSet, write_points
from SymRegistrationLib.geometry.transform_files import write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import write_volume

from . import models, scans, tables
from .formats import GRID, SHAPE, scan

MAKERS = (
    scans.damaged_nifti,
    scans.damaged_others,
    scans.special_files,
    scans.extras,
    tables.points,
    models.transforms,
    models.weights,
    tables.jobs,
    tables.tables,
)


def make(folder: Path) -> dict[str, Path]:
    """Fill ``folder``; returns the names that cases use."""
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    bad.mkdir()
    for name, shift in (("fixed", 0.0), ("moving", 1.0)):
        write_volume(good / f"{name}.nii.gz", scan(shift), GRID)
        write_volume(good / f"{name}_labels.nii.gz", (scan(shift) > 400).astype(np.uint8), GRID)
    at = np.array([(4, 5, 6), (8, 9, 10), (5, 10, 7), (9, 6, 11)])
    for name, move in (("fixed", 0.0), ("moving", 4.0)):
        write_points(good / f"{name}.csv", PointSet(GRID.points(at) + (move, 0, 0), ("a", "b", "c", "d")))
    field = np.zeros((*SHAPE, 3), np.float32)
    field[..., 0] = 4
    write_transform(good / "forward.h5", DenseTransform(GRID, field))
    write_transform(good / "inverse.h5", DenseTransform(GRID, -field))
    write_transform(good / "other.h5", DenseTransform(GRID, field * 20))
    sitk.WriteTransform(sitk.AffineTransform(3), str(good / "affine.tfm"))
    (good / "scans").mkdir()
    for k in range(3):
        write_volume(good / "scans" / f"sub-{k}_T1w.nii.gz", scan(k / 2), GRID)
    _weights(good)
    for make_some in MAKERS:
        make_some(bad, good)
    return {
        "good": good,
        "bad": bad,
        "fixed": good / "fixed.nii.gz",
        "moving": good / "moving.nii.gz",
        "net": good / "net.safetensors",
        "scans": good / "scans",
    }


def _weights(good: Path) -> None:
    import torch

    from SymRegistrationLib import networks
    from SymRegistrationLib.registration import weights

    torch.manual_seed(0)
    weights.save(good / "net.safetensors", networks.create("hsyn", "small"))
