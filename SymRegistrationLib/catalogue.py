"""What ``symreg methods`` tells: the registry of learned methods and the optimiser, with weights, publication, licence.

Level 4.
"""

from __future__ import annotations

from . import networks, weights
from .console import number
from .networks._base import parameter_count

_SYN = {
    "name": "syn",
    "title": "symmetric diffeomorphic optimiser; needs no weights and no training, takes any organ and contrast",
    "publication": "Avants et al., Symmetric diffeomorphic image registration with cross-correlation, Medical Image "
    "Analysis 12:26-41 (2008), doi:10.1016/j.media.2007.06.004",
    "licence": "Apache-2.0",
    "parameters": {},
    "inverse": "both directions from the same half-way fields",
    "deviations": [],
}


def catalogue() -> list[dict]:
    """One plain dictionary a method, ``syn`` first: name, title, publication, licence, parameters per size, inverse,
    deviations from the publication, and the sizes whose weights came with the package."""
    methods = [{**_SYN, "weights": []}]
    for name in networks.names():
        card = networks.card(name)
        methods.append(
            {
                "name": name,
                "title": card.title,
                "publication": card.publication,
                "licence": card.licence,
                "parameters": {size: parameter_count(networks.create(name, size)) for size in card.sizes},
                "inverse": card.inverse_method,
                "deviations": list(card.deviations),
                "weights": sorted(weights.shipped(name)),
            }
        )
    return methods


def catalogue_table(methods: list[dict]) -> str:
    """The catalogue for people."""
    parts = []
    for method in methods:
        sizes = ", ".join(f"{number(count)} ({size})" for size, count in method["parameters"].items())
        here = ", ".join(method["weights"]) or (
            "not here: train them, or give --weights FILE" if sizes else "none needed"
        )
        facts = (
            ("weights", here),
            ("parameters", sizes),
            ("inverse", method["inverse"]),
            ("paper", method["publication"]),
            ("licence", method["licence"]),
        )
        lines = [f"{method['name']}: {method['title']}", *(f"  {key:<12}{value}" for key, value in facts if value)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
