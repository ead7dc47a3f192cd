"""How volumes travel between Slicer and the worker: raw NRRD files in a private folder that is always removed.

Everything here is LPS mm; see nodes.py for the one place that knows RAS.
"""

import atexit
import os
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.job import RegistrationError

from .steps import PIECE, pieces

PREFIX = "SymRegistration-"
_TYPES = {
    "i1": "int8",
    "u1": "uint8",
    "i2": "int16",
    "u2": "uint16",
    "i4": "int32",
    "u4": "uint32",
    "i8": "int64",
    "u8": "uint64",
    "f4": "float",
    "f8": "double",
}
_SPELLINGS = {
    "signed char": "i1",
    "int8_t": "i1",
    "uchar": "u1",
    "unsigned char": "u1",
    "uint8_t": "u1",
    "short": "i2",
    "int16_t": "i2",
    "ushort": "u2",
    "unsigned short": "u2",
    "uint16_t": "u2",
    "int": "i4",
    "int32_t": "i4",
    "uint": "u4",
    "unsigned int": "u4",
    "uint32_t": "u4",
    "int64_t": "i8",
    "long long": "i8",
    "unsigned long long": "u8",
    "uint64_t": "u8",
    **{name: code for code, name in _TYPES.items()},
}


class PrivateFolder:
    """A temporary folder that only this user can read; its name tells the process, so that leftovers can be swept."""

    def __init__(self):
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        atexit.register(self.remove)

    def file(self, name):
        return str(self.path / name)

    def remove(self):
        shutil.rmtree(self.path, ignore_errors=True)
        atexit.unregister(self.remove)


def sweep():
    """Remove folders of this user whose application no longer runs (it was killed)."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        match = re.match(rf"{PREFIX}(\d+)-", path.name)
        if match and not _running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _running(pid, system=sys.platform):
    """True when process ``pid`` may be alive."""
    if system == "win32":  # signal 0 would end the process there
        try:
            import psutil
        except Exception:  # missing or damaged: the system's own clean-up has to do
            return True
        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def writeVolume(path, array, grid):
    """Generator: write (D, H, W) or (D, H, W, 3) as raw NRRD on ``grid`` (LPS mm)."""
    if array.dtype == bool:
        array = array.view(np.uint8)
    code = array.dtype.newbyteorder("=").str[1:]
    if code not in _TYPES:
        raise RegistrationError(
            f"voxels of type {array.dtype} cannot be exchanged.", "Convert the volume to a usual number type."
        )
    columns = grid.matrix[:3, :3].T[::-1]
    directions = " ".join("(" + ",".join(repr(float(v)) for v in column) + ")" for column in columns)
    sizes = " ".join(str(n) for n in grid.shape[::-1])
    vector = array.ndim == 4
    header = [
        "NRRD0004",
        f"type: {_TYPES[code]}",
        f"dimension: {array.ndim}",
        "space: left-posterior-superior",
        f"sizes: {'3 ' if vector else ''}{sizes}",
        f"space directions: {'none ' if vector else ''}{directions}",
        f"kinds: {'vector ' if vector else ''}domain domain domain",
        "endian: little",
        "encoding: raw",
        "space origin: (" + ",".join(repr(float(v)) for v in grid.matrix[:3, 3]) + ")",
    ]
    try:
        with open(path, "wb") as file:
            file.write(("\n".join(header) + "\n\n").encode())
            for start, stop in pieces(array.shape[0], array[0].nbytes):
                file.write(np.ascontiguousarray(array[start:stop], dtype=array.dtype.newbyteorder("<")).data)
                yield
    except OSError as error:
        raise RegistrationError(
            f"the volume could not be handed over ({error.strerror}).",
            f"Free some space on the disk that holds {tempfile.gettempdir()}.",
        ) from None


def readVolume(path):
    """Generator: read a NRRD file of the worker; returns (array, Grid), arrays as in :func:`writeVolume`."""
    with open(path, "rb") as file:
        fields = _header(file)
        shape = tuple(int(n) for n in fields["sizes"].split())[::-1]
        grid = Grid(shape[:3], _matrix(fields))
        array = np.empty(shape, "<" + _SPELLINGS[fields["type"]])
        view = memoryview(array).cast("B")
        if fields["encoding"] == "raw":
            for start, stop in pieces(len(view), 1):
                if file.readinto(view[start:stop]) != stop - start:
                    raise RegistrationError(
                        f"the result file {os.path.basename(path)} is cut short.", "Register again."
                    )
                yield
        else:
            yield from _inflate(file, view, os.path.basename(path))
    yield
    return array, grid


def readTransform(path):
    """Generator: read a transform of the worker; returns (lattice, Grid, before, after), the affines (4, 4)
    in LPS mm."""
    with open(path, "rb") as file:
        fields = _header(file)
    affines = [np.array(fields[key].split(), float).reshape(4, 4) for key in ("before", "after")]
    lattice, grid = yield from readVolume(path)
    return (lattice, grid, *affines)


def _header(file):
    if not file.readline().startswith(b"NRRD"):
        raise RegistrationError("a result file is not NRRD.", "Register again.")
    fields = {}
    for line in iter(file.readline, b"\n"):
        name, colon, value = line.decode().replace(":=", ": ", 1).partition(": ")
        if colon:
            fields[name.strip()] = value.strip()
        elif not line:
            raise RegistrationError("a result file is cut short.", "Register again.")
    return fields


def _matrix(fields):
    """Index (d, h, w) -> LPS mm."""
    vectors = [[float(v) for v in text.split(",")] for text in re.findall(r"\(([^)]*)\)", fields["space directions"])]
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(vectors)[::-1].T
    matrix[:3, 3] = [float(v) for v in fields["space origin"].strip("()").split(",")]
    if "right" in fields["space"]:
        raise RegistrationError("a result file is not in LPS.", "Register again.")
    return matrix


def _inflate(file, view, name):
    inflater, at = zlib.decompressobj(31), 0
    while block := inflater.unconsumed_tail or file.read(1 << 18):
        plain = inflater.decompress(block, PIECE)
        if at + len(plain) > len(view):
            break
        view[at : at + len(plain)] = plain
        at += len(plain)
        yield
    if at != len(view):
        raise RegistrationError(f"the result file {name} is cut short.", "Register again.")
