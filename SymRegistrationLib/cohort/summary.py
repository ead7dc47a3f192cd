"""The outcome of a batch in numbers: one row a pair, and which pairs stand out."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import duration, number
from ..quality.checks import checks, verdict
from .table import Row

#: A pair stands out when a robust z-score passes this (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993).
THRESHOLD = 3.5
#: Fewer finished pairs than this say nothing about what is usual.
LEAST = 5
#: measure: (title, +1 = large is bad or -1 = small is bad, smallest spread that counts as one, digits).
MEASURES = {
    "similarity_after": ("similarity", -1, 0.01, 3),
    "dice_after": ("mean Dice", -1, 0.01, 3),
    "landmarks_after_mm": ("landmark error, mm", 1, 0.1, 2),
    "confidence": ("confidence of the alignment", -1, 0.02, 2),
    "folded_percent": ("folded, %", 1, 0.002, 4),
    "ice_mean_mm": ("inverse consistency, mm", 1, 0.01, 3),
    "sd_log_jacobian": ("SD of log Jacobian", 1, 0.01, 3),
}
COLUMNS = (
    "id",
    "status",
    "reason",
    "score",
    "stands_out",
    "verdict",
    "fixed",
    "moving",
    "method",
    "preset",
    "similarity_before",
    "similarity_aligned",
    "similarity_after",
    "dice_before",
    "dice_after",
    "landmarks_before_mm",
    "landmarks_after_mm",
    "confidence",
    "unsure",
    "folded_voxels",
    "folded_percent",
    "ice_mean_mm",
    "ice_p95_mm",
    "ice_max_mm",
    "jacobian_min",
    "jacobian_max",
    "sd_log_jacobian",
    "log_scale",
    "seconds",
    "attempts",
    "folder",
)


@dataclass
class PairState:
    """One pair and what became of it.

    Attributes:
        row: of the table.
        status: ``waiting``, ``done`` or ``failed``.
        reason: why it failed.
        kept: finished already before this run.
        numbers: of a finished pair, by the names in ``COLUMNS``.
        score, stands_out: see :func:`judge`.
    """

    row: Row
    status: str = "waiting"
    reason: str = ""
    kept: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    attempts: int = 0
    score: float = 0.0
    stands_out: str = ""


def numbers_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the summary keeps of a pair's metrics."""
    import math

    judged = checks(metrics)
    fault = next((check.text for check in judged if check.level == "bad"), "")
    found: dict[str, Any] = {
        "method": metrics.get("method"),
        "preset": metrics.get("preset"),
        "verdict": verdict(judged)[0],
        "fault": fault,
    }
    similarity, labels = metrics.get("similarity") or {}, metrics.get("labels") or {}
    marks, pose, quality = metrics.get("landmarks") or {}, metrics.get("alignment") or {}, metrics.get("quality") or {}
    found |= {f"similarity_{stage}": similarity.get(stage) for stage in ("before", "aligned", "after")}
    for stage in ("before", "after"):
        found[f"dice_{stage}"] = labels.get(f"mean_{stage}")
        found[f"landmarks_{stage}_mm"] = marks.get(f"mean_{stage}_mm")
    found |= {name: pose.get(name) for name in ("confidence", "unsure")}
    found |= {name: quality[name] for name in COLUMNS if name in quality}
    if pose.get("matrix"):
        (a, b, c), (d, e, f), (g, h, i) = (row[:3] for row in pose["matrix"][:3])
        found["log_scale"] = math.log(abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)))
    return found


def finish(state: PairState, metrics: dict[str, Any]) -> None:
    """Take over a finished run: ``done``, or ``failed`` when it says that the scans were not registered."""
    judged = metrics.get("verdict") or {}
    state.numbers = numbers_of(metrics)
    state.status = "done" if judged.get("registered", True) else "failed"
    if state.status == "failed":
        state.reason = " ".join(judged["reasons"]) + " The folder holds the best state there was."


