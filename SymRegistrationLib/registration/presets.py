"""Presets: named balances of time and detail. They are data (``presets.json``); a new one is one more entry there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("presets.json")


@dataclass(frozen=True)
class Preset:
    """One entry of ``presets.json``.

    Attributes:
        title: for people.
        voxels: of the optimiser's working grid; its spacing follows from the size of the anatomy.
        memory_gb: that the optimiser's working grid takes, 10^9 bytes, measured and rounded up (RESULTS.md).
        after_network: most steps per level where a network has been, coarse to fine: from there about half of the
            schedule's steps, and fewer on the finest grid, lost no overlap on two development brains (tried by hand).
        settings: per optimiser what it changes of its own schedule; an optimiser that is not named keeps its defaults.
    """

    title: str
    voxels: float
    memory_gb: float
    after_network: tuple[int, ...]
    settings: Mapping[str, Mapping[str, Any]]


@lru_cache
def presets() -> dict[str, Preset]:
    """All presets by name, fastest first."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))["presets"]
    return {
        name: Preset(**{**entry, "after_network": tuple(entry["after_network"])}) for name, entry in entries.items()
    }
