"""Labels of one or several atlases carried to a scan and made into one map.

Every atlas is registered to the scan as a pair of a batch, so a run that was cut off goes on; carrying and
fusing are done again each time, they take seconds.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import replacing, write_whole
from ..geometry.resampling import resample_labels
from ..geometry.transform_files import read_transform
from ..geometry.volumes import Volume, read_labels, read_map, read_shape, write_volume
from ..job import InputError, Progress, silent
from ..jobs.apply import smallest
from ..quality.metrics import dice
from .fusion import ABSENT, fuse
from .summary import PairState

INTERPOLATIONS = ("smooth", "nearest")
#: What :func:`propagate` writes, for people.
FILES = (
    ("labels.nii.gz", "the fused labels on the target"),
    ("agreement.nii.gz", "share of the atlases that say the same, 0 to 1"),
    ("volumes.csv", "voxels, millilitres and agreement of every label"),
)


@dataclass(frozen=True)
class PropagationOptions:
    """How labels are carried and fused.

    Attributes:
        fusion: ``majority`` or ``staple``.
        interpolation: ``smooth`` (of the eight voxels around a point the label with the largest share) or ``nearest``.
        target_labels: label map of the target, for Dice; or None.
    """

    fusion: str = "majority"
    interpolation: str = "smooth"
    target_labels: str | None = None


def check_labels(labels: Mapping[str, str], carrying: PropagationOptions) -> None:
    """Look at the headers of all label maps. Raises InputError."""
    for name, path in labels.items():
        read_shape(path, f"labels of atlas '{name}'")
    if carrying.target_labels:
        read_shape(carrying.target_labels, "labels of the target")


def propagate(
    states: Sequence[PairState],
    labels: Mapping[str, str],
    output: str | Path,
    carrying: PropagationOptions = PropagationOptions(),
    progress: Progress = silent,
) -> dict:
    """Carry and fuse.

    Args:
        states: one registered atlas each, run with ``group``; those that failed are left out.
        labels: label map per id.
        output: folder; ``labels.nii.gz``, ``agreement.nii.gz``, ``volumes.csv``, ``propagation.json``, and each atlas's
            own carried labels in its folder.

    Returns:
        ``atlases``, ``fusion``, ``labels`` (per value: voxels, ml, agreement, and dice where the target's are given),
        ``mean_dice``, ``notes``.

    Raises:
        InputError: an atlas's labels cannot be used, or no atlas was registered.
    """
    done = sorted(
        (state for state in states if state.status == "done"), key=lambda s: -(s.numbers.get("similarity_after") or 0)
    )
    if not done:
        raise InputError("no atlas was registered, so there is nothing to carry.", "See summary.csv for the reasons.")
    maps, notes, grid = [], [], None
    for k, state in enumerate(done):
        progress("carry", 0.8 * k / len(done), f"carrying the labels of {state.row.identity}")
        carried = _carried(state, labels[state.row.identity], carrying)
        grid = carried.grid
        maps.append(carried.array)
        if not (carried.array > 0).any():
            notes.append(f"atlas '{state.row.identity}' brings no label onto the target")
    if carrying.fusion == "staple" and len(done) < 3:
        notes.append(f"STAPLE cannot tell which of {len(done)} atlases performs better; give at least three")
    progress("fuse", 0.8, f"fusing {len(done)} atlases")
    fused, agreement = fuse(maps, carrying.fusion)
    for name, array in (("labels.nii.gz", smallest(fused)), ("agreement.nii.gz", agreement)):
        with replacing(Path(output) / name) as temporary:
            write_volume(temporary, array, grid)
    table, mean_dice = _table(Volume(fused, grid), agreement, carrying.target_labels)
    result = {
        "atlases": [state.row.identity for state in done],
        "fusion": carrying.fusion,
        "interpolation": carrying.interpolation,
        "labels": table,
        "mean_dice": mean_dice,
        "notes": notes,
    }
    write_whole(Path(output) / "volumes.csv", _csv(table))
    write_whole(Path(output) / "propagation.json", json.dumps(result, indent=1))
    progress("fuse", 1.0, "done")
    return result


def _carried(state: PairState, path: str, carrying: PropagationOptions) -> Volume:
    """The labels of one atlas on the target's grid, ``ABSENT`` where its field of view does not reach; also written."""
    folder = Path(state.row.job.output)
    covered = read_map(folder / "coverage.nii.gz", "result")
    atlas = read_labels(path, f"labels of atlas '{state.row.identity}'")
    forward = read_transform(folder / f"forward.{state.row.job.transform_format}")
    array = resample_labels(atlas, forward, covered.grid, smooth=carrying.interpolation == "smooth")
    with replacing(folder / "labels.nii.gz") as temporary:
        write_volume(temporary, smallest(array), covered.grid)
    return Volume(np.where((covered.array > 0) | (array != 0), array, ABSENT).astype(np.int32), covered.grid)


def _table(fused: Volume, agreement: np.ndarray, target: str | None) -> tuple[dict[str, dict], float | None]:
    """Per label its size and agreement, and Dice with the target's own labels."""
    millilitres = fused.grid.volume / fused.array.size / 1000
    overlap: dict[int, float] = {}
    if target:
        from ..geometry.volumes import labels_on_grid

        own = read_labels(target, "labels of the target")
        there = own.array if own.grid.same_as(fused.grid) else labels_on_grid(own, fused.grid)
        overlap = dice(there, fused.array)
    table = {}
    for label in sorted({*(int(n) for n in np.unique(fused.array) if n), *overlap}):
        where = fused.array == label
        count = int(where.sum())
        table[str(label)] = {
            "voxels": count,
            "ml": round(count * millilitres, 4),
            "agreement": round(float(agreement[where].mean()), 4) if count else None,
        }
        if target:
            table[str(label)]["dice"] = round(overlap.get(label, 0.0), 4)
    return table, float(np.mean(list(overlap.values()))) if overlap else None


def _csv(table: dict[str, dict]) -> str:
    text = io.StringIO(newline="")
    columns = [
        "label",
        "voxels",
        "ml",
        "agreement",
        *(["dice"] if any("dice" in row for row in table.values()) else []),
    ]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for label, row in table.items():
        writer.writerow({"label": label, **{name: "" if value is None else value for name, value in row.items()}})
    return text.getvalue()
