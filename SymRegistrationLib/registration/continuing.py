"""Going on from a finished result: an update of the whole, or a repair of one region, without starting again.

What is optimised is a correction composed onto the finished half-way fields, so their detail is kept, and it is zero
where nothing shall change. Both work on a box: an update around the landmarks and labels it answers to, a repair around
its region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fields import FieldPair, gaussian, identity, jacobian_determinant, resize, warp
from ..geometry.grid import Grid
from ..geometry.volumes import Volume
from ..job import InputError, Options, Progress, silent
from ..losses import lncc_map, mind
from . import contrasts, memory, optimisers, sliding, working_grid
from .alignment import Alignment
from .evidence import detail_is_noise
from .guide import Region, window
from .optimisers import syn
from .presets import presets
from .schedule import Schedule, schedule_for
from .solver import Solver
from .state import State
from .steering import LabelChannels, LandmarkPairs, Observer, Steering, pulled_back
from .working_grid import Scan, WorkingPair

#: Most steps per level of an update, coarse to fine; without landmarks the coarsest level is left out.
UPDATE_STEPS = (10, 12, 6)
#: An update may change everything within so many voxels of a landmark, and less up to twice as far.
LANDMARK_REACH = 14.0
#: Standard deviation, voxels, by which the places that an update may change reach beyond its labels.
LABEL_REACH = 3.0
#: Voxels around the window that a repair sees, so that windows of the similarity are complete.
CONTEXT = 8
#: Local similarity that a repair may cost; more, and it starts from what was there.
CLEARLY_WORSE = 0.02
#: A change within more than this share of the grid makes everything anew.
MOST_AGAIN = 0.6


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins: at the alignment, or from a finished registration of the same two scans.

    Attributes:
        state: of that registration.
        region: with ``state``: only there the registration runs again.
        restore: with ``state``: deliver it as it is.
    """

    state: State | None = None
    region: Region | None = None
    restore: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        if self.state is None or self.restore:
            return {}
        return {"from": "repair", "rim_mm": self.region.rim_mm} if self.region else {"from": "update"}


def solver_for(
    volumes: Sequence[Volume],
    scans: tuple[Scan, Scan],
    options: Options,
    start: Start,
    steer: Callable[[WorkingPair], Steering] | None,
    pose: Callable[[], Alignment],
    notes: list[str],
    further: Sequence[tuple[Scan, Scan]] = (),
    regions: tuple[sliding.Regions, sliding.Regions] | None = None,
) -> Solver | Continuation:
    """Who computes the fields, and from where.

    Args:
        volumes: all that is looked at: the fixed and the moving scan, then further contrasts pair by pair.
        scans: fixed and moving, prepared.
        steer: gives what steers on a working pair.
        pose: makes the initial alignment; called only where the run begins there.
        notes: gets what was done other than asked, in words.
        further: scans of further contrasts, pair by pair.
        regions: what slides in the two scans.

    Raises:
        InputError: other scans than those of the start, or options that do not go with where the run begins.
    """
    if start.state is None:
        solver = Solver(scans, pose(), options, notes, further, regions)
        if solver.learned and not options.refine and (options.landmark_weight or options.drive_labels):
            raise InputError(
                f"landmarks and labels cannot pull the network {options.method} itself.",
                "Add --refine 2, so that the optimiser lets them.",
            )
        solver.steer = steer
        return solver
    start.state.check_inputs(*volumes)
    if options.uncertainty or options.ensemble:
        raise InputError(
            "going on from a finished registration makes no uncertainty map.", "Leave --uncertainty and --ensemble out."
        )
    if not (start.restore or start.region or bool(start.state.halves.any())):  # only aligned so far
        solver = Solver(scans, start.state.pose, options, notes, further, regions)
        solver.steer = steer
        return solver
    return Continuation(
        scans, start.state, options, notes, volumes[0].grid, start.region, steer, start.restore, further, regions
    )


