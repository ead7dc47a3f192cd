"""Score given transforms: overlap of labels, landmark error, deformation and inverse consistency.

Works on transform files of any tool that writes ITK transforms, so that two programs can be compared with the
same ruler.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..console import number, table
from ..geometry.grid import Grid
from ..geometry.points import PointSet, paired, read_points
from ..geometry.transform_files import physical, read_transform
from ..geometry.transforms import Transform
from ..geometry.volumes import Volume, read_labels, read_mask, read_volume
from ..job import InputError, Progress, check_both_sides, existing_file, silent
from ..quality.metrics import (
    ice_summary,
    inverse_consistency_map,
    jacobian_map,
    jacobian_summary,
    label_overlap,
    mean,
    target_registration_error,
)


@dataclass(frozen=True)
class Evaluation:
    """What ``symreg evaluate`` is asked to do; all are paths, and every part may be left out.

    Attributes:
        transform: forward, as ITK stores it (fixed points -> moving points). ``None`` scores the scans as they lie.
        inverse: the other direction, for the inverse consistency error.
        fixed: fixed scan: the grid on which deformation is measured; default the fixed labels', else the transform's.
        moving: moving scan; needed only when ``inverse`` has no grid of its own.
        fixed_mask: measure deformation only here.
        fixed_labels, moving_labels: for Dice; both or none.
        fixed_points, moving_points: for the landmark error; both or none.
    """

    transform: str | None = None
    inverse: str | None = None
    fixed: str | None = None
    moving: str | None = None
    fixed_mask: str | None = None
    fixed_labels: str | None = None
    moving_labels: str | None = None
    fixed_points: str | None = None
    moving_points: str | None = None

    def __post_init__(self) -> None:
        check_both_sides(self)
        if self.inverse and not self.transform:
            raise InputError("an inverse is given without its transform.", "Add --transform.")
        if not (self.transform or self.fixed_labels or self.fixed_points):
            raise InputError("there is nothing to evaluate.", "Give --transform, or labels or points of both scans.")

    @classmethod
    def from_dict(cls, raw: Any) -> Evaluation:
        """From plain data, as the worker gets it. Raises InputError on unknown or non-text fields."""
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(raw, dict) or set(raw) - set(names):
            raise InputError("the evaluate request must be an object of paths.", f"Known fields: {', '.join(names)}.")
        for name, value in raw.items():
            if value is not None and not isinstance(value, str):
                raise InputError(
                    f"'{name}' in the evaluate request must be text, not {value!r:.200}.", "Correct its value."
                )
        return cls(**raw)


def evaluate(request: Evaluation, progress: Progress = silent) -> dict:
    """Score what is given.

    Returns:
        ``quality`` (deformation and inverse consistency), ``labels`` and ``landmarks`` as in a run's metrics.json, each
        None when it was not asked for. Before is the position by the headers alone, after is with the transform.

    Raises:
        InputError: an input is missing, unreadable or of the wrong kind.
    """
    for field in dataclasses.fields(request):
        path = getattr(request, field.name)
        if path:
            existing_file(path, field.name.replace("_", " "))
    progress("read", 0.0, "reading")
    labels = [
        read_labels(p, w)
        for p, w in ((request.fixed_labels, "fixed labels"), (request.moving_labels, "moving labels"))
        if p
    ]
    points = [
        read_points(p, w)
        for p, w in ((request.fixed_points, "fixed points"), (request.moving_points, "moving points"))
        if p
    ]
    grid = read_volume(request.fixed, "fixed image").grid if request.fixed else labels[0].grid if labels else None
    forward = _read(request.transform, grid, "--fixed") if request.transform else None
    result: dict = {
        "transform": request.transform,
        "inverse": request.inverse,
        "quality": None,
        "labels": None,
        "landmarks": None,
    }
    if forward is not None:
        progress("deform", 0.3, "measuring the deformation")
        result["quality"] = _quality(request, forward, grid or forward.grid)
    if labels:
        progress("labels", 0.6, "comparing labels")
        result["labels"] = _labels(labels[0], labels[1], forward)
    if points:
        progress("points", 0.9, "comparing landmarks")
        result["landmarks"] = _landmarks(*paired(*points), forward)
    progress("done", 1.0, "done")
    return result


def _read(path: str, grid: Grid | None, option: str) -> Transform:
    try:
        return physical(read_transform(path), grid)
    except ValueError:
        raise InputError(
            f"transform '{path}' has no grid of its own.", f"Add {option} with the scan it belongs to."
        ) from None


def _quality(request: Evaluation, forward: Transform, grid: Grid) -> dict:
    mask = read_mask(request.fixed_mask, grid, "fixed mask") if request.fixed_mask else None
    quality: dict = jacobian_summary(jacobian_map(forward, grid), mask)
    if request.inverse:
        moving = request.moving or request.moving_labels
        inverse = _read(request.inverse, read_volume(moving, "moving image").grid if moving else None, "--moving")
        quality |= ice_summary(
            inverse_consistency_map(forward, inverse, grid), mask, float(np.prod(grid.spacing) ** (1 / 3))
        )
    return quality


def _labels(fixed: Volume, moving: Volume, forward: Transform | None) -> dict:
    before = label_overlap(fixed, moving, np.eye(4))
    after = label_overlap(fixed, moving, forward) if forward is not None else before
    # A label that the transform moved out of view is absent after, but was there before: it counts 0, not nothing.
    present = sorted(set(before) | set(after))
    per_label = {str(n): {"before": before.get(n, 0.0), "after": after.get(n, 0.0)} for n in present}
    return {
        "mean_before": mean({int(n): v["before"] for n, v in per_label.items()}),
        "mean_after": mean({int(n): v["after"] for n, v in per_label.items()}),
        "per_label": per_label,
    }


def _landmarks(fixed: PointSet, moving: PointSet, forward: Transform | None) -> dict:
    before = target_registration_error(np.eye(4), fixed.points, moving.points)
    after = target_registration_error(forward, fixed.points, moving.points) if forward is not None else before
    return {
        "count": len(fixed),
        "mean_before_mm": float(before.mean()),
        "mean_after_mm": float(after.mean()),
        "p95_after_mm": float(np.percentile(after, 95)),
        "max_after_mm": float(after.max()),
        "labels": list(fixed.labels),
        "before_mm": before.tolist(),
        "after_mm": after.tolist(),
    }


def evaluation_table(result: dict) -> str:
    """The result of :func:`evaluate` for people."""
    parts = []
    quality = result["quality"]
    if quality:
        rows = [
            ("folded voxels", f"{number(quality['folded_voxels'])} ({number(quality['folded_percent'], 4)} %)"),
            (
                "Jacobian min / median / max",
                " / ".join(number(quality[f"jacobian_{k}"]) for k in ("min", "median", "max")),
            ),
            ("SD of log Jacobian", number(quality["sd_log_jacobian"])),
        ]
        if "ice_mean_mm" in quality:
            rows.append(
                (
                    "inverse consistency error, mm, mean / 95 % / max",
                    " / ".join(number(quality[f"ice_{k}_mm"]) for k in ("mean", "p95", "max")),
                )
            )
        parts.append(table(("deformation", "value"), rows))
    if result["labels"]:
        labels = result["labels"]
        overlaps = [(f"label {n}", number(v["before"]), number(v["after"])) for n, v in labels["per_label"].items()]
        parts.append(
            table(
                ("Dice", "before", "after"),
                [*overlaps, ("mean", number(labels["mean_before"]), number(labels["mean_after"]))],
            )
        )
    if result["landmarks"]:
        marks = result["landmarks"]
        errors = [
            ("mean", number(marks["mean_before_mm"], 2), number(marks["mean_after_mm"], 2)),
            ("95 %", number(float(np.percentile(marks["before_mm"], 95)), 2), number(marks["p95_after_mm"], 2)),
            ("largest", number(max(marks["before_mm"]), 2), number(marks["max_after_mm"], 2)),
        ]
        parts.append(table((f"landmark error, mm ({marks['count']} pairs)", "before", "after"), errors))
    return "\n\n".join(parts)
