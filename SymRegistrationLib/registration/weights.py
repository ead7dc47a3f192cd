"""Trained weights on disk: safetensors in half precision beside a model card, never a pickle.

``NAME.safetensors`` holds the tensors and, in its header, method, size, options and version; the model card
``NAME.safetensors.json`` holds the same, the file's SHA-256, and what the weights were trained on and are not good for.
Shipped weights lie in ``model_weights/`` of the package as ``METHOD-SIZE.safetensors``. Pose and matching are the same
in front of every method there, and lie once beside them, in ``prealign.safetensors``: a file of such weights names the
SHA-256 of the one that it belongs to. Weights that are trained elsewhere are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..files import replacing, sha256
from ..job import InputError, parsed_json

FOLDER = Path(__file__).parents[1] / "model_weights"
SUFFIX = ".safetensors"
#: What :func:`save` itself says in a model card.
ABOUT = ("method", "size", "version", "prealign", "options", "sha256", "parameters")
#: Pose and matching that several weights files of one folder share, and the tensors that it holds.
SHARED = "prealign.safetensors"
_SHARED_PARTS = ("pose.", "match.")


@dataclass(frozen=True, eq=False)
class Weights:
    """What a file held.

    Attributes:
        path: where it came from.
        method, size, options: of the network it belongs to; see ``networks.create``.
        version: of the library that wrote it.
        tensors: parameter name -> tensor, as stored.
        sha256: of the file.
        card: the model card, {} when the file came without one (then the hash could not be checked).
    """

    path: Path
    method: str
    size: str
    options: dict[str, Any]
    version: str
    tensors: dict[str, Tensor]
    sha256: str
    card: dict[str, Any] = field(default_factory=dict)


def card_path(path: str | Path) -> Path:
    """Where the model card of a weights file lies."""
    return Path(f"{path}.json")


def save(path: str | Path, network: nn.Module, card: Mapping[str, Any] | None = None, share: bool = False) -> Path:
    """Write a network's weights and its model card; neither is ever half-written.

    Args:
        path: ends in ``.safetensors``.
        network: made by ``networks.create`` (carries ``card.name``, ``size`` and ``options``).
        card: facts for the model card: training data, its licence, steps, limits; plain JSON values.
        share: leave pose and matching to ``prealign.safetensors`` of that folder, which is written when there is none.

    Raises:
        InputError: a weight is not finite in half precision, the folder cannot be written, or pose and matching are
            not those that are shared there.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"weights are stored as {SUFFIX}, not as '{path.name}'.")
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous() for name, value in network.state_dict().items()
    }
    bad = _not_finite(tensors)
    if bad:
        raise InputError(
            f"the network's '{bad}' holds values that are not finite in half precision; nothing was written."
        )
    about = {"method": network.card.name, "size": network.size, "version": __version__}
    if share:
        parts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_SHARED_PARTS)}
        about["prealign"] = _share(path.with_name(SHARED), parts)
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in network.options.items()}
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={**about, "options": json.dumps(options, sort_keys=True)})
        full = {
            **about,
            "options": options,
            "sha256": sha256(temporary),
            "parameters": sum(value.numel() for value in tensors.values()),
            **(card or {}),
        }
        part = card_path(temporary)
        part.write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
        os.chmod(temporary, part.stat().st_mode)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
        os.replace(part, card_path(path))
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror}).") from None
    return path


def _share(path: Path, parts: dict[str, Tensor]) -> str:
    """SHA-256 of the shared file, written with ``parts`` or compared with them. Raises InputError."""
    if path.is_file():
        _, there = _read_tensors(path)
        if there.keys() != parts.keys() or not all(torch.equal(there[name], parts[name]) for name in parts):
            raise InputError(f"'{path}' holds another pose and matching than these weights.", "Choose another folder.")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(parts, temporary, metadata={"version": __version__})
    return sha256(path)


