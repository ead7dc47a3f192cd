"""What every kind of training takes, and how options are checked. Standard library only, so that help costs nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..job import MOST_THREADS, InputError, check_seed

PRECISIONS = ("auto", "float32", "bfloat16")


def check_shares(options: Any, names: str) -> None:
    """Refuse an attribute of the blank-separated ``names`` that is not between 0 and 1. Raises InputError."""
    for name in names.split():
        if not 0 <= getattr(options, name) <= 1:
            raise InputError(f"{_as_option(name)} is {getattr(options, name)}.", "It is a share: give 0 to 1.")


def check_least(options: Any, least: float, names: str) -> None:
    """Refuse an attribute of the blank-separated ``names`` that is infinite or below ``least``; ``None`` is not given.

    Raises:
        InputError: naming the attribute.
    """
    for name in names.split():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{_as_option(name)} is {value}.", f"Give at least {least}.")


def check_choice(options: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse an attribute that is none of what is allowed. Raises InputError."""
    if getattr(options, name) not in allowed:
        raise InputError(f"{_as_option(name)} is '{getattr(options, name)}'.", f"Choose one of: {', '.join(allowed)}.")


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """What every kind of training takes.

    Attributes:
        start: weights to start from.
        ema: decay of the moving average of the weights, which is validated and kept; 0 = none.
        stop_after: end this process after so many minutes with a checkpoint; the same command goes on.
        checkpoint_minutes: between checkpoints.
        precision: ``auto``, ``float32`` or ``bfloat16``.
        threads, seed: of the process.
        licence: of the weights, for the model card.
        command: that was typed, for the model card.
    """

    start: str | None = None
    ema: float = 0.999
    stop_after: float | None = None
    checkpoint_minutes: float = 5.0
    precision: str = "auto"
    threads: int | None = None
    seed: int = 0
    licence: str = "not stated"
    command: str = ""

    def __post_init__(self) -> None:
        check_least(self, 1, "threads")
        check_least(self, 0.01, "stop_after")
        check_least(self, 0, "checkpoint_minutes")
        check_choice(self, "precision", PRECISIONS)
        check_seed(self.seed)
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}.", "Give a decay from 0 (none) to below 1.")
        if (self.threads or 1) > MOST_THREADS:
            raise InputError(f"threads is {self.threads}.", f"Give at most {MOST_THREADS}.")


def _as_option(name: str) -> str:
    """An attribute as the command line calls it."""
    return name.replace("_", "-")
