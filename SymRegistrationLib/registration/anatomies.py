"""Presets by anatomy: which options suit what is registered; the shipped ones, and those that users keep in files.

A user's file is JSON with the same entries as ``presets.json``::

    {"presets": {"our-spines": {"title": "Spine, CT with MR", "reason": "one patient, bones stay",
                                "options": {"initial": "rigid", "preset": "thorough"}}}}

``options`` are fields of :class:`~SymRegistrationLib.job.Options`; ``preset`` there is how much time a run may take.
No torch, so that the Slicer panel can list and save presets before it exists.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..job import ANATOMIES, PRESETS, InputError, Options, check_fields, existing_file, parsed_json

#: Names are typed in shells and stand in tables.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,59}")
#: What belongs to a machine or to one run, never to a kind of anatomy.
_NOT_IN_PRESETS = ("device", "threads", "memory_gb", "seed")
#: Largest file that is read; a preset takes some hundred bytes.
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Anatomy:
    """One preset by anatomy.

    Attributes:
        name: as typed after ``--preset``.
        title: a label for menus.
        reason: why these options, one sentence.
        options: fields of Options that it sets where the user has set nothing else.
        source: path of the file that it was read from; "" for a shipped one.
    """

    name: str
    title: str
    reason: str
    options: Mapping[str, Any]
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**dataclasses.asdict(self), "options": dict(self.options)}


def user_file() -> Path:
    """Where a user's own presets lie: ``presets.json`` in ``$SYMREG_CONFIG``, else in ``symreg`` of the system's
    folder for settings (``$XDG_CONFIG_HOME`` or ``~/.config``; ``%APPDATA%``; ``~/Library/Application Support``)."""
    if folder := os.environ.get("SYMREG_CONFIG"):
        return Path(folder) / "presets.json"
    if sys.platform == "win32":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData/Roaming")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "symreg/presets.json"


def read(path: str | os.PathLike) -> dict[str, Anatomy]:
    """The presets of a file, every key and value checked.

    Raises:
        InputError: missing, not JSON, or a preset that no run could use; names the file, the preset and the key.
    """
    path = existing_file(path, "preset file")
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise InputError(f"preset file '{path}' is no preset file.", "Give a small JSON file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"preset file '{path}' could not be read ({error}).", "Save it as UTF-8.") from None
    raw = parsed_json(text, f"preset file '{path}'")
    entries = raw.get("presets") if isinstance(raw, dict) else None
    if not isinstance(entries, dict) or set(raw) - {"presets", "schema"}:
        raise InputError(
            f"preset file '{path}' must be an object with 'presets'.", 'Write {"presets": {"NAME": {"title": ...}}}.'
        )
    return {name: _checked(name, entry, str(path)) for name, entry in entries.items()}


def _checked(name: str, entry: Any, source: str) -> Anatomy:
    def wrong(what: str, hint: str) -> InputError:
        return InputError(f"preset file '{source}', preset '{name[:60]}': {what}", hint)

    if not _NAME.fullmatch(name):
        raise wrong("its name cannot be typed.", "Use small letters, digits, - and _, at most 60.")
    if name in PRESETS or name in ANATOMIES:
        raise wrong("this name is that of a shipped preset.", "Choose another name.")
    if not isinstance(entry, dict):
        raise wrong("it is not an object.", 'Write {"title": ..., "options": {...}}.')
    for key, value in entry.items():
        if key not in ("title", "reason", "options"):
            raise wrong(f"unknown key '{key}'.", "Known: title, reason, options.")
        if not isinstance(value, dict if key == "options" else str):
            raise wrong(f"'{key}' must be {'an object' if key == 'options' else 'text'}.", "Correct its value.")
    options = entry.get("options", {})
    for key in options:
        if key in _NOT_IN_PRESETS:
            raise wrong(f"'{key}' in its options belongs to the machine or the run.", "Leave it out.")
    try:
        Options(**check_fields(Options, options, "options"))
    except InputError as error:
        raise wrong(error.message, error.hint) from None
    return Anatomy(name, entry.get("title") or name, entry.get("reason", ""), options, source)


def anatomies(preset_file: str | os.PathLike | None = None) -> dict[str, Anatomy]:
    """Every preset by anatomy that there is: shipped, the user's own, and those of ``preset_file``, which win.

    Raises:
        InputError: a file of presets cannot be used.
    """
    found = {name: Anatomy(name, **entry) for name, entry in ANATOMIES.items()}
    if user_file().is_file():
        found |= read(user_file())
    return found | read(preset_file) if preset_file else found


def save(name: str, title: str, options: Mapping[str, Any], reason: str = "", path: Path | None = None) -> Path:
    """Keep a preset in the user's file (or ``path``), beside those in it; one of the same name is replaced.

    Returns:
        The file.

    Raises:
        InputError: the preset, or the file as it is, cannot be used. RegistrationError: the disk refuses.
    """
    path = path or user_file()
    one = _checked(name, {"title": title, "reason": reason, "options": dict(options)}, str(path))
    kept = read(path) if path.is_file() else {}
    return _write({**kept, name: one}, path)


def remove(name: str, path: Path | None = None) -> Path:
    """Take a preset out of the user's file (or ``path``); the others stay.

    Returns:
        The file.

    Raises:
        InputError: there is none of this name in it. RegistrationError: the disk refuses.
    """
    path = path or user_file()
    kept = read(path) if path.is_file() else {}
    if name not in kept:
        raise InputError(f"'{path}' holds no preset '{name}'.", "Only presets of your own can be taken out.")
    return _write({other: one for other, one in kept.items() if other != name}, path)


def _write(kept: Mapping[str, Anatomy], path: Path) -> Path:
    from ..files import write_whole

    entries = {
        each.name: {"title": each.title, "reason": each.reason, "options": dict(each.options)} for each in kept.values()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder '{path.parent}' cannot be made ({error.strerror}).", "Name another file.") from None
    write_whole(path, json.dumps({"presets": entries}, indent=1, ensure_ascii=False) + "\n")
    return path
