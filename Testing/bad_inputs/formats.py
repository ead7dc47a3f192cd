"""Scans as bytes, header field by header field, and the small scan that all of them hold."""

from __future__ import annotations

import struct

import numpy as np

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.transform_files import NIFTI_HEADER

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
