"""What one registration is told besides its two scans and its options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ..geometry.points import PointSet
from ..geometry.volumes import Volume
from ..job import InputError
from . import cutouts
from .guide import Pulling, Region
from .live import Watch
from .state import State


@dataclass(frozen=True, eq=False)
class Extras:
    """What may come with the two scans; every part is optional.

    Attributes:
        fixed_mask, moving_mask: (D, H, W) bool on the scan's grid: restrict the similarity.
        fixed_labels, moving_labels: label maps on any grid: evaluated, and with ``Options.drive_labels`` they pull.
        fixed_points, moving_points: landmarks, row by row: evaluated; with ``guide`` they start the alignment, and with
            ``Options.landmark_weight`` they pull.
        start: the state of a finished registration of the same scans to go on from.
        region: with ``start``: only there the registration runs again.
        restore: with ``start``: deliver that registration again; nothing is optimised.
        watch: who looks while the optimiser runs, and may end it.
        keep_state: deliver the state of the result, to go on from it.
        fixed_contrasts, moving_contrasts: further contrasts, pair by pair, in the space of the fixed and of the moving
            scan, on any grid: they drive the deformation together with the scans. The pose is found from the scans.
        sliding: label maps of what slides along its surroundings, fixed first, on any grid.
    """

    fixed_mask: np.ndarray | None = None
    moving_mask: np.ndarray | None = None
    fixed_labels: Volume | None = None
    moving_labels: Volume | None = None
    fixed_points: PointSet | None = None
    moving_points: PointSet | None = None
    guide: bool = False
    start: State | None = None
    region: Region | None = None
    restore: bool = False
    watch: Watch | None = None
    keep_state: bool = False
    fixed_contrasts: tuple[Volume, ...] = ()
    moving_contrasts: tuple[Volume, ...] = ()
    sliding: tuple[Volume | None, Volume | None] = (None, None)

    @property
    def pulling(self) -> Pulling:
        """What steers the deformation, if it is let."""
        return Pulling(self.fixed_points, self.moving_points, self.fixed_labels, self.moving_labels)

    @property
    def guides(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Landmarks in mm that start the alignment, None when none shall. Raises InputError: they are missing."""
        if not self.guide:
            return None
        if self.fixed_points is None or self.moving_points is None:
            raise InputError(
                "landmarks shall guide the alignment but none were given.", "Add --fixed-points and --moving-points."
            )
        return self.fixed_points.points, self.moving_points.points

    def completed(self, fixed: Volume, moving: Volume, notes: list[str]) -> Extras:
        """The same with the mask of a scan that was cut out of its surroundings, see :func:`.cutouts.masks`."""
        masks = cutouts.masks((fixed, moving), (self.fixed_mask, self.moving_mask), notes)
        return replace(self, fixed_mask=masks[0], moving_mask=masks[1])

    def volumes(self, fixed: Volume, moving: Volume) -> tuple[Volume, ...]:
        """All that a registration of these two looks at: them, then the further contrasts pair by pair."""
        return (fixed, moving, *chain(*zip(self.fixed_contrasts, self.moving_contrasts)))
