"""What the numbers of a run mean: the verdict with its thresholds, the table's explanations, the command again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..console import duration, number, table
from ..job import Job, Options
from ..quality.checks import STAGES, uncertainty_statement
from ..quality.schema import Quality, meanings


def number_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, plain meaning) of everything that was measured."""
    rows = []
    alignment, similarity = metrics.get("alignment") or {}, metrics.get("similarity") or {}
    if similarity:
        value = " / ".join(number(similarity[k]) for k in ("before", "aligned", "after"))
        rows.append(
            (
                f"similarity ({similarity['name']}): as scanned / aligned / registered",
                value,
                "local correlation of the intensities, 0 to 1; higher is more alike",
            )
        )
    quality = metrics.get("quality") or {}
    rows += [
        (meaning.name, number(quality[key], meaning.digits), meaning.sentence)
        for key, meaning in meanings(Quality).items()
        if key in quality
    ]
    told = metrics.get("uncertainty")
    if told:
        value = " / ".join(number(told.get(f"{k}_mm"), 2) for k in ("median", "mean", "p95"))
        rows.append(("uncertainty, median / mean / 95 %, mm", value, uncertainty_statement(told)))
    if alignment:
        rows.append(("initial alignment", str(alignment.get("kind")), "what brought the scans roughly together"))
        rows.append(
            (
                "confidence of the alignment",
                number(alignment.get("confidence"), 2),
                "0 to 1: how far the best position is ahead of the next",
            )
        )
    seconds = metrics.get("seconds") or {}
    if seconds:
        rows.append(
            (
                "time, s",
                number(seconds.get("total"), 2),
                ", ".join(f"{stage} {number(value, 2)}" for stage, value in seconds.items() if stage != "total"),
            )
        )
    rows.append(("peak memory, GB", number(metrics.get("peak_memory_gb"), 2), "largest size of the process so far"))
    for name in ("method", "preset", "similarity_measure", "device", "seed"):
        if name in metrics:
            rows.append((name.replace("_", " "), str(metrics[name]), "setting"))
    return rows


_ON = {"report": "--no-report", "keep_state": "--no-keep-state"}
_FLAGS = {
    "transform_format": "--transform-format",
    "composite": "--composite",
    "dense": "--dense",
    "guide_with_points": "--guide-with-points",
    "memory_gb": "--memory",
    "fixed_contrasts": "--fixed-contrast",
    "moving_contrasts": "--moving-contrast",
}


def command_of(job: dict) -> str:
    """The ``symreg register`` command that asks for the same job; options at their default are left out."""
    words = ["symreg", "register", job["fixed"], job["moving"], "-o", job["output"]]
    options = {**(job.get("options") or {})}
    switches = options.pop("method_options", None) or {}
    defaults = {f.name: f.default for f in (*fields(Job), *fields(Options))}
    for name, value in [*job.items(), *options.items()]:
        if name in _ON:  # the command line has these on unless told otherwise, whatever a job says by default
            words += [] if value else [_ON[name]]
            continue
        if name in ("fixed", "moving", "output", "options") or value is None or value == defaults.get(name):
            continue
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    for name, value in switches.items():
        words += ["--option", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join(words)


def summary(metrics: Mapping[str, Any], output: str) -> str:
    """The outcome of a run for people: what became better, what to check, where to look."""
    quality, rows = metrics["quality"], []
    parts = (
        (f"similarity ({metrics['similarity']['name']})", metrics["similarity"], "{}", 3),
        ("Dice", metrics.get("labels"), "mean_{}", 3),
        ("landmark error, mm", metrics.get("landmarks"), "mean_{}_mm", 2),
    )
    for name, values, key, digits in parts:
        if values:
            rows.append((name, *(number(values[key.format(stage)], digits) for stage in STAGES)))
    lines = [
        table(("", *STAGES), rows),
        "",
        f"folded voxels              {number(quality['folded_voxels'])} ({number(quality['folded_percent'], 4)} %)",
        f"inverse consistency error  {number(quality['ice_mean_mm'])} mm mean, "
        f"{number(quality['ice_p95_mm'])} mm 95 %, {number(quality['ice_max_mm'])} mm largest",
        f"time                       {duration(metrics['seconds']['total'])} with {metrics['method']} "
        f"on {metrics['device']}",
    ]
    told = metrics.get("uncertainty")
    if told:
        what = "68 % radius, calibrated" if told["calibrated"] else "relative only"
        lines.append(
            f"uncertainty                {number(told['mean_mm'], 2)} mm mean, {number(told['p95_mm'], 2)} mm 95 % "
            f"({what})"
        )
    judged = metrics.get("verdict")
    if judged:
        lines.append(f"verdict                    {judged['level']}")
        lines += [f"  {reason}" for reason in judged["reasons"]]
    if metrics["alignment"].get("unsure"):
        lines.append("the initial alignment is UNSURE: look at the report before you use this")
    report = Path(output) / "report.html"
    lines += ["", f"results in {output}" + (f", look at {report}" if report.exists() else "")]
    return "\n".join(lines)
