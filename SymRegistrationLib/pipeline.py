"""One registration from two volumes to transforms, maps and numbers, in memory: the stream behind all doors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from .fields import FieldPair, warp
from .geometry.grid import Grid
from .geometry.resampling import linear, nearest
from .geometry.transforms import Transform, TransformPair
from .geometry.volumes import Volume, foreground
from .job import INITIALS, InputError, Options, Progress, silent
from .quality import checks
from .quality import metrics as quality
from .quality.schema import Candidate, Evidence, Landmarks, Measured, Similarity, Sliding
from .quality.volume_change import folding_regions
from .registration import alignment, continuing, contrasts, devices, evidence, guide, methods, sliding, working_grid
from .registration.carrying import Carried, carry, carry_again
from .registration.clock import Clock
from .registration.continuing import Continuation, Start
from .registration.extras import Extras
from .registration.solver import Solver
from .registration.state import Finished, State, fingerprint
from .registration.working_grid import Scan

if TYPE_CHECKING:
    from .uncertainty.map import UncertaintyMap


@dataclass(frozen=True, eq=False)
class Result:
    """Everything one registration yields.

    Attributes:
        transforms: forward and inverse in mm, initial alignment included.
        warped_moving: (D, H, W) on the fixed grid.
        warped_fixed: (D, H, W) on the moving grid.
        map_grid: the fixed scan's axes and field of view, as fine as the fixed scan or as the working grid, whichever
            is coarser: finer maps would only repeat the same information.
        jacobian: (D, H, W) on ``map_grid``, determinant of the forward map.
        ice_mm: (D, H, W) on ``map_grid``, inverse consistency error in mm.
        uncertainty: (D, H, W) on the fixed grid, mm, or None: the radius that holds 68 % of the errors when
            it is calibrated.
        maps: further (D, H, W) maps on the fixed grid by name, for ``--maps``.
        state: what is needed to go on from here, or None when it was not asked for.
        linear: whether ``transforms.matrix`` and its inverse are the whole result.
        metrics: the numbers, see :mod:`SymRegistrationLib.quality.schema`.
    """

    fixed: Volume
    moving: Volume
    transforms: TransformPair
    alignment: alignment.Alignment
    warped_moving: np.ndarray
    warped_fixed: np.ndarray
    map_grid: Grid
    jacobian: np.ndarray
    ice_mm: np.ndarray
    metrics: Measured
    uncertainty: np.ndarray | None = None
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    state: State | None = None
    linear: bool = False

    @property
    def grids(self) -> dict[str, Grid]:
        """Where each output lies, by the words of the table of outputs."""
        return {"fixed": self.fixed.grid, "moving": self.moving.grid, "maps": self.map_grid}

    @property
    def forward(self) -> Transform:
        """Fixed point -> moving point."""
        return self.transforms.forward

    @property
    def inverse(self) -> Transform:
        """Moving point -> fixed point."""
        return self.transforms.inverse


def register(
    fixed: Volume, moving: Volume, options: Options = Options(), extras: Extras = Extras(), progress: Progress = silent
) -> Result:
    """Register two volumes symmetrically.

    Args:
        fixed, moving: the scans; they are not changed.
        options: see :class:`~SymRegistrationLib.job.Options`.
        extras: masks, labels, landmarks.
        progress: called as ``progress(stage, fraction of the whole run, message)``.

    Returns:
        :class:`Result`.

    Raises:
        InputError: something about the inputs or options; nothing was computed.
        RegistrationError: the run itself failed.
    """
    device = devices.resolve(options.device)
    with devices.run_settings(device, options.threads, options.seed):
        return _register(fixed, moving, options, extras, Clock(progress), device)


def _register(
    fixed: Volume, moving: Volume, options: Options, extras: Extras, clock: Clock, device: torch.device
) -> Result:
    check_options(options)
    clock.enter("prepare", "normalising intensities")
    notes = [*fixed.notes, *moving.notes]
    extras = extras.completed(fixed, moving, notes)
    scans = _prepared(fixed, moving, extras, device)
    if fixed.grid.same_as(moving.grid) and np.array_equal(fixed.array, moving.array):
        notes.append("fixed and moving are the same image; the result should be the identity")
    clock.enter("align", f"initial alignment: {options.initial}")
    start = Start(extras.start, extras.region, extras.restore)
    steer = guide.steer_by(fixed.grid, moving.grid, scans[1], options, extras.pulling, extras.watch, notes)
    further = contrasts.prepare(extras.fixed_contrasts, extras.moving_contrasts, options, device)
    regions = sliding.find((fixed, moving), extras.sliding, options, device, notes)

    def pose() -> alignment.Alignment:
        return sliding.staying_pose(scans, _pose(scans, options, extras, notes), options)

    volumes = extras.volumes(fixed, moving)
    solver = continuing.solver_for(volumes, scans, options, start, steer, pose, notes, further, regions)
    clock.enter("method", f"method: {options.method}")
    runs = options.extra_runs
    pair = solver.run(lambda stage, f, text: clock.inner(stage, f / (runs + 1), text))
    uncertain = None
    if isinstance(solver, Solver) and (options.uncertainty or options.ensemble):
        from .uncertainty.estimate import estimate_uncertainty

        uncertain = estimate_uncertainty(solver, pair, fixed, clock.inner)
        pair = uncertain.pair
    clock.enter("output", "transforms and maps")
    weighed = evidence.weigh(scans, solver.space, pair, solver.similarity == "mind")
    if weighed.best != evidence.STATES[-1] and isinstance(solver, Solver) and not _asked_for(options):
        if uncertain:
            notes.append("the uncertainty map was of the result that was given up, so there is none")
        pair, uncertain = solver.fall_back(weighed.best), None
    carried, facts = _carried(fixed, moving, pair, solver)
    metrics = _measured(fixed, extras, pair, solver, carried, uncertain.map if uncertain else None, start.told, facts)
    maps = _further_maps(fixed, pair, solver, uncertain.map if uncertain else None) if options.maps else {}
    clock.leave()
    if uncertain:
        clock.move("method", "uncertainty", uncertain.seconds)
    clock.progress("output", 1.0, "done")
    metrics |= {
        "method": options.method,
        "preset": options.preset,
        "similarity_measure": solver.similarity,
        "device": str(device),
        "seed": options.seed,
        "peak_memory_gb": round(devices.peak_memory_gb(), 3),
        "seconds": clock.told(),
        "sliding": cast(Sliding | None, sliding.told(solver.space, pair)),
        "evidence": _evidence_numbers(weighed),
    }
    metrics["verdict"] = checks.conclusion(metrics)
    return Result(
        fixed,
        moving,
        alignment=solver.pose,
        **vars(carried),
        metrics=metrics,
        uncertainty=uncertain.map.mm if uncertain else None,
        maps=maps,
        state=_state(fixed, moving, extras, pair, solver, carried, facts) if extras.keep_state else None,
        linear=(extras.start is None or extras.restore) and bool(methods.pose(options.method)),
    )


def check_options(options: Options) -> None:
    """Refuse before any work: an unknown method, missing weights, an unusable start transform. Raises InputError."""
    if options.initial not in INITIALS:
        alignment.read_linear(options.initial)
    if methods.pose(options.method) and (options.uncertainty or options.landmark_weight or options.drive_labels):
        raise InputError(
            f"{options.method} does not bend, so nothing can pull and no map of uncertainty can be made.",
            "Its confidence is among the numbers of the alignment; for the rest choose another method.",
        )
    if any(methods.pose(name) for name in (options.method, *options.others)) and options.ensemble:
        raise InputError("linear methods cannot be part of an ensemble.", "Name methods that bend.")
    for name in (options.method, *options.others):
        if methods.is_learned(name):
            from .registration import inference

            own = options if name == options.method else replace(options, weights=None, method_options={})
            inference.load_network(name, own)  # it is kept, so the run itself does not load it again


def _prepared(fixed: Volume, moving: Volume, extras: Extras, device: torch.device) -> tuple[Scan, Scan]:
    """Both scans ready for computing; those of the start where they are still in memory."""
    masks = extras.fixed_mask, extras.moving_mask
    before = extras.start.finished if extras.start else None
    known = before.prepared((fixed, moving), masks, device) if before else None
    return known or (working_grid.prepare(fixed, masks[0], device), working_grid.prepare(moving, masks[1], device))


def _carried(
    fixed: Volume, moving: Volume, pair: FieldPair, solver: Solver | Continuation
) -> tuple[Carried, dict[str, Any]]:
    """The result on the scans' own grids, and what is known from before of facts that do not change; where the result
    before is in memory, only what changed is made again."""
    known = solver.known if isinstance(solver, Continuation) else None
    if known is None:
        return carry(fixed, moving, pair, solver.space), {}
    if pair is known.pair:
        return known.carried, dict(known.facts)
    return carry_again(known.carried, fixed, moving, pair, solver.space), dict(known.facts)


def _state(
    fixed: Volume,
    moving: Volume,
    extras: Extras,
    pair: FieldPair,
    solver: Solver | Continuation,
    carried: Carried,
    facts: dict[str, Any],
) -> State:
    inputs, volumes = solver.state.inputs if isinstance(solver, Continuation) else (), extras.volumes(fixed, moving)
    if len(inputs) < len(volumes):
        inputs = tuple(map(fingerprint, volumes))
    finished = None
    if "inverses" in pair.details:
        masks = extras.fixed_mask, extras.moving_mask
        finished = Finished((fixed, moving), masks, solver.scans, solver.space, pair, carried, facts)
    return replace(State.of(pair, solver.space, solver.pose, solver.similarity, inputs), finished=finished)


def _asked_for(options: Options) -> bool:
    """Whether the user's own knowledge made the result, which the images alone must not overrule."""
    return bool(options.landmark_weight or options.drive_labels or methods.pose(options.method))