@dataclass
class Continuation:
    """One finished registration of two scans, to go on from; stands in the place of a solver.

    Attributes:
        scans, options, notes, further: as a :class:`.solver.Solver` takes them.
        state: where to start.
        fixed: grid of the fixed scan.
        region: where a repair may work; None = the whole is updated.
        steer: gives the landmarks, labels and observer on a working pair.
        restore: deliver the state as it is.
        regions: what slides in the two scans.
        known: what is still in memory of the state's registration, on the same prepared scans; else None.
        space: the working pair of the state.
        similarity: what is maximised.
    """

    scans: tuple[Scan, Scan]
    state: State
    options: Options
    notes: list[str]
    fixed: Grid
    region: Region | None = None
    steer: Callable[[WorkingPair], Steering] | None = None
    restore: bool = False
    further: Sequence[tuple[Scan, Scan]] = ()
    regions: tuple[sliding.Regions, sliding.Regions] | None = None

    def __post_init__(self) -> None:
        self.pose, self.learned = self.state.pose, False
        self.preset = presets()[self.options.preset]
        grid = self.state.grid
        if self.options.spacing and self.options.spacing < 0.99 * float(grid.spacing[0]):
            factor = float(grid.spacing[0]) / self.options.spacing
            shape = [int(np.ceil((n - 1) * factor)) + 1 for n in grid.shape]
            self._check_room(self.options.spacing, float(np.prod(shape)))
            self.state = self.state.on(shape)
            grid = self.state.grid
        finished = self.state.finished
        one = not self.further and (finished is None or not finished.space.contrasts)
        kept = finished is not None and finished.scans == self.scans and one
        self.known = finished if kept else None
        if self.known is not None:
            self.space, self.halves = self.known.space, self.known.pair.details["halves"]
        else:
            space = working_grid.pair_on(grid, *self.scans, self.pose.mid_to_fixed, self.pose.mid_to_moving)
            self.space = contrasts.beside(space, self.further, self.options)
            self.halves = self.state.halves.to(self.space.fixed.device)
        self.space = sliding.with_regions(self.space, self.regions)
        asked = self.options.similarity
        self.similarity = self.state.similarity if asked == "auto" else "mind" if asked == "mi" else asked
        if self.similarity not in optimisers.card(optimisers.REFINER).similarities:  # a network without refinement
            self.similarity = "lncc"

    def _check_room(self, spacing: float, voxels: float) -> None:
        available = memory.room(self.scans[0].image.device, self.options.memory_gb)
        memory.check_spacing(spacing, voxels, optimisers.card(optimisers.REFINER).bytes_per_voxel, available)

    def run(self, progress: Progress = silent) -> FieldPair:
        """Update or repair; both directions in voxels of the working grid. Raises InputError for a bad region."""
        if self.restore:
            return syn.compose_halves(self.halves) if self.known is None else self.known.pair
        steering = Steering(self.space.grid.shape) if self.steer is None else self.steer(self.space)
        parts = steering.landmarks, steering.labels, steering.observer, progress
        if self.region is None:
            return self.update(*parts)
        return self.repair(window(self.region, self.fixed, self.space, self.halves), *parts)

    def update(
        self,
        landmarks: LandmarkPairs | None,
        labels: LabelChannels | None,
        observer: Observer | None = None,
        progress: Progress = silent,
    ) -> FieldPair:
        """What is around landmarks and labels answers to them, and keeps to the images. Without either, all goes on.

        Returns:
            Both directions in voxels of the working grid.
        """
        inside = influence(self.halves, landmarks, labels)
        shrink, steps = ((4, 2, 1), UPDATE_STEPS) if landmarks is not None else ((2, 1), UPDATE_STEPS[1:])
        halves = self._within(inside, self.halves, shrink, steps, (landmarks, labels, observer), progress)
        return self._joined(halves, inside)

    def repair(
        self,
        inside: Tensor,
        landmarks: LandmarkPairs | None,
        labels: LabelChannels | None,
        observer: Observer | None = None,
        progress: Progress = silent,
    ) -> FieldPair:
        """Only where ``inside`` (1, 1, D, H, W), see :func:`guide.window`, is above 0 the fields change.

        The region starts from a smooth continuation of what is around it, since what was there is to be mended: from a
        local warp of 8 mm itself, the optimiser came back in one of three places only. When the result is less alike
        than what was there, the region starts again from that.
        """
        box, _ = _box(inside, CONTEXT)
        whole = Schedule.of(self.preset)
        smallest = min(inside[box].shape[2:])
        kept = [k for k, factor in enumerate(whole.shrink) if factor == 1 or smallest / factor >= 10]
        shrink, steps = [whole.shrink[k] for k in kept], [whole.iterations[k] for k in kept]
        steered = landmarks, labels, observer
        images = self.space.fixed[box], self.space.moving[box]
        before = self._alike(images, self.halves[box], inside[box])
        start = self.halves.clone()
        start[box] = _filled(start[box], inside[box])
        halves = self._within(inside, start, shrink, steps, steered, progress)
        if self._alike(images, halves[box], inside[box]) < before - CLEARLY_WORSE:
            self.notes.append("the region became less alike when it started anew, so it started from what was there")
            halves = self._within(inside, self.halves, shrink, steps, steered, progress)
        return self._joined(halves, inside)

    def _joined(self, halves: Tensor, inside: Tensor) -> FieldPair:
        """Both directions; where the result before is in memory, only what its change inside touches is composed
        again."""
        box = _box(inside, 0)[0]
        if self.known is None or inside[box].numel() > MOST_AGAIN * inside.numel():
            return syn.compose_halves(halves)
        return syn.recompose_halves(halves, self.known.pair, box[1:])

    def _within(
        self, inside: Tensor, base: Tensor, shrink: Sequence[float], steps: Sequence[int], steered: tuple, progress
    ) -> Tensor:
        """Half-way fields with a correction of ``base`` where ``inside`` is above 0, optimised on the box around
        that."""
        box, start = _box(inside, CONTEXT)
        space, crop = self.space, _Crop(box, start)
        pulled = steered[0] is not None or steered[1] is not None
        smooth = self.similarity == "lncc" and not pulled and detail_is_noise(space, self.halves)
        kind = self.similarity, self.pose.one_patient, space.regions is not None
        schedule = schedule_for(self.preset, *kind, smooth=smooth, pulled=pulled)
        schedule = replace(schedule, shrink=tuple(shrink), iterations=tuple(steps))
        landmarks, labels, observer = steered
        window = inside[box]
        fixed, moving, weight = space.channels()
        halves = syn.optimise_halves(
            fixed[box],
            moving[box],
            schedule.stiffer(self.options.stiffness),
            self.similarity,
            None if weight is None else weight[box],
            None,
            progress,
            Steering(grid_shape(window), crop.landmarks(landmarks), crop.labels(labels), base[box], window, observer),
            space.shares,
            None if space.regions is None else space.regions[box],
        )
        whole = self.halves.clone()
        whole[box] = torch.where(window > 0, halves, whole[box])
        return whole

    def _alike(self, images: tuple[Tensor, Tensor], halves: Tensor, inside: Tensor) -> float:
        """How alike the scans are inside the window; larger is better."""
        warped = warp(torch.cat(images), halves)
        if self.similarity == "mind":
            a, b = mind(warped).split(1)
            alike = 1 - (a - b).square().mean(1, keepdim=True)
        else:
            alike = lncc_map(warped[:1], warped[1:], 5)
        return float((alike * inside).sum() / inside.sum().clamp_min(1e-6))


