"""The shape of ``metrics.json``: every number's type, and what it means to people. No torch.

A new number is one entry here and the place that measures it; tables of the report, the terminal and the panel follow.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypedDict

#: Raised when a reader of the last number would misunderstand the file.
SCHEMA = 1


@dataclass(frozen=True)
class Meaning:
    """What a number says to people: a short name, a sentence, and how many digits are worth showing."""

    name: str
    sentence: str
    digits: int = 3


class Candidate(TypedDict):
    """One pose that the alignment looked at: ``score`` by the alignment's measure, all on one coarse level; how far it
    is from the one that was taken; ``matrix`` (4, 4) LPS mm, fixed -> moving."""

    name: str
    score: float
    degrees: float
    mm: float
    matrix: list[list[float]]


class Decided(TypedDict, total=False):
    """Which poses were looked at (the one that was taken comes last) and each decision on the way in a sentence;
    missing in files of versions that did not tell."""

    candidates: list[Candidate]
    reasons: list[str]


class Alignment(Decided):
    """What brought the scans roughly together; ``matrix`` is (4, 4) LPS mm, fixed -> moving."""

    kind: str
    confidence: float
    unsure: bool
    similarity: float | None
    measure: str
    likeness: float | None
    mirrored_gain: float | None
    matrix: list[list[float]]


class Evidence(TypedDict):
    """Normalised mutual information minus 1 of the scans as their headers lay them, aligned and registered, each gain
    in standard errors; ``structure``, ``covered`` and ``shared`` are of the delivered state
    (``registration/evidence.py``)."""

    before: float
    aligned: float
    after: float
    gain_aligned: float
    gain_after: float
    gain: float
    structure: float | None
    covered: float
    shared: float
    delivered: str


class Verdict(TypedDict):
    """``PASS``, ``WARN`` or ``FAIL``, and why; ``registered`` is False when the run ended no better than it began or
    the scans do not belong together."""

    level: str
    registered: bool
    reasons: list[str]


class Quality(TypedDict):
    """Whether the transforms are sound, measured on the fixed scan's grid."""

    folded_voxels: Annotated[
        int,
        Meaning(
            "folded voxels", "voxels with a Jacobian determinant of 0 or less: space is turned inside out there", 0
        ),
    ]
    folded_percent: Annotated[float, Meaning("folded, % of the volume", "0 is right for a diffeomorphism", 4)]
    folded_percent_content: Annotated[
        float, Meaning("folded, % of the content", "the same where the scan shows something", 4)
    ]
    jacobian_min: Annotated[
        float, Meaning("Jacobian, smallest", "strongest local shrinkage (fixed to moving), as a volume factor")
    ]
    jacobian_median: Annotated[
        float, Meaning("Jacobian, median", "typical volume factor, the alignment's scale included")
    ]
    jacobian_max: Annotated[float, Meaning("Jacobian, largest", "strongest local growth (fixed to moving)")]
    sd_log_jacobian: Annotated[
        float, Meaning("SD of log Jacobian", "irregularity of the deformation; lower is smoother")
    ]
    ice_mean_mm: Annotated[
        float,
        Meaning("inverse consistency error, mean, mm", "how far a point misses itself after forward and inverse", 4),
    ]
    ice_p95_mm: Annotated[float, Meaning("inverse consistency error, 95 %, mm", "95 of 100 points stay below", 4)]
    ice_max_mm: Annotated[
        float, Meaning("inverse consistency error, largest, mm", "the worst point in the scan's content")
    ]
    ice_mean_voxel: Annotated[
        float, Meaning("inverse consistency error, mean, voxels", "the same in voxels of the fixed scan", 4)
    ]
    inverse_method: Annotated[str, Meaning("inverse obtained by", "how the second direction came to be", 0)]
    residual_voxel: Annotated[
        float,
        Meaning(
            "largest residual on the working grid, voxels",
            "worst mismatch of the two fields before they were carried to the scans",
        ),
    ]


class Similarity(TypedDict):
    """How alike the scans are, by the measure ``name``, as scanned, aligned and registered; higher is more alike."""

    name: str
    before: float
    aligned: float
    after: float


class LabelOverlap(TypedDict):
    """Dice of the fixed labels with the moving ones, mean and per label (number as text)."""

    mean_before: float
    mean_aligned: float
    mean_after: float
    per_label: dict[str, dict[str, float]]


