"""``symreg presets`` and ``symreg suggest``: what to choose, before anything is registered."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..console import Console
from ..job import EFFORTS, InputError
from ..registration.anatomies import anatomies, user_file

PRESETS_TEXT = """List what --preset and --effort take: how much time a run may take, the presets by anatomy that come
with symreg, and your own. Yours lie in a JSON file, whose place is told at the end:

  {"presets": {"our-spines": {"title": "Spine, CT with MR", "reason": "bones of one patient stay",
                              "options": {"initial": "rigid", "preset": "thorough"}}}}

'options' are fields of a job's options; 'preset' there is how much time a run may take."""

SUGGEST = """Look at modality (DICOM), size and content of two scans, name the preset by anatomy that suits them, and
say why. Takes some seconds. Nothing is registered; where nothing speaks clearly the answer is 'unknown', with which
the run decides by itself."""

SUGGEST_EXAMPLES = """example:
  symreg suggest t1.nii.gz flair.nii.gz"""


def presets_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``presets``."""
    parser.add_argument("--preset-file", metavar="FILE", help="presets of a file, too")


def catalogue(preset_file: str | None = None) -> dict[str, Any]:
    """What can be chosen: ``efforts`` and ``anatomies`` (name, title, reason, options, source), and the ``user_file``.

    Raises:
        InputError: a file of presets cannot be used.
    """
    return {
        "efforts": [{"name": name, "title": title} for name, title in EFFORTS.items()],
        "anatomies": [one.to_dict() for one in anatomies(preset_file).values()],
        "user_file": str(user_file()),
    }


def asked_catalogue(request: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`catalogue` for a worker's request with or without ``preset_file``. Raises InputError."""
    path = request.get("preset_file")
    if not (path is None or isinstance(path, str)):
        raise InputError("'preset_file' must be text.", "Send the path of a preset file, or leave it out.")
    return catalogue(path)


def asked_suggestion(request: Mapping[str, Any]) -> dict[str, str]:
    """:func:`suggestion` for a worker's request with ``fixed`` and ``moving``. Raises InputError."""
    paths = [request.get(side) for side in ("fixed", "moving")]
    if not all(isinstance(path, str) and path for path in paths):
        raise InputError("the suggest request names no scans.", 'Send "fixed" and "moving": two paths.')
    return suggestion(str(paths[0]), str(paths[1]))


def suggestion(fixed: str, moving: str) -> dict[str, str]:
    """The ``preset`` that suits two scans, its ``title`` and the ``reason``. Raises InputError for unusable scans."""
    from ..geometry.volumes import read_modality, read_volume
    from ..registration.suggestion import suggest

    first, second = read_volume(fixed, "fixed image"), read_volume(moving, "moving image")
    found = suggest(first, second, (read_modality(fixed, "fixed image"), read_modality(moving, "moving image")))
    title = anatomies()[found.preset].title
    return {"preset": found.preset, "title": title, "reason": found.reason}


def _list_presets(args: argparse.Namespace, console: Console) -> None:
    found = catalogue(args.preset_file)
    lines = ["how much time (--effort):"]
    lines += [f"  {one['name']:<22}{one['title']}" for one in found["efforts"]]
    lines += ["", "what is registered (--preset):"]
    for one in found["anatomies"]:
        options = ", ".join(f"{name} {value}" for name, value in one["options"].items()) or "nothing set"
        where = f" [{one['source']}]" if one["source"] else ""
        lines.append(f"  {one['name']:<22}{one['title']}: {options}{where}")
        if one["reason"]:
            lines.append(f"{'':24}{one['reason']}")
    console.result(found, "\n".join([*lines, "", f"your own: {found['user_file']}"]))


def _suggest(args: argparse.Namespace, console: Console) -> None:
    found = suggestion(args.fixed, args.moving)
    console.result(found, f"--preset {found['preset']}   ({found['title']})\nwhy: {found['reason']}")


COMMANDS = {"presets": _list_presets, "suggest": _suggest}
