"""ITK transform files with compressed single-precision arrays: as much of HDF5 as that needs; numpy only.

SimpleITK writes transforms as uncompressed doubles, four to eight times larger than what they tell. ITK itself, and
so Slicer, SimpleITK and ANTs, reads compressed float32 as well, and so does nitransforms. Nothing here reads HDF5;
the layout follows the public "HDF5 File Format Specification", version 0 of the superblock, which every release of
the library reads.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .grid import Grid

_NOWHERE = 0xFFFFFFFFFFFFFFFF
#: Entries of a group and chunks of an array that fit one node of the version-0 defaults.
_MOST_LINKS, _MOST_CHUNKS = 8, 64
#: Arrays from this many bytes on are compressed, in chunks of at least so many bytes.
_CHUNK_BYTES = 1 << 20


#: Makes one transform of those that follow it.
COMPOSITE = ("CompositeTransform_double_3_3", np.empty(0), np.empty(0))


def affine_part(matrix: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """A (4, 4) matrix in LPS mm as ITK keeps it."""
    return "AffineTransform_double_3_3", np.zeros(3), np.concatenate([matrix[:3, :3].ravel(), matrix[:3, 3]])


def grid_part(grid: Grid, displacement: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """A (D, H, W, 3) displacement grid in LPS mm as ITK keeps it; zero displacement outside."""
    size, spacing, origin, direction = grid.itk
    fixed = np.array([*size, *origin, *spacing, *direction], np.float64)
    return "DisplacementFieldTransform_double_3_3", fixed, displacement.astype(np.float32, copy=False)


def compact_parts(
    grid: Grid, displacement: np.ndarray, before: np.ndarray, after: np.ndarray
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """A lattice between two affines; ITK applies the last of a composite first."""
    return [COMPOSITE, affine_part(after), grid_part(grid, displacement), affine_part(before)]


def deflated(data: bytes | memoryview, level: int = 1) -> bytes:
    """Numbers packed byte by byte of equal weight: only runs are looked for, since nothing longer repeats. On lattices
    a tenth larger in two thirds of the time, on states smaller."""
    packer = zlib.compressobj(level, strategy=zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


class _File:
    """Blocks with known addresses, gathered in memory until everything is there."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = [bytes(96)]  # the superblock, filled in at the end
        self.size = 96

    def add(self, block: bytes) -> int:
        """Append a block; returns its address."""
        address = self.size
        padded = block + bytes(-len(block) % 8)
        self.blocks.append(padded)
        self.size += len(padded)
        return address


def _message(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 8)
    return struct.pack("<HHB3x", kind, len(body), 0) + body


def _object(file: _File, *messages: bytes) -> int:
    body = b"".join(messages)
    return file.add(struct.pack("<BxHII4x", 1, len(messages), 1, len(body)) + body)


def _group(file: _File, links: dict[str, int]) -> tuple[int, int, int]:
    """A group of named objects; returns the addresses of its header, its tree and its names."""
    if len(links) > _MOST_LINKS:
        raise ValueError(f"a group of this writer holds at most {_MOST_LINKS} objects, got {len(links)}")
    names, places = bytearray(8), {}
    for name in sorted(links):
        places[name] = len(names)
        names += name.encode("ascii") + b"\0"
        names += bytes(-len(names) % 8)
    data = file.add(bytes(names))
    heap = file.add(b"HEAP" + struct.pack("<B3xQQQ", 0, len(names), 1, data))
    entries = b"".join(struct.pack("<QQI4x16x", places[name], links[name], 0) for name in sorted(links))
    node = file.add(b"SNOD" + struct.pack("<BxH", 1, len(links)) + entries + bytes(40 * (_MOST_LINKS - len(links))))
    keys = struct.pack("<QQQ", 0, node, max(places.values()))
    tree = file.add(b"TREE" + struct.pack("<BBHQQ", 0, 0, 1, _NOWHERE, _NOWHERE) + keys + bytes(520 - len(keys)))
    return _object(file, _message(0x11, struct.pack("<QQ", tree, heap))), tree, heap


def _dataspace(count: int) -> bytes:
    return _message(0x01, struct.pack("<BBB5xQ", 1, 1, 0, count))


def _float_type(bits: int) -> bytes:
    exponent, fraction, bias = (8, 23, 127) if bits == 32 else (11, 52, 1023)
    return _message(
        0x03,
        struct.pack(
            "<BBBBIHHBBBBI", 0x11, 0x20, bits - 1, 0, bits // 8, 0, bits, fraction, exponent, 0, fraction, bias
        ),
    )


def _fill(when: int) -> bytes:
    return _message(0x05, struct.pack("<BBBB", 2, when, 2, 0))


