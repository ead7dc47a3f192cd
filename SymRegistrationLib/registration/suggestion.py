"""Which preset by anatomy suits two scans, and why: from modality, size and content, before anything is registered.

A suggestion, never a decision: it is shown with its reason, and where nothing speaks clearly it is ``unknown``, with
which the run decides by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..geometry.volumes import Volume, foreground
from . import alignment, working_grid

#: A CT shows air near -1000 Hounsfield units; no other modality stores such values over 1 % of a scan.
AIR = -900
#: Hounsfield units of inflated lung, and litres of it from which on a scan shows a chest (a collapsed lung has 1).
LUNG, LUNG_LITRES = (-950, -600), 1.0
#: Extent in mm of the content of a head or a skull-stripped brain along every axis of the patient; heads reach down
#: to the neck. A rule of thumb.
HEAD = (90.0, 290.0)
#: Width in mm from which on content is a trunk.
TRUNK = 260.0
#: Voxel size in mm at which scans are aligned for the question whether they show one contrast.
COARSE = 4.0


@dataclass(frozen=True)
class Facts:
    """What a scan shows.

    Attributes:
        modality: ``CT``, ``MR``, ``US``, or "" when neither header nor values tell.
        extent: (3,) mm of the content along left-right, back-front, feet-head.
        lung_litres: of inflated lung, CT only.
    """

    modality: str
    extent: tuple[float, float, float]
    lung_litres: float

    @property
    def head(self) -> bool:
        """Whether the content is as large as a head or a brain."""
        return all(HEAD[0] <= e <= HEAD[1] for e in self.extent) and self.extent[0] < TRUNK


@dataclass(frozen=True)
class Suggestion:
    """``preset`` by anatomy, and the ``reason`` in one sentence."""

    preset: str
    reason: str


def facts(volume: Volume, modality: str = "") -> Facts:
    """Look at one scan.

    Args:
        modality: of its header (DICOM), "" when it has none.
    """
    array, grid = volume.array, volume.grid
    stride = tuple(slice(None, None, max(1, int(COARSE // s))) for s in grid.spacing)
    seen = array[stride]
    litres = float(np.prod(grid.spacing)) * array.size / seen.size / 1e6
    if not modality and (seen < AIR).mean() > 0.01 and seen.min() > -5000:
        modality = "CT"
    lung = float(((seen > LUNG[0]) & (seen < LUNG[1])).sum()) * litres if modality == "CT" else 0.0
    content = foreground(array)
    where = np.argwhere(content[stride]) * [s.step or 1 for s in stride]
    points = grid.points(where.astype(float)) if len(where) else np.zeros((1, 3))
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    return Facts(modality, tuple(float(v) for v in high - low), lung)  # type: ignore[arg-type]


def suggest(fixed: Volume, moving: Volume, modalities: tuple[str, str] = ("", "")) -> Suggestion:
    """The preset that suits two scans, and why. Raises InputError for scans without content."""
    seen = [facts(volume, modality) for volume, modality in zip((fixed, moving), modalities)]
    kinds = {one.modality for one in seen}
    if kinds == {"CT", "MR"} or (kinds == {"CT", ""} and any(one.head for one in seen)):
        return Suggestion("ct-mr", "one scan is a CT and the other is not: brightness means different things in them.")
    if "US" in kinds and len(kinds) == 2:
        return Suggestion("prostate-mr-us", "one scan is an ultrasound, the other is not.")
    if kinds == {"CT"}:
        litres = min(one.lung_litres for one in seen)
        if litres >= LUNG_LITRES:
            return Suggestion(
                "lung-ct", f"both are CT and show at least {litres:.1f} litres of inflated lung, which slides."
            )
        if all(one.extent[0] > TRUNK for one in seen):
            return Suggestion(
                "abdomen", "both are CT of a trunk with less than a litre of lung: organs move, spine and ribs stay."
            )
        return Suggestion("unknown", "both are CT, and neither a chest nor an abdomen.")
    if not all(one.head for one in seen):
        sizes = " and ".join(" x ".join(f"{e:.0f}" for e in one.extent) for one in seen)
        return Suggestion("unknown", f"the content ({sizes} mm) is not that of two heads; the scans themselves decide.")
    scans = [working_grid.shrink(working_grid.prepare(volume), COARSE) for volume in (fixed, moving)]
    pose = alignment.align(scans[0], scans[1])
    size = "both are as large as a head or brain"
    if pose.unsure:
        return Suggestion("unknown", f"{size}, but how they lie to each other is not clear.")
    if pose.likeness >= alignment.ONE_CONTRAST:
        return Suggestion("brain", f"{size}, and their brightness agrees locally (correlation {pose.likeness:.2f}).")
    return Suggestion(
        "brain-two-contrasts", f"{size}, and their brightness does not agree locally (correlation {pose.likeness:.2f})."
    )