@dataclass(frozen=True)
class _Crop:
    """A box of the working grid: its slices, and its first voxel."""

    box: tuple
    start: Tensor

    def landmarks(self, pairs: LandmarkPairs | None) -> LandmarkPairs | None:
        if pairs is None:
            return None
        start = self.start.to(pairs.fixed)
        return LandmarkPairs(pairs.fixed - start, pairs.moving - start, pairs.tolerance, pairs.weight)

    def labels(self, labels: LabelChannels | None) -> LabelChannels | None:
        if labels is None:
            return None
        channels = labels.channels[self.box]
        kept = (channels.amax((2, 3, 4)) > 0.5).all(0)
        return LabelChannels(channels[:, kept].contiguous(), labels.weight) if bool(kept.any()) else None


def grid_shape(image: Tensor) -> tuple[int, int, int]:
    """(D, H, W) of an image."""
    d, h, w = image.shape[2:]
    return d, h, w


def _box(window: Tensor, margin: int) -> tuple[tuple, Tensor]:
    """Slices of the box around a window, ``margin`` voxels larger, and its first voxel."""
    where = (window[0, 0] > 0).nonzero()
    low = (where.amin(0) - margin).clamp_min(0)
    high = torch.minimum(where.amax(0) + margin + 1, torch.tensor(window.shape[2:], device=window.device))
    return (..., *(slice(int(a), int(b)) for a, b in zip(low, high))), low


def influence(halves: Tensor, landmarks: LandmarkPairs | None, labels: LabelChannels | None) -> Tensor:
    """(1, 1, D, H, W), 0 to 1: where an update may change half-way fields: around pairs and labels; 1 everywhere when
    neither pulls."""
    shape = halves.shape[2:]
    if landmarks is None and labels is None:
        return torch.ones(1, 1, *shape, device=halves.device)
    inside = torch.zeros(1, 1, *shape, device=halves.device)
    if landmarks is not None:
        targets = torch.stack([landmarks.fixed, landmarks.moving])
        middle = pulled_back(halves, targets, targets).mean(0).float()
        coarse = [max(2, n // 4) for n in shape]
        step = torch.tensor([(n - 1) / (m - 1) for n, m in zip(shape, coarse)]).to(middle)
        places = identity(coarse, halves.device)[0].flatten(1).T * step
        near = torch.cdist(places, middle).amin(1).view(1, 1, *coarse)
        inside = resize((2 - near / LANDMARK_REACH).clamp(0, 1), shape)
    if labels is not None:
        shown = labels.channels.amax((0, 1))[None, None]
        inside = torch.maximum(inside, ((gaussian(shown, LABEL_REACH) - 0.01) * 10).clamp(0, 1))
    return inside


def _filled(halves: Tensor, inside: Tensor) -> Tensor:
    """Half-way fields whose values in the window are replaced by a smooth continuation of those around it."""
    depth = 0.5 * float((inside > 0.5).sum()) ** (1 / 3)
    outside = (inside <= 0).to(halves)
    known = gaussian(outside, max(depth, 1.0)).clamp_min(1e-4)
    filled = torch.where(inside > 0, gaussian(halves * outside, max(depth, 1.0)) / known, halves)
    for sigma in (max(depth / 2, 1.0), max(depth / 4, 1.0), 1.0):
        for _ in range(6):
            filled = torch.where(inside > 0, gaussian(filled, sigma), filled)
    filled = halves + inside * (filled - halves)
    folded = bool((jacobian_determinant(filled) <= 0.05).any())
    return syn.regularise_folds(filled, 0.1) * (inside > 0) + halves * (inside <= 0) if folded else filled
