"""The registry of optimisers: every file of this folder that does not begin with ``_`` is one."""

from __future__ import annotations

import importlib
import pkgutil

from . import _base
from ._base import Optimiser, OptimiserCard, RunSettings

__all__ = ["REFINER", "Optimiser", "OptimiserCard", "RunSettings", "card", "create", "names"]

#: Refines what a network found.
REFINER = "syn"


def names() -> list[str]:
    """Names of all optimisers: the one that refines first, the others sorted."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_base._REGISTRY, key=lambda name: (name != REFINER, name))


def card(name: str) -> OptimiserCard:
    """The card of an optimiser. Raises KeyError when there is none of that name."""
    names()
    return _base._REGISTRY[name].card


def create(name: str) -> Optimiser:
    """An optimiser, ready to run. Raises KeyError when there is none of that name."""
    names()
    return _base._REGISTRY[name]()
