"""Damaged scans, masks and label maps."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import write_volume

from .formats import GRID, SHAPE, flipped, mgh, mha, nifti, nrrd, scan


def damaged_nifti(bad: Path, good: Path) -> None:
    """Damaged NIfTI files: one header field each, or damaged bytes."""
    array = scan()
    whole = nifti(array)
    float_array = array.astype(np.float32)
    sform = np.c_[4 * np.eye(3), [10, 20, 30]]
    flat, unknown = sform.copy(), sform.copy()
    flat[:, 2] = flat[:, 1]
    unknown[0, 3] = np.nan
    fields = {
        "sizeof": {"sizeof_hdr": 999},
        "magic": {"magic": b"xyz"},
        "nine_axes": {"dim": [9, *[4] * 7]},
        "no_axes": {"dim": [0] * 8},
        "negative_size": {"dim": [3, -4, 16, 14, 1, 1, 1, 1]},
        "huge": {"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]},
        "datatype": {"datatype": 999},
        "offset": {"vox_offset": 1e7},
        "offset_nan": {"vox_offset": np.nan},
        "zero_spacing": {"pixdim": [1, 0, 4, 4, 1, 1, 1, 1], "sform_code": 0, "qform_code": 1},
        "nan_spacing": {"pixdim": [1, np.nan, 4, 4, 1, 1, 1, 1], "sform_code": 0, "qform_code": 1},
        "huge_spacing": {"pixdim": [1, 1e30, 1e30, 1e30, 1, 1, 1, 1], "sform_code": 1, "srow": sform * 1e30},
        "tiny_spacing": {"pixdim": [1, 1e-10, 1e-10, 1e-10, 1, 1, 1, 1], "srow": sform * 1e-10},
        "flat_sform": {"srow": flat},
        "nan_sform": {"srow": unknown},
        "nan_slope": {"scl_slope": np.nan, "datatype": 16, "bitpix": 32},
        "five_axes": {"dim": [5, 18, 16, 7, 1, 2, 1, 1]},
        "complex": {"datatype": 32, "bitpix": 64, "dim": [3, 9, 8, 14, 1, 1, 1, 1]},
        "rgb": {"datatype": 128, "bitpix": 24, "dim": [3, 6, 16, 14, 1, 1, 1, 1]},
    }
    for name, changes in fields.items():
        source = float_array if name == "nan_slope" else array
        (bad / f"{name}.nii").write_bytes(nifti(source, **changes))
    packed = gzip.compress(whole)
    (bad / "huge.nii.gz").write_bytes(gzip.compress((bad / "huge.nii").read_bytes()))
    (bad / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    (bad / "tail.nii.gz").write_bytes(packed[:-5])
    (bad / "flipped.nii.gz").write_bytes(flipped(packed, 0.5))
    (bad / "checksum.nii.gz").write_bytes(packed[:-8] + struct.pack("<I", zlib.crc32(whole) ^ 1) + packed[-4:])
    (bad / "cut.nii").write_bytes(whole[:2000])
    (bad / "header_only.nii").write_bytes(whole[:352])
    (bad / "empty.nii").write_bytes(b"")
    (bad / "empty.nii.gz").write_bytes(b"")
    (bad / "text.nii.gz").write_text("this is no image\n" * 40)
    (bad / "plain.nii.gz").write_bytes(whole[:100] + b"not gzip")
    for name, values in (
        ("constant", np.full(SHAPE, 7, np.int16)),
        ("all_nan", np.full(SHAPE, np.nan, np.float32)),
        ("all_inf", np.full(SHAPE, np.inf, np.float32)),
        ("one_voxel", np.ones((1, 1, 1), np.int16)),
        ("speck", (np.arange(np.prod(SHAPE)).reshape(SHAPE) == 999).astype(np.int16)),
        ("flat", array[7]),
        ("series", np.stack([array, array])),
    ):
        (bad / f"{name}.nii").write_bytes(nifti(values))


def damaged_others(bad: Path, good: Path) -> None:
    """Damaged files of the other formats."""
    array = scan()
    for name, in_nrrd, in_mha, in_mgh in (
        (
            "zero_spacing",
            {"space_directions": "(0,0,0) (0,4,0) (0,0,4)"},
            {"ElementSpacing": "0 4 4"},
            {"delta": (0, 4, 4)},
        ),
        (
            "singular",
            {"space_directions": "(4,0,0) (0,4,0) (0,4,0)"},
            {"TransformMatrix": "1 0 0 0 1 0 0 1 0"},
            {"cosines": (1, 0, 0, 0, 1, 0, 0, 1, 0)},
        ),
        ("huge", {"sizes": "90000 90000 90000"}, {"DimSize": "90000 90000 90000"}, {"size": (30000, 30000, 30000, 1)}),
        ("type", {"type": "porridge"}, {"ElementType": "MET_PORRIDGE"}, {"type": 99}),
    ):
        (bad / f"{name}.nrrd").write_bytes(nrrd(array, **in_nrrd))
        (bad / f"{name}.mha").write_bytes(mha(array, **in_mha))
        (bad / f"{name}.mgh").write_bytes(mgh(array, **in_mgh))
    for ending in ("nrrd", "mha", "mgz"):
        (bad / f"empty.{ending}").write_bytes(b"")
        (bad / f"text.{ending}").write_bytes(b"this is no image\n" * 40)
    for name, data in {
        "cut.nrrd": nrrd(array)[:1500],
        "nan_origin.nrrd": nrrd(array, space_origin="(nan,0,0)"),
        "negative.nrrd": nrrd(array, sizes="-18 16 14"),
        "two_sizes.nrrd": nrrd(array, sizes="18 16"),
        "encoding.nrrd": nrrd(array, encoding="zip"),
        "no_directions.nrrd": nrrd(array, space_directions="none none none"),
        "cut.mha": mha(array)[:1500],
        "nan_spacing.mha": mha(array, ElementSpacing="nan 4 4"),
        "inf_origin.mha": mha(array, Offset="inf 0 0"),
        "no_size.mha": mha(array, DimSize=""),
        "detached.nhdr": nrrd(array, **{"data file": "gone.raw"}),
        "detached.mhd": mha(array, ElementDataFile="gone.raw"),
        "short.mhd": mha(array, ElementDataFile="short.raw"),
        "short.raw": b"\1" * 100,
        "huge.mhd": mha(array, ElementDataFile="short.raw", DimSize="90000 90000 90000"),
        "cut.mgh": mgh(array)[:1000],
        "cut.mgz": gzip.compress(mgh(array))[:900],
        "huge.mgz": gzip.compress(mgh(array, size=(30000, 30000, 30000, 1))),
        "frames.mgh": mgh(array, size=(18, 16, 7, 2)),
        "negative.mgh": mgh(array, size=(-18, 16, 14, 1)),
        "all_nan.mgh": mgh(array, type=3),
        "scan.txt": nifti(array),
        "scan": nifti(array),
        "scan.xyz": nifti(array),
        "scan.nii.gz.part": gzip.compress(nifti(array)),
        "scan.npy": b"\x93NUMPY",
        "page.html": b"<html></html>",
    }.items():
        (bad / name).write_bytes(data)
    sitk.WriteImage(sitk.GetImageFromArray(array[7].astype(np.uint8)), str(bad / "picture.png"))
    noise = (
        np.random.default_rng(0).integers(0, 900, (24, 24, 24)).astype(np.int16)
    )  # stored, not packed: a bit is a voxel
    for ending in ("nrrd", "mha"):
        write_volume(bad / f"checksum.{ending}", noise, Grid.centred(noise.shape, 4.0, (0, 0, 0)))
        data = (bad / f"checksum.{ending}").read_bytes()
        (bad / f"checksum.{ending}").write_bytes(flipped(data, 0.6))
    write_volume(bad / "nan_scan.nrrd", np.full(SHAPE, np.nan, np.float32), GRID)
    image = sitk.GetImageFromArray(array)
    sitk.WriteImage(sitk.Compose(image, image, image), str(bad / "vector.mha"))


def special_files(bad: Path, good: Path) -> None:
    """Folders, pipes and names where a file is expected."""
    (bad / "folder").mkdir()
    (bad / "folder" / "notes.txt").write_text("no DICOM here")
    (bad / "broken_dicom").mkdir()
    (bad / "broken_dicom" / "1.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 200)
    (bad / "folder.nii.gz").mkdir()
    os.mkfifo(bad / "pipe.nii")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(bad)  # the name of a socket must be short
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
    (bad / "dangling.nii").symlink_to(bad / "gone.nii")
    (bad / "loop.nii").symlink_to(bad / "loop.nii")


def extras(bad: Path, good: Path) -> None:
    """Masks and label maps."""
    write_volume(bad / "nomask.nii.gz", np.zeros(SHAPE, np.uint8), GRID)
    write_volume(bad / "farmask.nii.gz", np.ones(SHAPE, np.uint8), Grid.centred(SHAPE, 4.0, (5000, 0, 0)))
    write_volume(bad / "halves.nii.gz", scan().astype(np.float32) + 0.5, GRID)
    write_volume(bad / "nan_labels.nrrd", np.where(scan() > 0, np.nan, 1).astype(np.float32), GRID)
    write_volume(bad / "big_labels.nii.gz", np.where(scan() > 0, 1e12, 0).astype(np.float64), GRID)
    write_volume(bad / "far.nii.gz", scan(), Grid.centred(SHAPE, 4.0, (5000, 0, 0)))
