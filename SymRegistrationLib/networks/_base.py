"""The contract of a learned method: one file, one card, one class, one recipe.

A method file in this folder defines exactly one :class:`SymmetricNetwork` and registers it; nothing else
has to be edited for the command line, the trainer, the tests and the documentation to know it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import FieldPair, inverse_consistency
from ..job import InputError, MethodCard


@dataclass(frozen=True, kw_only=True)
class Card(MethodCard):
    """A method's card, and what a network adds.

    Attributes:
        size_multiple: every axis of an input is padded to a multiple of this.
        minimum_size: smallest axis the network accepts, voxels.
        bytes_per_voxel: peak inference memory per working-grid voxel and size name, measured, float32.
        spacing: default working voxel size, mm.
        intensity: rule that maps a scan to the network's input.
        exchange_tolerance: voxels by which exchanging the inputs may change the exchanged fields; 0 = exactly.
        sizes: parameters of the constructor per size name; ``published`` and ``small`` always exist.
        half_on_cpu: bfloat16 was measured to be faster on processors that have it and to move no vector by 0.1 voxel.
    """

    size_multiple: int = 16
    minimum_size: int = 32
    bytes_per_voxel: Mapping[str, float]
    spacing: float = 1.5
    intensity: str = "robust percentiles to [0, 1], background 0"
    exchange_tolerance: float = 0.0
    sizes: Mapping[str, Mapping[str, Any]]
    half_on_cpu: bool = False


@dataclass(frozen=True)
class Stage:
    """One leg of progressive training.

    Attributes:
        level: finest level trained in this stage, 1 = coarsest.
        iterations: optimiser steps of the published schedule.
        learning_rate: of Adam.
        frozen: steps at the start during which coarser levels stay as they are.
    """

    level: int
    iterations: int
    learning_rate: float
    frozen: int = 0


@dataclass(frozen=True)
class Recipe:
    """How the publication trains: stages in order, batch size, and the shape of the learning rate, which is halved
    every ``halve_every`` steps of a stage after its first ``halve_after``."""

    stages: tuple[Stage, ...]
    batch: int = 1
    halve_every: int | None = None
    halve_after: int = 0
    notes: str = ""


@dataclass(frozen=True, eq=False)
class Note:
    """Something that a network may have to tell; whether it does is known on the device only.

    Attributes:
        text: in words; ``{count}`` stands for ``count``.
        when: tensor () of truth values.
        count: tensor () of numbers, or None.
        inverse_method: what the pair's becomes when the note is told; "" = as it is.
    """

    text: str
    when: Tensor
    count: Tensor | None = None
    inverse_method: str = ""


@dataclass(frozen=True, eq=False)
class NetworkOutput:
    """What a network says of one pair; ``pair`` always, the rest for losses and for looking at.

    Nothing in here has been read from the device; :meth:`finished` does that once.

    Attributes:
        pair: both directions on the input grid, voxels. During training its tensors carry gradients.
        velocity: (N, 3, D, H, W) when the maps are exp(+v), exp(-v); else None.
        aux: named extras: per-level fields, half fields, attention maps; ``notes`` is a list of :class:`Note`,
            ``facts`` are numbers by name, tensors ().
    """

    pair: FieldPair
    velocity: Tensor | None = None
    aux: dict[str, Any] = field(default_factory=dict)

    def finished(self) -> NetworkOutput:
        """The same with what waits on the device read: the residual and the facts as numbers, and of the notes those
        that apply, in words."""
        told = [note for note in self.aux.get("notes", ()) if bool(note.when)]
        method = next((note.inverse_method for note in told if note.inverse_method), self.pair.inverse_method)
        words = [note.text if note.count is None else note.text.format(count=int(note.count)) for note in told]
        facts = {name: float(value) for name, value in self.aux.get("facts", {}).items()}
        pair = replace(self.pair, inverse_method=method, residual=float(self.pair.residual))
        return replace(self, pair=pair, aux={**self.aux, "notes": words, "facts": facts})


class SymmetricNetwork(nn.Module):
    """Base of all learned methods.

    ``forward(moving, fixed)`` takes two (N, 1, D, H, W) float tensors in [0, 1] on one working grid whose axes are
    multiples of ``card.size_multiple``, and returns a :class:`NetworkOutput`. It does not change its inputs.
    Every displacement or velocity head is an ``nn.Conv3d`` with three output channels; with zero heads the result is
    the identity.

    Attributes:
        size: key of the card's ``sizes`` that :func:`SymRegistrationLib.networks.create` used; "" when built directly.
        options: all arguments of the constructor, so that weights can name what they belong to.
        least_bytes_per_voxel: peak inference memory of what runs before the card's network, measured, float32.
    """

    card: Card
    recipe: Recipe
    size: str = ""
    options: Mapping[str, Any] = MappingProxyType({})
    least_bytes_per_voxel: float = 0.0

    def forward(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        raise NotImplementedError

    def objective(self, moving: Tensor, fixed: Tensor, level: int | None = None) -> dict[str, Tensor]:
        """The published loss of one training step as named, already weighted terms; their sum is minimised.

        Args:
            moving, fixed: (N, 1, D, H, W).
            level: finest level in use, 1 = coarsest; ``None`` = all.
        """
        raise NotImplementedError

    def mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """The maps that supervision may judge, with gradients: (to_moving, to_fixed) from one grid each.

        Both (N, 3, D, H, W) voxels of the inputs, ``None`` = identity; the moving scan pulled by the first is to match
        the fixed one pulled by the second. Defaults to both directions of :meth:`forward`.
        """
        pair = self(moving, fixed).pair
        return [(pair.fixed_to_moving, None), (None, pair.moving_to_fixed)]

    def map_terms(self, maps: list[tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
        """Terms of its own that a method adds to supervision, from its own :meth:`mappings`; none by default."""
        return {}

    def supervised_mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> tuple[list[tuple[Tensor | None, Tensor | None]], dict[str, Tensor]]:
        """:meth:`mappings`, and :meth:`map_terms` of what the method itself predicted."""
        maps = self.mappings(moving, fixed, level)
        return maps, self.map_terms(maps)

    def supervised_terms_of(self, pair: Any, level: int) -> dict[str, Tensor] | None:
        """Terms of its own for a pair whose labels or true map are known (``synthetic.Pair``), in place
        of the trainer's.

        ``None``, the default: the trainer judges :meth:`mappings`.
        """
        return None

    def parameter_groups(self, level: int) -> list[nn.Parameter]:
        """Parameters that belong to ``level`` (1 = coarsest), for progressive training and freezing.

        What several levels share is in the group of each; freezing coarser levels spares what the current one lists.
        """
        raise NotImplementedError

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are shortened together; by default every child's. A part with a loss of its own,
        whose gradients are of another size, must not silence the others."""
        return [list(part.parameters()) for part in self.children()]

    @property
    def levels(self) -> int:
        """Number of levels that :attr:`recipe` trains one after the other."""
        return max(stage.level for stage in self.recipe.stages)

    def check_inputs(self, moving: Tensor, fixed: Tensor) -> None:
        """Refuse what the network cannot take. Raises InputError."""
        if moving.shape != fixed.shape or moving.dim() != 5 or moving.shape[1] != 1:
            raise InputError(
                f"{self.card.name} needs two (N, 1, D, H, W) tensors of one shape, got "
                f"{tuple(moving.shape)} and {tuple(fixed.shape)}."
            )
        multiple, least = self.card.size_multiple, self.card.minimum_size
        for n in moving.shape[2:]:
            if n < least or n % multiple:
                raise InputError(
                    f"{self.card.name} needs axes of at least {least} voxels in multiples of {multiple}, got "
                    f"{tuple(moving.shape[2:])}.",
                    "Pad the volumes, or choose a smaller --spacing.",
                )


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in module.parameters())


