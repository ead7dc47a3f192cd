"""The registry of learned methods: every file of this folder that does not begin with ``_`` is one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..job import InputError
from . import _base
from ._base import Card, SymmetricNetwork
from ._prealign import PreAligned


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")


def names() -> list[str]:
    """Names of all learned methods, sorted."""
    _discover()
    return sorted(_base._REGISTRY)


def network_class(name: str) -> type[SymmetricNetwork]:
    """The class of a method. Raises InputError with the known names."""
    _discover()
    if name not in _base._REGISTRY:
        raise InputError(f"there is no network '{name}'.", f"Known: {', '.join(names())}.")
    return _base._REGISTRY[name]


def card(name: str) -> Card:
    """The card of a method. Raises InputError with the known names."""
    return network_class(name).card


def create(name: str, size: str = "small", **options) -> SymmetricNetwork:
    """A network with fresh weights.

    Args:
        name: from :func:`names`.
        size: a key of the card's ``sizes``.
        options: the method's own switches; they override the size's. Every method takes ``prealign=True``: a learned
            pose and matching in front of it, see :class:`~SymRegistrationLib.networks._prealign.PreAligned`.

    Raises:
        InputError: unknown name, size or switch.
    """
    cls = network_class(name)
    if size not in cls.card.sizes:
        raise InputError(f"{name} has no size '{size}'.", f"Known: {', '.join(cls.card.sizes)}.")
    if "front" in options:  # what weights made before version 0.2 call it
        options.setdefault("prealign", options.pop("front"))
    return _built(cls, size, {**cls.card.sizes[size], **options})


def restore(name: str, size: str, options: Mapping[str, Any]) -> SymmetricNetwork:
    """The network that weights were made for: ``options`` are all of its switches, whatever a size means today.

    Raises:
        InputError: as :func:`create`.
    """
    cls, options = network_class(name), dict(options)
    if size and size not in cls.card.sizes:
        raise InputError(f"{name} has no size '{size}'.", f"Known: {', '.join(cls.card.sizes)}.")
    if "front" in options:
        options.setdefault("prealign", options.pop("front"))
    return _built(cls, size, options)


def _built(cls: type[SymmetricNetwork], size: str, options: dict[str, Any]) -> SymmetricNetwork:
    own, name = dict(options), cls.card.name
    prealign = own.pop("prealign", False)
    if not isinstance(prealign, bool):
        raise InputError(f"prealign is {prealign!r}.", "Choose one of: true, false.")
    try:
        network = cls(**own)
    except TypeError as error:
        raise InputError(
            f"{name} does not take these options ({error}).",
            "Leave out --option, or see the switches of the method in its file.",
        ) from None
    network = PreAligned(network) if prealign else network
    network.size, network.options = size, MappingProxyType(options)
    return network
