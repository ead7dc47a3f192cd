"""What an image file claims and whether that can be true; asked before ITK allocates or believes anything.

Standard library only. ITK fills up with zeros where a NIfTI file ends early or its compressed stream is
damaged, takes a spacing of 0 for 1 mm, and prints its complaints past Python; here such files are found and named.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

#: More voxels than this per byte of file cannot be: deflate packs at most 1:1032.
MOST_PACKED = 1100.0
_DETACHED = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)[ \t]*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_PACKED = re.compile(rb"^(?:CompressedData\s*=\s*True|encoding:\s*(?:gz|gzip))\s*$", re.IGNORECASE | re.MULTILINE)


def size_fault(path: Path, voxels: float) -> str:
    """Why a file cannot hold so many voxels, or ''."""
    there = _data_bytes(path)
    if voxels > MOST_PACKED * max(there, 1):
        return f"declares {voxels:.3g} voxels in {there} bytes"
    return ""


def _data_bytes(path: Path) -> int:
    """Bytes of the file with the voxels: of the header itself, or of the file that a detached header names."""
    here = path.stat().st_size
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return here
    named = _data_file(path)
    if named is not None and named.is_file():
        return named.stat().st_size
    # A list or a pattern of files: they lie beside the header.
    return sum(entry.stat().st_size for entry in os.scandir(path.parent) if entry.is_file())


def _head(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(1 << 16)


def _data_file(path: Path) -> Path | None:
    """The file that a MetaImage or NRRD header names for its voxels; ``None`` = the header's own file."""
    found = _DETACHED.search(_head(path))
    if found is None or found[1].upper() == b"LOCAL":
        return None
    return path.parent / os.fsdecode(found[1])


# ---------------------------------------------------------------------------------------------- NIfTI


