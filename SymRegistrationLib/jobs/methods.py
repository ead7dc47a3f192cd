"""What ``symreg methods`` tells: every method with its weights, publication and licence."""

from __future__ import annotations

from .. import networks
from ..console import number
from ..networks._base import parameter_count
from ..registration import methods, weights


def catalogue() -> list[dict]:
    """One plain dictionary a method, optimisers first: name, title, publication, licence, parameters per size, inverse,
    deviations from the publication, and the sizes whose weights came with the package."""
    return [_entry(name) for name in methods.names()]


def _entry(name: str) -> dict:
    card, learned = methods.card(name), methods.is_learned(name)
    sizes = networks.card(name).sizes if learned else ()
    return {
        "name": name,
        "title": card.title,
        "publication": card.publication,
        "licence": card.licence,
        "parameters": {size: parameter_count(networks.create(name, size)) for size in sizes},
        "inverse": card.inverse_method,
        "deviations": list(card.deviations),
        "weights": sorted(weights.shipped(name)) if learned else [],
    }


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
