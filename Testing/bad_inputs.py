"""Makes files that no program should swallow: a corpus of damaged scans, tables, transforms and weights, by code.

``make(folder)`` fills ``folder/good`` with a small correct set and ``folder/bad`` with what is derived from it by one
defect each, so that a refusal can only be due to that defect.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import PointSet, write_points
from SymRegistrationLib.geometry.transform_files import NIFTI_HEADER, write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import write_volume

SHAPE = (14, 16, 18)
GRID = Grid.centred(SHAPE, 4.0, (10, -20, 30))


def scan(shift: float = 0.0) -> np.ndarray:
    """(D, H, W) int16: an ellipsoid with structure, ``shift`` voxels along W."""
    z, y, x = (np.arange(n) - (n - 1) / 2 for n in SHAPE)
    x = x[None, None, :] - shift
    body = np.sqrt((z[:, None, None] / 5) ** 2 + (y[None, :, None] / 6) ** 2 + (x / 7) ** 2) < 1
    return (body * (500 + 200 * np.sin(x / 2) + 100 * np.cos(y[None, :, None]) * np.sin(z[:, None, None] / 2))).astype(
        np.int16
    )


def nifti(array: np.ndarray, **changes) -> bytes:
    """A NIfTI-1 file with ``array`` (D, H, W) and any header field changed."""
    code, bits = {"int16": (4, 16), "float32": (16, 32), "uint8": (2, 8)}[array.dtype.name]
    header = np.zeros((), NIFTI_HEADER)
    fields = {
        "sizeof_hdr": 348,
        "dim": [array.ndim, *array.shape[::-1], *[1] * (7 - array.ndim)],
        "datatype": code,
        "bitpix": bits,
        "pixdim": [1, 4, 4, 4, 1, 1, 1, 1],
        "vox_offset": 352,
        "scl_slope": 1,
        "xyzt_units": 2,
        "sform_code": 1,
        "srow": np.c_[4 * np.eye(3), [10, 20, 30]],
        "magic": b"n+1",
    }
    for name, value in {**fields, **changes}.items():
        header[name] = value
    return header.tobytes() + bytes(4) + array.tobytes()


def nrrd(array: np.ndarray, drop: tuple[str, ...] = (), **changes) -> bytes:
    """A raw NRRD file with any header field changed or dropped."""
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, array.shape[::-1])),
        "space directions": "(4,0,0) (0,4,0) (0,0,4)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(0,0,0)",
    }
    fields.update({name.replace("_", " "): value for name, value in changes.items()})
    lines = [f"{name}: {value}" for name, value in fields.items() if name not in drop]
    return ("NRRD0004\n" + "\n".join(lines) + "\n\n").encode() + array.tobytes()


def mha(array: np.ndarray, **changes) -> bytes:
    """A raw MetaImage file with any header field changed."""
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "4 4 4",
        "DimSize": " ".join(map(str, array.shape[::-1])),
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }
    fields.update(changes)
    return "".join(f"{name} = {value}\n" for name, value in fields.items()).encode() + array.tobytes()


def mgh(array: np.ndarray, **changes) -> bytes:
    """A FreeSurfer MGH file (big-endian) with any header field changed."""
    fields = {
        "version": 1,
        "size": (*array.shape[::-1], 1),
        "type": 4,
        "dof": 0,
        "good": 1,
        "delta": (4, 4, 4),
        "cosines": (-1, 0, 0, 0, 0, -1, 0, 1, 0),
        "centre": (0, 0, 0),
        **changes,
    }
    head = struct.pack(">i4i2ih", fields["version"], *fields["size"], fields["type"], fields["dof"], fields["good"])
    head += struct.pack(">3f9f3f", *fields["delta"], *fields["cosines"], *fields["centre"])
    return head.ljust(284, b"\0") + array.astype(">i2").tobytes()


def flipped(data: bytes, at: float) -> bytes:
    """``data`` with one bit changed at the share ``at`` of its length."""
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


# ---------------------------------------------------------------------------------------------- the good set


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
    for make_some in (_scans, _more_scans, _special_files, _extras, _points, _transforms, _bad_weights, _jobs, _tables):
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


# ---------------------------------------------------------------------------------------------- scans


def _scans(bad: Path, good: Path) -> None:
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


def _more_scans(bad: Path, good: Path) -> None:
    """Damaged files of the other formats."""
    array = scan()
    for name, data in {
        "empty.nrrd": b"",
        "text.nrrd": b"this is no image\n" * 40,
        "cut.nrrd": nrrd(array)[:1500],
        "zero_spacing.nrrd": nrrd(array, space_directions="(0,0,0) (0,4,0) (0,0,4)"),
        "singular.nrrd": nrrd(array, space_directions="(4,0,0) (0,4,0) (0,4,0)"),
        "nan_origin.nrrd": nrrd(array, space_origin="(nan,0,0)"),
        "huge.nrrd": nrrd(array, sizes="90000 90000 90000"),
        "negative.nrrd": nrrd(array, sizes="-18 16 14"),
        "two_sizes.nrrd": nrrd(array, sizes="18 16"),
        "type.nrrd": nrrd(array, type="porridge"),
        "encoding.nrrd": nrrd(array, encoding="zip"),
        "no_directions.nrrd": nrrd(array, space_directions="none none none"),
        "detached.nhdr": nrrd(array, **{"data file": "gone.raw"}),
        "empty.mha": b"",
        "text.mha": b"this is no image\n" * 40,
        "cut.mha": mha(array)[:1500],
        "huge.mha": mha(array, DimSize="90000 90000 90000"),
        "zero_spacing.mha": mha(array, ElementSpacing="0 4 4"),
        "nan_spacing.mha": mha(array, ElementSpacing="nan 4 4"),
        "inf_origin.mha": mha(array, Offset="inf 0 0"),
        "singular.mha": mha(array, TransformMatrix="1 0 0 0 1 0 0 1 0"),
        "no_size.mha": mha(array, DimSize=""),
        "type.mha": mha(array, ElementType="MET_PORRIDGE"),
        "detached.mhd": mha(array, ElementDataFile="gone.raw"),
        "short.mhd": mha(array, ElementDataFile="short.raw"),
        "short.raw": b"\1" * 100,
        "huge.mhd": mha(array, ElementDataFile="short.raw", DimSize="90000 90000 90000"),
        "empty.mgz": b"",
        "text.mgz": b"this is no image\n" * 40,
        "cut.mgh": mgh(array)[:1000],
        "huge.mgh": mgh(array, size=(30000, 30000, 30000, 1)),
        "cut.mgz": gzip.compress(mgh(array))[:900],
        "huge.mgz": gzip.compress(mgh(array, size=(30000, 30000, 30000, 1))),
        "singular.mgh": mgh(array, cosines=(1, 0, 0, 0, 1, 0, 0, 1, 0)),
        "zero_spacing.mgh": mgh(array, delta=(0, 4, 4)),
        "frames.mgh": mgh(array, size=(18, 16, 7, 2)),
        "negative.mgh": mgh(array, size=(-18, 16, 14, 1)),
        "all_nan.mgh": mgh(array, type=3),
        "type.mgh": mgh(array, type=99),
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


def _special_files(bad: Path, good: Path) -> None:
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


def _extras(bad: Path, good: Path) -> None:
    """Masks and label maps."""
    write_volume(bad / "nomask.nii.gz", np.zeros(SHAPE, np.uint8), GRID)
    write_volume(bad / "farmask.nii.gz", np.ones(SHAPE, np.uint8), Grid.centred(SHAPE, 4.0, (5000, 0, 0)))
    write_volume(bad / "halves.nii.gz", scan().astype(np.float32) + 0.5, GRID)
    write_volume(bad / "nan_labels.nrrd", np.where(scan() > 0, np.nan, 1).astype(np.float32), GRID)
    write_volume(bad / "big_labels.nii.gz", np.where(scan() > 0, 1e12, 0).astype(np.float64), GRID)
    write_volume(bad / "far.nii.gz", scan(), Grid.centred(SHAPE, 4.0, (5000, 0, 0)))


# ---------------------------------------------------------------------------------------------- tables and transforms


def _points(bad: Path, good: Path) -> None:
    def markups(**changes) -> str:
        point = {"label": "a", "position": [1, 2, 3], **changes.pop("point", {})}
        return json.dumps({"markups": [{"coordinateSystem": "LPS", "controlPoints": [point], **changes}]})

    for name, text in {
        "empty.csv": "",
        "header.csv": "label,x,y,z\n",
        "columns.csv": "a,b,c\n1,2,3\n",
        "words.csv": "x,y,z\none,two,three\n",
        "two.csv": "x,y\n1,2\n",
        "ragged.csv": "x,y,z\n1,2,3\n4,5\n",
        "nan.csv": "x,y,z\n" + "1,2,nan\n" * 4,
        "inf.csv": "x,y,z\n" + "1,2,1e999\n" * 4,
        "bare.csv": "1,2\n3,4\n",
        "short.csv": "x,y,z\n1,2,3\n",
        "mixed.csv": "label,x_ras,y_lps,z_ras\na,1,2,3\n",
        "twice.csv": "label,x,y,z\n" + "d,1,2,3\na,1,2,3\nb,1,2,3\nx,1,2,3\n",
        "ijk.fcsv": "# Markups fiducial file version = 4.11\n# CoordinateSystem = IJK\n# columns = id,x,y,z\n1,2,3,4\n",
        "cut.mrk.json": markups()[:-8],
        "list.mrk.json": "[1, 2]",
        "other.mrk.json": '{"curves": []}',
        "inch.mrk.json": markups(coordinateUnits="inch"),
        "world.mrk.json": markups(coordinateSystem="MNI"),
        "flat.mrk.json": markups(point={"position": [1, 2]}),
        "null.mrk.json": markups(point={"position": None}),
        "none.mrk.json": '{"markups": []}',
        "deep.mrk.json": '{"markups": ' + "[" * 100_000,
        "nanpoint.mrk.json": markups(point={"position": [1, float("nan"), 3]}),
    }.items():
        (bad / name).write_text(text, encoding="utf-8")
    (bad / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (bad / "quote.csv").write_text('label,x,y,z\n"a,' + "1" * 200_000 + "\n", encoding="utf-8")


def _transforms(bad: Path, good: Path) -> None:
    whole = (good / "forward.h5").read_bytes()
    affine = (good / "affine.tfm").read_text()
    field = np.zeros((*SHAPE, 3), np.float32)
    field[7, 8, 9] = np.nan
    write_transform(bad / "nan.h5", DenseTransform(GRID, field))
    write_transform(bad / "nan_field.nrrd", DenseTransform(GRID, field))
    for name, data in {
        "empty.h5": b"",
        "text.h5": b"this is no transform",
        "cut.h5": whole[: len(whole) // 2],
        "head.h5": whole[:8] + bytes(500),
        "empty.tfm": b"",
        "text.tfm": b"this is no transform",
        "few.tfm": affine.replace("Parameters: 1 0 0", "Parameters: 1").encode(),
        "words.tfm": affine.replace("Parameters: 1", "Parameters: one").encode(),
        "nan.tfm": affine.replace("Parameters: 1", "Parameters: nan").encode(),
        "zero.tfm": affine.replace("Parameters: 1", "Parameters: 0").encode(),
        "kind.tfm": affine.replace("AffineTransform", "PorridgeTransform").encode(),
        "huge.tfm": affine.replace("Parameters: 1", "Parameters: 1e300").encode(),
    }.items():
        (bad / name).write_bytes(data)
    sitk.WriteTransform(sitk.AffineTransform(2), str(bad / "plane.tfm"))
    image = sitk.GetImageFromArray(np.zeros((*SHAPE, 2), np.float32), isVector=True)
    sitk.WriteImage(image, str(bad / "two.nrrd"))
    (bad / "huge_field.nii").write_bytes(
        nifti(np.zeros(8, np.float32), dim=[5, 3000, 3000, 3000, 1, 3, 1, 1], intent_code=1006)
    )
    (bad / "huge_field.nrrd").write_bytes(
        nrrd(
            scan(),
            type="float",
            dimension="4",
            kinds="vector domain domain domain",
            sizes="3 9000 9000 9000",
            space_directions="none (4,0,0) (0,4,0) (0,0,4)",
        )
    )
    cut = nifti(np.zeros((3, 1, *SHAPE), np.float32), intent_code=1006)
    (bad / "cut_field.nii").write_bytes(cut[: len(cut) // 2])


# ---------------------------------------------------------------------------------------------- weights


class _Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def _bad_weights(bad: Path, good: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = (good / "net.safetensors").read_bytes()
    card = json.loads((good / "net.safetensors.json").read_text())
    tensors = load_file(good / "net.safetensors")
    about = {"method": "hsyn", "size": "small", "version": "0.1.0", "options": json.dumps(card["options"])}

    def put(name: str, data: bytes, with_card: dict | str | None = None) -> None:
        (bad / f"{name}.safetensors").write_bytes(data)
        if with_card is not None:
            text = with_card if isinstance(with_card, str) else json.dumps(with_card)
            (bad / f"{name}.safetensors.json").write_text(text)

    def save(name: str, values: dict, metadata: dict | None) -> None:
        save_file(
            {key: value.contiguous() for key, value in values.items()}, bad / f"{name}.safetensors", metadata=metadata
        )

    put("empty", b"")
    put("text", b"this is no network\n" * 40)
    put("trap", pickle.dumps(_Trap(bad / "executed")))
    with zipfile.ZipFile(bad / "torch_zip.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Trap(bad / "executed")))
    put("cut", whole[: len(whole) // 2])
    put("flipped", flipped(whole, 0.7), card)
    put("flipped_header", whole.replace(b'"dtype"', b'"dtyqe"', 1))
    put("other_hash", whole, {**card, "sha256": hashlib.sha256(b"").hexdigest()})
    put("no_hash", whole, {"method": "hsyn"})
    put("card_text", whole, "this is no card")
    put("card_list", whole, "[1, 2]")
    put("card_deep", whole, "[" * 100_000)
    put("long_header", struct.pack("<Q", 2**60) + whole[8:])
    first = next(iter(tensors))
    save("nan", {**tensors, first: tensors[first] * float("nan")}, about)
    save("nameless", tensors, None)
    save("another", tensors, {**about, "method": "caml"})
    save("stranger", tensors, {**about, "method": "porridge"})
    save("size", tensors, {**about, "size": "gigantic"})
    save("switch", tensors, {**about, "options": '{"porridge": 3}'})
    save("switch_list", tensors, {**about, "options": "[1, 2]"})
    save("switch_text", tensors, {**about, "options": "{oops"})
    save("switch_huge", tensors, {**about, "options": json.dumps(dict.fromkeys(card["options"], "x"))})
    save("missing", {key: value for key, value in tensors.items() if key != first}, about)
    save("extra", {**tensors, "porridge": tensors[first].clone()}, about)
    save("shape", {**tensors, first: tensors[first][:1]}, about)
    (bad / "folder.safetensors").mkdir()


# ---------------------------------------------------------------------------------------------- jobs and tables of
# scans


def _jobs(bad: Path, good: Path) -> None:
    base = {"fixed": str(good / "fixed.nii.gz"), "moving": str(good / "moving.nii.gz"), "output": "{out}"}
    for name, job in {
        "unknown": {**base, "speed": 3},
        "missing": {"fixed": "a", "output": "b"},
        "type": {**base, "fixed": 3},
        "options": {**base, "options": [1]},
        "option": {**base, "options": {"colour": 1}},
        "option_type": {**base, "options": {"seed": "one"}},
        "option_bool": {**base, "options": {"refine": True}},
        "option_nan": {**base, "options": {"spacing": float("nan")}},
        "option_inf": {**base, "options": {"spacing": float("inf")}},
        "preset": {**base, "options": {"preset": "slow"}},
        "null": {**base, "fixed": None},
        "list": [base],
        "text": "register",
        "nul": {**base, "fixed": "a\0b.nii"},
        "blank": {**base, "fixed": ""},
        "long": {**base, "fixed": "x" * 5000},
        "nul_output": {**base, "output": "a\0b"},
        "blank_output": {**base, "output": ""},
        "surrogate": {**base, "fixed": "\udcff.nii"},
        "format": {**base, "transform_format": "exe"},
        "method_options": {**base, "options": {"method_options": 3}},
        "composite": {**base, "composite": "yes"},
    }.items():
        (bad / f"job_{name}.json").write_text(json.dumps(job))
    (bad / "job_cut.json").write_text("{oops")
    (bad / "job_empty.json").write_text("")
    (bad / "job_deep.json").write_text("[" * 100_000)
    (bad / "job_binary.json").write_bytes(bytes(range(256)))
    (bad / "job_number.json").write_text('{"fixed": ' + "9" * 5000 + "}")


def _tables(bad: Path, good: Path) -> None:
    """Tables of scans for training."""
    a, b = (str(good / "scans" / f"sub-{k}_T1w.nii.gz") for k in (0, 1))
    for name, text in {
        "t_empty": "",
        "t_columns": f"colour,size\n{a},3\n",
        "t_unknown": f"image,colour\n{a},red\n",
        "t_gone": "image\ngone.nii.gz\nx.nii\n",
        "t_split": f"image,split\n{a},maybe\n{b},train\n",
        "t_header": "image,subject\n",
        "t_one": f"image\n{a}\n",
        "t_wide": "image,labels\n" + "x" * 200_000 + ",y\n",
        "t_half": f"fixed,moving\n{a},\n{b},{a}\n",
        "t_same": f"image,subject\n{a},x\n{b},x\n",
    }.items():
        (bad / f"{name}.csv").write_text(text)
    c = good / "scans" / "sub-2_T1w.nii.gz"
    for name, text in {
        "b_empty": "",
        "b_head": "fixed,moving\n",
        "b_columns": f"one,two\n{a},{b}\n",
        "b_no_moving": f"fixed,id\n{a},x\n",
        "b_unknown": f"fixed,moving,colour\n{a},{b},red\n",
        "b_blank": f"fixed,moving\n{a},\n",
        "b_gone": f"fixed,moving\n{a},gone.nii\n",
        "b_twice": f"fixed,moving,id\n{a},{b},x\n{a},{c},x\n",
        "b_case": f"fixed,moving,id\n{a},{b},x\n{a},{c},X\n",
        "b_up": f"fixed,moving,id\n{a},{b},../../out\n",
        "b_root": f"fixed,moving,id\n{a},{b},/etc/x\n",
        "b_dots": f"fixed,moving,id\n{a},{b},..\n",
        "b_hidden": f"fixed,moving,id\n{a},{b},.x\n",
        "b_nul": f"fixed,moving,id\n{a},{b},x\0y\n",
        "b_back": f"fixed,moving,id\n{a},{b},a\\b\n",
        "b_long": f"fixed,moving,id\n{a},{b},{'x' * 300}\n",
        "b_many": f"fixed,moving\n{a},{b},{c}\n",
        "b_header_twice": f"fixed,moving,moving\n{a},{b},{c}\n",
        "b_quote": f'fixed,moving\n"{a},{b}\n',
        "b_labels": f"fixed,moving,fixed_labels\n{a},{b},{a}\n",
        "b_method": f"fixed,moving,method\n{a},{b},magic\n",
        "b_initial": f"fixed,moving,initial\n{a},{b},sideways\n",
        "b_cut": f"fixed,moving\n{a},cut.nii.gz\n",
        "b_pipe": f"fixed,moving\n{a},pipe.nii\n",
        "b_huge": f"fixed,moving\n{a},huge.mha\n",
        "b_wide": "fixed,moving\n" + "x" * 200_000 + ",y\n",
    }.items():
        (bad / f"{name}.csv").write_text(text)
    (good / "pairs.csv").write_text(f"fixed,moving\n{a},{b}\n")
    (bad / "b_binary.csv").write_bytes(bytes(range(256)))
    (bad / "t_binary.csv").write_bytes(bytes(range(256)))
    (bad / "mixed").mkdir()
    write_volume(bad / "mixed" / "sub-1.nii.gz", scan(), GRID)
    (bad / "mixed" / "sub-2.nii.gz").write_bytes(b"")