def _pose(
    scans: tuple[working_grid.Scan, working_grid.Scan], options: Options, extras: Extras, notes: list[str]
) -> alignment.Alignment:
    """The initial alignment; doubts about it go into ``notes``."""
    measure = "mi" if options.similarity in ("mi", "mind") else "auto"
    kind, near = options.initial, None
    if linear := methods.pose(options.method):  # a start that is not searched for is where the search goes on
        if kind not in ("rigid", "affine"):
            near = alignment.align(*scans, kind).matrix
        kind = linear
    guides = extras.guides
    if guides is not None and not linear and kind not in INITIALS:
        guides = None
        notes.append("the start transform was taken; the landmarks were measured but did not guide the alignment")
    pose = alignment.align(*scans, kind, measure, options.seed, guides, near)
    if pose.unsure:
        notes.append(
            f"the initial alignment is unsure (confidence {pose.confidence:.2f}): another pose fits nearly as "
            "well; check the result, or give landmarks or a start transform"
        )
    return pose


def _measured(
    fixed: Volume,
    extras: Extras,
    pair: FieldPair,
    solver: Solver | Continuation,
    carried: Carried,
    uncertain: UncertaintyMap | None,
    step: dict[str, Any],
    facts: dict[str, Any],
) -> Measured:
    """What the result says of itself, and what labels and landmarks say of it.

    Args:
        step: where it went on from, for metrics.json.
        facts: what a continuation does not change; what is missing is measured and put in.
    """
    pose, notes = solver.pose, solver.notes
    jacobian, grid, physical = carried.jacobian, carried.map_grid, carried.transforms
    if "content" not in facts:
        facts["content"] = nearest(foreground(fixed.array), fixed.grid, grid)
    content = facts["content"]
    sound: Any = {
        **quality.jacobian_summary(jacobian, content),
        **quality.ice_summary(carried.ice_mm, content, float(np.mean(fixed.grid.spacing))),
        "inverse_method": pair.inverse_method,
        "residual_voxel": float(pair.residual),
    }
    if sound["folded_voxels"]:
        notes.append(f"{sound['folded_voxels']} voxels are folded (Jacobian determinant <= 0); see jacobian.nii.gz")
    if uncertain is not None:
        notes += uncertain.notes
    metrics: Measured = {
        "alignment": {
            "kind": pose.kind,
            "confidence": round(pose.confidence, 4),
            "unsure": pose.unsure,
            "similarity": _number(pose.similarity),
            "measure": pose.measure,
            "likeness": _number(pose.likeness),
            "mirrored_gain": _number(pose.mirrored_gain),
            "matrix": pose.matrix.tolist(),
            "candidates": [cast(Candidate, one.told()) for one in pose.candidates],
            "reasons": list(pose.reasons),
        },
        "quality": sound,
        "similarity": _similarities(solver, pair, facts),
        "uncertainty": None if uncertain is None else uncertain.summary,
        "notes": notes,
        "folding": folding_regions(jacobian, grid),
        "labels": _labels(extras, physical),
        "landmarks": _landmarks(extras, physical, fixed.grid, uncertain),
        "steering": guide.outcome(extras.pulling, solver.options, physical.forward, step, notes),
    }
    if extras.fixed_labels is not None:
        from .uncertainty.estimate import label_volumes

        metrics["volumes"] = label_volumes(
            extras.fixed_labels, linear(jacobian, grid, fixed.grid), fixed.grid, uncertain
        )
    return metrics


