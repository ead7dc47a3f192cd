"""Why the alignment ended where it did: the poses that were looked at with their scores, and each decision in a
sentence, for people and for metrics.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .pose_search import CLEARLY, LEAST_GAIN, LEAST_STRETCH, MIDDLE, Found, Search, ahead

#: Poses of the search that are told beside the headers' and the one that was taken.
SHOWN = 3
#: What a score is called.
MEASURES = {"ncc": "correlation", "mi": "normalised mutual information"}


@dataclass(frozen=True, eq=False)
class Candidate:
    """One pose that the alignment looked at.

    Attributes:
        name: ``headers`` (as they are), ``headers, refined``, ``search 1`` ... (elsewhere, best first), ``taken``.
        matrix: (4, 4) LPS mm, fixed -> moving.
        score: by the measure of the alignment, all on one coarse level.
        degrees, mm: how far it is from the pose that was taken: turn, and distance at the middle of the fixed content.
    """

    name: str
    matrix: np.ndarray
    score: float
    degrees: float
    mm: float

    def told(self) -> dict[str, Any]:
        """For metrics.json."""
        rounded = {name: round(getattr(self, name), 4) for name in ("score", "degrees", "mm")}
        return {"name": self.name, **rounded, "matrix": self.matrix.round(6).tolist()}


def candidates(search: Search, found: Found) -> tuple[Candidate, ...]:
    """What was looked at: the headers' own pose, as it is and refined, the best that lie elsewhere than the winner, and
    the pose that was taken, after its refinement on finer levels."""
    poses = [("headers", search.generator(np.eye(4)))]
    if len(found.tried):
        poses.append(("headers, refined", found.tried[0]))
        others = torch.as_tensor(found.scores[1:]).argsort(descending=True) + 1
        elsewhere = [found.tried[k] for k in others.tolist() if not search.one_basin(found.tried[k], found.x)]
        poses += [(f"search {rank}", one) for rank, one in enumerate(elsewhere[:SHOWN], 1)]
    poses.append(("taken", found.x))
    x = torch.stack([one for _, one in poses])
    with torch.no_grad():
        scores = search.level(MIDDLE).score(*search.poses(x), found.measure).tolist()
    to_fixed, to_moving = (side.cpu().numpy() for side in search.poses(x))
    matrices = [b @ np.linalg.inv(a) for a, b in zip(to_fixed, to_moving)]
    middle = np.append(search.scans[0].centroid, 1.0)
    return tuple(
        Candidate(
            name,
            matrix,
            score,
            _degrees(matrix[:3, :3], matrices[-1][:3, :3]),
            float(np.linalg.norm(((matrix - matrices[-1]) @ middle)[:3])),
        )
        for (name, _), matrix, score in zip(poses, matrices, scores)
    )


def _degrees(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two linear maps, their stretch left out."""
    u, _, vt = np.linalg.svd(a @ np.linalg.inv(b))
    return float(np.degrees(np.arccos(np.clip((np.trace(u @ vt) - 1) / 2, -1, 1))))


def reasons(search: Search, found: Found, asked: tuple[str, str], likeness: float, threshold: float) -> tuple[str, ...]:
    """Each decision in a sentence: one contrast or two, which pose won, whether it may stretch.

    Args:
        asked: kind and measure, as :func:`alignment.align` was asked.
        likeness: local correlation at the pose that was taken; ``threshold``: from which on it is one contrast.
    """
    return (
        _contrasts(found, asked[1], likeness, threshold),
        *([_pose(search, found)] if len(found.tried) else []),
        _freedom(found, asked[0]),
    )


def _contrasts(found: Found, asked: str, likeness: float, threshold: float) -> str:
    word = MEASURES[found.measure]
    if asked != "auto":
        return f"Poses were scored by {word}, as asked."
    text = f"brightness agrees locally with a correlation of {likeness:.2f} (one contrast from {threshold:g} on)"
    if found.measure == "ncc":
        return f"One contrast: {text}; poses were scored by {word}."
    return f"Two contrasts: {text}; poses were scored by {word}, which does not look at which tissue is bright."


def _pose(search: Search, found: Found) -> str:
    best, header = float(found.scores[found.winner]), float(found.scores[0])
    elsewhere = f"the best pose elsewhere is behind by {100 * found.confidence:.0f} %"
    if found.winner == 0:
        return (
            f"The headers' own pose was refined and kept: no other was clearly better (from {100 * CLEARLY:g} % on); "
            f"{elsewhere}."
        )
    lead = f"{100 * ahead(best, header, found.measure):.0f}"
    if search.one_basin(found.tried[0], found.tried[found.winner]):
        return f"The search took the pose to which the headers' own leads as well, {lead} % ahead; {elsewhere}."
    return f"The search's pose was taken: {lead} % ahead of the headers' own, refined; {elsewhere}."


def _freedom(found: Found, kind: str) -> str:
    told = found.stretched
    if told is None:
        return {
            "rigid": "Rigid, as asked.",
            "similarity": "Rigid: across contrasts a scale is not searched."
            if found.measure == "mi"
            else "Rigid with one scale, as asked.",
        }.get(kind, "Affine: scale and shear are free between scans of one contrast.")
    way = f"stretching by {100 * told.stretch:.1f} % gains {100 * told.gain:.1f} % of information"
    least = f"at least {100 * LEAST_STRETCH:g} % and {100 * LEAST_GAIN:g} %"
    if told.insisted:
        return f"Stretched: the images insist, {way} ({least} are needed)."
    return f"Rigid, as one patient is: {way} ({least} would be needed)."
