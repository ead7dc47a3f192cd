"""What a training run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..job import InputError
from .checks import ProcessOptions, check_choice, check_least, check_shares

BAD_SCANS = ("skip", "refuse")
RATES = ("auto", "published", "cosine")


@dataclass(frozen=True)
class Weighting:
    """Weights of the loss terms that training adds to, or takes instead of, the published loss.

    Attributes:
        published: of the method's own loss, on pairs whose two scans look alike (real scans, one contrast).
        dice: of 1 - soft Dice of the warped labels.
        end_point: of the distance to the true map in voxels, where it is known.
        landmarks: of the distance of landmarks in voxels, where they are given.
        smooth: of the fields' mean squared differences on supervised pairs (voxel units; mathematics.md, 4.1).
        fold: of folded voxels on supervised pairs.
    """

    published: float = 1.0
    dice: float = 1.0
    end_point: float = 0.1
    landmarks: float = 0.02
    smooth: float = 0.2
    fold: float = 1.0


@dataclass(frozen=True)
class TrainingOptions(ProcessOptions):
    """One training run. A checkpoint is also written at each validation; precision ``auto`` is bfloat16 on CUDA.

    Attributes:
        method, size, method_options: of the network; see ``symreg methods``.
        data: folder or table of scans; ``None`` = none.
        labels: folder or table of label maps to synthesise scans from; ``None`` = none.
        shapes: share of the synthetic pairs that show random shapes; without data and labels all do.
        real: share of the steps that see real scans, when there are scans and label maps.
        two_people: share of the pairs from label maps that show two people (labels known, true map not).
        one_contrast: share of the synthetic pairs whose two scans have one contrast.
        t1: share of the scans synthesised from FreeSurfer's labels that look T1-weighted; the others
            have random contrasts.
        output: folder of the run; a run that is already in it goes on.
        validation: share of the subjects kept for validation, or names of them.
        bad_scans: ``skip`` or ``refuse``.
        spacing, shape: of the working grid, mm and voxels; ``None`` = planned from data and memory.
        batch: pairs per optimiser step and process.
        iterations: optimiser steps of all stages together; ``None`` = published, or what fits ``minutes``.
        stages: share of the work of each stage, coarsest first; ``None`` = as published (by time where ``minutes`` is
            set and there is no GPU: the same for each).
        freeze: levels up to this one stay as they are while finer ones are trained.
        minutes: the whole plan is made to fit in this time.
        learning_rate, rate: peak, and its shape: ``auto``, ``published`` or ``cosine``.
        supervised: share of the synthetic steps that are trained on labels and true maps; the others on
            the published loss.
        weights: see :class:`Weighting`.
        rotation, shift, scale: largest poses of pairs, degrees, mm, share.
        curriculum: share of each stage over which poses grow from a fifth to their full range.
        validate_every, patience: steps between validations (``None`` = 20 in the plan), and how many without progress
            end a stage; 0 = never.
        validation_pairs: number of them.
        gradient_checkpointing: less memory for a third more time.
        tensorboard: also write TensorBoard events.
    """

    method: str
    output: str
    size: str = "small"
    method_options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    labels: str | None = None
    shapes: float = 0.1
    real: float = 0.5
    two_people: float = 0.3
    one_contrast: float = 0.4
    t1: float = 0.4
    validation: str = "0.15"
    bad_scans: str = "refuse"
    spacing: float | None = None
    shape: tuple[int, int, int] | None = None
    batch: int = 1
    iterations: int | None = None
    stages: tuple[float, ...] | None = None
    minutes: float | None = None
    freeze: int = 0
    learning_rate: float | None = None
    rate: str = "auto"
    supervised: float = 0.7
    weights: Weighting = Weighting()
    rotation: float = 90.0
    shift: float = 50.0
    scale: float = 0.2
    curriculum: float = 0.5
    validate_every: int | None = None
    patience: int = 6
    validation_pairs: int = 8
    gradient_checkpointing: bool = False
    tensorboard: bool = False
    device: str = "auto"
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "shapes real two_people one_contrast t1 supervised curriculum")
        check_least(self, 1, "batch iterations validate_every validation_pairs")
        check_least(self, 0, "rotation shift scale freeze patience")
        check_least(self, 0.01, "minutes spacing memory_gb")
        check_least(self, 1e-9, "learning_rate")
        check_choice(self, "bad_scans", BAD_SCANS)
        check_choice(self, "rate", RATES)
        if self.shape is not None and (len(self.shape) != 3 or min(self.shape) < 8):
            raise InputError(f"shape is {self.shape}.", "Give three numbers of voxels, at least 8 each, as 96,112,96.")
        if self.stages is not None and (min(self.stages) < 0 or not 0 < sum(self.stages) < math.inf):
            raise InputError(f"stages is {self.stages}.", "Give one share per stage, as 0.4,0.3,0.2,0.1.")
        for name, value in vars(self.weights).items():
            if not 0 <= value < math.inf:
                raise InputError(
                    f"{name.replace('_', '-')}-weight is {value}.", "Give 0 to leave a term out, or a positive number."
                )
        if not (self.weights.published or self.supervised):
            raise InputError(
                "nothing is left to train on: the published loss weighs 0 and no step is supervised.",
                "Raise --published or --supervised.",
            )
