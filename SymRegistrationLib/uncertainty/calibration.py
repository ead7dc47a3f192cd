"""From predictors of uncertainty to millimetres that can be believed, and how well they can.

A calibrated radius is a few numbers, fitted where the true error is known and stored in ``calibration.json``
(for learned methods in ``NAME.calibration.json`` beside the weights)::

    s^2 = floor^2 + sum over predictors of (weight * predictor)^2    radius at 68 % = s * radii["68"] * voxel size

Predictors are lengths in voxels of the working grid (see :mod:`SymRegistrationLib.uncertainty.predictors`), so one
entry serves all spacings. Every weight is at least 0: more of a predictor never means less uncertainty. The weights
maximise the likelihood of the errors as lengths of 3-D normal vectors of variance s^2 / 3 an axis; the three radii are
then plain quantiles of error / s, because real errors have longer tails (mathematics.md, 16.3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..job import FORMER_NAMES, InputError

STORE = Path(__file__).parent / "calibration.json"
LEVELS = (50, 68, 95)
#: The preset of an entry that serves all of them: a learned method without refinement does the same under each.
ANY_PRESET = "any"
#: Steps of the sparsification curve: shares of the points that are left out, most uncertain first.
SHARES = np.arange(0, 1, 0.02)


@dataclass(frozen=True)
class Calibration:
    """What turns predictors into radii for one method and preset.

    Attributes:
        method, preset, similarity: what it was fitted for; a run with others is not calibrated by it. The preset
            :data:`ANY_PRESET` fits all.
        kind: ``runs`` (perturbed runs were made) or ``fast`` (predictors of the single run only).
        floor: voxels.
        weights: per predictor, at least 0.
        radii: per level ("50", "68", "95") the factor from s to the radius that holds so many percent of the errors.
        on: what it was fitted on, for people.
        judged: what it was judged on and what came out there.
        refine: optimiser levels after a network.
        patch_mm: distance over which errors go together; for the confidence of volumes. 0 = not known.
        sha256: of the weights whose errors it tells, "" for a method without weights.
    """

    method: str
    preset: str
    similarity: str
    kind: str
    floor: float
    weights: Mapping[str, float]
    radii: Mapping[str, float]
    on: str
    judged: Mapping[str, object] = field(default_factory=dict)
    refine: int = 0
    patch_mm: float = 0.0
    sha256: str = ""

    def scale(self, predictors: Mapping[str, Any]) -> Any:
        """s in voxels, of the predictors' own type and shape. A predictor that is missing raises KeyError."""
        squared = sum((weight * predictors[name]) ** 2 for name, weight in self.weights.items())
        return (squared + self.floor**2) ** 0.5

    def radius(self, predictors: Mapping[str, Any], level: int = 68) -> Any:
        """Radius in voxels that holds ``level`` percent (50, 68 or 95) of the true errors."""
        return self.scale(predictors) * self.radii[str(level)]

    def fits(self, method: str, preset: str, similarity: str, kind: str, refine: int) -> bool:
        """Whether it was fitted for such runs."""
        ours = (self.method, self.similarity, self.kind, self.refine)
        return ours == (method, similarity, kind, refine) and self.preset in (preset, ANY_PRESET)


