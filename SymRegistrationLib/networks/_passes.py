"""Repeated passes of a method's finest level in the mean frame, and the similarity force that it may see.

The levels of all methods end on a lattice of two voxels. What a single look at the images leaves over, further looks
with the same weights can find: both scans are warped half-way by what is known so far, and the level adds to it. During
training the state is detached between passes, so that memory does not grow with their number (recurrent inference:
RIIR, Zhang et al. 2023; GraDIRN, Qiu et al., MICCAI 2022). The force is the gradient of the local correlation (or of
MIND's squared difference for two contrasts) with respect to the half-way displacement, smoothed and normalised: an
input beside the images, never added to the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import (
    compose,
    exponentiate,
    gaussian,
    gradient,
    jacobian_determinant,
    no_autocast,
    scale_channels,
    settled,
    square_sum,
    warp,
)
from ..fields.inversion import invert
from ..losses import diffusion, lncc, lncc_force, mind, mind_ssd
from ._attention import up_blocks
from ._base import NetworkOutput, Note, measured_pair

#: Squarings of a half-way velocity: of the few cells that are left, 1/32 at a time is fine enough.
_SQUARINGS = 5
#: Volume below which a half-way map is eased, and how often that is tried.
_LEAST_DETERMINANT, _ROUNDS = 0.25, 6
#: Adam's rate of the adaptation to one pair, cells, and its steps unless others are asked for (RESULTS.md).
_ADAPT_RATE, ADAPT_STEPS = 0.03, 2
#: Adam's other numbers (Kingma and Ba, ICLR 2015).
_BETAS, _EPS = (0.9, 0.999), 1e-8
#: Voxels per axis of the first half of the passes at use, as a share of the whole (results/networks.md).
_COARSE = 0.65
#: Voxels of the images per cell of the fields.
CELL = 2
#: Window of the local correlation whose gradient is the force, and Gaussian sigma that smooths it, voxels.
_WINDOW, _SMOOTH = 5, 1.2
#: Factors that bring the force to about length one inside a brain, and the length at which its vectors are cut. Both
#: similarities are free of the scans' own scale, so the force is, too, and it fades as the scans come to match.
_SCALE = {"lncc": 3.0, "mind": 3.0}
_LONGEST = 4.0
#: Scans that correlate less than this where either shows something are taken for two contrasts.
_ONE_CONTRAST = 0.6


@dataclass(frozen=True, eq=False)
class HalfFields:
    """Where places of the mean frame lie in the moving and in the fixed scan, (N, 3, d, h, w) displacements in cells.

    Attributes:
        velocity: h, where ``to_moving`` is exp(h) and ``to_fixed`` exp(-h); ``None`` = the maps are composed of steps.
    """

    to_moving: Tensor
    to_fixed: Tensor
    velocity: Tensor | None = None

    def advanced(self, v: Tensor) -> HalfFields:
        """Both maps behind a further step, ``v`` towards the moving and ``-v`` towards the fixed scan; a velocity
        grows by ``v``."""
        if self.velocity is not None:
            return of_velocity(self.velocity + v)
        # Each side has a tensor of its own, so that gradients, too, are sums of two that exchange exactly.
        return HalfFields(compose(self.to_moving, v.clone()), compose(self.to_fixed, -v))

    def where(self, chosen: Tensor, other: HalfFields) -> HalfFields:
        """This where the tensor () is true, else ``other``."""
        velocities = self.velocity, other.velocity
        return HalfFields(
            torch.where(chosen, self.to_moving, other.to_moving),
            torch.where(chosen, self.to_fixed, other.to_fixed),
            None if velocities[0] is None or velocities[1] is None else torch.where(chosen, *velocities),
        )

    def on(self, shape: Sequence[int]) -> HalfFields:
        """The same on another lattice (d, h, w) over the same volume."""
        if tuple(shape) == tuple(self.to_moving.shape[2:]):
            return self

        def there(u: Tensor) -> Tensor:
            factors = [n / m for n, m in zip(shape, u.shape[2:])]
            return scale_channels(F.interpolate(u, size=tuple(shape), mode="trilinear", align_corners=False), factors)

        if self.velocity is not None:
            return of_velocity(there(self.velocity))
        return HalfFields(there(self.to_moving), there(self.to_fixed))

    def detached(self) -> HalfFields:
        """The same without a history for gradients."""
        return HalfFields(*(None if u is None else u.detach() for u in (self.to_moving, self.to_fixed, self.velocity)))

    def warped(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Both scans, (N, C, D, H, W), half-way."""
        return (
            warp(moving, up_blocks(self.to_moving, CELL), padding="zeros"),
            warp(fixed, up_blocks(self.to_fixed, CELL), padding="zeros"),
        )

    def full(self) -> tuple[Tensor, Tensor]:
        """(fixed to moving, moving to fixed) in voxels of the images; not differentiable.

        Maps are joined and inverted on the images' grid: interpolated inverses of a lattice's cells are no inverses. Of
        a velocity's squarings the last two are enough there.
        """
        if self.velocity is not None:
            quarters = (up_blocks(exponentiate(v / 2, _SQUARINGS), CELL) for v in (self.velocity, -self.velocity))
            to_moving, to_fixed = (compose(u, u) for u in quarters)
            return compose(to_moving, to_moving), compose(to_fixed, to_fixed)
        a, b = up_blocks(self.to_moving, CELL), up_blocks(self.to_fixed, CELL)
        return compose(a, invert(b, iterations=30).field), compose(b, invert(a, iterations=30).field)