def _further_maps(
    fixed: Volume, pair: FieldPair, solver: Solver | Continuation, uncertain: UncertaintyMap | None
) -> dict[str, np.ndarray]:
    """What ``--maps`` adds: spread of the runs, contrast and Jacobian from coarse to fine."""
    from .uncertainty.estimate import coarse_to_fine

    return {**(uncertain.maps if uncertain else {}), **coarse_to_fine(solver.space, pair, fixed.grid)}


def _similarities(solver: Solver | Continuation, pair: FieldPair, facts: dict[str, Any]) -> Similarity:
    """Local correlation before anything, after the alignment, after the method, all on working-type grids."""
    space = solver.space
    after = quality.similarity(space.fixed, warp(space.moving, pair.fixed_to_moving))
    if "similarity" in facts:
        return cast(Similarity, {**facts["similarity"], "after": after})
    # Behind a network that found the pose itself, aligned means at the affine part of what it found, as for labels.
    aligned = quality.similarity(space.fixed, space.moving)
    try:
        layout = working_grid.Layout(float(space.grid.spacing[0]))
        raw = working_grid.working_pair(*solver.scans, np.eye(4), np.eye(4), layout)
        before = quality.similarity(raw.fixed, raw.moving)
    except InputError:  # as scanned, the two do not even overlap
        before = 0.0
    facts["similarity"] = {"name": "lncc", "before": before, "aligned": aligned}
    return {"name": "lncc", "before": before, "aligned": aligned, "after": after}


