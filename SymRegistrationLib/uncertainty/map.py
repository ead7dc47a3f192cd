"""The uncertainty map that a user gets: predictors put together, in mm on the fixed scan, with words on what
it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..fields import sample
from ..geometry.grid import Grid
from ..geometry.lattice import affine_grid
from ..geometry.regions import regions, values_at
from ..quality.checks import uncertainty_statement
from ..registration.working_grid import WorkingPair
from .calibration import Calibration
from .predictors import Runs

#: Runs (or methods) are said to disagree wildly when this many percent of the content move by more than
#: :data:`WILD` voxels.
WILD_PERCENT, WILD = 10, 3.0
#: Regions of the highest uncertainty: above this percentile of the content and above twice its median.
WORST_PERCENTILE, WORST_TIMES = 97.0, 1.5
#: A region smaller than this (ml) is not listed among the worst.
LEAST_ML = 0.2
WIDENED = "at the surfaces of what slides the uncertainty was widened by what neighbouring voxels part there"
NOT_MM = "the uncertainty map is relative: it shows where the result is less stable, not by how many mm it errs"


@dataclass(frozen=True, eq=False)
class UncertaintyMap:
    """The answer to "how far off may it be, here?".

    Attributes:
        mm: (D, H, W) float32 on the fixed grid. Calibrated: the radius that holds 68 % of the true
            errors; otherwise relative.
        spread: (D, H, W) mm, root trace of the covariance of the runs; ``None`` without runs.
        axis: (D, H, W) mm, standard deviation along the direction of largest spread; ``None`` without runs.
        summary: the part ``uncertainty`` of metrics.json.
        notes: sentences for people.
    """

    mm: np.ndarray
    spread: np.ndarray | None
    axis: np.ndarray | None
    summary: dict
    notes: tuple[str, ...]

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """The maps of the runs by the names of their files."""
        return {} if self.spread is None else {"uncertainty_spread": self.spread, "uncertainty_axis": self.axis}

    def radii(self, points: np.ndarray, grid: Grid) -> list[float | None] | None:
        """The calibrated 68 % radius, mm, at (n, 3) LPS points; ``grid`` is the map's.

        A point outside has None; the whole answer is None when the map is relative only.
        """
        if not self.summary.get("calibrated"):
            return None
        values = values_at(self.mm, grid, points)
        return [None if np.isnan(value) else round(float(value), 3) for value in values]


def uncertainty_map(
    predictors: Mapping[str, Tensor],
    runs: Runs | None,
    space: WorkingPair,
    grid: Grid,
    content: np.ndarray,
    calibration: Calibration | None,
    shear: Tensor | None = None,
) -> UncertaintyMap:
    """Put the predictors of one registration together.

    Args:
        predictors: (D, H, W) voxels of the working grid, from the single run and, when there were some,
            the perturbed runs.
        runs: the perturbed runs; ``None`` = fast mode.
        space: the working grid's place.
        grid: where the map is wanted, the fixed scan's.
        content: (D, H, W) bool on ``grid``, where the scan shows something; for the numbers.
        calibration: what makes mm of it; ``None`` = relative.
        shear: (D, H, W) voxels of the working grid, by how much places part that slide along each other: there a place
            may go with either side.
    """
    linear = (space.mid_to_moving @ space.grid.matrix)[:3, :3]
    voxel = float(abs(np.linalg.det(linear)) ** (1 / 3))

    def placed(values: Tensor) -> np.ndarray:
        matrix = space.grid.inverse @ np.linalg.inv(space.mid_to_fixed) @ grid.matrix
        return sample(values[None, None], affine_grid(grid.shape, matrix, values[None, None]))[0, 0].cpu().numpy()

    spread = placed(runs.spread.length(linear)) if runs else None
    axis = placed(runs.spread.largest_axis(linear)) if runs else None
    mm = _millimetres(predictors, spread, calibration, voxel, placed)
    notes = []
    if shear is not None:
        mm = np.hypot(mm, placed(shear * voxel))
        notes.append(WIDENED)
    seen = mm[content] if content.any() else mm.ravel()
    worst = _worst(mm, grid, content)
    summary: dict[str, Any] = {
        "kind": "runs" if runs else "fast",
        "runs": runs.spread.count - 1 if runs else 0,
        "level": 68 if calibration else None,
        "mean_mm": float(seen.mean()),
        "median_mm": float(np.median(seen)),
        "p95_mm": float(np.percentile(seen, 95)),
        "calibrated": calibration is not None,
        "worst": worst,
        "voxel_mm": voxel,
    }
    if calibration is None:
        notes.append(NOT_MM)
    else:
        times = {level: round(k / calibration.radii["68"], 4) for level, k in calibration.radii.items()}
        summary |= {
            "on": calibration.on,
            "judged": dict(calibration.judged),
            "times": times,
            "patch_mm": calibration.patch_mm,
        }
    disagreement = _disagreement(predictors, content, placed)
    if disagreement:
        notes.append(disagreement)
    summary |= {"disagreement": disagreement, "worth": uncertainty_statement(summary)}
    return UncertaintyMap(mm, spread, axis, summary, tuple(notes))


def _millimetres(
    predictors: Mapping[str, Tensor],
    spread: np.ndarray | None,
    calibration: Calibration | None,
    voxel: float,
    placed: Callable,
) -> np.ndarray:
    """The map itself: calibrated where it can be, else the spread of the runs, else what one run tells."""
    if calibration is not None:
        return placed(calibration.radius(predictors) * voxel)
    if spread is not None:
        return spread
    return placed((predictors["contrast"].square() + predictors["bend"].square()).sqrt() * voxel)


def _disagreement(predictors: Mapping[str, Tensor], content: np.ndarray, placed: Callable) -> str:
    """A sentence when runs or methods contradict each other over much of the content, else ''."""
    for name, who in (("methods", "the methods of the ensemble"), ("jitter", "repeated runs")):
        if name in predictors:
            apart = placed(predictors[name])
            share = 100 * float(np.mean((apart[content] if content.any() else apart) > WILD))
            if share > WILD_PERCENT:
                return (
                    f"{who} disagree wildly: by more than {WILD:g} voxels of the working grid in {share:.0f} % of the "
                    "content; trust none of them before you have looked"
                )
    return ""


def _worst(mm: np.ndarray, grid: Grid, content: np.ndarray) -> list[dict]:
    """Up to five regions of the content where the map is highest."""
    seen = mm[content] if content.any() else mm.ravel()
    threshold = max(float(np.percentile(seen, WORST_PERCENTILE)), WORST_TIMES * float(np.median(seen)))
    found, _ = regions((mm > threshold) & (content if content.any() else True), mm, grid, most=5)
    return [region.plain() for region in found if region.ml >= LEAST_ML]
