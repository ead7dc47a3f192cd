"""Numerical inverses of displacement fields (mathematics.md, 2.3).

Conventions and what is composed here: :mod:`SymRegistrationLib.fields`. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import check_field, gradient, resize_field, sample_at, square_sum, warp

#: Axes of at least so many voxels are halved for a first guess, which needs no better residual than this, voxels.
_WORTH_HALVING, _GUESS = 24, 0.05
#: Where there is nothing to halve: first steps, as parts of the plain fixed-point step.
_FIRST_STEPS = (0.9, 0.9, 0.9, 0.9)
#: Newton steps of all voxels.
_NEWTON_STEPS = 2


@dataclass(frozen=True, eq=False)
class Inversion:
    """A numerical inverse with its quality. ``residual`` is max |w + u o (id + w)| in voxels, on other devices than a
    CPU a tensor ()."""

    field: Tensor
    residual: float | Tensor
    iterations: int


@torch.no_grad()
def invert(u: Tensor, start: Tensor | None = None, tolerance: float = 0.01, iterations: int = 60) -> Inversion:
    """Numerical inverse of a displacement field (mathematics.md, 2.3); not differentiable.

    The first guess is the inverse on half as many voxels an axis. Newton steps of all voxels follow, then damped
    fixed-point steps: the plain step ``w <- -u(x + w)`` diverges where ``|grad u| >= 1`` although the map is
    invertible; a step of 0.7 of it converges for strongly strained maps too, and is shortened further where the
    residual grows all the same. Voxels do not depend on each other, so on a CPU only those go on that have not
    converged; elsewhere all do, without asking the device.

    Args:
        u: (N, 3, D, H, W) voxels.
        start: first guess, default as above.
        tolerance: stop when the largest residual is below, in voxels.
        iterations: stop after so many steps at the latest.

    Returns:
        :class:`Inversion` with the measured residual of the returned field.
    """
    check_field(u)
    w = _guess(u, iterations) if start is None else start
    used = min(_NEWTON_STEPS, iterations)
    for _ in range(used):
        w = _newton(w, w + warp(u, w))
    w = w.clone(memory_format=torch.contiguous_format) if not used else w
    residual = w + warp(u, w)
    if u.device.type != "cpu":
        return Inversion(*_converge_everywhere(u, w, residual, tolerance, iterations - used), iterations)
    worst, left = 0.0, iterations - used
    for n in range(len(u)):
        far = square_sum(residual[n : n + 1]).flatten().gt(tolerance**2).nonzero()[:, 0]
        if len(far):
            values, least, steps = _converge(u[n : n + 1], w[n].flatten(1)[:, far], far, tolerance, left)
            w[n].view(3, -1)[:, far] = values
            worst, used = max(worst, least), max(used, iterations - left + steps)
        else:
            worst = max(worst, float(square_sum(residual[n : n + 1]).max()) ** 0.5)
    return Inversion(w, worst, used)


def _guess(u: Tensor, iterations: int) -> Tensor:
    """A first guess of the inverse, wrong by about a tenth of a voxel."""
    shape = u.shape[2:]
    coarse = [(n + 1) // 2 if n >= _WORTH_HALVING else n for n in shape]
    if list(shape) != coarse:
        return resize_field(invert(resize_field(u, coarse), None, _GUESS, iterations).field, shape)
    w = -u
    for step in _FIRST_STEPS:
        w = w - step * (w + warp(u, w))
    return w


def _newton(w: Tensor, residual: Tensor) -> Tensor:
    """A Newton step: the inverse map's own derivative ``I + grad w`` is that of the map, inverted."""
    moved = w - residual
    for axis in range(3):
        moved.addcmul_(gradient(w, axis), residual[:, axis : axis + 1], value=-1)
    return moved