def nifti_fault(path: Path) -> str:
    """What is wrong with the header of a single-file NIfTI, or with the file's length, or ''; other formats: ''."""
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return ""
    try:
        header = _nifti_header(path, name.endswith(".gz"))
        order = "<" if header[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
        (kind,) = struct.unpack(order + "i", header[:4])
        if kind not in (348, 540) or header[4:7] != b"n+2" and header[344:347] != b"n+1":
            return "could not be read (no NIfTI file, whatever its name says)"
        first = kind == 348
        dim = struct.unpack(order + ("8h" if first else "8q"), header[40:56] if first else header[16:80])
        (bits,) = struct.unpack(order + "h", header[72:74] if first else header[14:16])
        (offset,) = struct.unpack(order + ("f" if first else "q"), header[108:112] if first else header[168:176])
        spacing = struct.unpack(order + ("3f" if first else "3d"), header[80:92] if first else header[112:136])
    except (EOFError, OSError, zlib.error, struct.error):
        return "could not be read (damaged, or not what its name says)"
    if not 1 <= dim[0] <= 7:
        return f"could not be read (a NIfTI header that declares {dim[0]} axes)"
    if not all(math.isfinite(s) and s != 0 for s in spacing[: min(dim[0], 3)]):
        return f"has a voxel size of {' x '.join(f'{s:g}' for s in spacing)} mm in its header"
    if not (math.isfinite(offset) and 0 <= offset < 2**53):
        return f"says that its voxels begin at byte {offset:g}"
    need = int(offset) + math.prod(max(1, n) for n in dim[1 : 1 + max(dim[0], 0)]) * bits // 8
    return "" if _unpacked_bytes(path, need) >= need else "is cut off: its voxels are not all there"


def nifti_reals(path: Path) -> tuple[str, int] | None:
    """NumPy's name of the type of the voxels of a NIfTI file and the byte where they begin, unpacked; None where they
    are no real numbers in floating point, or it is no NIfTI by its name."""
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return None
    header = _nifti_header(path, name.endswith(".gz"))
    order = "<" if header[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    first = struct.unpack(order + "i", header[:4])[0] == 348
    (kind,) = struct.unpack(order + "h", header[70:72] if first else header[12:14])
    (offset,) = struct.unpack(order + ("f" if first else "q"), header[108:112] if first else header[168:176])
    return (order + {16: "f4", 64: "f8"}[kind], int(offset)) if kind in (16, 64) else None


def _nifti_header(path: Path, packed: bool) -> bytes:
    head = _head(path)
    return zlib.decompressobj(wbits=31).decompress(head, 544) if packed else head[:544]


def _unpacked_bytes(path: Path, need: int) -> int:
    """Bytes in a NIfTI file after unpacking: told by the end of the file or, where that is unusual,
    counted to ``need``."""
    size = path.stat().st_size
    if not path.name.lower().endswith(".gz"):
        return size
    if _last_number(path) == need % 2**32:
        return need
    # Several gzip members, or bytes after the voxels.
    there = 0
    with contextlib.suppress(zlib.error, EOFError):
        for block in _unpacked(path, 0):
            there += len(block)
            if there >= need:
                break
    return there


def mgh_fault(path: Path) -> str:
    """What is wrong with the header of a FreeSurfer MGH or MGZ file, or ''."""
    packed = path.name.lower().endswith("z")
    try:
        header = zlib.decompressobj(wbits=31).decompress(_head(path), 28) if packed else _head(path)[:28]
        version, *size, _, _ = struct.unpack(">7i", header)
    except (OSError, EOFError, zlib.error, struct.error):
        return "could not be read (damaged, or not what its name says)"
    if version != 1:
        return "could not be read (no MGH file, whatever its name says)"
    return "has no voxels" if min(size) < 1 else size_fault(path, float(math.prod(size)))


# ---------------------------------------------------------------------------------------------- compressed voxels


def is_intact(path: Path, look: Callable[[bytes], None] | None = None) -> bool:
    """False when the compressed voxels of a file do not have the checksum that was stored with them.

    It unpacks everything once (0.3 s for 256^3), because ITK checks nothing; ``look`` gets each unpacked piece.
    """
    name = path.name.lower()
    at = 0
    try:
        if name.endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
            head = _head(path)
            if not _PACKED.search(head):
                return True
            named = _data_file(path)
            if named is not None:
                path = named
            else:
                mark = _DETACHED.search(head) if name.endswith((".mha", ".mhd")) else re.search(rb"\r?\n\r?\n", head)
                at = (
                    head.index(b"\n", mark.end()) + 1
                    if mark and name.endswith((".mha", ".mhd"))
                    else mark.end()
                    if mark
                    else 0
                )
        elif not name.endswith(".gz"):
            return True
        for block in _unpacked(path, at):
            if look is not None:
                look(block)
        return True
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def _unpacked(path: Path, start: int) -> Iterator[bytes]:
    """Pieces of the unpacked gzip or zlib stream from byte ``start`` on.

    Raises:
        zlib.error, EOFError: damaged, a checksum that differs, or cut off.
    """
    with open(path, "rb") as raw:
        raw.seek(start)
        unpacker, ended = zlib.decompressobj(wbits=47), False
        while block := raw.read(1 << 20):
            while block:
                if ended:  # another member, or bytes that belong to nothing
                    if block[:2] != b"\x1f\x8b":
                        return
                    unpacker, ended = zlib.decompressobj(wbits=47), False
                yield unpacker.decompress(block, 1 << 24)
                ended = unpacker.eof
                block = unpacker.unused_data if ended else unpacker.unconsumed_tail
        if not ended:
            raise EOFError


# ---------------------------------------------------------------------------------------------- after writing


def check_written(path: Path, count: int) -> None:
    """Make sure that a file which ITK has just written holds ``count`` bytes of voxels.

    ITK, teem and HDF5 do not report every write that fails: a full disk may only show when they close the file.

    Raises:
        OSError: it is shorter than that.
    """
    name, size = path.name.lower(), path.stat().st_size
    if name.endswith((".nii", ".nii.gz")):
        whole = not nifti_fault(path) and (
            name.endswith(".nii") or _last_number(path) == (count + 352) % 2**32 or is_intact(path)
        )
    elif name.endswith(".h5"):
        whole = 0 < _hdf5_end(path) <= size
    elif _PACKED.search(_head(path)):
        whole = _last_number(path) == count % 2**32 if name.endswith(".nrrd") else is_intact(path)
    else:
        whole = size > count
    if not whole:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _last_number(path: Path) -> int:
    """The last four bytes: what a gzip stream says of its unpacked length."""
    with open(path, "rb") as raw:
        raw.seek(-4, os.SEEK_END)
        return struct.unpack("<I", raw.read(4))[0]


def _hdf5_end(path: Path) -> int:
    """Where the superblock of an HDF5 file says that the file ends, 0 when there is none (HDF5
    format, section II.A)."""
    head = _head(path)[:48]
    if len(head) < 48 or head[:8] != b"\x89HDF\r\n\x1a\n":
        return 0
    at = 40 if head[8] < 2 else 28
    return struct.unpack("<Q", head[at : at + 8])[0]


# ---------------------------------------------------------------------------------------------- silence

_lock = threading.Lock()
_silent = {"depth": 0, "stderr": -1}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What C libraries print to stderr goes nowhere; their errors come as exceptions and are told by ours."""
    with _lock:
        if _silent["depth"] == 0:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            try:
                _silent["stderr"] = os.dup(2)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)
            except OSError:  # a program without a console
                _silent["stderr"] = -1
        _silent["depth"] += 1
    try:
        yield
    finally:
        with _lock:
            _silent["depth"] -= 1
            if _silent["depth"] == 0 and _silent["stderr"] >= 0:
                os.dup2(_silent["stderr"], 2)
                os.close(_silent["stderr"])


def itk_reason(error: Exception) -> str:
    """What an exception of ITK says, without addresses, source files and the file's name."""
    lines = [line for line in str(error).splitlines() if line.startswith("[nrrd]")] or [str(error)]
    text = " ".join(re.sub(r"^.*?(?:ITK ERROR|sitk::ERROR|itk::ERROR):", "", lines[-1], flags=re.DOTALL).split())
    if "Unable to determine ImageIO reader" in text:
        return "no known format"
    if "orthonormal" in text:
        return "its axes are not at right angles: a sheared or singular orientation"
    if "direction, determinant is 0" in text:
        return "its orientation is singular"
    text = re.sub(r"^\w+\(0x\w+\): ", "", text).split(" Reason: No such file")[0]
    return text[:160] or type(error).__name__
