"""What is known of the methods without importing one (no torch): ``methods.json``, generated from the registry.

``python -m SymRegistrationLib.registration.methods`` writes the file anew; a test compares it with the registry.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("methods.json")


@lru_cache
def known() -> dict[str, dict]:
    """Per method's name: ``name``, ``title``, ``description``, ``publication``, ``needs_weights``, ``linear``;
    optimisers first."""
    return {entry["name"]: entry for entry in json.loads(FILE.read_text(encoding="utf-8"))["methods"]}


def needs_weights(name: str) -> bool:
    """False for an optimiser; True for a network, and for a name that only the registry itself may know."""
    return known().get(name, {}).get("needs_weights", True)


def is_linear(name: str) -> bool:
    """True for a method that only aligns: its transforms are linear."""
    return known().get(name, {}).get("linear", False)
