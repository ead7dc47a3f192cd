"""Labelled pairs of real scans that only judge a network in training: its own levels against what stands in
front of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fields import jacobian_determinant, sample
from ..geometry.volumes import read_labels, read_volume
from ..job import InputError, Progress, silent
from ..quality import metrics
from ..registration import working_grid
from . import dataset
from .pool import STRUCTURES


class JudgedPair:
    """A labelled pair of real scans, brought into its mean frame once by a method's pose and matching.

    Args:
        fixed, moving: scans with labels.
        network: pose and matching, with a method behind them.
        spacing: working voxel, mm.
        labels: the label numbers that count; ``None`` = all but 0.
    """

    def __init__(
        self, fixed: dataset.Case, moving: dataset.Case, network: Any, spacing: float, labels: list[int] | None = None
    ):
        self.name = f"{fixed.subject}<-{moving.subject}"
        volumes = [read_volume(case.image, "scan") for case in (fixed, moving)]
        self.labels = [read_labels(case.labels) for case in (fixed, moving)]
        self.chosen = labels
        scans = [working_grid.prepare(volume) for volume in volumes]
        layout = working_grid.Layout(spacing, network.card.size_multiple, whole=True)
        self.space = working_grid.working_pair(*scans, np.eye(4), np.eye(4), layout)
        network = network.eval()
        with torch.no_grad():
            self.frame, self.moving, self.fixed = network._met(self.space.moving, self.space.fixed)

    @torch.no_grad()
    def scores(self, network: Any) -> dict[str, float]:
        """``dice``, ``dice_before`` (what stands in front), ``folded`` (share, of the residual map) and
        ``residual_voxel`` (largest, of both directions)."""
        zero = torch.zeros_like(self.frame.out(None, 1))
        found = network.within(self.moving, self.fixed, self.frame).pair
        u = found.fixed_to_moving.float()
        return {
            "dice_before": self.dice(zero),
            "dice": self.dice(u),
            "folded": float((jacobian_determinant(u) <= 0).float().mean()),
            "residual_voxel": float(found.residual),
        }

    def dice(self, u: Tensor) -> float:
        """Mean Dice at every second voxel of the fixed scan; ``u`` is the displacement in the mean frame, voxels."""
        total = self.frame.through(u, 1)
        fixed, moving = self.labels
        index = np.stack(np.meshgrid(*[np.arange(0, n, 2) for n in fixed.grid.shape], indexing="ij"), -1).reshape(-1, 3)
        where = torch.from_numpy(self.space.grid.indices(fixed.grid.points(index))).float()
        size = torch.tensor(total.shape[2:]).float()
        moved = sample(total, (2 * where / (size - 1) - 1).flip(-1)[None, :, None, None])[0, :, :, 0, 0].T + where
        target = np.round(moving.grid.indices(self.space.grid.points(moved.double().numpy()))).astype(int)
        inside = ((target >= 0) & (target < np.array(moving.grid.shape))).all(1)
        labels = np.zeros(len(index), moving.array.dtype)
        labels[inside] = moving.array[tuple(target[inside].T)]
        return metrics.mean(metrics.dice(fixed.array[tuple(index.T)], labels, self.chosen))


def judged_pairs(table: str, network: Any, spacing: float, progress: Progress = silent) -> list[JudgedPair]:
    """Pairs of a table with the columns fixed, moving, fixed_labels and moving_labels. Raises InputError."""
    listing = dataset.find(table)
    pairs = listing.pairs or ()
    if not pairs or any(case.labels is None for case in listing.cases):
        raise InputError(
            f"'{table}' names no labelled pairs.", "Give a CSV with fixed, moving, fixed_labels and moving_labels."
        )
    out = []
    for number, (moving, fixed) in enumerate(pairs):
        progress("judge", number / len(pairs), f"bringing {Path(listing.cases[fixed].name).name} together")
        cases = [
            replace(listing.cases[k], subject=Path(listing.cases[k].name).name.split(".")[0]) for k in (fixed, moving)
        ]
        known = set(np.unique(read_labels(cases[0].labels).array).tolist()) & set(STRUCTURES)
        out.append(JudgedPair(*cases, network, spacing, sorted(STRUCTURES) if len(known) > 4 else None))
    return out