class Landmarks(TypedDict):
    """Target registration error in mm, and per landmark the calibrated radius where there is one."""

    count: int
    mean_before_mm: float
    mean_aligned_mm: float
    mean_after_mm: float
    p95_after_mm: float
    labels: list[str]
    before_mm: list[float]
    after_mm: list[float]
    radius_mm: list[float | None] | None


class Folding(TypedDict):
    """Connected regions of folded voxels: how many, and the largest."""

    count: int
    regions: list[dict[str, Any]]


class Sliding(TypedDict):
    """Regions that slide along their surroundings."""

    regions: Annotated[int, Meaning("regions that slide", "what each is smoothed by itself", 0)]
    surface_percent: Annotated[
        float, Meaning("at their surfaces, % of the content", "where maps show shear: neither growth nor error", 1)
    ]
    shear_mean_mm: Annotated[
        float, Meaning("parted there, mean, mm", "by how much neighbouring voxels of the working grid part")
    ]


class Measured(TypedDict, total=False):
    """What every registration measures; a part that was not asked for is None or missing."""

    alignment: Alignment
    quality: Quality
    similarity: Similarity
    sliding: Sliding | None
    evidence: Evidence
    verdict: Verdict
    uncertainty: dict[str, Any] | None
    notes: list[str]
    folding: Folding
    labels: LabelOverlap | None
    landmarks: Landmarks | None
    volumes: dict[str, dict[str, float | None]]
    steering: dict[str, Any] | None
    method: str
    preset: str
    similarity_measure: str
    device: str
    seed: int
    peak_memory_gb: float
    seconds: dict[str, float]


class Metrics(Measured, total=False):
    """The whole file: what was measured, for which job, by what, and where the outputs lie."""

    schema: int
    version: str
    job: dict[str, Any]
    environment: dict[str, str]
    files: dict[str, str]


#: Parts without which a file is no record of a registration.
ESSENTIAL = ("quality", "seconds", "method")


@lru_cache
def meanings(part: type) -> dict[str, Meaning]:
    """Per number of a part, in order, what it means."""
    hints = typing.get_type_hints(part, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def problems(metrics: Any, shape: Any = Metrics, where: str = "metrics") -> list[str]:
    """What in ``metrics`` does not fit the schema, one sentence each; [] when all of it does.

    Numbers may be whole where fractions are allowed. What the schema does not know is a problem, too, except inside
    parts that are free (``dict[str, Any]``).
    """
    if shape is Any:
        return []
    if typing.is_typeddict(shape):
        return _record_problems(metrics, shape, where)
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if origin is Annotated:
        return problems(metrics, arguments[0], where)
    if origin in (typing.Union, types.UnionType):
        return [] if any(not problems(metrics, one, where) for one in arguments) else [_wrong(where, shape, metrics)]
    if origin is list:
        if not isinstance(metrics, list):
            return [_wrong(where, shape, metrics)]
        return [text for k, value in enumerate(metrics) for text in problems(value, arguments[0], f"{where}[{k}]")]
    if origin is dict:
        if not isinstance(metrics, Mapping) or not all(isinstance(key, str) for key in metrics):
            return [_wrong(where, shape, metrics)]
        return [text for key, value in metrics.items() for text in problems(value, arguments[1], f"{where}.{key}")]
    allowed = (int, float) if shape is float else shape
    fits = isinstance(metrics, allowed) and (shape is bool or not isinstance(metrics, bool))
    return [] if fits else [_wrong(where, shape, metrics)]


def _record_problems(metrics: Any, shape: Any, where: str) -> list[str]:
    if not isinstance(metrics, Mapping):
        return [_wrong(where, "an object", metrics)]
    hints = typing.get_type_hints(shape, include_extras=True)
    required = ESSENTIAL if shape is Metrics else sorted(shape.__required_keys__)
    found = [f"{where} lacks '{name}'" for name in required if name not in metrics]
    found += [f"{where} has an unknown '{name}'" for name in metrics if name not in hints]
    for name, hint in hints.items():
        if name in metrics:
            found += problems(metrics[name], hint, f"{where}.{name}")
    return found


def _wrong(where: str, shape: Any, value: Any) -> str:
    kind = getattr(shape, "__name__", None) if isinstance(shape, type) else str(shape)
    return f"{where} should be {kind}, not {value!r:.80}"
