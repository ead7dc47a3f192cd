"""What ``symreg methods`` tells: the registry of learned methods and the optimiser, with weights, publication, licence.

Level 4.
"""

from __future__ import annotations

from . import networks
from .console import number
from .networks._base import parameter_count

_SYN = {
    "name": "syn",
    "title": "symmetric diffeomorphic optimiser; needs no weights and no training, takes any organ and contrast",
    "publication": "Avants et al., Symmetric diffeomorphic image registration with cross-correlation, Medical Image Analysis "
                   "12:26-41 (2008), doi:10.1016/j.media.2007.06.004",
    "licence": "Apache-2.0",
    "parameters": {},
    "inverse": "both directions from the same half-way fields",
    "deviations": [],
}


def catalogue() -> list[dict]:
    """One plain dictionary a method, ``syn`` first: name, title, publication, licence, parameters per size, inverse,
    deviations from the publication, and whether weights are there."""
    methods = [{**_SYN, "weights": True}]
    for name in networks.names():
        card = networks.card(name)
        methods.append({
            "name": name, "title": card.title, "publication": card.publication, "licence": card.licence,
            "parameters": {size: parameter_count(networks.create(name, size)) for size in card.sizes},
            "inverse": card.inverse_method, "deviations": list(card.deviations), "weights": _weights_present(name),
        })
    return methods


def catalogue_table(methods: list[dict]) -> str:
    """The catalogue for people."""
    parts = []
    for method in methods:
        sizes = ", ".join(f"{number(count)} ({size})" for size, count in method["parameters"].items())
        weights = "none needed" if not sizes else "present" if method["weights"] else "not here: train them, or give --weights FILE"
        lines = [f"{method['name']}: {method['title']}"]
        lines += [f"  {key:<12}{value}" for key, value in (("weights", weights), ("parameters", sizes), ("inverse", method["inverse"]),
                                                           ("paper", method["publication"]), ("licence", method["licence"])) if value]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
