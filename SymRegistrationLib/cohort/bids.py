"""Pairs out of a folder of scans, BIDS or flat.

The scans, and the label maps, masks and landmarks that belong to them, are found as for training (see
:mod:`SymRegistrationLib.training.dataset`); this says which of them make pairs.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from ..job import InputError, Job
from ..training.dataset import Case, find
from .table import UNSET, Cells, stem

PAIRINGS = ("sessions", "all")


def folder_cells(folder: str | Path, to: Job, pairing: str | None = None, suffix: str | None = None) -> Cells:
    """A table of the pairs of a folder.

    Args:
        folder: BIDS (``sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz``) or any folder of scans.
        to: its ``fixed``, unless ``UNSET``, is what every other scan goes onto; the table then has no column ``fixed``.
        pairing: else: ``sessions``: every later session onto the first one of its subject; ``all``: every scan onto
            every other one. ``None`` takes ``sessions`` where there are any.
        suffix: which scans, by the last word of BIDS names (``T1w``); ``None`` takes T1w, or the only one there is.

    Raises:
        InputError: no scans, several suffixes, or nothing to pair.
    """
    folder = Path(folder)
    cases = _wanted(folder, [case for case in find(folder).cases if case.image and not _derived(folder, case)], suffix)
    if to.fixed != UNSET:
        lines = [_side(case, "moving", folder) for case in cases if not os.path.samefile(case.image, to.fixed)]
        for line in lines:
            line.update({f"moving_{kind}": "" for kind in ("labels", "points") if not getattr(to, f"fixed_{kind}")})
        if not lines:
            raise InputError(f"'{folder}' holds no scan but '{to.fixed}' itself.", "Give another folder, or a table.")
        return _cells(folder, lines)
    if pairing is None and not any("_ses-" in f"_{case.subject}" for case in cases):
        raise InputError(
            f"'{folder}' does not say which scan goes onto which.",
            "Give --to TEMPLATE for all onto one, --pairs all for all onto all, or a table.",
        )
    pairs = itertools.permutations(cases, 2) if pairing == "all" else _sessions(cases)
    lines = [{**_side(fixed, "fixed", folder), **_side(moving, "moving", folder)} for moving, fixed in pairs]
    if not lines:
        raise InputError(
            f"'{folder}' holds no pair.", "A pair needs two sessions of one subject; give --to or --pairs all."
        )
    for line in lines:
        for kind in ("labels", "points"):  # measured only where both scans have them
            if not (line[f"fixed_{kind}"] and line[f"moving_{kind}"]):
                line[f"fixed_{kind}"] = line[f"moving_{kind}"] = ""
    return _cells(folder, lines)


def _cells(folder: Path, lines: list[dict[str, str]]) -> Cells:
    return Cells(str(folder), folder, tuple(enumerate(lines, 1)))


def _side(case: Case, side: str, folder: Path) -> dict[str, str]:
    extras = {f"{side}_{kind}": getattr(case, kind) for kind in ("mask", "labels", "points")}
    return {name: os.path.relpath(path, folder) if path else "" for name, path in {side: case.image, **extras}.items()}


def _derived(folder: Path, case: Case) -> bool:
    parts = Path(case.image).relative_to(folder).parts
    return "derivatives" in parts or "sourcedata" in parts


def _suffix(case: Case) -> str:
    """``T1w`` of a BIDS name, an empty text for other names."""
    name = stem(case.image)
    return name.split("_")[-1] if re.match(r"sub-[^_]+_", name) else ""


def _wanted(folder: Path, cases: list[Case], suffix: str | None) -> list[Case]:
    there = sorted({_suffix(case) for case in cases})
    if suffix is None:
        suffix = "T1w" if "T1w" in there else there[0] if len(there) == 1 else None
    if suffix is None:
        raise InputError(
            f"'{folder}' holds scans of several kinds: {', '.join(filter(None, there))}.", "Choose one with --suffix."
        )
    found = [case for case in cases if _suffix(case) == suffix]
    if not found:
        raise InputError(
            f"'{folder}' holds no scan '{suffix}'.", f"There are: {', '.join(filter(None, there)) or 'none'}."
        )
    return found


def _sessions(cases: list[Case]) -> list[tuple[Case, Case]]:
    """(moving, fixed): every later session with the first one of the same subject; one scan a session."""
    people: dict[str, dict[str, Case]] = {}
    for case in cases:
        person, _, session = case.subject.partition("_ses-")
        people.setdefault(person, {}).setdefault(session, case)
    pairs = []
    for sessions in people.values():
        first, *later = [sessions[name] for name in sorted(sessions, key=_natural)]
        pairs += [(other, first) for other in later]
    return pairs


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts ``2`` before ``10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]