def padded_shape(shape: Sequence[int], card: Card) -> tuple[int, ...]:
    """``shape`` raised to the multiples and the minimum of a method."""
    return tuple(math.ceil(max(n, card.minimum_size) / card.size_multiple) * card.size_multiple for n in shape)


def pad_to(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Zero padding of (N, C, D, H, W) to a larger ``shape``, the same on both sides up to one voxel."""
    widths = []
    for have, want in zip(reversed(image.shape[2:]), reversed(tuple(shape))):
        widths += [(want - have) // 2, (want - have) - (want - have) // 2]
    return F.pad(image, widths) if any(widths) else image


def crop_to(image: Tensor, shape: Sequence[int]) -> Tensor:
    """The middle of (N, C, D, H, W): undoes :func:`pad_to`."""
    for axis, want in enumerate(shape):
        have = image.shape[axis + 2]
        if have != want:
            image = image.narrow(axis + 2, (have - want) // 2, want)
    return image


def measured_pair(fixed_to_moving: Tensor, moving_to_fixed: Tensor, method: str) -> FieldPair:
    """A :class:`FieldPair` whose residual is measured, the larger of the two orders, and stays on the device; gradients
    stay in the fields."""
    with torch.no_grad():
        residual = torch.maximum(
            inverse_consistency(fixed_to_moving, moving_to_fixed).max(),
            inverse_consistency(moving_to_fixed, fixed_to_moving).max(),
        )
    return FieldPair(fixed_to_moving, moving_to_fixed, method, residual)


def differences(text: str | None) -> tuple[str, ...]:
    """The points (``* ...``) of a method file's docstring, what differs from its paper, each on one line."""
    found = re.findall(r"^\* (.+(?:\n  .+)*)", text or "", re.MULTILINE)
    return tuple(re.sub(r"\s+", " ", point).replace("``", "") for point in found)


_REGISTRY: dict[str, type[SymmetricNetwork]] = {}


#: What every shipped network has in front of it, and no paper.
PREALIGN_DEVIATION = (
    "Shipped weights stand behind a learned pose and a learned matching, which are no part of the publication; "
    "prealign=false runs the method alone, behind the initial alignment."
)


def register(cls: type[SymmetricNetwork]) -> type[SymmetricNetwork]:
    """Class decorator: makes a method known by its card's name. A second method of one name is an error.

    What stands in front of the shipped networks is told among the card's deviations.
    """
    cls.card = replace(cls.card, deviations=(*cls.card.deviations, PREALIGN_DEVIATION))
    name = cls.card.name
    if name in _REGISTRY:
        raise ValueError(f"two methods are called '{name}': {_REGISTRY[name].__module__} and {cls.__module__}")
    _REGISTRY[name] = cls
    return cls
