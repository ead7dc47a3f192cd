"""What the options of every kind of training must fulfil. Standard library only, so that help costs nothing."""

from __future__ import annotations

import math
from typing import Any

from ..job import MOST_THREADS, InputError, check_seed

PRECISIONS = ("auto", "float32", "bfloat16")


def check_shares(options: Any, names: str) -> None:
    """Refuse an attribute of the blank-separated ``names`` that is not between 0 and 1. Raises InputError."""
    for name in names.split():
        if not 0 <= getattr(options, name) <= 1:
            raise InputError(f"{_told(name)} is {getattr(options, name)}.", "It is a share: give 0 to 1.")


def check_least(options: Any, least: float, names: str) -> None:
    """Refuse an attribute of the blank-separated ``names`` that is infinite or below ``least``; ``None`` is not given.

    Raises:
        InputError: naming the attribute.
    """
    for name in names.split():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{_told(name)} is {value}.", f"Give at least {least}.")


def check_choice(options: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse an attribute that is none of what is allowed. Raises InputError."""
    if getattr(options, name) not in allowed:
        raise InputError(f"{_told(name)} is '{getattr(options, name)}'.", f"Choose one of: {', '.join(allowed)}.")


def check_process(options: Any) -> None:
    """What every training takes: ``precision``, ``seed``, ``threads`` and ``ema``. Raises InputError."""
    check_choice(options, "precision", PRECISIONS)
    check_seed(options.seed)
    if not 0 <= options.ema < 1:
        raise InputError(f"ema is {options.ema}.", "Give a decay from 0 (none) to below 1.")
    if (options.threads or 1) > MOST_THREADS:
        raise InputError(f"threads is {options.threads}.", f"Give at most {MOST_THREADS}.")


def _told(name: str) -> str:
    """An attribute as the command line calls it."""
    return name.replace("_", "-")
