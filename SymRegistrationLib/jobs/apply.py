"""Carry images, label maps and points through a transform file.

Images and points go opposite ways. A transform file maps points of the fixed space to the moving space; that
is what warps the moving *image* onto the fixed grid. A *point* of the moving scan therefore needs the other direction:
the inverse file of the same run when it lies beside, else a numerical inverse whose residual is measured and told.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from ..files import replacing
from ..geometry.points import read_points, write_points
from ..geometry.regions import values_at
from ..geometry.resampling import (
    INTERPOLATIONS,
    invert_points,
    map_points,
    outside_field,
    resample_image,
    resample_labels,
)
from ..geometry.transform_files import read_transform
from ..geometry.volumes import read_labels, read_volume, write_volume
from ..job import InputError, Progress, existing_file, silent, usable_path

KINDS = ("image", "labels", "points")
IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
POINT_ENDINGS = (".csv", ".fcsv", ".json")
LABEL_INTERPOLATIONS = ("nearest", "smooth")
#: An inverse file whose points return further away than this (mm, 95 % of them) does not belong to the transform.
BELONGS_MM = 2.0
#: Points whose inverse misses by more than this (mm) are told.
MISSED_MM = 0.5
NUMERICAL = "numerical inverse"


@dataclass(frozen=True)
class Application:
    """What ``symreg apply`` is asked to do; all paths are strings.

    Attributes:
        input: image, label map or landmark file.
        transform: transform file (ITK: points of the fixed space -> points of the moving space).
        output: the file to write; its ending chooses the format.
        reference: an image on whose grid the result is wanted; needed for images and label maps.
        kind: ``image``, ``labels`` or ``points``.
        interpolation: ``linear``, ``nearest`` or ``bspline`` for images; ``nearest`` or ``smooth`` for label maps;
            ``None`` = linear, nearest.
        points_from: the scan in which the points were placed, ``moving`` or ``fixed``; they go to the other one.
        inverse: the transform file of the other direction; ``None`` = the one of the same run, when it lies beside.
    """

    input: str
    transform: str
    output: str
    reference: str | None = None
    kind: str = "image"
    interpolation: str | None = None
    points_from: str = "moving"
    inverse: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is '{self.kind}'.", f"Choose one of: {', '.join(KINDS)}.")
        if self.points_from not in ("moving", "fixed"):
            raise InputError(f"points_from is '{self.points_from}'.", "Choose moving or fixed.")
        allowed = {"image": tuple(INTERPOLATIONS), "labels": LABEL_INTERPOLATIONS, "points": ()}[self.kind]
        if self.interpolation is not None and self.interpolation not in allowed:
            known = ", ".join(allowed) or "none, points are not interpolated"
            raise InputError(f"interpolation '{self.interpolation}' is not for {self.kind}.", f"Known: {known}.")
        if self.kind != "points" and not self.reference:
            hint = "Add --reference with the image whose grid you want, usually the fixed scan."
            if self.input.lower().endswith(POINT_ENDINGS):
                hint = f"Add --points if '{self.input}' holds landmarks."
            raise InputError("no reference image is given.", hint)
        endings = POINT_ENDINGS if self.kind == "points" else IMAGE_ENDINGS
        name = self.output.lower() if self.kind == "points" else self.output  # ITK knows the lower-case ones only
        if not name.endswith(endings):
            raise InputError(f"'{self.output}' has no known ending.", f"Use one of: {', '.join(endings)}.")

    @classmethod
    def from_dict(cls, raw: Any) -> Application:
        """From plain data, as the worker gets it. Raises InputError on unknown, missing or non-text fields."""
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(raw, dict) or set(raw) - set(names) or not {"input", "transform", "output"} <= set(raw):
            raise InputError(
                "the apply request must be an object with input, transform and output.",
                f"Known fields: {', '.join(names)}.",
            )
        for name, value in raw.items():
            if not isinstance(value, str) and not (value is None and name in ("reference", "interpolation", "inverse")):
                raise InputError(
                    f"'{name}' in the apply request must be text, not {value!r:.200}.", "Correct its value."
                )
        return cls(**raw)


def apply_transform(request: Application, progress: Progress = silent) -> dict:
    """Do what ``request`` asks and write its output atomically.

    Returns:
        What was done: ``output``, ``kind``, ``notes`` (warnings for people) and, for points, ``count``, ``from``,
        ``to``, ``method``, ``residual_mean_mm``, ``residual_max_mm``, ``outside``, ``radius_mm`` (68 %, a list or None)
        and ``no_radius`` (why not).

    Raises:
        InputError: an input is missing, unreadable or of the wrong kind, or the output cannot be written.
    """
    for path, what in (
        (request.input, request.kind),
        (request.transform, "transform"),
        (request.reference, "reference image"),
        (request.inverse, "inverse transform"),
    ):
        if path:
            existing_file(path, what)
            if _same_file(path, request.output):
                raise InputError(f"the output would replace the {what} '{path}'.", "Give the result another name.")
    check_writable(Path(request.output))
    progress("read", 0.0, f"reading {Path(request.transform).name}")
    transform = read_transform(request.transform)
    result = _points(request, transform) if request.kind == "points" else _image(request, transform, progress)
    progress("done", 1.0, f"wrote {request.output}")
    return {"output": request.output, "kind": request.kind, **result}


def check_writable(path: Path) -> None:
    """Refuse an output whose folder is missing or closed. Raises InputError."""
    folder = usable_path(path, "the output").parent
    if not folder.is_dir():
        raise InputError(f"the output folder '{folder}' does not exist.", "Create it first.")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"'{path}' cannot be written.", "Choose a file in a folder that you may write to.")


def _image(request: Application, transform: sitk.Transform, progress: Progress) -> dict:
    grid = read_volume(request.reference or "", "reference image").grid
    volume = (read_labels if request.kind == "labels" else read_volume)(request.input, request.kind)
    progress("resample", 0.3, f"resampling {Path(request.input).name}")
    if request.kind == "labels":
        array = smallest(resample_labels(volume, transform, grid, smooth=request.interpolation == "smooth"))
    else:
        array = resample_image(volume, transform, grid, request.interpolation or "linear")
    notes = [*volume.notes, *_against(request)]
    if array.min() == array.max():
        notes.append("nothing of the input lands on the reference grid; is this the transform of the other direction?")
    progress("write", 0.8, f"writing {Path(request.output).name}")
    with replacing(request.output) as temporary:
        write_volume(temporary, array, grid)
    return {"notes": notes}


def _against(request: Application) -> list[str]:
    """A note where a run's transform is asked to carry a scan against its direction."""
    run = _run_of(Path(request.transform))
    source, target = (run.moving, run.fixed) if run.role == "forward" else (run.fixed, run.moving)
    if not (_same_file(request.reference, source) or (request.kind == "image" and _same_file(request.input, target))):
        return []
    other = f"; the other way is {run.sibling.name}" if run.sibling else ""
    return [f"{Path(request.transform).name} brings '{source}' onto '{target}'{other}"]