def of_velocity(h: Tensor) -> HalfFields:
    """exp(h) and exp(-h), ``h`` (N, 3, d, h, w) in cells."""
    return HalfFields(exponentiate(h, _SQUARINGS), exponentiate(-h, _SQUARINGS), h)


def no_motion(image: Tensor, velocity: bool = False) -> HalfFields:
    """The identity for images (N, C, D, H, W)."""
    zero = image.new_zeros((len(image), 3, *(n // CELL for n in image.shape[2:])), dtype=torch.float32)
    return HalfFields(zero, zero, zero if velocity else None)


def one_contrast(moving: Tensor, fixed: Tensor) -> Tensor:
    """Whether the same tissue looks alike in both scans, (N, 1, D, H, W), once they meet; ()."""
    inside = ((moving > 0.05) | (fixed > 0.05)).to(moving)
    count = inside.sum().clamp_min(1)
    a, b = (inside * (x - (inside * x).sum() / count) for x in (moving, fixed))
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-6) >= _ONE_CONTRAST


class MeanFramePasses(nn.Module):
    """What a method adds to its class to repeat its finest level in the mean frame.

    A method has ``switches`` with ``passes`` (how often at use; 0 = as the paper, once) and ``force`` (whether the
    level sees :func:`similarity_force`), and defines :meth:`step`.
    """

    #: Whether the half-way maps are exp(h), exp(-h) of one velocity.
    stationary = False
    #: What stands around the method: half-way fields -> (to moving, to fixed) maps of the whole, voxels;
    #: see :func:`inside`.
    around: Callable[[HalfFields], tuple[Tensor, Tensor]] | None = None
    #: Steps of :meth:`adapted` behind the passes; set for one call by :func:`adapting`.
    adapt = 0

    def step(self, moving: Tensor, fixed: Tensor, state: HalfFields, force: Tensor | None, both: bool) -> Tensor:
        """The half-way velocity that one pass adds, (N, 3, D/2, H/2, W/2) cells.

        Args:
            moving, fixed: (N, 1, D, H, W), warped by ``state``.
            both: look in both orders of the scans, so that exchanging them turns the result round exactly; in training
                one order does, since pairs come in both.
        """
        raise NotImplementedError

    def coarse_halves(self, moving: Tensor, fixed: Tensor) -> HalfFields:
        """What the levels before the finest one find."""
        return no_motion(moving, self.stationary)

    def refined(
        self, moving: Tensor, fixed: Tensor, state: HalfFields, both: bool = True, kind: str | Tensor = "lncc"
    ) -> HalfFields:
        """``state`` behind one more pass.

        Args:
            moving, fixed: (N, 1, D, H, W), even axes.
            kind: of the force, see :func:`similarity_force`.
        """
        x, y = state.warped(moving, fixed)
        force = similarity_force(x, y, kind) if self.switches.force else None
        return state.advanced(self.step(x, y, state, force, both))

    def passed(self, moving: Tensor, fixed: Tensor) -> tuple[HalfFields, list[Note]]:
        """All levels and passes, the state detached between passes in training; at use no part may do harm.

        Returns:
            The half-way fields, and what was dropped: the coarser levels' or the passes' field, where MIND
            self-similarity of the warped scans is worse with it.
        """
        kind: str | Tensor = one_contrast(moving, fixed) if self.switches.force else "lncc"
        start, notes = no_motion(moving, self.stationary), list[Note]()
        kept = self.coarse_halves(moving, fixed)
        thin = moving, fixed
        if not self.training:
            thin = F.avg_pool3d(moving.float(), CELL), F.avg_pool3d(fixed.float(), CELL)
            unlike = self._unlike(*thin, start)
            kept, unlike = self._harmless(*thin, start, unlike, kept, "coarser levels", notes)
        state = kept
        for x, y, times in self._looks(moving, fixed):
            state = state.on([n // CELL for n in x.shape[2:]])
            for _ in range(times):
                state = self.refined(x, y, state.detached() if self.training else state, kind=kind)
        if not self.training:
            what = f"{self.switches.passes} passes of the finest level"
            state, unlike = self._harmless(*thin, kept, unlike, state, what, notes)
            if self.adapt:
                fitted = self.adapted(moving, fixed, state, self.adapt, kind)
                state, _ = self._harmless(*thin, state, unlike, fitted, f"{self.adapt} steps of adaptation", notes)
        if not self.training:
            with no_autocast(moving):
                state = self._unfolded(state, notes)
        return state, notes

    def _looks(self, moving: Tensor, fixed: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """What the passes look at, and how many of them: at use the first half sees voxels 1.5 times as long, for a
        third of the time."""
        passes, card = int(self.switches.passes), self.card
        coarse = [
            max(round(n * _COARSE / card.size_multiple) * card.size_multiple, card.minimum_size)
            for n in moving.shape[2:]
        ]
        if self.training or math.prod(coarse) >= math.prod(moving.shape[2:]):
            return [(moving, fixed, passes)]
        x, y = (F.interpolate(image, size=coarse, mode="area") for image in (moving, fixed))
        return [(x, y, passes // 2), (moving, fixed, passes - passes // 2)]

    def _unfolded(self, state: HalfFields, notes: list[Note]) -> HalfFields:
        """``state`` made smaller where it, with what stands around the method, squeezes space to less than a quarter
        or folds it."""
        first = None
        for _ in range(_ROUNDS):
            maps = (
                self.around(state) if self.around else (up_blocks(u, CELL) for u in (state.to_moving, state.to_fixed))
            )
            squeezed = torch.cat([(jacobian_determinant(u) < _LEAST_DETERMINANT).float() for u in maps], 1).amax(
                1, keepdim=True
            )
            first = squeezed.sum() if first is None else first
            if settled(~squeezed.any()):
                break
            keep = 1 - (4 * gaussian(F.max_pool3d(squeezed, CELL), 1.5)).clamp(max=1.0)
            parts = (keep * u for u in (state.to_moving, state.to_fixed))
            state = of_velocity(keep * state.velocity) if state.velocity is not None else HalfFields(*parts)
        text = "its field was made smaller about {count} voxels that it would have squeezed or folded"
        notes.append(Note(text, first > 0, first))
        return state

    def adapted(
        self, moving: Tensor, fixed: Tensor, state: HalfFields, steps: int, kind: str | Tensor = "lncc"
    ) -> HalfFields:
        """``state`` behind a velocity that is fitted to this very pair: instance optimisation by Adam.

        What is minimised is what training minimises without labels: local correlation (MIND's squared difference for
        two contrasts) half-way, and the diffusion of both half fields.
        """
        state = state.detached()
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(moving):
            moving, fixed = moving.float().clone(), fixed.float().clone()
            v = torch.zeros_like(state.to_moving)
            mean, square = torch.zeros_like(v), torch.zeros_like(v)
            for n in range(1, steps + 1):
                now = state.advanced(v.requires_grad_())
                x, y = now.warped(moving, fixed)
                loss = _unlike_by(kind, x, y) + diffusion(now.to_moving) + diffusion(now.to_fixed)
                (slope,) = torch.autograd.grad(loss, v)
                # Adam, written out: PyTorch's optimisers load a compiler, four seconds in every new process.
                mean, square = torch.lerp(slope, mean, _BETAS[0]), torch.lerp(slope**2, square, _BETAS[1])
                size = (square / (1 - _BETAS[1] ** n)).sqrt() + _EPS
                v = v.detach() - _ADAPT_RATE / (1 - _BETAS[0] ** n) * mean / size
            return state.advanced(v)

    @staticmethod
    def _unlike(moving: Tensor, fixed: Tensor, state: HalfFields) -> Tensor:
        """Mean squared difference of the self-similarity of both scans, averaged over cells, half-way, ()."""
        with torch.no_grad(), no_autocast(moving):
            halves = (moving, state.to_moving), (fixed, state.to_fixed)
            return mind_ssd(*(warp(image, u, padding="zeros") for image, u in halves))

    def _harmless(
        self,
        moving: Tensor,
        fixed: Tensor,
        before: HalfFields,
        unlike: Tensor,
        after: HalfFields,
        what: str,
        notes: list[Note],
    ) -> tuple[HalfFields, Tensor]:
        """``after`` and its measure, or ``before`` where that is no worse."""
        if after.to_moving is before.to_moving:
            return after, unlike
        now = self._unlike(moving, fixed, after)
        kept = now <= unlike
        notes.append(Note(f"the field of the {what} was dropped: the scans are more alike without it", ~kept))
        return after.where(kept, before), torch.where(kept, now, unlike)


@contextmanager
def inside(network: nn.Module, around: Callable[[HalfFields], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Tell a method of repeated passes what its half-way fields are put into, for the calls within."""
    network.around = around
    try:
        yield
    finally:
        network.around = None


@contextmanager
def adapting(network: nn.Module, steps: int | None) -> Iterator[bool]:
    """Let a network of repeated passes fit its result to the pair of the next calls.

    Args:
        steps: ``None`` = :data:`ADAPT_STEPS`.

    Yields:
        Whether it can.
    """
    methods = [m for m in network.modules() if isinstance(m, MeanFramePasses) and m.switches.passes]
    for method in methods:
        method.adapt = ADAPT_STEPS if steps is None else steps
    try:
        yield bool(methods)
    finally:
        for method in methods:
            method.adapt = 0


def passed_output(network: MeanFramePasses, moving: Tensor, fixed: Tensor) -> NetworkOutput:
    """The result of a method whose passes compose displacements, both directions by numerical inversion of the
    half-way maps."""
    state, notes = network.passed(moving, fixed)
    pair = measured_pair(*state.full(), "fixed_point")
    return NetworkOutput(pair, aux={"half_fields": state, "notes": notes})


#: Cells that a force of one moves by, where a network begins as a plain step; trained on synthetic pairs (RESULTS.md).
GAIN = 0.1
_LEAK = 0.2


@torch.no_grad()
def begin_as_step(
    path: list[nn.Conv3d], first: int, skips: list[int], unit: float = 1.0, leaky: list[bool] | None = None
) -> None:
    """Weights with which convolutions carry the force through to the field, so that training starts from a plain step.

    A signed number passes a leaky ReLU as two channels, itself and its negative. Six channels of each convolution are
    given to that; all others keep their random weights and their way into these six is closed until training opens it.

    Args:
        path: convolutions from the one that sees the force to the head.
        first: the force's first input channel.
        skips: for every further convolution, where the six channels of the one before lie in its input.
        unit: cells that the head's unit stands for.
        leaky: whether a leaky ReLU 0.2 stands in front of every further convolution; by default of all.
    """
    leaky = leaky or [True] * len(skips)
    for number, conv in enumerate(path):
        last = number == len(path) - 1
        for row in range(3 if last else 6):
            axis, sign = row % 3, 1.0 if row < 3 else -1.0
            weight = conv.weight[row]
            weight.mul_(1e-3 if last else 0.0)
            centre = weight[:, weight.shape[1] // 2, weight.shape[2] // 2, weight.shape[3] // 2]
            if number == 0:
                centre[first + axis] = sign * (GAIN / unit if last else 1.0)
            else:
                share = sign / (1 + _LEAK if leaky[number - 1] else 2.0) * (GAIN / unit if last else 1.0)
                centre[skips[number - 1] + axis] += share
                centre[skips[number - 1] + 3 + axis] -= share


def both_orders(
    network: nn.Module, x: Tensor, y: Tensor, turning: tuple[Tensor, ...] = (), both: bool = True
) -> Tensor:
    """A network's field for inputs in both orders, odd under their exchange: (f(x, y, t) - f(y, x, -t)) / 2.

    Args:
        network: (N, C, ...) -> (N, 3, ...).
        x, y: (N, C, d, h, w) views of the moving and the fixed scan.
        turning: further inputs that exchanging the scans turns round.
        both: False = f(x, y, t) alone.
    """
    there = torch.cat([x, y, *turning], 1)
    if not both:
        return network(there)
    back = torch.cat([y, x, *(-t for t in turning)], 1)
    a, b = network(torch.cat([there, back])).chunk(2)
    return (a - b) / 2


def _by_kind(kind: str | Tensor, one: Callable[[], Tensor], two: Callable[[], Tensor]) -> Tensor:
    """``one`` for one contrast, ``two`` for two; where the answer waits on a device both are computed."""
    if isinstance(kind, Tensor):
        if kind.device.type != "cpu":
            return torch.where(kind, one(), two())
        kind = "lncc" if bool(kind) else "mind"
    return two() if kind == "mind" else one()


def _unlike_by(kind: str | Tensor, x: Tensor, y: Tensor) -> Tensor:
    return _by_kind(kind, lambda: lncc(x, y, 7), lambda: 10 * mind_ssd(x, y))


@torch.no_grad()
def similarity_force(moving: Tensor, fixed: Tensor, kind: str | Tensor = "lncc") -> Tensor:
    """(N, 3, D/2, H/2, W/2): which way a half-way step raises the similarity, of length about 1, at most ``_LONGEST``.

    Exchanging the scans turns it round.

    Args:
        moving, fixed: (N, 1, D, H, W), warped half-way; even axes.
        kind: ``lncc`` or ``mind``, or what :func:`one_contrast` says.
    """
    with no_autocast(moving):
        a, b = moving.float(), fixed.float()
        return _by_kind(kind, lambda: _pull(a, b, "lncc"), lambda: _pull(a, b, "mind"))


def _pull(a: Tensor, b: Tensor, kind: str) -> Tensor:
    if kind == "mind":
        a, b = mind(a), mind(b)
        force_a, force_b = b - a, a - b
    else:
        force_a, force_b = lncc_force(a, b, _WINDOW)[0].chunk(2)
    pull = torch.cat(
        [
            (force_a * gradient(a, axis)).sum(1, keepdim=True) - (force_b * gradient(b, axis)).sum(1, keepdim=True)
            for axis in range(3)
        ],
        1,
    )
    pull = _SCALE[kind] * F.avg_pool3d(gaussian(pull, _SMOOTH), CELL)
    return pull * (_LONGEST / square_sum(pull).sqrt().clamp_min(1e-6)).clamp(max=1.0)
