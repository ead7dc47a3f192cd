"""What steers an optimiser beside the images: pairs of landmarks and labels that pull, a window that confines, a state
to go on from, an observer who may end the run.

An optimiser walks two half-way fields, fixed first. Everything here acts on both halves by opposite halves of one
vector field in the middle, so exchanging the scans still exchanges the results; every step is small and composed, so
the maps stay invertible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fields import (
    compose,
    gaussian,
    gradient,
    jacobian_determinant,
    resize,
    resize_field,
    sample_at,
    square_sum,
    warp,
)

#: Standard deviation of a landmark's kernel in voxels of the level: it reaches far on coarse levels and little on fine.
KERNEL = 3.0
#: The narrowest kernel of the last, full-resolution steps, voxels.
NARROWEST = 2.0
#: Pulled until this share of the tolerance, so that resampling to the scans does not carry a pair out of it again.
AIM = 0.5
#: No step stretches or squeezes the middle by more than this.
STEEPEST = 0.35


@dataclass(frozen=True, eq=False)
class LandmarkPairs:
    """Pairs that shall meet.

    Attributes:
        fixed, moving: (n, 3) float64 indices of the working grid: where each scan's points lie before anything bends.
        tolerance: (n,) voxels of the working grid; within it a pair counts as met.
        weight: 0 to 1, the share of what is left that every step takes away.
    """

    fixed: Tensor
    moving: Tensor
    tolerance: Tensor
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class LabelChannels:
    """Labels that shall overlap.

    Attributes:
        channels: (2, L, D, H, W) float32: the share of each label in each voxel of the working grid, fixed first.
        weight: 0 to 1: how much of the step labels decide where they speak, against the images.
    """

    channels: Tensor
    weight: float = 0.5


@dataclass(frozen=True, eq=False)
class Observer:
    """Who looks on.

    Attributes:
        seen: called after each level with (halves (2, 3, d, h, w) in voxels of that level, similarity, level from 1,
            number of levels).
        enough: asked before each step; True ends the run there, with a complete result.
    """

    seen: Callable[[Tensor, float, int, int], None]
    enough: Callable[[], bool]


@dataclass(frozen=True, eq=False)
class Steering:
    """Everything that steers one run on one working grid of ``shape``.

    Attributes:
        base: (2, 3, D, H, W) half-way fields to go on from; what is optimised is then a correction composed onto them.
        window: (1, 1, D, H, W), 0 to 1: steps are multiplied by it, and where it is 0 nothing changes.
    """

    shape: tuple[int, int, int]
    landmarks: LandmarkPairs | None = None
    labels: LabelChannels | None = None
    base: Tensor | None = None
    window: Tensor | None = None
    observer: Observer | None = None

    @property
    def decides(self) -> bool:
        """Whether more than the images decides: something pulls, or the observer has ended the run."""
        return bool(self.landmarks or self.labels or (self.observer and self.observer.enough()))

    def at(self, shape: Sequence[int]) -> SteeredLevel:
        """The same on a coarser level of ``shape``, over the same corners."""
        return SteeredLevel(self, tuple(shape))

    def settled(self, halves: Tensor, least: float) -> Tensor:
        """Half-way fields at full size: composed onto the base, and bent until landmarks are met as far as they can be.

        Args:
            halves: (2, 3, D, H, W) of this steering's shape.
            least: steps that squeeze a half below this Jacobian determinant are refused.
        """
        total = halves if self.base is None else compose(self.base, halves)
        if self.landmarks is not None:
            total = settle_landmarks(total, self.landmarks, least, self.window)
        return total


class SteeredLevel:
    """One resolution of a :class:`Steering`."""

    def __init__(self, whole: Steering, shape: Sequence[int]):
        self.observer = whole.observer
        self.base = None if whole.base is None else resize_field(whole.base, shape)
        self.window = None if whole.window is None else resize(whole.window, shape)
        self.landmarks = _Pull(scaled(whole.landmarks, whole.shape, shape)) if whole.landmarks is not None else None
        self.labels = _Overlap(whole.labels, whole.shape, shape) if whole.labels is not None else None

    def total(self, halves: Tensor) -> Tensor:
        """The half-way fields that ``halves`` stand for."""
        return halves if self.base is None else compose(self.base, halves)

    def update(self, halves: Tensor, by_images: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The next step (2, 3, d, h, w) of images, labels and landmarks together, and what it maximises."""
        total = self.total(halves)
        update, value = by_images(total)
        if self.labels is not None:
            update, overlap = self.labels.blended(total, update)
            value = value + overlap
        if self.landmarks is not None:
            pull, error = self.landmarks.step(total, KERNEL)
            update, value = update + pull, value - error
        return (update if self.window is None else update * self.window), value

    def hold(self, before: Tensor, after: Tensor) -> Tensor:
        """A change of ``halves`` only as far as the window allows."""
        return after if self.window is None else before + self.window * (after - before)

    def enough(self) -> bool:
        """Whether the observer wants no more."""
        return self.observer is not None and self.observer.enough()

    def leave_level(self, halves: Tensor, value: Tensor, level: int, levels: int) -> bool:
        """Show the level to the observer; False when it shall be the last."""
        if self.observer is None:
            return True
        self.observer.seen(self.total(halves), float(value), level, levels)
        return not self.observer.enough()


