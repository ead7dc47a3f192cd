"""The contract of an optimiser: a method that needs no weights, and refines what a network found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ...fields import FieldPair
from ...job import InputError, MethodCard, Progress, silent
from ..presets import Preset
from ..steering import Steering
from ..working_grid import WorkingPair


@dataclass(frozen=True, kw_only=True)
class OptimiserCard(MethodCard):
    """A method's card, and what an optimiser adds.

    Attributes:
        similarities: what it can maximise, by the names of ``--similarity``; ``auto`` takes ``lncc`` for one contrast
            and ``mind`` for two where they are among them, else the first.
        bytes_per_voxel: peak memory of a run per voxel of the working grid, float32, measured.
        pose: ``rigid``, ``similarity`` or ``affine`` when the alignment is the whole result; "" when it bends.
    """

    similarities: tuple[str, ...]
    bytes_per_voxel: float
    pose: str = ""


@dataclass(frozen=True)
class RunSettings:
    """How one run of an optimiser shall go.

    Attributes:
        preset: how much time it may take.
        similarity: one of the card's.
        start: begin from this result, in voxels of the grid, instead of from the identity.
        levels: with ``start``, refine on so many of the finest levels only; 0 = the whole schedule.
        stiffness: factor on the smoothing of the whole field, for runs that ask how stable a result is.
        progress: called as ``progress("optimise", fraction of this call, message)``.
        steering: landmarks and labels that pull, a region that confines, an observer that may end the run.
        one_patient: the alignment found no stretch between the scans, so they are taken for one patient's.
        smooth: what the images show of detail was found to be noise.
    """

    preset: Preset
    similarity: str
    start: FieldPair | None = None
    levels: int = 0
    stiffness: float = 1.0
    progress: Progress = silent
    steering: Steering | None = None
    one_patient: bool = False
    smooth: bool = False


class Optimiser(ABC):
    """One optimiser; a file of this folder registers exactly one class."""

    card: OptimiserCard

    @abstractmethod
    def run(self, space: WorkingPair, settings: RunSettings) -> FieldPair:
        """Register the two images of a working pair.

        Args:
            space: images, weights and grid.
            settings: how.

        Returns:
            Both directions in voxels of the grid, the residual of their composition measured. ``details["halves"]``,
            (2, 3, D, H, W), are the fields from half-way to fixed and to moving, if there are such: without them no
            state is kept and nothing can be gone on from.
        """


_REGISTRY: dict[str, type[Optimiser]] = {}


def register(cls: type[Optimiser]) -> type[Optimiser]:
    """Class decorator: make an optimiser known under its card's name. Raises ValueError when the name is taken."""
    if cls.card.name in _REGISTRY:
        raise ValueError(f"there are two optimisers '{cls.card.name}'")
    _REGISTRY[cls.card.name] = cls
    return cls


def check_similarity(card: OptimiserCard, similarity: str) -> None:
    """Refuse a similarity that an optimiser does not have. Raises InputError."""
    if similarity not in card.similarities:
        raise InputError(
            f"{card.name} has no similarity '{similarity}'.", f"Choose one of: {', '.join(card.similarities)}."
        )