def read_calibrations(path: Path = STORE) -> list[Calibration]:
    """All entries of a file. Raises InputError when it is not one."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["entries"]
        return [Calibration(**{FORMER_NAMES.get(name, name): v for name, v in entry.items()}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"calibration file '{path}' cannot be read ({error}).", "Reinstall, or fit it again."
        ) from None


def write_calibrations(entries: list[Calibration], path: Path = STORE) -> None:
    """Write entries as :func:`read_calibrations` reads them."""
    text = json.dumps({"schema": 1, "entries": [asdict(entry) for entry in entries]}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


@lru_cache(maxsize=8)
def _read(path: Path, stamp: int) -> tuple[Calibration, ...]:
    return tuple(read_calibrations(path))


def beside(weights: Path) -> Path:
    """Where the calibration of a weights file lies."""
    return Path(weights).with_suffix(".calibration.json")


def find(
    method: str, preset: str, similarity: str, kind: str, refine: int = 0, weights: Path | None = None, sha256: str = ""
) -> Calibration | None:
    """The calibration of such runs: from beside the weights for a learned method, else from the package; ``None`` =
    there is none.

    Args:
        method, preset, similarity, kind, refine: see :class:`Calibration`.
        weights: the weights file of a learned method.
        sha256: of that file, as its model card says. An entry that was fitted with other weights is no calibration, and
            without a card (``""``) there is none.
    """
    path = STORE if weights is None else beside(weights)
    if not path.is_file() or (weights is not None and not sha256):
        return None
    fitting = (
        entry for entry in _read(path, path.stat().st_mtime_ns) if entry.fits(method, preset, similarity, kind, refine)
    )
    return next((entry for entry in fitting if entry.sha256 == sha256), None)


# ---------------------------------------------------------------------------------------------- fitting


def fit(
    predictors: Mapping[str, np.ndarray], errors: np.ndarray, steps: int = 400
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Floor, weights and radii from points whose true error is known.

    Args:
        predictors: name -> (n,) voxels, at least 0.
        errors: (n,) voxels, at least 0.
        steps: of the maximisation.

    Returns:
        (floor, weights, radii) of a :class:`Calibration`; predictors of no use get the weight 0.

    Raises:
        ValueError: fewer than 100 points, or values that are not finite.
    """
    names = list(predictors)
    columns = (
        torch.from_numpy(np.stack([np.asarray(predictors[name], float) for name in names] or [0 * errors], 1)) ** 2
    )
    squared = torch.from_numpy(np.asarray(errors, float)) ** 2
    if len(squared) < 100 or not (torch.isfinite(columns).all() and torch.isfinite(squared).all()):
        raise ValueError("a calibration needs at least 100 points with finite values")
    typical = columns.mean(0).clamp_min(1e-12)
    # exp keeps every share positive; the start gives each predictor an equal part of the mean squared error.
    logs = torch.full(
        (len(names) + 1,),
        float((squared.mean() / (len(names) + 1)).clamp_min(1e-12).log()),
        dtype=torch.float64,
        requires_grad=True,
    )
    optimiser = torch.optim.Adam([logs], 0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        shares = logs.exp()
        variance = (shares[0] + columns @ (shares[1:] / typical)) / 3 + 1e-9
        (1.5 * variance.log() + squared / (2 * variance)).mean().backward()
        optimiser.step()
    shares = logs.detach().exp()
    kept = shares[1:] > 1e-3 * float(squared.mean())
    weights = {name: float((shares[k + 1] / typical[k]).sqrt()) if kept[k] else 0.0 for k, name in enumerate(names)}
    floor = float(shares[0].sqrt())
    draft = Calibration("", "", "", "", floor, weights, {}, "")
    ratio = np.asarray(errors, float) / np.maximum(
        draft.scale({name: np.asarray(predictors[name], float) for name in names}), 1e-9
    )
    return floor, weights, {str(level): float(np.percentile(ratio, level)) for level in LEVELS}


# ---------------------------------------------------------------------------------------------- judging


def coverage(errors: np.ndarray, radii: np.ndarray) -> float:
    """Percent of the errors that lie within their radius."""
    return float(100 * (np.asarray(errors) <= np.asarray(radii)).mean())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing their mean rank; nan when one of them is constant."""
    ranks: list[np.ndarray] = []
    for values in (a, b):
        _, where, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where.ravel()])
    if min(r.std() for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def sparsification(errors: np.ndarray, order_by: np.ndarray) -> np.ndarray:
    """Mean error of what is left when the :data:`SHARES` of highest ``order_by`` are left out, in units of the
    mean of all."""
    errors = np.asarray(errors, float)
    ordered = errors[np.argsort(np.asarray(order_by, float), kind="stable")]
    means = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    left = np.maximum(1, np.round(len(ordered) * (1 - SHARES)).astype(int))
    return means[left - 1] / max(errors.mean(), 1e-12)


def ause(errors: np.ndarray, uncertainty: np.ndarray) -> float:
    """Area between the sparsification curves of an uncertainty and of the errors themselves (Ilg et al., ECCV 2018); 0
    = perfect."""
    return float((sparsification(errors, uncertainty) - sparsification(errors, errors)).mean())