def _same_file(a: str | None, b: str | None) -> bool:
    """Whether two paths lead to one file."""
    try:
        return bool(a and b) and os.path.samefile(a or "", b or "")
    except OSError:
        return False


def smallest(labels: np.ndarray) -> np.ndarray:
    """The same labels in the smallest integer type that holds them."""
    low, high = int(labels.min()), int(labels.max())
    kinds = (np.uint8, np.int16, np.int32)
    return labels.astype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


# ---------------------------------------------------------------------------------------------- points


@dataclass(frozen=True)
class _Run:
    """What the metrics.json beside a transform tells: the file's direction, its sibling, the scans' names, and the
    calibrated uncertainty map or why there is none."""

    role: str = "forward"
    sibling: Path | None = None
    fixed: str = "fixed scan"
    moving: str = "moving scan"
    radius_map: Path | None = None
    no_radius: str = (
        "the transform does not lie in the folder of its run (no metrics.json that names it), so nothing "
        "is known of its errors"
    )


def _run_of(transform: Path) -> _Run:
    try:
        metrics = json.loads((transform.parent / "metrics.json").read_text(encoding="utf-8"))
        files, job = metrics["files"], metrics["job"]
        role = next(r for r in ("forward", "inverse") if files.get(r) == transform.name)
        sibling = transform.parent / files["inverse" if role == "forward" else "forward"]
        return _Run(
            role,
            sibling if sibling.exists() else None,
            str(job["fixed"]),
            str(job["moving"]),
            *_radius_map(metrics, transform.parent),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return _Run()  # not in a run's folder: the file is taken as what warps the moving image


def _radius_map(metrics: dict, folder: Path) -> tuple[Path | None, str]:
    """The run's calibrated uncertainty map, or None and the reason in words."""
    told = metrics.get("uncertainty")
    if not told:
        return None, "the run made no uncertainty map; register with --uncertainty 8 to get one"
    if not told.get("calibrated"):
        return None, "the run's uncertainty map is relative only, so it gives no mm"
    path = folder / str(metrics["files"].get("uncertainty", "uncertainty.nii.gz"))
    return (path, "") if path.is_file() else (None, f"the run's uncertainty map '{path}' is missing")


def _points(request: Application, transform: sitk.Transform) -> dict:
    points = read_points(request.input, "points")
    run = _run_of(Path(request.transform))
    to_fixed = request.points_from == "moving"
    notes: list[str] = []
    if to_fixed == (run.role == "inverse"):
        moved, residual = map_points(transform, points.points), np.zeros(len(points))
        used, method = transform, f"{Path(request.transform).name}, as it is"
    else:
        moved, residual, used, method = _other_way(request, transform, points.points, run, notes)
    outside = int(outside_field(used, moved if method == NUMERICAL else points.points).sum())
    if outside:
        notes.append(
            f"{outside} of {len(points)} points lie outside the transform's grid; its border displacement was used"
        )
    missed = int((residual > MISSED_MM).sum())
    if missed:
        notes.append(
            f"{missed} of {len(points)} points could not be inverted to {MISSED_MM} mm (worst {residual.max():.2f} mm)"
        )
    radii = _radii(run, moved if to_fixed else points.points)
    with replacing(request.output) as temporary:
        write_points(temporary, dataclasses.replace(points.moved(moved), radii=radii))
    source, target = (run.moving, run.fixed) if to_fixed else (run.fixed, run.moving)
    return {
        "notes": notes,
        "count": len(points),
        "from": source,
        "to": target,
        "method": method,
        "outside": outside,
        "residual_mean_mm": float(residual.mean()),
        "residual_max_mm": float(residual.max()),
        "radius_mm": [None if r != r else round(r, 3) for r in radii] or None,
        "no_radius": run.no_radius,
    }


def _radii(run: _Run, fixed_points: np.ndarray) -> tuple[float, ...]:
    """68 % radius in mm of each point, nan outside the map, () when the run has no calibrated map.

    The map lies on the fixed scan; for points carried to the fixed scan it is read where they arrive.
    """
    if run.radius_map is None:
        return ()
    volume = read_volume(run.radius_map, "uncertainty map")
    return tuple(float(r) for r in values_at(volume.array, volume.grid, fixed_points))


def _other_way(
    request: Application, transform: sitk.Transform, points: np.ndarray, run: _Run, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, sitk.Transform, str]:
    """Points against the direction of ``transform``: by the other file, or numerically; with residuals in mm."""
    path = Path(request.inverse) if request.inverse else run.sibling
    if path is not None and not transform.IsLinear():
        other = read_transform(path)
        moved = map_points(other, points)
        residual = np.linalg.norm(map_points(transform, moved) - points, axis=1)
        if np.percentile(residual, 95) <= BELONGS_MM:
            return moved, residual, other, path.name
        if request.inverse:
            raise InputError(
                f"'{path}' is not the inverse of '{request.transform}': points return "
                f"{np.median(residual):.1f} mm away.",
                "Give the pair of one run, or leave --inverse out.",
            )
        notes.append(
            f"{path.name} beside the transform does not belong to it (points return {np.median(residual):.1f} mm "
            "away), so the transform was inverted numerically"
        )
    try:
        moved, residual = invert_points(transform, points)
    except (RuntimeError, np.linalg.LinAlgError):
        raise InputError(
            f"transform '{request.transform}' flattens space and has no inverse.",
            "Points of the moving scan cannot go through it.",
        ) from None
    return moved, residual, transform, "exact inverse" if transform.IsLinear() else NUMERICAL
