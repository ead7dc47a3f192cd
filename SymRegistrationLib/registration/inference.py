"""A learned method on a working grid of any size: fitted to its multiples, to the memory that is there,
to the device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import networks
from ..fields import FieldPair, resize, resize_field
from ..job import InputError, Options, Progress, RegistrationError, silent
from ..networks._base import Card, SymmetricNetwork, crop_to, measured_pair, pad_to, padded_shape
from ..networks._passes import adapting
from . import devices, memory, weights

#: A memory bound may make the voxels of the working grid at most so many times longer.
COARSEST = 4.0


@dataclass(frozen=True)
class _Plan:
    """Where and how finely a network runs; ``shape`` is the working grid before padding."""

    device: torch.device
    shape: tuple[int, ...]
    note: str = ""


def load_network(name: str, options: Options, device: torch.device | None = None) -> SymmetricNetwork:
    """The network of a run with its weights, in evaluation mode on ``device`` (default: the options').

    The last few networks are kept, so a worker loads each only once; they must not be changed.

    Args:
        name: of the method.
        options: ``weights`` and ``method_options`` (``size`` picks shipped weights, the rest are
            the method's switches).

    Raises:
        InputError: no weights, weights that do not fit, unknown switches.
    """
    device = device or devices.resolve(options.device)
    switches = dict(options.method_options)
    size = switches.pop("size", None)
    if size is not None and not isinstance(size, str):
        raise InputError(f"size is {size!r}.", f"Known: {', '.join(networks.card(name).sizes)}.")
    path = weights.find(name, options.weights, size)
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    network = _loaded(name, path, stamp, json.dumps(switches, sort_keys=True), device)
    if size and network.size != size:
        raise InputError(f"'{path}' holds {name} of size {network.size}, not {size}.", "Leave out --option size.")
    return network


def working_spacing(name: str, options: Options) -> float:
    """Voxel size in mm of the working grid: what the run's weights were trained at, else the method's
    own. Raises InputError."""
    path = weights.find(name, options.weights, options.method_options.get("size"))
    spacing = weights.read_card(path).get("plan", {}).get("spacing")
    return float(spacing) if isinstance(spacing, (int, float)) and spacing > 0 else networks.card(name).spacing


@lru_cache(maxsize=4)
def _loaded(name: str, path: Path, stamp: int, switches: str, device: torch.device) -> SymmetricNetwork:
    found = weights.load(path, name)
    try:
        network = networks.restore(name, found.size, {**found.options, **_renamed(json.loads(switches))})
    except InputError as error:
        if json.loads(switches):
            raise
        raise InputError(f"'{path}' cannot be used: {error.message}", error.hint) from None
    weights.fill(network, found)
    return _placed(network, device)


def _renamed(switches: dict) -> dict:
    """Switches under their present names, so that they override what weights call otherwise."""
    return {"prealign" if name == "front" else name: value for name, value in switches.items()}


@torch.no_grad()
def run_network(
    moving: Tensor,
    fixed: Tensor,
    name: str,
    options: Options = Options(),
    network: SymmetricNetwork | None = None,
    progress: Progress = silent,
) -> FieldPair:
    """Both directions of one pair by a learned method.

    Args:
        moving, fixed: (N, 1, D, H, W) in [0, 1] on one working grid of any size, any device.
        name: of the method.
        options: ``device``, ``memory_gb``, ``weights``, ``method_options``, ``adapt``.
        network: a network to use instead of loading one; it is moved to the device.
        progress: told where the network runs and when it had to run coarser or elsewhere.

    Returns:
        The pair on the working grid, float32, on the device of ``moving``; ``details["notes"]`` says in words what was
        done other than asked, ``details["device"]`` and ``details["shape"]`` where and on what lattice it ran.

    Raises:
        InputError: shapes, device, weights or options that cannot be used.
        RegistrationError: it does not fit the memory even at the coarsest lattice, or the result is not finite.
    """
    card = networks.card(name)
    _check(moving, fixed, card)
    device = devices.resolve(options.device)
    if network is None:
        progress("method", 0.0, f"loading {name}")
        network = load_network(name, options, device)
    elif network.card.name != name:
        raise InputError(f"a network of {network.card.name} was given for {name}.")
    shape = tuple(moving.shape[2:])
    notes: list[str] = []
    coarser = 1.0
    while True:
        plan = _planned(network, len(moving), shape, device, options, coarser)
        if plan.note:
            notes.append(plan.note)
            progress("method", 0.05, plan.note)
        progress("method", 0.1, f"{name} on {plan.device} at {'x'.join(map(str, plan.shape))}")
        try:
            pair = _run(moving, fixed, network, plan, options.adapt)
            break
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if coarser == 1.0:
                coarser, text = 1.5, "the GPU ran out of memory; trying again on a coarser grid"
            else:
                coarser, device, text = (
                    1.0,
                    torch.device("cpu"),
                    "the GPU ran out of memory twice; going on with the CPU",
                )
            notes.append(text)
            progress("method", 0.05, text)
    if not (torch.isfinite(pair.fixed_to_moving).all() and torch.isfinite(pair.moving_to_fixed).all()):
        raise RegistrationError(
            f"{name} gave fields that are not finite.", "Check the scans' intensities and the weights."
        )
    progress("method", 1.0, f"{name} done")
    notes += pair.details.get("notes", [])
    return replace(pair, details={"notes": notes, "device": str(plan.device), "shape": plan.shape})


def memory_needed(network: SymmetricNetwork, shape: tuple[int, ...], batch: int = 1) -> float:
    """Bytes that inference takes on a working grid, from the card's measured bytes per voxel."""
    card = network.card
    per_voxel = card.bytes_per_voxel.get(network.size) or max(card.bytes_per_voxel.values())
    return batch * max(per_voxel, network.least_bytes_per_voxel) * math.prod(padded_shape(shape, card))


def _check(moving: Tensor, fixed: Tensor, card: Card) -> None:
    if moving.shape != fixed.shape or moving.dim() != 5 or moving.shape[1] != 1:
        raise InputError(
            f"{card.name} needs two (N, 1, D, H, W) volumes on one grid, got {tuple(moving.shape)} and "
            f"{tuple(fixed.shape)}."
        )
    # Up to twice the size may be padding; beyond that a network sees mostly nothing.
    least = card.minimum_size // 2
    if min(moving.shape[2:]) < least:
        raise InputError(
            f"the working grid {tuple(moving.shape[2:])} is too small for {card.name}, which needs at least "
            f"{least} voxels per axis.",
            "Choose a smaller --spacing, or --method syn.",
        )


def _planned(
    network: SymmetricNetwork,
    batch: int,
    shape: tuple[int, ...],
    device: torch.device,
    options: Options,
    coarser: float,
) -> _Plan:
    """The finest lattice, at least ``coarser`` times the voxel, whose estimate fits the memory."""
    room = memory.room(device, options.memory_gb, memory.NETWORK_SHARE)
    factor, lattice = coarser, _lattice(shape, coarser, network.card)
    while memory_needed(network, lattice, batch) > room:
        factor *= 1.03
        lattice = _lattice(shape, factor, network.card)
        if factor > COARSEST or min(lattice) < network.card.minimum_size // 2:
            raise RegistrationError(
                f"{network.card.name} needs {memory_needed(network, shape, batch) / 1e9:.2f} GB for this working grid "
                f"and {room / 1e9:.2f} GB may be used; a grid coarse enough to fit would be too coarse.",
                "Raise --memory, free memory, choose a larger --spacing, or --method syn.",
            )
    if lattice == shape:
        return _Plan(device, shape)
    note = ""
    if factor > coarser:
        note = (
            f"{network.card.name} would need {memory_needed(network, shape, batch) / 1e9:.2f} GB and "
            f"{room / 1e9:.2f} GB may be used: its working grid was made {factor:.2f} times coarser"
        )
    return _Plan(device, lattice, note)


def _lattice(shape: tuple[int, ...], factor: float, card: Card) -> tuple[int, ...]:
    """``shape`` with voxels ``factor`` times longer, corner voxels staying corners."""
    if factor == 1.0:
        return tuple(shape)
    return tuple(max(math.floor((n - 1) / factor) + 1, 1) for n in shape)


def _placed(network: SymmetricNetwork, device: torch.device) -> SymmetricNetwork:
    layout = torch.channels_last_3d if device.type == "cuda" else devices.fastest_convolutions()[1]
    placed: SymmetricNetwork = network.eval().to(device)
    return placed.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs


def _precision(device: torch.device, card: Card) -> AbstractContextManager:
    """Half precision for convolutions where that is faster; field mathematics stays in float32."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.float16)
    if card.half_on_cpu and devices.half_precision_pays():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def _run(moving: Tensor, fixed: Tensor, network: SymmetricNetwork, plan: _Plan, adapt: int | None = 0) -> FieldPair:
    """One pass at the plan's lattice, back on the grid of ``moving``."""
    network = _placed(network, plan.device)
    whole = padded_shape(plan.shape, network.card)
    moved, kept = (pad_to(resize(x.to(plan.device).float(), plan.shape), whole) for x in (moving, fixed))
    with _precision(plan.device, network.card), adapting(network, adapt) as can:
        output = network(moved, kept)
    if adapt and not can:
        raise InputError(
            f"these weights of {network.card.name} cannot adapt to a pair.",
            "Leave out --adapt, or use weights with passes.",
        )
    output = output.finished()
    pair = output.pair
    there, back = (
        resize_field(crop_to(u.float(), plan.shape), moving.shape[2:]).to(moving.device)
        for u in (pair.fixed_to_moving, pair.moving_to_fixed)
    )
    if there.shape == pair.fixed_to_moving.shape:  # neither cropped nor resized: measured already
        found = replace(pair, fixed_to_moving=there, moving_to_fixed=back)
    else:
        found = measured_pair(there, back, pair.inverse_method)
    notes = [f"{network.card.name}: {note}" for note in output.aux["notes"]]
    return replace(found, residual=float(found.residual), details={"notes": notes})


@contextmanager
def dropout_at_work(network: nn.Module, seed: int) -> Iterator[bool]:
    """Let the dropout layers of a network drop although it is in evaluation mode (Gal and Ghahramani, ICML 2016).

    Yields:
        Whether it has any that drop something.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]

    def drop(module: Any, inputs: tuple, output: Tensor) -> Tensor:
        share = 1 - module.p
        wide = output.dim() - 2 if not isinstance(module, nn.Dropout) else 0
        shape = output.shape[: output.dim() - wide] + (1,) * wide
        return output * (torch.rand(shape, generator=random).to(output) < share) / share

    random = torch.Generator().manual_seed(seed)
    handles = [layer.register_forward_hook(drop) for layer in layers]
    try:
        yield bool(layers)
    finally:
        for handle in handles:
            handle.remove()