def _text(file: _File, text: str) -> int:
    """An array of one string of variable length, as ITK keeps the kind of a transform."""
    value = text.encode("ascii")
    entry = struct.pack("<HH4xQ", 1, 1, len(value)) + value + bytes(-len(value) % 8)
    free = 4096 - 16 - len(entry)
    heap = file.add(
        b"GCOL" + struct.pack("<B3xQ", 1, 4096) + entry + struct.pack("<HH4xQ", 0, 0, free) + bytes(free - 16)
    )
    data = file.add(struct.pack("<IQI", len(value), heap, 1))
    kind = struct.pack("<BBBBI", 0x19, 0x01, 0, 0, 16) + struct.pack("<BBBBIHH", 0x10, 0, 0, 0, 1, 0, 8)
    return _object(
        file, _dataspace(1), _message(0x03, kind), _fill(2), _message(0x08, struct.pack("<BBQQ", 3, 1, data, 16))
    )


def _array(file: _File, values: np.ndarray, level: int) -> int:
    """A one-dimensional float array; large ones in compressed chunks."""
    values = np.ascontiguousarray(values).ravel()
    width = values.dtype.itemsize
    values = values.astype(f"<f{width}", copy=False)
    head = _dataspace(len(values)), _float_type(8 * width)
    if values.nbytes < _CHUNK_BYTES or not level:
        data = file.add(values.tobytes())
        return _object(file, *head, _fill(2), _message(0x08, struct.pack("<BBQQ", 3, 1, data, values.nbytes)))
    step = max(-(-len(values) // _MOST_CHUNKS), _CHUNK_BYTES // width)
    starts = range(0, len(values), step)

    def packed(start: int) -> bytes:
        chunk = values[start : start + step]
        if len(chunk) < step:
            chunk = np.concatenate([chunk, np.zeros(step - len(chunk), chunk.dtype)])
        # The shuffle filter: first bytes of all numbers, then second bytes, ...; high bytes repeat and pack well.
        return deflated(np.ascontiguousarray(chunk.view(np.uint8).reshape(-1, width).T).data, level)

    with ThreadPoolExecutor(2) as pool:
        chunks = list(pool.map(packed, starts))
    keys = b"".join(
        struct.pack("<IIQQQ", len(chunk), 0, start, 0, file.add(chunk)) for start, chunk in zip(starts, chunks)
    )
    keys += struct.pack("<IIQQ", 0, 0, len(starts) * step, 0)
    size = (2 * 32 + 1) * 24 + 2 * 32 * 8
    tree = file.add(
        b"TREE" + struct.pack("<BBHQQ", 1, 0, len(chunks), _NOWHERE, _NOWHERE) + keys + bytes(size - len(keys))
    )
    filters = (
        struct.pack("<BB6x", 1, 2)
        + struct.pack("<HHHHI4x", 2, 0, 0, 1, width)
        + struct.pack("<HHHHI4x", 1, 0, 0, 1, level)
    )
    return _object(
        file,
        *head,
        _fill(3),
        _message(0x0B, filters),
        _message(0x08, struct.pack("<BBBQII", 3, 2, 2, tree, step, width)),
    )


def write_transforms(path: str | Path, parts: Sequence[tuple[str, np.ndarray, np.ndarray]], level: int = 1) -> None:
    """Write an ITK transform file.

    Args:
        parts: (ITK's type name, fixed parameters, parameters) of each transform, in ITK's order; a first part
            ``CompositeTransform_double_3_3`` with empty arrays makes one transform of the others.
        level: of compression, 1 (fast) to 9; 0 = none.

    Raises:
        OSError: the disk is full or the folder closed.
    """
    file = _File()
    groups = {}
    for number, (kind, fixed, parameters) in enumerate(parts):
        links = {"TransformType": _text(file, kind)}
        if np.size(parameters):
            links["TransformFixedParameters"] = _array(file, np.asarray(fixed, np.float64), level)
            links["TransformParameters"] = _array(file, parameters, level)
        groups[str(number)] = _group(file, links)[0]
    root, tree, heap = _group(file, {"TransformGroup": _group(file, groups)[0]})
    file.blocks[0] = (
        b"\x89HDF\r\n\x1a\n"
        + struct.pack("<BBBBBBBBHHI", 0, 0, 0, 0, 0, 8, 8, 0, 4, 16, 0)
        + struct.pack("<QQQQ", 0, _NOWHERE, file.size, _NOWHERE)
        + struct.pack("<QQI4xQQ", 0, root, 1, tree, heap)
    )
    with open(path, "wb") as stream:
        for block in file.blocks:
            stream.write(block)