def _labels(extras: Extras, physical: TransformPair) -> Any:
    if extras.fixed_labels is None or extras.moving_labels is None:
        return None
    tables = {
        name: quality.label_overlap(extras.fixed_labels, extras.moving_labels, through)
        for name, through in (("before", np.eye(4)), ("aligned", physical.matrix), ("after", physical.forward))
    }
    labels = sorted(set().union(*tables.values()))
    return {
        **{f"mean_{name}": quality.mean(table) for name, table in tables.items()},
        "per_label": {str(n): {name: table.get(n, 0.0) for name, table in tables.items()} for n in labels},
    }


def _landmarks(
    extras: Extras, physical: TransformPair, grid: Grid, uncertain: UncertaintyMap | None
) -> Landmarks | None:
    if extras.fixed_points is None or extras.moving_points is None:
        return None
    points = extras.fixed_points.points, extras.moving_points.points
    before, aligned, after = (
        quality.target_registration_error(t, *points) for t in (np.eye(4), physical.matrix, physical.forward)
    )
    return {
        "count": len(after),
        "mean_before_mm": float(before.mean()),
        "mean_aligned_mm": float(aligned.mean()),
        "mean_after_mm": float(after.mean()),
        "p95_after_mm": float(np.percentile(after, 95)),
        "labels": list(extras.fixed_points.labels),
        "before_mm": before.tolist(),
        "after_mm": after.tolist(),
        "radius_mm": uncertain.radii(points[0], grid) if uncertain else None,
    }


def _evidence_numbers(weighed: evidence.Evidence) -> Evidence:
    """The evidence for metrics.json."""
    values = {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(weighed).items()}
    values["delivered"] = values.pop("best")
    return cast(Evidence, values)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)