# ---------------------------------------------------------------------------------------------- landmarks


def scaled(pairs: LandmarkPairs, shape: Sequence[int], to: Sequence[int]) -> LandmarkPairs:
    """Landmarks in indices of a grid of shape ``to`` over the same corners."""
    factor = torch.tensor([(n - 1) / max(o - 1, 1) for n, o in zip(to, shape)]).to(pairs.fixed)
    return LandmarkPairs(
        pairs.fixed * factor, pairs.moving * factor, pairs.tolerance * float(factor.mean()), pairs.weight
    )


class _Pull:
    """The step that brings pairs together; remembers where the points lie in the middle."""

    def __init__(self, pairs: LandmarkPairs):
        self.pairs = pairs
        self.middle = torch.stack([pairs.fixed, pairs.moving])
        self.first: float | None = None

    def apart(self, halves: Tensor) -> Tensor:
        """(n, 3) voxels from each fixed point's place in the middle to its partner's."""
        targets = torch.stack([self.pairs.fixed, self.pairs.moving])
        self.middle = pulled_back(halves, targets, self.middle)
        return self.middle[1] - self.middle[0]

    def step(self, halves: Tensor, sigma: float) -> tuple[Tensor, float]:
        """(2, 3, d, h, w) step, and what is left: the mean excess over the tolerance as a share of the first one."""
        apart = self.apart(halves)
        length = apart.norm(dim=1, keepdim=True).clamp_min(1e-9)
        excess = apart * (1 - AIM * self.pairs.tolerance[:, None] / length).clamp_min(0)
        left = float(excess.norm(dim=1).mean())
        if self.first is None:
            self.first = max(left, 1e-6)
        half = 0.5 * self.pairs.weight * excess
        half = half * (0.5 * sigma / half.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp(max=1)
        field = spread(self.middle.mean(0), half, sigma, halves.shape[2:]).to(halves)
        return torch.cat([-field, field]), self.pairs.weight * left / self.first


def pulled_back(halves: Tensor, targets: Tensor, guess: Tensor, iterations: int = 40) -> Tensor:
    """(2, n, 3) places in the middle that the halves take to ``targets``; damped fixed-point steps from ``guess``."""
    at, best, least = guess, guess, None
    for _ in range(iterations):
        rest = at + sample_at(halves.double(), at) - targets
        size = rest.norm(dim=2, keepdim=True)
        if least is None:
            least = size
        better = size <= least
        best, least = torch.where(better, at, best), torch.where(better, size, least)
        if float(least.max()) < 1e-3:
            break
        at = at - 0.8 * rest
    return best


def spread(centres: Tensor, vectors: Tensor, sigma: float, shape: Sequence[int]) -> Tensor:
    """(1, 3, *shape): the smooth field that takes (about) the (n, 3) ``vectors`` at the (n, 3) ``centres``, voxels.

    Gaussian kernels whose weights solve the small linear system of all centres; a ridge of 0.05 keeps near, unlike
    vectors from growing opposite weights. No derivative exceeds :data:`STEEPEST`.
    """
    distance = torch.cdist(centres, centres)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)
    kernel += 0.05 * torch.eye(len(centres), dtype=kernel.dtype, device=kernel.device)
    weights = torch.linalg.solve(kernel, vectors)
    coarse = [max(2, min(n, math.ceil((n - 1) * 2.5 / sigma) + 1)) for n in shape]
    k = [
        torch.exp(-0.5 * ((torch.linspace(0, n - 1, m).to(centres)[:, None] - centres[:, axis]) / sigma) ** 2)
        for axis, (n, m) in enumerate(zip(shape, coarse))
    ]
    plane = (k[1][:, None] * k[2][None]).reshape(-1, len(centres))
    lines = (weights.T[:, None] * k[0][None]).reshape(-1, len(centres))
    field = (lines @ plane.T).view(1, 3, *coarse)
    steps = [(m - 1) / max(n - 1, 1) for n, m in zip(shape, coarse)]
    steepest = max(float(gradient(field, axis).abs().max()) * steps[axis] for axis in range(3))
    return resize((field * min(1.0, STEEPEST / max(steepest, 1e-9))).float(), shape)


