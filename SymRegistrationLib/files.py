"""Files that appear whole or not at all, their SHA-256, and what to say when a disk refuses."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .job import RegistrationError

_BLOCK = 1 << 20
CHECK_SPACE = "Check free space and permissions."


@contextmanager
def replacing(path: str | os.PathLike, hint: str = CHECK_SPACE) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place at the end, or vanishes when something goes wrong.

    Args:
        hint: what the user can do when it cannot be written.

    Raises:
        RegistrationError: the disk is full or the folder closed; what was at ``path`` is untouched.
    """
    path = Path(path)
    # What a run that was killed left. The ending stays, because SimpleITK chooses the format by it.
    for left in path.parent.glob(f".partial-*-{glob.escape(path.name)}"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors makes files anew that only their owner can read
        os.replace(temporary, path)
    except RegistrationError:
        raise
    except (OSError, RuntimeError) as error:
        raise RegistrationError(f"'{path}' cannot be written: {reason(error)}.", hint) from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise RegistrationError(f"'{path}' cannot be written: {reason(error)}.", hint) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes, hint: str = CHECK_SPACE, durable: bool = False) -> None:
    """Replace a small file in one step.

    Args:
        content: text (written as UTF-8) or bytes.
        durable: wait until it has reached the disk.

    Raises:
        RegistrationError: the disk does not take it; what was there is untouched.
    """
    with replacing(path, hint) as temporary, open(temporary, "wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def reason(error: BaseException) -> str:
    """Why a file could not be written, in a few words."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    told = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return " ".join(str(told).split())[:160]


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def json_object(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none: no regular file (a pipe would wait for ever), no JSON."""
    try:
        if not Path(path).is_file():
            return None
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
