"""The state of a training run on disk, so that a kill at any moment costs minutes and changes nothing.

One safetensors file holds everything, exchanged atomically: the file is either the old state or the new one.
Plain tensors and JSON; nothing in it can run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import reason, replacing, write_whole
from ..job import InputError, RegistrationError

#: What to do when a file of a training run cannot be written.
GO_ON = "Free disk space and give the same command again: the run goes on from its last checkpoint."


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before stays until the new one is complete.

    Raises:
        RegistrationError: disk full or not writable; the earlier checkpoint is untouched.
    """
    with replacing(path, GO_ON) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            temporary,
            metadata={"facts": json.dumps(facts)},
        )
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. Raises InputError when it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            facts = json.loads((stream.metadata() or {})["facts"])
            return {name: stream.get_tensor(name) for name in stream.keys()}, facts  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the checkpoint '{path}' is damaged ({error}).", "Delete it to begin anew, or choose another --output."
        ) from None


def pack(
    network: nn.Module, optimiser: torch.optim.Adam, averages: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Everything that changes during training as named tensors.

    Args:
        averages: named copies of the weights: moving average, best so far.
    """
    tensors = {f"model/{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"adam/{key}/{name}"] = torch.as_tensor(value)
    for which, values in averages.items():
        tensors.update({f"{which}/{name}": value for name, value in values.items()})
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], network: nn.Module, optimiser: torch.optim.Adam
) -> dict[str, dict[str, Tensor]]:
    """Undo :func:`pack`; returns the averages."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        which, _, rest = name.partition("/")
        parts.setdefault(which, {})[rest] = value
    network.load_state_dict(parts.pop("model"))
    parameters = dict(network.named_parameters())
    for name, value in parts.pop("adam", {}).items():
        key, _, parameter = name.partition("/")
        # Adam keeps its step counter on the CPU.
        place = torch.device("cpu") if key == "step" else parameters[parameter].device
        optimiser.state[parameters[parameter]][key] = value.to(place)
    random = parts.pop("random", {})
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return parts


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log that lie after ``step``, and a line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(line + "\n" for line in kept), GO_ON)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One line on a JSONL log. Raises RegistrationError when it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RegistrationError(f"'{path}' cannot be written: {reason(error)}.", GO_ON) from None
