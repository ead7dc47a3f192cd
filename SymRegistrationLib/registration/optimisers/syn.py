"""Method ``syn``: the symmetric diffeomorphic optimiser, and the refinement after any network.

After Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Med Image Anal 2008,
in our own formulation (the half-way maps of HSyN, optimised instead of learned). The state is two half-way fields
``u_f`` (mid -> fixed) and ``u_m`` (mid -> moving). One step warps both images to the middle, takes the exact gradient
of the local correlation there, smooths it, scales it so that its longest vectors are about ``step`` voxels, and
composes it onto both halves. The full maps are ``phi_m o phi_f^-1`` and ``phi_f o phi_m^-1``: one state gives both, so
exchanging the inputs exchanges the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...fields import (
    FieldPair,
    compose,
    compose_step,
    gaussian,
    gradient,
    identity,
    inverse_consistency,
    jacobian_determinant,
    resize,
    resize_field,
    sample_at,
    settled,
    square_sum,
    warp,
)
from ...fields.inversion import invert, invert_within
from ...job import Progress, silent
from ...losses import lncc_force, mind
from ..schedule import Schedule, schedule_for
from ..sliding import SlidingSmoother
from ..steering import SteeredLevel, Steering
from ..working_grid import WorkingPair
from ._base import Optimiser, OptimiserCard, RunSettings, check_similarity, register

#: The longest vectors of a smoothed force are about this many times its root mean square (brain, liver, lung alike).
TYPICAL_TO_LONGEST = 9.0
#: Distance of the neighbours that MIND compares, voxels of the level. With 2, which networks use, known warps of three
#: contrasts were left with up to twice the error (results/contrasts.md).
NEIGHBOURS = 1
#: Standard deviation, voxels, of the smoothing where half-way fields are squeezed, and how far around such a place
#: smoothing looks: twice the filter's reach, and one more.
_EASING, _EASING_ROOM = 1.5, 13
#: Steps between two looks at the similarity.
_LOOK = 4


@torch.no_grad()
def optimise(fixed: Tensor, moving: Tensor, *how: Any, **more: Any) -> FieldPair:
    """Register two images on one grid; the arguments are those of :func:`optimise_halves`.

    Returns:
        :class:`FieldPair` in voxels of the grid, ``inverse_method="symmetric"``, residual measured; its
        ``details["halves"]`` are the (2, 3, D, H, W) half-way fields, fixed first.
    """
    return compose_halves(optimise_halves(fixed, moving, *how, **more))


@torch.no_grad()
def optimise_halves(
    fixed: Tensor,
    moving: Tensor,
    schedule: Schedule = Schedule(),
    similarity: str = "lncc",
    weight: Tensor | None = None,
    start: FieldPair | None = None,
    progress: Progress = silent,
    steering: Steering | None = None,
    shares: Sequence[float] = (),
    regions: Tensor | None = None,
) -> Tensor:
    """The half-way fields (2, 3, D, H, W) of two images, fixed first.

    Args:
        fixed, moving: (1, C, D, H, W) float32 in [0, 1], C contrasts.
        similarity: ``lncc``, ``mse``, ``ncc`` or ``mind``; of each contrast by itself, then summed.
        weight: (2, 1 or C, D, H, W), where fixed and moving may be looked at; ``None`` = everywhere.
        start: begin from this result (it is split into halves) instead of from the identity.
        progress: called as ``progress("optimise", fraction, message)``.
        steering: what else pulls, where it may move, from which state, and who watches.
        shares: how much each contrast counts, their sum 1; () = all the same.
        regions: (2, R, D, H, W), what slides in each scan, see :class:`SlidingSmoother`; ``None`` = nothing.
    """
    images = torch.cat([fixed, moving])
    shapes = [_level_shape(fixed.shape[2:], factor) for factor in schedule.shrink]
    halves = (
        torch.zeros(2, 3, *shapes[0], device=fixed.device)
        if start is None
        else split_halves(_resized(start, shapes[0]))
    )
    work = [n * math.prod(shape) for n, shape in zip(schedule.iterations, shapes)]
    done = 0.0
    for k, (shape, iterations) in enumerate(zip(shapes, schedule.iterations)):
        level = _Level(images, weight, shape, schedule, similarity, shares, regions)
        halves = resize_field(halves, shape)

        def report(step: int, value: float, level=k + 1, base=done, share=work[k] / iterations) -> None:
            progress(
                "optimise",
                min(1.0, (base + share * step) / sum(work)),
                f"level {level} of {len(shapes)}, step {step}, similarity {value:.4f}",
            )

        steered = None if steering is None else steering.at(shape)
        halves, value = level.run(halves, iterations, report, steered)
        eased = regularise_folds(halves, schedule.least_determinant)
        halves = eased if steered is None else steered.hold(halves, eased)
        done += work[k]
        if steered is not None and not steered.leave_level(halves, value, k + 1, len(shapes)):
            break
    halves = resize_field(halves, fixed.shape[2:])
    return halves if steering is None else steering.settled(halves, schedule.least_determinant)


def _resized(pair: FieldPair, shape: tuple[int, ...]) -> FieldPair:
    there, back = (resize_field(u, shape) for u in (pair.fixed_to_moving, pair.moving_to_fixed))
    return FieldPair(there, back, pair.inverse_method, pair.residual)


def compose_halves(halves: Tensor) -> FieldPair:
    """(2, 3, D, H, W) half-way fields, fixed first, to the full maps in both directions."""
    inverse = invert(halves, tolerance=0.005, iterations=40)
    full = compose(halves.flip(0), inverse.field)
    forward, backward = full[:1], full[1:]
    residual = max(
        float(inverse_consistency(forward, backward).max()), float(inverse_consistency(backward, forward).max())
    )
    details = {"half_inverse_residual": inverse.residual, "halves": halves, "inverses": inverse.field}
    return FieldPair(forward, backward, "symmetric", residual, details)


@torch.no_grad()
def recompose_halves(halves: Tensor, before: FieldPair, box: Sequence[slice]) -> FieldPair:
    """:func:`compose_halves` where half-way fields changed in a box only.

    Args:
        halves: (2, 3, D, H, W), fixed first.
        before: what :func:`compose_halves` made of them before they changed.
        box: three slices; outside of them the half-way fields are the same as before.

    Returns:
        As :func:`compose_halves`; the residual is the larger one of before and of where something changed. Its
        ``details["changed"]`` are two boxes, three slices each: outside of them the direction is as it was.
    """
    inverses = before.details["inverses"].clone()
    full = torch.cat([before.fixed_to_moving, before.moving_to_fixed])
    places = identity(halves.shape[2:], halves.device)
    changed = []
    for k in range(2):
        part = _reached((before.details["halves"][k : k + 1], halves[k : k + 1]), places, box)
        at: Any = (..., *part)
        found = invert_within(halves[k : k + 1], inverses[k : k + 1], part, tolerance=0.005, iterations=40).field
        inverses[k][at] = found[0]
        there = (places[at] + found).flatten(2).transpose(1, 2)
        full[k][at] = found[0] + sample_at(halves[1 - k : 2 - k], there)[0].T.view_as(found[0])
        changed.append(part)
    residual = float(before.residual)
    for k, part in enumerate(changed):
        at = (..., *part)
        there = (places[at] + full[k : k + 1][at]).flatten(2).transpose(1, 2)
        rest = full[k : k + 1][at] + sample_at(full[1 - k : 2 - k], there).transpose(1, 2).view_as(places[at])
        residual = max(residual, float(square_sum(rest).max()) ** 0.5)
    details = {"halves": halves, "inverses": inverses, "changed": changed}
    return FieldPair(full[:1], full[1:], "symmetric", residual, details)


def _reached(fields: Sequence[Tensor], places: Tensor, box: Sequence[slice]) -> tuple[slice, slice, slice]:
    """The box that holds every place to which one of the (1, 3, D, H, W) fields leads from a box, or from next to it.

    Where the box ends at a border of the grid, so does the result: fields keep their values beyond.
    """
    shape = places.shape[2:]
    near = [slice(max(0, part.start - 1), min(n, part.stop + 1)) for part, n in zip(box, shape)]
    at: Any = (..., *near)
    ends = torch.cat([(places[at] + u[at]).flatten(2) for u in fields])
    low, high = ends.amin((0, 2)).floor().int().tolist(), ends.amax((0, 2)).ceil().int().tolist()
    d, h, w = (
        slice(max(0, a) if part.start else 0, min(n, b + 1) if part.stop < n else n)
        for a, b, part, n in zip(low, high, near, shape)
    )
    return d, h, w


def split_halves(pair: FieldPair) -> Tensor:
    """Half-way fields (2, 3, D, H, W), fixed first, of a full pair: each voxel's match is parted in the middle.

    With ``m(x) = x + u(x) / 2`` the midpoint of a fixed point and its match, ``m^-1`` maps the middle to the fixed
    scan and ``phi o m^-1`` to the moving one; done from both sides and averaged, it favours neither.
    """
    both = torch.cat([pair.fixed_to_moving, pair.moving_to_fixed])
    to_own = invert(both / 2, tolerance=0.01, iterations=30).field
    to_other = compose(both, to_own)
    return (to_own + to_other.flip(0)) / 2


def regularise_folds(halves: Tensor, least: float, rounds: int = 4) -> Tensor:
    """Smooth half-way fields only where they are squeezed below ``least`` in volume, so that they stay invertible.

    After the first round only what it changed is looked at; on a CPU, only the box around what is squeezed is smoothed.
    """
    eased, touched = halves, None
    at: Any = (..., *(slice(0, n) for n in halves.shape[2:]))
    for _ in range(rounds):
        squeezed = jacobian_determinant(eased[at]) < least
        if touched is not None:
            squeezed &= touched
        if halves.device.type == "cpu":  # elsewhere asking costs more than smoothing nothing
            where = squeezed.any(1).any(0).nonzero()
            if not len(where):
                break
            low, high = (where.amin(0) - _EASING_ROOM).clamp_min(0).tolist(), (where.amax(0) + _EASING_ROOM).tolist()
            near: Any = (..., *(slice(a, min(b + 1, n)) for a, b, n in zip(low, high, squeezed.shape[2:])))
            squeezed = squeezed[near]
            at = (..., *(slice(w.start + n.start, w.start + n.stop) for w, n in zip(at[1:], near[1:])))
        part = eased[at]
        blend = gaussian(squeezed.to(halves), _EASING).mul_(4).clamp_(max=1)
        smooth = torch.lerp(part, gaussian(part, _EASING), blend.expand_as(part))
        eased = eased.clone() if eased is halves else eased
        eased[at] = smooth
        touched = blend > 0
    return eased


def _level_shape(shape: Sequence[int], factor: float) -> tuple[int, ...]:
    return tuple(max(min(n, 8), round((n - 1) / factor) + 1) for n in shape)


class _Level:
    """One resolution: images shrunk onto corner-aligned voxels, and the steps taken there."""

    def __init__(
        self,
        images: Tensor,
        weight: Tensor | None,
        shape: tuple[int, ...],
        schedule: Schedule,
        similarity: str,
        shares: Sequence[float] = (),
        regions: Tensor | None = None,
    ):
        ratios = [(o - 1) / max(n - 1, 1) for o, n in zip(images.shape[2:], shape)]
        sigma = [0.5 * math.sqrt(r * r - 1) if r > 1.01 else 0.0 for r in ratios]
        if any(sigma):
            images = resize(gaussian(images, sigma), shape)
            weight = None if weight is None else resize(weight, shape)
            regions = None if regions is None else resize(gaussian(regions, sigma), shape)
        self.smooth = SlidingSmoother(regions)
        self.schedule, self.similarity = schedule, similarity
        contrasts = images.shape[1]
        self.shares = tuple(shares) or (1 / contrasts,) * contrasts
        if similarity == "mind":
            images = torch.cat([mind(image, dilation=NEIGHBOURS) for image in images.split(1, 1)], 1)
        self.features, self.weight = images, weight

    def run(
        self, halves: Tensor, iterations: int, report, steered: SteeredLevel | None = None
    ) -> tuple[Tensor, Tensor]:
        """At most ``iterations`` steps; stops when the similarity no longer rises, and returns the best state seen and
        its similarity.

        Since every step is as long as the first, identical scans would otherwise be shaken by rounding errors.
        """
        schedule = self.schedule
        values: list[Tensor] = []
        best, highest = halves, halves.new_full((), -math.inf)
        far = steered is not None and steered.landmarks is not None  # only they pull by more than a voxel a step
        for step in range(iterations + 1):
            if steered is None:
                update, value = self.update(halves)
            else:
                update, value = steered.update(halves, self.update)
            values.append(value)
            # On the device, without reading the value: there the host would wait for every step.
            better = value > highest
            best = halves if settled(better) else torch.where(better, halves, best)
            highest = torch.where(better, value, highest)
            if step == iterations or self._stands_still(values, report):
                break
            if steered is not None and steered.enough():
                break
            halves = moved = (compose if far else compose_step)(halves, update)
            if schedule.smooth_total > 0 and step % schedule.smooth_every == schedule.smooth_every - 1:
                halves = self.smooth(halves, schedule.smooth_total * schedule.smooth_every**0.5)
            if step % 10 == 9:
                halves = regularise_folds(halves, schedule.least_determinant, rounds=1)
            if steered is not None:
                halves = steered.hold(moved, halves)
        return best, highest

    def _stands_still(self, values: list[Tensor], report) -> bool:
        """Whether the similarity gained too little in the last steps; looks, and reports, every few steps only."""
        step, patience = len(values) - 1, self.schedule.patience
        if step and step % _LOOK:
            return False
        history = torch.stack(values).tolist()
        report(step, history[-1])
        past = step - patience
        return past > 0 and max(history) - max(history[:past]) < self.schedule.tolerance * abs(history[0])

    def update(self, halves: Tensor) -> tuple[Tensor, Tensor]:
        """The next step (2, 3, D, H, W) in voxels and the present similarity (larger is better), both on the device."""
        warped = warp(self.features, halves)
        weight = None if self.weight is None else warp(self.weight, halves, padding="zeros").prod(0, keepdim=True)
        force, value = self._force(warped, weight)
        # d similarity / d u = force * gradient of the warped image, summed over its channels.
        direction = torch.empty_like(halves)
        for axis in range(3):
            torch.sum(gradient(warped, axis).mul_(force), 1, out=direction[:, axis])
        self.smooth.look(halves)
        direction = self.smooth(direction, self.schedule.smooth_update)
        length = square_sum(direction)
        typical = TYPICAL_TO_LONGEST * length.mean().sqrt()
        # Scaled by the root mean square, so that one hot voxel does not decide; no vector longer than a voxel.
        scale = self.schedule.step / typical.clamp_min(1e-12)
        return direction.mul_(scale / length.sqrt_().mul_(scale).clamp_(min=1.0)), value

    def _force(self, warped: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Derivative of the similarity with respect to every channel of both warped images, and the similarity."""
        measure, window, count = _FORCES[self.similarity], self.schedule.window, len(self.shares)
        if count == 1:
            return measure(warped[:1], warped[1:], window, weight)
        weights = (None,) * count if weight is None else weight.expand(-1, count, -1, -1, -1).split(1, 1)
        forces, values = zip(
            *(
                measure(channels[:1], channels[1:], window, w)
                for channels, w in zip(warped.split(warped.shape[1] // count, 1), weights)
            )
        )
        force = torch.cat([share * one for share, one in zip(self.shares, forces)], 1)
        return force, torch.stack([share * one for share, one in zip(self.shares, values)]).sum()


def _difference_force(a: Tensor, b: Tensor, window: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of -mean squared difference; for ``mse`` and, over 12 channels, for ``mind``."""
    difference = a - b
    if weight is not None:
        difference = difference * weight
    return torch.cat([-difference, difference]), -difference.square().mean()


def _global_force(a: Tensor, b: Tensor, window: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of the correlation over the whole volume."""
    w = torch.ones_like(a) if weight is None else weight
    total = w.sum()
    a, b = a - (a * w).sum() / total, b - (b * w).sum() / total
    aa, bb, ab = (w * a * a).sum(), (w * b * b).sum(), (w * a * b).sum()
    norm = (aa * bb).sqrt().clamp_min(1e-6)
    value = ab / norm
    return torch.cat([w * (b / norm - value * a / aa), w * (a / norm - value * b / bb)]), value


_FORCES = {"lncc": lncc_force, "mse": _difference_force, "mind": _difference_force, "ncc": _global_force}


@register
class SyN(Optimiser):
    """Greedy symmetric normalisation; see the head of this file."""

    card = OptimiserCard(
        name="syn",
        label="SyN optimizer",
        title="symmetric diffeomorphic optimiser; needs no weights and no training, takes any organ",
        description="Symmetric diffeomorphic optimization of exactly this pair of scans. Needs no training; works for "
        "any organ and, with its modality-independent similarity, for two different contrasts.",
        publication="Avants et al., Symmetric diffeomorphic image registration with cross-correlation, Medical Image "
        "Analysis 12:26-41 (2008), doi:10.1016/j.media.2007.06.004",
        deviations=(),
        inverse_method="symmetric",
        similarities=tuple(_FORCES),
        # RESULTS.md's thorough brains (2.4 million voxels, 1.4 GB with torch itself) come to about 400, rounded up.
        bytes_per_voxel=500.0,
    )

    def run(self, space: WorkingPair, settings: RunSettings) -> FieldPair:
        """See :meth:`Optimiser.run`."""
        check_similarity(self.card, settings.similarity)
        kind = settings.similarity, settings.one_patient, space.regions is not None
        schedule = schedule_for(settings.preset, *kind, settings.levels, settings.smooth)
        schedule = schedule.stiffer(settings.stiffness)
        fixed, moving, weight = space.channels()
        how = schedule, settings.similarity, weight, settings.start, settings.progress, settings.steering, space.shares
        return optimise(fixed, moving, *how, regions=space.regions)
