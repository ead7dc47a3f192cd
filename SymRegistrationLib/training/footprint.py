"""How much memory a training step takes, and the working grid that fits it and the time it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..job import InputError
from ..networks._base import SymmetricNetwork, padded_shape, parameter_count
from ..registration import memory
from .dataset import Facts
from .loss import step_terms
from .options import TrainingOptions
from .samples import Sample
from .synthetic import Synthesis, make_pair

#: Peak memory of a training step over what its forward pass keeps for the backward pass; 1.5 to 2 on the four networks.
PEAK = 2.0

#: Voxels of the working grid that a plan takes when nothing else bounds it.
MOST_VOXELS = {"cpu": 110_000, "cuda": 1_200_000}


MARGIN = 1.12


def step_gb(network: SymmetricNetwork, shape: Sequence[int], per_voxel: float) -> float:
    """10^9 bytes that one step takes on a grid of ``shape``, with ``per_voxel`` from :func:`kept_bytes`."""
    return (PEAK * per_voxel * math.prod(shape) + 20 * parameter_count(network) + 3e8) / 1e9


def kept_bytes(network: SymmetricNetwork, options: TrainingOptions) -> float:
    """Bytes per voxel that one forward pass in training keeps for the backward pass: counted on a small
    pair of shapes."""
    shape = padded_shape((network.card.minimum_size,) * 3, network.card)
    pair = make_pair(None, Synthesis(shape=shape), 0)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    most = 0
    for published in (True, False):
        seen: dict[int, int] = {}

        def count(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            passes = list(
                step_terms(network, Sample(pair, published, not published), network.levels, options.weights, 0)
            )
        most = max(most, sum(seen.values()))
        del passes
    return most / math.prod(shape)


@dataclass(frozen=True)
class Footprint:
    """The working grid of a training run: voxel size in mm, shape, and 10^9 bytes that a step needs and may use."""

    spacing: float
    shape: tuple[int, ...]
    need_gb: float
    room_gb: float


def working_footprint(
    options: TrainingOptions, network: SymmetricNetwork, facts: list[Facts], device: torch.device, notes: list[str]
) -> Footprint:
    """The finest grid over the scans' content that fits memory and time, or the one that was asked for.

    Args:
        facts: of every scan; [] = shapes only.
        notes: gets why the voxels are larger than wished.

    Raises:
        InputError: a shape that the method cannot take, or a step that does not fit the memory.
    """
    card = network.card
    room = memory.room(device, options.memory_gb, memory.TRAINING_SHARE) / 1e9
    extent = np.percentile([f.extent for f in facts], 90, axis=0) if facts else np.full(3, 180.0)
    wished = max(card.spacing, float(np.median([f.spacing for f in facts])) if facts else 0.0)
    per_voxel = kept_bytes(network, options)

    def shape_at(spacing: float) -> tuple[int, ...]:
        return options.shape or padded_shape([math.ceil(e * MARGIN / spacing) for e in extent], card)

    def fits(spacing: float) -> bool:
        return step_gb(network, shape_at(spacing), per_voxel) <= room

    spacing = options.spacing or wished
    if options.spacing is None and options.shape is not None and facts:
        spacing = max(spacing, float(max(e * MARGIN / n for e, n in zip(extent, options.shape))))
    if options.spacing is None and options.shape is None:
        bound = MOST_VOXELS["cuda" if device.type == "cuda" else "cpu"]
        while math.prod(shape_at(spacing)) > bound or not fits(spacing):
            larger = spacing * 1.04
            if min(math.ceil(e * MARGIN / larger) for e in extent) < card.minimum_size / 2:
                break
            spacing = larger
    spacing = round(spacing, 3)
    shape = tuple(int(n) for n in shape_at(spacing))
    if options.spacing is None and spacing > wished * 1.05:
        why = "the time a step takes" if fits(spacing / 1.04) else "the memory"
        notes.append(f"voxels of {spacing:g} mm instead of {wished:g} mm, for {why}; --spacing overrides")
    if padded_shape(shape, card) != shape:
        raise InputError(
            f"{card.name} cannot train on {'x'.join(map(str, shape))} voxels.",
            f"Every axis must be a multiple of {card.size_multiple} and at least {card.minimum_size}: try "
            f"--shape {','.join(map(str, padded_shape(shape, card)))}.",
        )
    need = step_gb(network, shape, per_voxel)
    if need > room:
        raise InputError(
            f"a training step at {'x'.join(map(str, shape))} needs about {need:.2f} GB and {room:.2f} GB may be used.",
            "Choose a larger --spacing, a smaller --shape or --size, or raise --memory.",
        )
    return Footprint(spacing, shape, need, room)
