"""What a pool of training pairs, and a run of training on one, are asked to do.

Standard library only, so that help costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..job import InputError
from .checks import ProcessOptions, check_least, check_shares


@dataclass(frozen=True)
class PoolOptions:
    """How the pairs of a pool are made.

    Attributes:
        spacing: working voxel, mm. shape: of the working grid, voxels; multiples of 16.
        rotation: largest relative rotation, degrees. shift: mm. scale: share.
        warp: largest root mean square of each scan's own smooth warp, mm.
        two_people: share of the pairs that show two different label maps.
        pose_only: share of the pairs that only the pose has brought together, not the matching.
        random_contrast: share of the scans with a random contrast instead of a T1-like one.
        strip: share of the pairs without what lies outside the brain (FreeSurfer numbers from 500 on).
        thick: share of the scans with thick slices, 3 to 5 mm.
        noise: largest standard deviation of noise before averaging, of the scan's range. bias: largest logarithm of
            the bias field.
        teacher: whether ``syn`` registers clean renderings of each pair, for phase A of a training; two thirds of
            the time of a pair.
        seed: of everything.
    """

    spacing: float = 2.0
    shape: tuple[int, int, int] = (80, 96, 80)
    rotation: float = 15.0
    shift: float = 15.0
    scale: float = 0.1
    warp: float = 2.5
    two_people: float = 0.7
    pose_only: float = 0.15
    random_contrast: float = 0.0
    strip: float = 0.85
    thick: float = 0.1
    noise: float = 0.08
    bias: float = 0.3
    teacher: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self, "two_people pose_only random_contrast strip thick")
        if any(n < 32 or n % 16 for n in self.shape):
            raise InputError(f"the pool's shape is {self.shape}.", "Give multiples of 16, at least 32.")


@dataclass(frozen=True)
class PoolTraining(ProcessOptions):
    """One run. Precision ``auto`` is measured.

    Attributes:
        method, size, method_options: of the network, which needs ``passes``.
        pool: folder of the pairs. output: of the run; a run that is already in it goes on.
        start: weights that are taken over, pose and matching among them; a method's name = the shipped ones.
        keep: beginnings of the names of the tensors that are taken from there; all others begin anew.
        steps_coarse, steps_teacher, steps_free: optimiser steps of phase C (0 = the coarser levels stay as they
            start), A and B.
        block: (D, H, W) voxels that a step of A and B sees, multiples of 16; ``None`` = all.
        learning_rate, last_rate: of Adam, by a cosine over both phases. inverse_rate: of a learned
            inverse, held constant.
        most_passes: passes of a pair in training, drawn from 1 to this.
        inverse_share: share of the passes after which a learned inverse learns, too.
        clip: longest gradient of each part.
        magnitude: weight of the mean squared sum of the half fields, mm^2.
        judged: table or folder of labelled scan pairs that only judge. judge_every: steps; they never train.
    """

    method: str
    pool: str
    output: str
    size: str = "recurrent"
    method_options: dict[str, Any] = field(default_factory=dict)
    keep: tuple[str, ...] = ("pose.", "match.")
    steps_coarse: int = 0
    steps_teacher: int = 8000
    steps_free: int = 3400
    learning_rate: float = 1e-3
    last_rate: float = 2e-5
    inverse_rate: float = 1e-4
    block: tuple[int, int, int] | None = (48, 64, 48)
    most_passes: int = 4
    inverse_share: float = 0.25
    clip: float = 1.0
    ema: float = field(default=0.998, kw_only=True)
    magnitude: float = 0.1
    judged: str | None = None
    judge_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "steps_coarse steps_teacher steps_free last_rate inverse_rate magnitude")
        check_least(self, 1, "most_passes judge_every")
        check_least(self, 1e-9, "learning_rate clip")
        check_shares(self, "inverse_share")
        if self.steps < 1:
            raise InputError("the run has no step.", "Raise the steps of a phase.")
        if self.block is not None and (len(self.block) != 3 or any(n < 32 or n % 16 for n in self.block)):
            raise InputError(f"block is {self.block}.", "Give three multiples of 16, at least 32, or leave it out.")

    @property
    def steps(self) -> int:
        """Of all phases."""
        return self.steps_coarse + self.steps_teacher + self.steps_free

    def phase(self, step: int) -> str:
        """``C``, ``A`` or ``B``."""
        return "C" if step < self.steps_coarse else "A" if step < self.steps_coarse + self.steps_teacher else "B"