def settle_landmarks(
    halves: Tensor, pairs: LandmarkPairs, least: float, window: Tensor | None = None, rounds: int = 24
) -> Tensor:
    """Bend half-way fields until every pair is within its tolerance, or no step that does not squeeze helps any more.

    Wide kernels first, narrower ones when pairs that are near each other ask for different things.
    """
    pull, sigma = _Pull(pairs), KERNEL
    floor = min(least / 2, 0.9 * float(jacobian_determinant(halves).min()))
    before = math.inf
    for _ in range(rounds):
        apart = pull.apart(halves).norm(dim=1)
        if bool((apart <= 1.25 * AIM * pairs.tolerance).all()):
            break
        worst = float((apart - AIM * pairs.tolerance).clamp_min(0).max())
        if worst > 0.8 * before:
            if sigma <= NARROWEST:
                break
            sigma = max(NARROWEST, sigma / 1.5)
        before = worst
        step, _ = pull.step(halves, sigma)
        step = step if window is None else step * window
        for _ in range(4):
            moved = compose(halves, step)
            if float(jacobian_determinant(moved).min()) >= floor:
                halves = moved
                break
            step = step / 2
    return halves


# ---------------------------------------------------------------------------------------------- labels


class _Overlap:
    """Steps that bring the borders of labels onto each other, on the box around them."""

    def __init__(self, labels: LabelChannels, whole: Sequence[int], shape: Sequence[int]):
        channels = labels.channels
        ratios = [(o - 1) / max(n - 1, 1) for o, n in zip(whole, shape)]
        sigma = [0.5 * math.sqrt(r * r - 1) if r > 1.01 else 0.5 for r in ratios]
        channels = resize(gaussian(channels, sigma), shape)
        shown = (channels.amax((0, 1)) > 0.02).nonzero()
        low = (shown.amin(0) - 10).clamp_min(0)
        high = torch.minimum(shown.amax(0) + 11, torch.tensor(shape, device=shown.device))
        self.box: Any = (..., *(slice(int(a), int(b)) for a, b in zip(low, high)))
        self.channels, self.weight = channels[self.box].contiguous(), labels.weight

    def blended(self, halves: Tensor, update: Tensor) -> tuple[Tensor, float]:
        """``update`` with the labels' own step in place of it where they speak, and the weighted mean overlap.

        The labels' step solves ``(grad a + grad b) v = a - b`` for all channels at once, as the symmetric demons do
        (Vercauteren et al., NeuroImage 2009), smoothed with its own certainty: borders carry their surroundings.
        """
        warped = warp(self.channels, halves[self.box])
        a, b = warped[:1], warped[1:]
        difference = a - b
        slopes = [gradient(a, axis) + gradient(b, axis) for axis in range(3)]
        pushes = [(difference * slope).sum(1, keepdim=True) for slope in slopes]
        sure = (slopes[0] ** 2 + slopes[1] ** 2 + slopes[2] ** 2 + difference**2).sum(1, keepdim=True)
        parts = gaussian(torch.cat([*pushes, sure], 1), 1.5)
        share = self.weight * parts[:, 3:] / (parts[:, 3:] + 0.01)
        step = parts[:, :3] / (parts[:, 3:] + 1e-3)
        step = step * (1.0 / square_sum(step).sqrt().clamp_min(1e-9)).clamp(max=1)
        update = update.clone()
        update[self.box] = (1 - share) * update[self.box] + share * torch.cat([-step, step])
        overlap = 2 * (a * b).sum((2, 3, 4)) / (a * a + b * b).sum((2, 3, 4)).clamp_min(1e-6)
        return update, self.weight * float(overlap.mean())