def _with_shared(path: Path, digest: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of ``path`` and those that it left to the shared file beside it. Raises InputError."""
    beside = path.with_name(SHARED)
    if not beside.is_file():
        raise InputError(f"'{path}' needs '{SHARED}' beside it.", "Copy both files of the folder where it came from.")
    if sha256(beside) != digest:
        raise InputError(
            f"'{beside}' is not the file that '{path.name}' was trained behind (SHA-256 differs).",
            "Copy both files of the folder where it came from.",
        )
    return {**tensors, **_read_tensors(beside)[1]}


def load(path: str | Path, method: str | None = None) -> Weights:
    """Read and check a weights file.

    Args:
        path: a file that :func:`save` wrote.
        method: the method it must belong to; ``None`` = any.

    Raises:
        InputError: missing, not safetensors, truncated, another hash than the model card's, of another method, or with
            values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no weights file '{path}'.", "Check --weights.")
    digest = sha256(path)
    card = read_card(path)
    if card and card.get("sha256") != digest:
        raise InputError(
            f"'{path}' is not the file its model card describes (SHA-256 differs): damaged or exchanged.",
            "Fetch or train it again; after a deliberate change delete the .json beside it.",
        )
    about, tensors = _read_tensors(path)
    if "method" not in about:
        raise InputError(
            f"'{path}' holds tensors but does not say of which method.", "Use a file that `symreg train` wrote."
        )
    if method is not None and about["method"] != method:
        raise InputError(
            f"'{path}' holds weights of {about['method']}, not of {method}.",
            f"Use --method {about['method']}, or other weights.",
        )
    if "prealign" in about:
        tensors = _with_shared(path, about["prealign"], tensors)
    bad = _not_finite(tensors)
    if bad:
        raise InputError(
            f"'{path}' is unusable: '{bad}' holds NaN or infinite values.", "Train again from an earlier checkpoint."
        )
    options = parsed_json(about.get("options", "{}"), f"the header of '{path}'")
    if not isinstance(options, dict):
        raise InputError(f"'{path}' has a damaged header.", "Fetch or train it again.")
    return Weights(
        path, about["method"], about.get("size", ""), options, about.get("version", ""), tensors, digest, card
    )


def fill(network: nn.Module, weights: Weights) -> None:
    """Put weights into a network, in its own precision. Raises InputError when names or shapes differ.

    A method that runs without pose and matching takes its part of weights that were made with them.
    """
    own = network.state_dict()
    if not any(name.startswith("inner.") for name in own) and any(
        name.startswith("inner.") for name in weights.tensors
    ):
        weights = replace(weights, tensors={n[6:]: v for n, v in weights.tensors.items() if n.startswith("inner.")})
    for name in own:
        if name not in weights.tensors:
            raise _mismatch(network, weights, f"'{name}' is missing")
        if own[name].shape != weights.tensors[name].shape:
            raise _mismatch(
                network,
                weights,
                f"'{name}' is {tuple(weights.tensors[name].shape)} and should be {tuple(own[name].shape)}",
            )
    for name in weights.tensors:
        if name not in own:
            raise _mismatch(network, weights, f"'{name}' is not part of it")
    network.load_state_dict({name: value.to(own[name].dtype) for name, value in weights.tensors.items()})


def shipped(method: str) -> dict[str, Path]:
    """Weights that came with the package, by size."""
    start = f"{method}-"
    return {path.name[len(start) : -len(SUFFIX)]: path for path in sorted(FOLDER.glob(f"{start}*{SUFFIX}"))}


def find(method: str, file: str | None = None, size: str | None = None) -> Path:
    """The weights file of a run: ``file``, or the shipped one of ``size``, or any shipped one.

    Raises:
        InputError: there is none; says what can be done.
    """
    if file:
        return Path(file)
    here = shipped(method)
    if not here or (size and size not in here):
        what = f"{method} ({size})" if size else method
        raise InputError(
            f"there are no weights for {what}.",
            f"Train them with `symreg train --method {method}` or pass --weights FILE; --method syn needs none.",
        )
    return here[size] if size else next(iter(here.values()))


def _mismatch(network: nn.Module, weights: Weights, what: str) -> InputError:
    return InputError(
        f"'{weights.path}' (size '{weights.size}') does not fit {network.card.name} of size "
        f"'{network.size}' with these options: {what}.",
        "Use the size and options it was trained with.",
    )


def read_card(path: Path) -> dict[str, Any]:
    """The model card beside a weights file, {} where there is none. Raises InputError when it is not readable."""
    beside = card_path(path)
    if not beside.is_file():
        return {}
    try:
        card = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        raise InputError(f"the model card '{beside}' is not readable JSON.", "Fetch it again, or delete it.")
    return card


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            return dict(stream.metadata() or {}), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"'{path}' is not a complete safetensors file ({error}).",
            "Fetch or train it again; pickled .pt files are never read.",
        ) from None


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of the first tensor with NaN or infinity, or ''."""
    return next((name for name, value in tensors.items() if not torch.isfinite(value).all()), "")
