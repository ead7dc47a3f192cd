"""A learned pose and a learned matching in front of any method, for scans that nobody prepared.

The published networks expect affinely aligned pairs and learn large displacements slowly. With the switch
``prealign=True`` a method gets both scans in a mean frame that key points (``_pose``) and descriptors (``_match``) have
found; its own network adds the rest. Everything stays symmetric: exchanging the scans exchanges the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..fields import (
    FieldPair,
    ambient_autocast,
    box_mean,
    compose,
    gaussian,
    identity,
    jacobian_determinant,
    no_autocast,
    settled,
    square_sum,
    warp,
)
from ..losses import lncc
from ._attention import up_blocks
from ._base import NetworkOutput, Stage, SymmetricNetwork, measured_pair
from ._match import CELL, ROUNDS_BEFORE_PASSES, Halves, Match
from ._passes import HalfFields, MeanFramePasses, inside
from ._pose import KeyPoints, Pose, fitted_pose, found_pose, pose_terms

#: Volume below which a joined map is eased, and how often that is tried.
_LEAST_DETERMINANT, _ROUNDS = 0.2, 4
#: Adam's steps and rates on the pose, then on the matching, before the method itself is trained.
_STAGES = (Stage(1, 20_000, 5e-4), Stage(2, 10_000, 5e-4, frozen=5_000))


class PreAligned(SymmetricNetwork):
    """A method behind pose and matching. Level 1 is the pose, 2 the matching, l + 2 the method's level l.

    Args:
        inner: the method.
        points: number of key points.
    """

    least_bytes_per_voxel = 450.0  # at 112^3 on a CPU

    def __init__(self, inner: SymmetricNetwork, points: int = 48):
        super().__init__()
        self.inner, self.pose, self.match = inner, KeyPoints(points), Match()
        self.card = inner.card
        own = (replace(s, level=s.level + len(_STAGES)) for s in inner.recipe.stages)
        self.recipe = replace(inner.recipe, stages=(*_STAGES, *own))

    def estimate(self, moving: Tensor, fixed: Tensor) -> tuple[Pose, tuple[Tensor, Tensor], Tensor]:
        """The pose, (moving, fixed) key points and how surely both were seen; float32 also under autocast."""
        with no_autocast(moving):
            (m, f), (sure_m, sure_f) = (x.chunk(2) for x in self.pose(torch.cat([moving, fixed]).float()))
            sure = sure_m * sure_f + 1e-4
            return fitted_pose(m, f, sure), (m, f), sure

    def _frame(self, moving: Tensor, fixed: Tensor, precision: AbstractContextManager = nullcontext()) -> _Frame:
        """The mean frame that pose and matching find; ``precision`` of the matching's convolutions."""
        self.check_inputs(moving, fixed)
        pose = self.estimate(moving, fixed)[0] if self.training else self._searched(moving, fixed)
        here = identity(moving.shape[2:], moving.device).expand(len(moving), -1, -1, -1, -1)
        u = pose.offset(here)
        met = [warp(moving, u, padding="zeros"), warp(fixed, -u, padding="zeros")]
        box = self._box(met)
        rounds = ROUNDS_BEFORE_PASSES if self._looks_again else None
        return _Frame(pose, self.match(*(_cut(x, *box) for x in met), rounds, precision), here, box[0])

    @property
    def _looks_again(self) -> bool:
        """Whether the method repeats its finest level, and so goes on where the matching ends."""
        return isinstance(self.inner, MeanFramePasses) and bool(self.inner.switches.passes)

    @torch.no_grad()
    def _searched(self, moving: Tensor, fixed: Tensor) -> Pose:
        """The poses of a batch, looked for from many sides; see :func:`found_pose`."""
        with no_autocast(moving):
            found = [found_pose(self.pose, m[None], f[None]) for m, f in zip(moving, fixed)]
        return Pose(*(torch.cat(parts) for parts in zip(*(pose.parts for pose in found))))

    def _met(
        self, moving: Tensor, fixed: Tensor, precision: AbstractContextManager = nullcontext()
    ) -> tuple[_Frame, Tensor, Tensor]:
        """The mean frame, and both scans in it, on the box that shows something once they match."""
        frame = self._frame(moving, fixed, precision)
        met = [warp(x, frame.out(None, side), padding="zeros") for x, side in ((moving, 1), (fixed, -1))]
        box = self._box(met)
        return frame.part(*box), *(_cut(x, *box) for x in met)

    def _box(self, met: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """First and behind-last voxels of what follows: at use, in front of repeated passes, only what shows something.

        A box is the one thing that the host must learn in the middle of a forward, before and behind the matching: it
        is the shape of what follows.
        """
        whole = [0, 0, 0], list(met[0].shape[2:])
        if not self._boxed:
            return whole
        least, multiple = self.card.minimum_size, self.card.size_multiple
        low, high = content_box(torch.maximum(*met), multiple)
        fits = all(b - a >= least and (b - a) % multiple == 0 for a, b in zip(low, high))
        return (low, high) if fits else whole

    @property
    def _boxed(self) -> bool:
        return self._looks_again and not self.training

    def forward(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        """The method alone may run in half precision; frames, their joining and easing may not: they are places."""
        ambient = ambient_autocast(moving)
        with no_autocast(moving):
            return self._forward(moving, fixed, ambient)

    def _forward(self, moving: Tensor, fixed: Tensor, ambient: AbstractContextManager) -> NetworkOutput:
        frame, met_moving, met_fixed = self._met(moving, fixed, nullcontext() if self.training else ambient)
        with ambient:
            found = self.within(met_moving, met_fixed, frame)
        there = frame.through(found.pair.fixed_to_moving.float(), 1)
        back = frame.through(found.pair.moving_to_fixed.float(), -1)
        there, back = symmetrise_inverses(there, back)
        if not self.training:
            there, back = eased(there), eased(back)
        pair: FieldPair = measured_pair(there, back, found.pair.inverse_method)
        return NetworkOutput(pair, aux={**found.aux, "pose": frame.pose, "match": frame.halves})

    def within(self, met_moving: Tensor, met_fixed: Tensor, frame: _Frame) -> NetworkOutput:
        """The method's result in the mean frame, from scans that have met there."""
        if not self._boxed:
            return self.inner(met_moving, met_fixed)

        def around(state: HalfFields) -> tuple[Tensor, Tensor]:
            return frame.out(up_blocks(state.to_moving, CELL), 1), frame.out(up_blocks(state.to_fixed, CELL), -1)

        with inside(self.inner, around):
            return self.inner(met_moving, met_fixed)

    def objective(self, moving: Tensor, fixed: Tensor, level: int | None = None) -> dict[str, Tensor]:
        if level is not None and level <= len(_STAGES):
            to_moving, to_fixed = self.mappings(moving, fixed, level)[0]
            return {
                "front_similarity": lncc(
                    warp(moving, to_moving, padding="zeros"), warp(fixed, to_fixed, padding="zeros"), 9
                )
            }
        _, met_moving, met_fixed = self._met(moving, fixed)
        return self.inner.objective(met_moving, met_fixed, None if level is None else level - len(_STAGES))

    def mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        if level == 1:
            u = self.estimate(moving, fixed)[0].offset(identity(moving.shape[2:], moving.device))
            return [(u, -u)]
        if level == 2:
            frame = self._frame(moving, fixed)
            return [(frame.out(None, 1), frame.out(None, -1))]
        return self.supervised_mappings(moving, fixed, level)[0]

    def supervised_mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> tuple[list[tuple[Tensor | None, Tensor | None]], dict[str, Tensor]]:
        if level is not None and level <= len(_STAGES):
            return self.mappings(moving, fixed, level), {}
        frame, met_moving, met_fixed = self._met(moving, fixed)
        own = None if level is None else level - len(_STAGES)
        inner, terms = self.inner.supervised_mappings(met_moving, met_fixed, own)
        return [(frame.out(to_moving, 1), frame.out(to_fixed, -1)) for to_moving, to_fixed in inner], terms

    def supervised_terms_of(self, pair: Any, level: int) -> dict[str, Tensor] | None:
        """The pose alone has terms of its own."""
        return pose_terms(*self.estimate(pair.moving, pair.fixed), pair) if level == 1 else None

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Pose, matching, and each group of the method."""
        return [list(self.pose.parameters()), list(self.match.parameters()), *self.inner.clip_groups()]

    def parameter_groups(self, level: int) -> list[nn.Parameter]:
        if level <= len(_STAGES):
            return list((self.pose, self.match)[level - 1].parameters())
        return self.inner.parameter_groups(level - len(_STAGES))


class _Frame:
    """The mean frame of a pair: how to leave it towards a scan, and how to come from one.

    Args:
        pose, halves: what was found, pose outside; ``halves`` on the frame's own lattice.
        here: (N, 3, D, H, W) voxel positions of the scans' grid.
        low: where the frame's lattice begins on that grid, voxels; it continues its border outside.
    """

    def __init__(self, pose: Pose, halves: Halves, here: Tensor, low: Sequence[int] = (0, 0, 0)):
        self.pose, self.halves, self.here, self.low = pose, halves, here, low
        self._half = {1: up_blocks(halves.to_moving, CELL), -1: up_blocks(halves.to_fixed, CELL)}
        self._low = torch.tensor(low, dtype=here.dtype, device=here.device).view(1, 3, 1, 1, 1)
        self._own = _cut(here, low, [a + n for a, n in zip(low, self._half[1].shape[2:])])

    def part(self, low: Sequence[int], high: Sequence[int]) -> _Frame:
        """The same frame on the box from ``low`` to behind ``high``, even voxels of its lattice."""
        cells = [n // CELL for n in low], [n // CELL for n in high]
        halves = self.halves
        steps = tuple((_cut(there, *cells), _cut(back, *cells)) for there, back in halves.steps)
        cut = Halves(_cut(halves.to_moving, *cells), _cut(halves.to_fixed, *cells), steps)
        return _Frame(self.pose, cut, self.here, [a + b for a, b in zip(self.low, low)])

    def out(self, u: Tensor | None, side: int) -> Tensor:
        """Displacement from the frame's lattice, along ``u`` first, to the moving (+1) or fixed (-1) scan's grid."""
        total = self._half[side] if u is None else compose(self._half[side], u.float())
        return total + side * self.pose.offset(self._own + total) + self._low

    def through(self, u: Tensor, side: int) -> Tensor:
        """Fixed to moving (+1) or back (-1) on the scans' grid: into the frame, along ``u``, out on the other side."""
        enter = self.pose.to_mean(self.here, -side) - self.here - self._low
        enter = compose(up_blocks(self.halves.inverse(-side), CELL), enter)
        total = compose(compose(self._half[side], u), enter) + self._low
        return total + side * self.pose.offset(self.here + total)


def _cut(image: Tensor, low: Sequence[int], high: Sequence[int]) -> Tensor:
    """The box from ``low`` to behind ``high`` of (N, C, D, H, W)."""
    box: Any = (..., *(slice(a, b) for a, b in zip(low, high)))
    return image[box]


def content_box(image: Tensor, multiple: int, margin: int = 2, threshold: float = 0.1) -> tuple[list[int], list[int]]:
    """First and behind-last voxel per axis of a box about what (N, 1, D, H, W) shows, axes multiples of ``multiple``.

    The box begins at even voxels and stays inside the image where that is possible; an empty image gives the whole.
    """
    low, high = [], []
    shown = box_mean(image, 5) > threshold  # noise of the background averages out
    for axis, n in enumerate(image.shape[2:]):
        where = shown.any(dim=0).any(dim=0).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        first, last = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, n)
        size = min(-(-(last - first + 2 * margin) // multiple) * multiple, n)
        start = min(max((first + last - size) // 2, 0), n - size)
        low.append(start - start % CELL)
        high.append(low[-1] + size)
    return low, high


@torch.no_grad()
def eased(u: Tensor) -> Tensor:
    """A whole map, voxels, smoothed where the parts that it was joined of squeeze space together to nearly nothing."""
    with no_autocast(u):
        return _eased(u)


def _eased(u: Tensor) -> Tensor:
    for _ in range(_ROUNDS):
        squeezed = (jacobian_determinant(u) < _LEAST_DETERMINANT).to(u)
        if settled(~squeezed.any()):
            break
        blend = gaussian(squeezed, 1.5).mul_(4).clamp_(max=1)
        u = u + blend * (gaussian(u, 1.5) - u)
    return u


def symmetrise_inverses(u: Tensor, w: Tensor, rounds: int = 2) -> tuple[Tensor, Tensor]:
    """Two directions made inverse to each other where both stay on the grid; what sampling left over is shared.

    Unlike ``balanced_pair`` it judges by the mean over such places: behind a large pose much of a grid maps outside of
    it. Exchanging ``u`` and ``w`` exchanges the results exactly. Not differentiable.
    """
    best, least = (u, w), u.new_full((), float("inf"), dtype=torch.float64)
    ended = torch.zeros_like(least, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(rounds):
            left, right = compose(w, u) * _inside(u), compose(u, w) * _inside(w)
            error = square_sum(left).mean().double() + square_sum(right).mean().double()
            ended = ended | ~(error < least)
            if settled(ended):
                break
            best = torch.where(ended, best[0], u), torch.where(ended, best[1], w)
            least = torch.where(ended, least, error)
            u, w = u - left / 2, w - right / 2
    return best


def _inside(u: Tensor) -> Tensor:
    """(N, 1, D, H, W) in {0, 1}: where a field ends on its own grid."""
    target = identity(u.shape[2:], u.device) + u
    last = torch.tensor([n - 1 for n in u.shape[2:]], device=u.device).view(1, 3, 1, 1, 1)
    return ((target >= 0) & (target <= last)).all(1, keepdim=True).to(u.dtype)
