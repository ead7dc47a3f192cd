"""Errors that say what is wrong and what to do, and checks of what is typed, sent or named. Standard library only."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any


class RegistrationError(Exception):
    """A run failed for a reason that can be told in one line.

    Args:
        message: names the file or node and says what is wrong.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InputError(RegistrationError):
    """The request or one of its inputs cannot be used; nothing was computed and nothing was written."""

    exit_code = 2


def numbers(given: float | str, what: str) -> list[float]:
    """A number, or the numbers of a text separated by commas or blanks. Raises InputError naming ``what``."""
    if not isinstance(given, str):
        values = [float(given)]
    else:
        try:
            values = [float(word) for word in given.replace(",", " ").split()]
        except ValueError:
            values = []
    if not values or not all(math.isfinite(value) for value in values):
        raise InputError(f"{what} is '{str(given)[:100]}'.", "Give numbers, separated by commas.")
    return values


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy and torch do not both take. Raises InputError."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}.", "Give a whole number from 0 to 2^63 - 1.")


def check_both_sides(request: Any) -> None:
    """Refuse labels or landmarks of one scan alone, in the fields ``fixed_labels``, ``moving_labels`` and so on of
    ``request``. Raises InputError."""
    for kind in ("labels", "points", "sliding_mask"):
        fixed, moving = (getattr(request, f"{side}_{kind}", None) for side in ("fixed", "moving"))
        if bool(fixed) != bool(moving):
            missing = "moving" if fixed else "fixed"
            words = "sliding masks" if kind == "sliding_mask" else kind
            option = f"--{missing}-{kind.replace('_', '-')}"
            raise InputError(f"{words} are given for one scan only.", f"Add {option}, or leave both out.")


def parsed_json(text: str, what: str) -> Any:
    """The data of a JSON text. Raises InputError naming ``what``, also for nesting that no honest file has."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON ({str(error)[:100]}).", "Correct it, or write it again.") from None


def usable_path(path: str | os.PathLike, what: str) -> Path:
    """``path`` if it can be one, whether or not something is there. Raises InputError naming ``what``."""
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise InputError(f"the path of {what} is {text!r}.", "Give the name of a file or folder.")
    try:
        text.encode()
    except UnicodeEncodeError:  # ITK would end the whole process
        raise InputError(
            f"the path of {what}, {ascii(text)[:300]}, is not written in UTF-8.",
            "Rename the file or folder; names of old disks often are in Latin-1.",
        ) from None
    return Path(path)


def existing_file(path: str | os.PathLike, what: str) -> Path:
    """``path`` if a file or folder that may be read is there. Raises InputError naming ``what``."""
    path = usable_path(path, what)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{what} '{path}' does not exist.", "Check the path.") from None
    except OSError as error:
        raise InputError(
            f"{what} '{str(path)[:300]}' cannot be opened ({error.strerror}).", "Check the path."
        ) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would wait for ever, a device never end
        raise InputError(
            f"{what} '{path}' is neither a file nor a folder.", "Give a file on disk, not a pipe or a device."
        )
    if not os.access(path, os.R_OK):
        raise InputError(
            f"{what} '{path}' may not be read.", "Ask for permission, or copy it to where you may read it."
        )
    return path
