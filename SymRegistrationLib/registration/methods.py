"""One registry of all that ``--method`` takes: the optimisers and the networks.

A new optimiser is one file in ``registration/optimisers/``, a new network one file in ``networks/``; nothing else has
to know it.
"""

from __future__ import annotations

import json

from .. import networks
from ..job import InputError, MethodCard
from . import catalogue, optimisers


def names() -> list[str]:
    """All methods, optimisers first."""
    return [*optimisers.names(), *networks.names()]


def is_learned(name: str) -> bool:
    """Whether a method is a network, which needs weights. Raises InputError for an unknown name."""
    if name in optimisers.names():
        return False
    if name in networks.names():
        return True
    raise InputError(f"there is no method '{name}'.", f"Known: {', '.join(names())}.")


def card(name: str) -> MethodCard:
    """The card of a method: an optimiser's or a network's. Raises InputError for an unknown name."""
    return networks.card(name) if is_learned(name) else optimisers.card(name)


def pose(name: str) -> str:
    """The kind of pose that is all a linear method finds; "" for a method that bends. Raises InputError."""
    return "" if is_learned(name) else optimisers.card(name).pose


def catalogue_text() -> str:
    """The registry as the text of ``methods.json``, which the Slicer panel and checks without torch read."""
    entries = [
        {
            "name": one.name,
            "title": one.label,
            "description": one.description,
            "publication": one.publication,
            "needs_weights": is_learned(one.name),
            "linear": bool(pose(one.name)),
        }
        for one in map(card, names())
    ]
    return json.dumps({"schema": 1, "methods": entries}, indent=1) + "\n"


if __name__ == "__main__":
    catalogue.FILE.write_text(catalogue_text(), encoding="utf-8")
