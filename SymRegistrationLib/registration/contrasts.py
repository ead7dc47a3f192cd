"""Further contrasts of the two sides: what can be done with them, and made ready for computing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..geometry.volumes import Volume
from ..job import InputError, Options, numbers
from . import methods, working_grid
from .working_grid import Scan, WorkingPair


def prepare(
    fixed: Sequence[Volume], moving: Sequence[Volume], options: Options, device: torch.device | str
) -> list[tuple[Scan, Scan]]:
    """The further contrasts of both sides, pair by pair.

    Raises:
        InputError: not as many on one side as on the other, weights that do not fit, or a method that could not look at
            them.
    """
    if len(fixed) != len(moving):
        raise InputError(
            f"{len(fixed)} further contrasts of the fixed side and {len(moving)} of the moving side are given.",
            "They go pair by pair.",
        )
    shares(options, 1 + len(fixed))
    if not fixed:
        return []
    if methods.pose(options.method):
        raise InputError(
            f"{options.method} looks at one contrast a side.", "Choose a method that bends, or leave the others out."
        )
    if methods.is_learned(options.method) and not options.refine:
        raise InputError(
            f"the network {options.method} itself looks at one contrast a side.",
            "Add --refine 2, so that the optimiser looks at all of them.",
        )
    if options.extra_runs:
        raise InputError(
            "perturbed runs and ensembles look at one contrast a side.",
            "Leave --ensemble out, and choose --uncertainty fast.",
        )
    return [
        (working_grid.prepare(a, None, device), working_grid.prepare(b, None, device)) for a, b in zip(fixed, moving)
    ]


def beside(space: WorkingPair, further: Sequence[tuple[Scan, Scan]], options: Options) -> WorkingPair:
    """A working pair with the further contrasts that are given, weighted as the options say; see
    :meth:`WorkingPair.with_contrasts`."""
    return space.with_contrasts(further, shares(options, 1 + len(further))) if further else space


def shares(options: Options, count: int) -> tuple[float, ...]:
    """How much each of ``count`` contrasts counts, their sum 1. Raises InputError when the weights do not fit."""
    if not options.contrast_weights:
        return (1 / count,) * count
    values = numbers(options.contrast_weights, "contrast_weights")
    if len(values) != count or min(values) < 0 or not sum(values) > 0:
        raise InputError(
            f"contrast_weights is '{options.contrast_weights}'.",
            f"Give {count} numbers from 0 on, one for each pair of contrasts, the first pair of scans first.",
        )
    return tuple(value / sum(values) for value in values)
