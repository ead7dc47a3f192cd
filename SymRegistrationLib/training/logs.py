"""Logs of a training run: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log; a cut-off last line is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_row(path: Path, step: int) -> dict[str, Any] | None:
    """The validation of ``step``, or the last one, or ``None``."""
    found = rows(path)
    return next((row for row in found if row["step"] == step), found[-1] if found else None)
