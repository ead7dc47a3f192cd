"""Switches of the methods: what several share, and how values that cannot be are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..job import InputError

#: Of every size that repeats its finest level (see ``_passes``).
REPEATED = {"passes": 4, "force": True}


def check_choice(switch: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a method switch that has no such value. Raises InputError."""
    if value not in allowed:
        raise InputError(f"{switch} is {value!r}.", f"Choose one of: {', '.join(map(str, allowed))}.")


def check_choices(switches: Any, **allowed: Sequence[Any]) -> None:
    """:func:`check_choice` for the named attributes. Raises InputError."""
    for switch, values in allowed.items():
        check_choice(switch, getattr(switches, switch), values)


@dataclass(frozen=True)
class Repeated:
    """Switches of every method whose finest level can be repeated in the mean frame.

    Attributes:
        passes: how often that level looks at use; 0 = once, as in the paper.
        force: it sees the gradient of the local correlation, too; needs ``passes``.
    """

    passes: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.passes, int) or isinstance(self.passes, bool) or not 0 <= self.passes <= 20:
            raise InputError(f"passes is {self.passes!r}.", "Give a whole number from 0 (as in the paper) to 20.")
        if self.force and not self.passes:
            raise InputError("force=true needs passes.", "Add passes=4, or leave force out.")
