"""The uncertainty map that a user gets: signs put together, in mm on the fixed scan, with words on what it is worth.

Level 5, beside :mod:`uncertainty`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import Calibration
from .fields import sample
from .geometry import Grid
from .preprocess import Workspace, affine_grid
from .regions import regions
from .report_numbers import worth
from .uncertainty import Runs

#: Runs (or methods) are said to disagree wildly when this many percent of the content move by more than :data:`WILD` voxels.
WILD_PERCENT, WILD = 10, 3.0
#: Regions of the highest uncertainty: above this percentile of the content and above twice its median.
WORST_PERCENTILE, WORST_TIMES = 97.0, 1.5
#: A region smaller than this (ml) is not listed among the worst.
LEAST_ML = 0.2
NOT_MM = "the uncertainty map is relative: it shows where the result is less stable, not by how many mm it errs"


@dataclass(frozen=True, eq=False)
class UncertaintyMap:
    """The answer to "how far off may it be, here?".

    Attributes:
        mm: (D, H, W) float32 on the fixed grid. Calibrated: the radius that holds 68 % of the true errors; otherwise relative.
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


def uncertainty_map(signs: Mapping[str, Tensor], runs: Runs | None, space: Workspace, grid: Grid, content: np.ndarray,
                    calibration: Calibration | None) -> UncertaintyMap:
    """Put the signs of one registration together.

    Args:
        signs: (D, H, W) voxels of the working grid, from the single run and, when there were some, the perturbed runs.
        runs: the perturbed runs; ``None`` = fast mode.
        space: the working grid's place.
        grid: where the map is wanted, the fixed scan's.
        content: (D, H, W) bool on ``grid``, where the scan shows something; for the numbers.
        calibration: what makes mm of it; ``None`` = relative.
    """
    linear = (space.mid_to_moving @ space.grid.matrix)[:3, :3]
    voxel = float(abs(np.linalg.det(linear)) ** (1 / 3))

    def placed(values: Tensor) -> np.ndarray:
        matrix = space.grid.inverse @ np.linalg.inv(space.mid_to_fixed) @ grid.matrix
        return sample(values[None, None], affine_grid(grid.shape, matrix, values[None, None]))[0, 0].cpu().numpy()

    spread = placed(runs.spread.length(linear)) if runs else None
    axis = placed(runs.spread.largest_axis(linear)) if runs else None
    if calibration is not None:
        mm = placed(calibration.radius(signs) * voxel)
    elif spread is not None:
        mm = spread
    else:
        mm = placed((signs["contrast"].square() + signs["bend"].square()).sqrt() * voxel)
    seen = mm[content] if content.any() else mm.ravel()
    worst, notes = _worst(mm, grid, content), []
    summary = {"kind": "runs" if runs else "fast", "runs": runs.spread.count - 1 if runs else 0, "level": 68 if calibration else None,
               "mean_mm": float(seen.mean()), "median_mm": float(np.median(seen)), "p95_mm": float(np.percentile(seen, 95)),
               "calibrated": calibration is not None, "worst": worst, "voxel_mm": voxel}
    if calibration is None:
        notes.append(NOT_MM)
    else:
        times = {level: round(k / calibration.radii["68"], 4) for level, k in calibration.radii.items()}
        summary |= {"on": calibration.on, "judged": dict(calibration.judged), "times": times, "patch_mm": calibration.patch_mm}
    disagreement = _disagreement(signs, content, placed)
    if disagreement:
        notes.append(disagreement)
    summary |= {"disagreement": disagreement, "worth": worth(summary)}
    return UncertaintyMap(mm, spread, axis, summary, tuple(notes))


def _disagreement(signs: Mapping[str, Tensor], content: np.ndarray, placed) -> str:
    """A sentence when runs or methods contradict each other over much of the content, else ''."""
    for name, who in (("methods", "the methods of the ensemble"), ("jitter", "repeated runs")):
        if name in signs:
            apart = placed(signs[name])
            share = 100 * float(np.mean((apart[content] if content.any() else apart) > WILD))
            if share > WILD_PERCENT:
                return (f"{who} disagree wildly: by more than {WILD:g} voxels of the working grid in {share:.0f} % of the content; "
                        "trust none of them before you have looked")
    return ""


def _worst(mm: np.ndarray, grid: Grid, content: np.ndarray) -> list[dict]:
    """Up to five regions of the content where the map is highest."""
    seen = mm[content] if content.any() else mm.ravel()
    threshold = max(float(np.percentile(seen, WORST_PERCENTILE)), WORST_TIMES * float(np.median(seen)))
    found, _ = regions((mm > threshold) & (content if content.any() else True), mm, grid, most=5)
    return [region.plain() for region in found if region.ml >= LEAST_ML]


@contextmanager
def dropout_at_work(network: nn.Module, seed: int) -> Iterator[bool]:
    """Let the dropout layers of a network drop although it is in evaluation mode (Gal and Ghahramani, ICML 2016).

    Yields:
        Whether it has any that drop something.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]

    def drop(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        share = 1 - module.p
        wide = output.dim() - 2 if not isinstance(module, nn.Dropout) else 0
        shape = output.shape[: output.dim() - wide] + (1,) * wide
        return output * (torch.rand(shape, generator=random).to(output) < share) / share

    random = torch.Generator().manual_seed(seed)
    handles = [layer.register_forward_hook(drop) for layer in layers]
    try:
        yield bool(layers)
    finally:
        for handle in handles:
            handle.remove()