def judge(states: Sequence[PairState]) -> None:
    """Give every finished pair its score and say why it stands out.

    The score is the largest robust z-score over the measures, 0.6745 (x - median) / MAD, counted towards the bad side,
    with a floor for the MAD so that near-identical pairs do not accuse each other. A verdict of ``bad`` counts as
    standing out too.
    """
    done = [state for state in states if state.status == "done"]
    for state in done:
        state.score, state.stands_out = 0.0, ""
    for name, (title, sign, floor, digits) in MEASURES.items():
        pairs = [(state, state.numbers.get(name)) for state in done]
        values = [value for _, value in pairs if isinstance(value, (int, float))]
        if len(values) < LEAST:
            continue
        middle = statistics.median(values)
        spread = max(statistics.median(abs(value - middle) for value in values), floor)
        for state, value in pairs:
            if not isinstance(value, (int, float)):
                continue
            z = 0.6745 * sign * (value - middle) / spread
            if z > THRESHOLD:
                text = f"{title} {number(value, digits)} (usual {number(middle, digits)})"
                state.stands_out = f"{state.stands_out}; {text}" if state.stands_out else text
            state.score = max(state.score, z)
    for state in done:
        if state.numbers.get("verdict") == "bad":
            fault = state.numbers.get("fault") or "its report says: do not use"
            state.stands_out = f"{fault} {state.stands_out}".strip()
            state.score += THRESHOLD


def ordered(states: Sequence[PairState]) -> list[PairState]:
    """Failed ones first, then by score, then as in the table."""
    rank = {"failed": 0, "done": 1, "waiting": 2}
    return sorted(states, key=lambda state: (rank[state.status], -round(state.score, 9), state.row.line))


def csv_text(states: Sequence[PairState]) -> str:
    """``summary.csv``, in the table's order."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for state in states:
        job = state.row.job
        known = {
            "id": state.row.identity,
            "status": state.status,
            "reason": " ".join(state.reason.split()),
            "fixed": job.fixed,
            "moving": job.moving,
            "method": job.options.method,
            "preset": job.options.preset,
            "folder": state.row.identity,
            "seconds": None if state.seconds is None else round(state.seconds, 2),
            "attempts": state.attempts,
        }
        if state.status == "done":
            known |= {**state.numbers, "score": round(state.score, 2), "stands_out": state.stands_out}
        writer.writerow({name: "" if value is None else value for name, value in known.items()})
    return text.getvalue()


def counts(states: Sequence[PairState]) -> dict[str, int]:
    """How many are ``done``, ``failed``, ``waiting``, ``kept`` from before, and ``standing_out``."""
    found = {status: sum(state.status == status for state in states) for status in ("done", "failed", "waiting")}
    return {
        "pairs": len(states),
        **found,
        "kept": sum(state.kept for state in states),
        "standing_out": sum(bool(state.stands_out) for state in states),
    }


def summary_text(states: Sequence[PairState], output: str, seconds: float, shown: int = 12) -> str:
    """The outcome for people."""
    found = counts(states)
    lines = [
        f"{found['done']} of {found['pairs']} pairs done in {duration(seconds)}"
        + (f", {found['kept']} of them before" if found["kept"] else "")
        + (f"; {found['failed']} FAILED" if found["failed"] else "")
        + (f"; {found['waiting']} not yet tried" if found["waiting"] else "")
    ]
    best = ordered(states)
    for title, part, column in (
        ("failed", [s for s in best if s.status == "failed"], lambda s: s.reason),
        ("stands out", [s for s in best if s.stands_out], lambda s: s.stands_out),
    ):
        if part:
            width = max(len(state.row.identity) for state in part[:shown])
            lines += [
                "",
                f"{title}:",
                *(f"  {s.row.identity.ljust(width)}  {' '.join(column(s).split())}" for s in part[:shown]),
            ]
            lines += [f"  and {len(part) - shown} more"] if len(part) > shown else []
    lines += ["", f"look at {Path(output) / 'index.html'}; every number is in {Path(output) / 'summary.csv'}"]
    return "\n".join(lines)
