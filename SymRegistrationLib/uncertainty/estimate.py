"""The part of a registration that asks how far its result can be trusted; runs only when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..fields import FieldPair, gaussian, jacobian_determinant, resize, resize_field, sample, warp
from ..geometry.grid import Grid
from ..geometry.lattice import affine_grid
from ..geometry.volumes import Volume, foreground, labels_on_grid
from ..job import Progress
from ..quality.volume_change import volume_changes
from ..registration import working_grid
from ..registration.sliding import surface_shear
from ..registration.solver import Solver
from ..registration.working_grid import WorkingPair
from . import calibration
from .map import UncertaintyMap, uncertainty_map
from .predictors import LogMean, Runs, contrast_predictor, perturbations, single_run_predictors, with_low_contrast

#: Coarse-to-fine maps: factor of each level, coarsest first.
SCALES = (4, 2, 1)


@dataclass(frozen=True, eq=False)
class UncertaintyEstimate:
    """What came of it: the delivered pair (another one when the mean was asked for), the map, and what it cost."""

    pair: FieldPair
    map: UncertaintyMap
    seconds: float


def estimate_uncertainty(solver: Solver, pair: FieldPair, fixed: Volume, progress: Progress) -> UncertaintyEstimate:
    """The uncertainty map of a result, from perturbed runs, further methods, or the single run alone.

    Args:
        solver: of the pipeline, which made ``pair``; ``run(perturbation=...)`` repeats it.
        pair: the delivered result.
        fixed: the fixed scan.
        progress: told before every run.
    """
    started, options = time.perf_counter(), solver.options
    mean = LogMean() if options.average else None
    runs = Runs(pair.fixed_to_moving[0]) if options.extra_runs else None
    if mean:
        mean.add(pair)
    for k, (kind, solve) in enumerate(_solves(solver)):
        progress("uncertainty", (k + 1) / (options.extra_runs + 1), f"run {k + 1} of {options.extra_runs}")
        found = solve()
        runs.add(found.fixed_to_moving[0], kind)
        if mean:
            mean.add(found)
    predictors = single_run_predictors(solver.space, pair)
    if runs:
        predictors |= runs.predictors()
    predictors = with_low_contrast(predictors)
    kind = "runs" if isinstance(options.uncertainty, int) and options.uncertainty else "fast"
    content = foreground(fixed.array)
    # Neither a mean of runs, nor what slides or was kept smooth, errs as the single results that the calibrations were
    # fitted on.
    other = options.average or solver.smooth or solver.space.regions is not None
    other = other or (kind == "fast" and options.uncertainty != "fast")
    known = None if other else _calibration(solver, kind)
    shear = surface_shear(solver.space, pair)
    found = uncertainty_map(predictors, runs, solver.space, fixed.grid, content, known, shear)
    return UncertaintyEstimate(mean.pair() if mean else pair, found, time.perf_counter() - started)


def _solves(solver: Solver) -> Iterator[tuple[str, Callable]]:
    """(kind, function that runs) of every further run."""
    for name in solver.options.others:
        yield "methods", lambda name=name: _other_method(solver, name)
    count = solver.options.uncertainty
    for change in perturbations(0 if isinstance(count, str) else count, solver.options.seed):
        kind = "stiff" if change.stiffness > 1 else "jitter"
        yield kind, lambda change=change: solver.run(perturbation=change)


def _other_method(solver: Solver, name: str) -> FieldPair:
    other = solver.other(name)
    return working_grid.to_working_grid(other.run(), other.space, solver.space)


def _calibration(solver: Solver, kind: str) -> calibration.Calibration | None:
    options, path, sha256 = solver.options, None, ""
    if solver.learned:
        from ..registration import weights

        path = weights.find(options.method, options.weights, options.method_options.get("size"))
        sha256 = weights.read_card(path).get("sha256", "")
    return calibration.find(options.method, options.preset, solver.similarity, kind, options.refine, path, sha256)


# ---------------------------------------------------------------------------------------------- maps and volumes


def coarse_to_fine(space: WorkingPair, pair: FieldPair, grid: Grid) -> dict[str, np.ndarray]:
    """How sure the images are of the result, and what it does to volumes, seen at several scales.

    Returns:
        ``appearance_4``, ``_2``, ``_1`` (mm that a point could move unnoticed at that scale, see
        :func:`contrast_predictor`) and ``log_jacobian_4``, ``_2``, ``_1`` (natural logarithm of the determinant of the
        deformation without the alignment, at that scale; 0 = no change); (D, H, W) float32 on ``grid``.
    """
    shape = space.fixed.shape[2:]
    voxel = float(space.grid.spacing[0])
    matrix = space.grid.inverse @ np.linalg.inv(space.mid_to_fixed) @ grid.matrix
    maps = {}
    for factor in SCALES:
        level = [max(min(n, 8), round((n - 1) / factor) + 1) for n in shape]
        sigma = 0.5 * max(factor**2 - 1, 0) ** 0.5
        fixed, moving, u = (
            gaussian(x, sigma) if sigma else x for x in (space.fixed, space.moving, pair.fixed_to_moving)
        )
        fixed, moving, u = resize(fixed, level), resize(moving, level), resize_field(u, level)
        for name, values in (
            ("appearance", contrast_predictor(fixed, warp(moving, u))[None, None] * voxel * factor),
            ("log_jacobian", jacobian_determinant(u).clamp_min(1e-3).log()),
        ):
            values = resize(values, shape)
            maps[f"{name}_{factor}"] = sample(values, affine_grid(grid.shape, matrix, values))[0, 0].cpu().numpy()
    return maps


def label_volumes(labels: Volume, jacobian: np.ndarray, grid: Grid, found: UncertaintyMap | None) -> dict:
    """Volume change per fixed label, with its confidence where the map is calibrated; see :func:`volume_changes`.

    Args:
        labels: on any grid.
        jacobian: (D, H, W) on ``grid``, the fixed scan's.
        found: the uncertainty map on ``grid``, or None.
    """
    array = labels.array if labels.grid.same_as(grid) else labels_on_grid(labels, grid)
    calibrated = found is not None and found.summary.get("calibrated")
    patch = found.summary.get("patch_mm", 0.0) if found is not None else 0.0
    return volume_changes(array, jacobian, grid, found.mm if calibrated else None, patch)