@torch.no_grad()
def invert_within(
    u: Tensor, inverse: Tensor, part: Sequence[slice], tolerance: float = 0.01, iterations: int = 60
) -> Inversion:
    """A numerical inverse brought up to date in one box of its grid; not differentiable.

    Args:
        u: (1, 3, D, H, W) voxels.
        inverse: (1, 3, D, H, W), a first guess, most often the inverse of what ``u`` was before.
        part: three slices, the box.
        tolerance, iterations: as for :func:`invert`.

    Returns:
        :class:`Inversion` whose field is that of the box, (1, 3, d, h, w).
    """
    at: Any = (..., *part)
    guess = inverse[at]
    index = torch.arange(u.shape[2:].numel(), device=u.device).view(u.shape[2:])[tuple(part)].flatten()
    values, worst, used = _converge(u, guess[0].flatten(1), index, tolerance, iterations)
    return Inversion(values.view_as(guess), worst, used)


def _converge(u: Tensor, w: Tensor, where: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, float, int]:
    """Fixed-point steps of single voxels, each with its own step length.

    Args:
        u: (1, 3, D, H, W).
        w: (3, n) first guesses at the flat voxel indices ``where`` (n,).

    Returns:
        (3, n) the values with the smallest residual seen, the largest of these residuals in voxels, and
        the steps taken.
    """
    height, width = u.shape[3:]  # torch.unravel_index loads sympy: half a second in every new process
    place = torch.stack([where // (height * width), where // width % height, where % width]).to(u)
    best, left = w.clone(), w + sample_at(u, (place + w).T[None])[0].T
    least = left.square().sum(0)
    # From here on only what has not converged yet; ``at`` says where among the voxels asked for.
    at = torch.arange(len(where), device=u.device)
    here, size, nearest = w, least, w
    step, worse = torch.full_like(size, 0.7), torch.zeros_like(size)
    for used in range(iterations + 1):
        going = (size > tolerance**2).nonzero()[:, 0]
        if used == iterations or not len(going):
            break
        at, place, here, left, nearest = at[going], place[:, going], here[:, going], left[:, going], nearest[:, going]
        size, step, worse = size[going], step[going], worse[going]
        here = here - step * left
        left = here + sample_at(u, (place + here).T[None])[0].T
        now = left.square().sum(0)
        better = now < size
        nearest, size = torch.where(better, here, nearest), torch.where(better, now, size)
        worse = torch.where(better, torch.zeros_like(worse), worse + 1)
        circling = (worse >= 4).nonzero()[:, 0]  # around the solution: back to the best place, with a shorter step
        if len(circling):
            step[circling] *= 0.6
            worse[circling] = 0
            here[:, circling] = nearest[:, circling]
            left[:, circling] = here[:, circling] + sample_at(u, (place + here)[:, circling].T[None])[0].T
        best[:, at], least[at] = nearest, size
    return best, float(least.max()) ** 0.5, used


def _converge_everywhere(
    u: Tensor, w: Tensor, residual: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The steps of :func:`_converge` at all voxels at once, with nothing to read.

    Args:
        u, w: (N, 3, D, H, W) field and first guess of its inverse.
        residual: ``w + u o (id + w)``.

    Returns:
        The values with the smallest residual seen, and the largest of these residuals in voxels, ().
    """
    best, rest, least = w, residual, square_sum(residual)
    step, worse = torch.full_like(least, 0.7), torch.zeros_like(least)
    for _ in range(iterations):
        active = least > tolerance**2
        moved = w - step * residual
        left = moved + warp(u, moved)
        size = square_sum(left)
        better = active & (size < least)
        best, rest, least = (torch.where(better, a, b) for a, b in ((moved, best), (left, rest), (size, least)))
        worse = torch.where(better, 0.0, worse + 1)
        circling = active & (worse >= 4)
        step = torch.where(circling, 0.6 * step, step)
        worse = torch.where(circling, 0.0, worse)
        w = torch.where(circling, best, torch.where(active, moved, w))
        residual = torch.where(circling, rest, torch.where(active, left, residual))
    return best, least.max().sqrt()
