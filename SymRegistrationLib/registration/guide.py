"""From landmarks, label maps and a region in millimetres to what steers a run on its working grid; bad ones refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from ..fields import gaussian, identity, sample
from ..geometry.grid import Grid, index_map, transform_points
from ..geometry.lattice import affine_grid
from ..geometry.points import PointSet
from ..geometry.transforms import Transform
from ..geometry.volumes import Volume, to_itk
from ..job import InputError, Options, numbers
from .live import Watch, observer
from .steering import LabelChannels, LandmarkPairs, Steering
from .working_grid import Scan, WorkingPair

#: Two pairs contradict each other when, tolerances allowed for, they ask for a stretch or a squeeze beyond this factor.
STRETCH = 4.0
#: Labels that may be driven at once: each is two more images on the working grid.
MOST_LABELS = 64


@dataclass(frozen=True, eq=False)
class Region:
    """Where a repair may work, in the fixed scan.

    Attributes:
        mask: a label map, everything but 0 belongs to the region; or None for a sphere.
        centre, radius_mm: of the sphere, LPS mm.
        rim_mm: so far around the region the change fades out; beyond it nothing changes. A rim narrower than 2.5 voxels
            of the working grid counts as that wide.
    """

    mask: Volume | None = None
    centre: tuple[float, float, float] | None = None
    radius_mm: float = 0.0
    rim_mm: float = 10.0


@dataclass(frozen=True, eq=False)
class Pulling:
    """Landmarks and label maps of both scans that may pull; each pair is given or missing."""

    fixed_points: PointSet | None = None
    moving_points: PointSet | None = None
    fixed_labels: Volume | None = None
    moving_labels: Volume | None = None


def steer_by(
    fixed: Grid,
    moving: Grid,
    moving_scan: Scan,
    options: Options,
    pulling: Pulling,
    watch: Watch | None,
    notes: list[str],
) -> Callable[[WorkingPair], Steering] | None:
    """What gives the landmarks, labels and observer of a working pair; None when nothing steers.

    Args:
        fixed, moving: grids of the scans.
        moving_scan: prepared, for the looks of ``watch``.

    Raises:
        InputError: something shall pull and is missing, empty, outside, or contradicts itself.
    """
    points: tuple[PointSet, PointSet] | None = None
    labels: tuple[Volume, Volume] | None = None
    tolerance, which = np.empty(0), []
    if options.landmark_weight > 0:
        if pulling.fixed_points is None or pulling.moving_points is None:
            raise InputError("landmarks shall pull but none were given.", "Add --fixed-points and --moving-points.")
        points = pulling.fixed_points, pulling.moving_points
        tolerance = tolerances(options.landmark_tolerance, len(points[0]))
        check_landmarks(*points, (fixed, moving), tolerance)
    if options.drive_labels:
        if pulling.fixed_labels is None or pulling.moving_labels is None:
            raise InputError("labels shall pull but none were given.", "Add --fixed-labels and --moving-labels.")
        labels = pulling.fixed_labels, pulling.moving_labels
        which = shared_labels(*labels, options.drive_labels, notes)
    if not (points or which or watch):
        return None

    def steer(space: WorkingPair) -> Steering:
        return Steering(
            space.grid.shape,
            landmark_pairs(*points, space, tolerance, options.landmark_weight, notes) if points else None,
            label_channels(*labels, space, which, options.label_weight) if labels and which else None,
            observer=None if watch is None else observer(watch, space, moving_scan, fixed),
        )

    return steer


def outcome(
    pulling: Pulling, options: Options, forward: Transform, step: dict[str, Any], notes: list[str]
) -> dict[str, Any] | None:
    """What pulled, and whether each driving pair was met; pairs that were not are named in ``notes``. None when nothing
    steered and ``step`` is empty."""
    found = dict(step)
    if options.landmark_weight > 0 and pulling.fixed_points is not None and pulling.moving_points is not None:
        tolerance = tolerances(options.landmark_tolerance, len(pulling.fixed_points))
        left = np.linalg.norm(forward.map_points(pulling.fixed_points.points) - pulling.moving_points.points, axis=1)
        unmet = np.flatnonzero(left > tolerance)
        found["landmarks"] = {
            "weight": options.landmark_weight,
            "tolerance_mm": tolerance.tolist(),
            "residual_mm": left.tolist(),
            "met": int(len(left) - len(unmet)),
            "unmet": [named(pulling.fixed_points, k) for k in unmet],
        }
        for k in unmet:
            notes.append(
                f"landmark pair {named(pulling.fixed_points, k)} is still {left[k]:.1f} mm apart (tolerance "
                f"{tolerance[k]:g} mm): it cannot be met without folding, or against its neighbours"
            )
    if options.drive_labels and pulling.fixed_labels is not None and pulling.moving_labels is not None:
        driven = shared_labels(pulling.fixed_labels, pulling.moving_labels, options.drive_labels, [])
        found["labels"] = {"weight": options.label_weight, "driven": driven}
    return found or None


# ---------------------------------------------------------------------------------------------- landmarks


def tolerances(given: float | str, count: int) -> np.ndarray:
    """(count,) mm: one number for all pairs, or one for each. Raises InputError."""
    values = numbers(given, "the landmark tolerance")
    if len(values) not in (1, count):
        raise InputError(
            f"{len(values)} landmark tolerances are given for {count} pairs.", "Give one for all, or one for each."
        )
    if not all(0 < value < 1000 for value in values):
        raise InputError("a landmark tolerance is not above 0 and below 1000 mm.", "Give millimetres.")
    return np.broadcast_to(np.array(values, float), (count,))


def named(points: PointSet, k: Any) -> str:
    """A landmark for messages: its number from 1, and its name where it has one."""
    return f"{k + 1} ({points.labels[k]})" if points.labels[k] else str(k + 1)


def check_landmarks(fixed: PointSet, moving: PointSet, grids: Sequence[Grid], tolerance: np.ndarray) -> None:
    """Refuse pairs that no smooth map can meet. Raises InputError naming them.

    Args:
        grids: of the fixed and the moving scan.
        tolerance: (n,) mm.
    """
    away = []
    for points, grid in zip((fixed, moving), grids):
        index = grid.indices(points.points)
        away.append(((index < -0.5) | (index > np.asarray(grid.shape) - 0.5)).any(1))
    lost = np.flatnonzero(away[0] & away[1])
    if len(lost):
        raise InputError(
            f"landmark {named(fixed, lost[0])} lies outside both scans{_others(len(lost) - 1)}.",
            "Check the coordinate system of the files (LPS or RAS), or remove the pair.",
        )
    apart = [np.linalg.norm(p.points[:, None] - p.points[None], axis=2) for p in (fixed, moving)]
    allowed = tolerance[:, None] + tolerance[None]
    longer, shorter = np.maximum(*apart), np.minimum(*apart)
    wrong = np.argwhere(np.triu(longer > 2 * allowed + STRETCH * shorter, 1))
    if len(wrong):
        i, j = wrong[0]
        raise InputError(
            f"the landmark pairs {named(fixed, i)} and {named(fixed, j)} contradict each other: they are "
            f"{apart[0][i, j]:.1f} mm apart in the fixed scan and {apart[1][i, j]:.1f} mm in the moving "
            f"one{_others(len(wrong) - 1, 'pairs')}.",
            "Correct or remove one of them; no smooth map meets both.",
        )


def _others(count: int, what: str = "points") -> str:
    return f", and so do {count} more {what}" if count else ""


def landmark_pairs(
    fixed: PointSet, moving: PointSet, space: WorkingPair, tolerance: np.ndarray, weight: float, notes: list[str]
) -> LandmarkPairs | None:
    """Landmarks on the working grid; those beyond it are left out and named in ``notes``."""
    size = np.asarray(space.grid.shape) - 1
    there = [
        space.grid.indices(transform_points(np.linalg.inv(to), points.points))
        for to, points in ((space.mid_to_fixed, fixed), (space.mid_to_moving, moving))
    ]
    one, other = (((index >= 0) & (index <= size)).all(1) for index in there)
    inside = one & other
    if not inside.all():
        lost = ", ".join(named(fixed, k) for k in np.flatnonzero(~inside))
        notes.append(f"landmark {lost} lies beyond what both scans show, and did not pull")
    if not inside.any():
        return None
    device = space.fixed.device
    return LandmarkPairs(
        torch.from_numpy(there[0][inside]).to(device),
        torch.from_numpy(there[1][inside]).to(device),
        torch.from_numpy(tolerance[inside] / float(space.grid.spacing[0])).to(device),
        weight,
    )


# ---------------------------------------------------------------------------------------------- labels


def shared_labels(fixed: Volume, moving: Volume, wanted: str, notes: list[str]) -> list[int]:
    """Numbers of the labels that shall be driven: ``wanted`` is ``all`` or numbers; those in one map only are noted.

    Raises:
        InputError: not numbers, a label in neither map, or none that both maps have.
    """
    known = [set(np.unique(volume.array).tolist()) - {0} for volume in (fixed, moving)]
    known = [{int(n) for n in numbers_ if n > 0} for numbers_ in known]
    for volume, some in zip((fixed, moving), known):
        if not some:
            raise InputError(f"'{volume.name}' has no labels in it.", "Give a label map whose structures are not 0.")
    asked = sorted(known[0] | known[1]) if wanted.strip() == "all" else _label_numbers(wanted)
    nowhere = [n for n in asked if n not in known[0] and n not in known[1]]
    if nowhere:
        raise InputError(
            f"label {', '.join(map(str, nowhere))} is empty in both label maps.",
            f"Known: {', '.join(map(str, sorted(known[0] & known[1])))[:200]}.",
        )
    common = [n for n in asked if n in known[0] and n in known[1]]
    if len(common) < len(asked):
        lost = ", ".join(str(n) for n in asked if n not in common)
        notes.append(f"label {lost} is empty in one of the scans, and did not pull")
    if not common:
        raise InputError("the two label maps have no label in common.", "Give the same structure the same number.")
    if len(common) > MOST_LABELS:
        raise InputError(
            f"{len(common)} labels shall pull; at most {MOST_LABELS} can.", "Choose some with --drive-labels."
        )
    return common


def _label_numbers(text: str) -> list[int]:
    try:
        return sorted({int(word) for word in text.replace(",", " ").split()})
    except ValueError:
        raise InputError(f"'{text}' is no list of labels.", "Give 'all', or label numbers like 4,43,17,53.") from None


def label_channels(
    fixed: Volume, moving: Volume, space: WorkingPair, which: Sequence[int], weight: float
) -> LabelChannels:
    """The share of each label in each voxel of the working grid, as :class:`LabelChannels`."""
    device, sides = space.fixed.device, []
    for volume, to in ((fixed, space.mid_to_fixed), (moving, space.mid_to_moving)):
        labels = torch.from_numpy(np.ascontiguousarray(volume.array).astype(np.int64)).to(device)
        ratio = space.grid.spacing[0] / volume.grid.spacing
        sigma = [0.5 * float(max(r * r - 1, 0)) ** 0.5 for r in ratio]
        at = affine_grid(space.grid.shape, index_map(space.grid, to, volume.grid), labels[None, None].float())
        channels = []
        for n in which:
            one = (labels == n).float()[None, None]
            channels.append(sample(gaussian(one, sigma) if any(sigma) else one, at, padding="zeros"))
        sides.append(torch.cat(channels, 1))
    return LabelChannels(torch.cat(sides), weight)


# ---------------------------------------------------------------------------------------------- regions


def window(region: Region, fixed: Grid, space: WorkingPair, halves: Tensor) -> Tensor:
    """(1, 1, D, H, W) on the working grid: 1 where the middle leads into the region of the fixed scan, falling to 0 at
    the rim, and exactly 0 beyond.

    Args:
        fixed: grid of the fixed scan.
        halves: (2, 3, D, H, W), where the middle leads to now.

    Raises:
        InputError: an empty region, or one outside the scan.
    """
    places = identity(space.grid.shape, halves.device) + halves[:1]
    matrix = torch.from_numpy(space.mid_to_fixed @ space.grid.matrix).to(places)
    points = torch.einsum("rc,ncdhw->ndhwr", matrix[:3, :3], places) + matrix[:3, 3]
    if region.mask is None:
        centre = np.asarray(region.centre, float)
        index = fixed.indices(centre)
        reach = region.radius_mm / fixed.spacing
        if ((index < -0.5 - reach) | (index > np.asarray(fixed.shape) - 0.5 + reach)).any():
            raise InputError("the region lies outside the fixed scan.", "Give its centre in LPS mm of the fixed scan.")
        distance = (points - torch.from_numpy(centre).to(points)).norm(dim=-1) - region.radius_mm
    else:
        distance = _distance_to(region.mask, fixed, points, region.rim_mm)
    # Interpolation carries a change two voxels further, so the window ends that much before the rim.
    voxel = float(space.grid.spacing[0])
    share = (1 - distance / max(region.rim_mm - 2 * voxel, 0.5 * voxel)).clamp(0, 1)[:, None]
    inside = share * share * (3 - 2 * share)
    if float(inside.max()) <= 0:
        raise InputError("the region lies outside what both scans show.", "Choose one that the scans share.")
    return inside


def _distance_to(mask: Volume, fixed: Grid, points: Tensor, rim: float) -> Tensor:
    """(1, D, H, W) mm from each of the (1, D, H, W, 3) points to the nearest voxel of the mask, 0 within."""
    where = np.argwhere(mask.array != 0)
    if not len(where):
        raise InputError(f"the region '{mask.name}' is empty.", "Paint the place that shall be repaired.")
    index = fixed.indices(mask.grid.points(where[:: max(1, len(where) // 20000)]))
    if not ((index >= -0.5) & (index <= np.asarray(fixed.shape) - 0.5)).all(1).any():
        raise InputError(f"the region '{mask.name}' lies outside the fixed scan.", "Draw it on the fixed scan.")
    margin = np.ceil(1.5 * rim / mask.grid.spacing).astype(int) + 2
    grid = mask.grid.cropped(where.min(0) - margin, where.max(0) + 1 + margin)
    part = np.zeros(grid.shape, np.uint8)
    part[tuple((where - where.min(0) + margin).T)] = 1
    image = sitk.SignedMaurerDistanceMap(
        to_itk(part, grid), insideIsPositive=False, squaredDistance=False, useImageSpacing=True
    )
    distance = torch.from_numpy(np.maximum(sitk.GetArrayFromImage(image), 0).astype(np.float32)).to(points.device)
    inverse = torch.from_numpy(grid.inverse).to(points)
    size = torch.tensor(grid.shape).to(points)
    at = (points @ inverse[:3, :3].T + inverse[:3, 3]) * 2 / (size - 1) - 1
    found = sample(distance[None, None], at.flip(-1))[:, 0]
    beyond = (at.abs() > 1).any(-1)
    return torch.where(beyond, torch.full_like(found, 2 * rim), found)
