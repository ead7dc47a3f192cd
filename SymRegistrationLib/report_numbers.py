"""What the numbers of a run mean: the verdict with its thresholds, the table's explanations, the command again.

Level 2, no pictures and no torch, so that other views (terminal, Slicer) can say the same.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from .console import duration, number, table
from .job import Job, Options

#: Folded voxels up to this share (%) are tolerable, none is good.
FOLDED_TOLERABLE = 0.01
#: Mean inverse consistency error in voxels: good below the first, unusable above the second.
ICE_GOOD, ICE_BAD = 0.1, 0.5
#: Local volume changes beyond these factors deserve a look.
VOLUME_LOW, VOLUME_HIGH = 0.1, 10.0
#: 95 % of the content have a calibrated 68 % radius of so many voxels of the working grid: good below, unusable above.
UNCERTAIN_GOOD, UNCERTAIN_BAD = 1.5, 3.0
#: A similarity that fell by less than this is unchanged: interpolation and rounding move it as much.
SIMILARITY_TOLERANCE = 0.005
#: Scans that are this alike (local correlation) as they are need not become more so.
ALIKE = 0.9
STAGES = ("before", "aligned", "after")
VERDICTS = {"good": "No fault found", "look": "Usable, but look closer", "bad": "Do not use this without checking"}


@dataclass(frozen=True)
class Check:
    """One statement; ``level`` is ``good``, ``look`` or ``bad``."""

    level: str
    text: str


def verdict(found: list[Check]) -> tuple[str, str]:
    """(level, words) of the worst check."""
    level = next((level for level in ("bad", "look") if any(check.level == level for check in found)), "good")
    return level, VERDICTS[level]


def checks(metrics: dict) -> list[Check]:
    """Judge the numbers of metrics.json one by one, thresholds stated; parts that are missing are not judged."""
    found = []
    alignment, similarity = metrics.get("alignment") or {}, metrics.get("similarity") or {}
    if alignment.get("kind") not in (None, "none"):
        name = f"The initial alignment ({alignment['kind']}) is"
        if alignment.get("unsure"):
            found.append(Check("bad", f"{name} unsure: another position fits nearly as well."))
        else:
            found.append(Check("good", f"{name} clear: no other position fits as well."))
    if similarity:
        found.append(_alike(similarity))
    return found + _measured(metrics) + _sound(metrics.get("quality") or {}) + _certain(metrics.get("uncertainty") or {})


def _alike(similarity: dict) -> Check:
    """Whether the scans became more alike than they were, and not less than the alignment had made them."""
    before, aligned, after = (similarity[stage] for stage in STAGES)
    change = f"{similarity['name']} went {_way(similarity, '{}')} (a loss below {SIMILARITY_TOLERANCE:g} counts as none)"
    if after < max(before, aligned) - SIMILARITY_TOLERANCE:
        return Check("bad", f"The scans became LESS alike: {change}.")
    if after > before + SIMILARITY_TOLERANCE:
        return Check("good", f"The scans became more alike: {change}.")
    if after >= ALIKE:
        return Check("good", f"The scans were and are alike: {change}.")
    return Check("look", f"The scans became NO more alike, and {number(after, 2)} is below {ALIKE:g}: {change}.")


def worth(told: dict) -> str:
    """What the uncertainty map of a run is worth, in one or two sentences; ``told`` is that part of metrics.json."""
    if not told.get("calibrated"):
        return "Uncertainty: relative only. The map shows where the result is less stable, not by how many mm it errs."
    judged = told.get("judged") or {}
    text = f"Uncertainty: calibrated on {told.get('on')}."
    if judged:
        text += (f" On other scans with known warps the 68 % radius held {number(judged.get('coverage_68'), 0)} % of the true errors; rank "
                 f"correlation with them {number(judged.get('rank'), 2)}.")
    return text + " Scans of two people, or organs that slide, err by more: at landmarks of breathing livers about twice as much."


def _certain(told: dict) -> list[Check]:
    """The uncertainty map, where there is one that can be judged."""
    if told.get("disagreement"):
        text = told["disagreement"]
        return [Check("bad", f"{text[:1].upper()}{text[1:]}.")]
    if not told.get("calibrated"):
        return []
    share = told["p95_mm"] / told["voxel_mm"]
    level = "good" if share < UNCERTAIN_GOOD else "look" if share < UNCERTAIN_BAD else "bad"
    return [Check(level, f"Calibrated uncertainty: 68 % of errors below {number(told['median_mm'], 2)} mm at the median place, below "
                         f"{number(told['p95_mm'], 2)} mm in 95 % of the content (good below {UNCERTAIN_GOOD:g}, unusable above "
                         f"{UNCERTAIN_BAD:g} voxels of the working grid).")]


def _measured(metrics: dict) -> list[Check]:
    """Labels and landmarks, which the method has not seen."""
    found = []
    labels, marks = metrics.get("labels"), metrics.get("landmarks")
    if labels:
        worse = labels["mean_after"] < max(labels["mean_aligned"], labels["mean_before"])
        text = f"Mean Dice of {len(labels['per_label'])} labels went {_way(labels, 'mean_{}')}."
        found.append(Check("bad" if worse else "good", text))
    if marks:
        worse = marks["mean_after_mm"] > min(marks["mean_aligned_mm"], marks["mean_before_mm"])
        text = f"Mean error at {marks['count']} landmarks went {_way(marks, 'mean_{}_mm')} mm."
        found.append(Check("bad" if worse else "good", text))
    return found


def _way(values: dict, key: str) -> str:
    before, aligned, after = (number(values[key.format(stage)], 2) for stage in STAGES)
    return f"from {before} as scanned over {aligned} aligned to {after}"


def _sound(quality: dict) -> list[Check]:
    """The transforms as maps: folding, inverse consistency, extreme volume change."""
    found = []
    share, mean = quality.get("folded_percent"), quality.get("ice_mean_voxel")
    if share == 0:
        found.append(Check("good", "No folding: every voxel has a Jacobian determinant above 0."))
    elif share is not None:
        text = f"{number(quality['folded_voxels'])} voxels ({number(share, 4)} %) are folded"
        level = "look" if share <= FOLDED_TOLERABLE else "bad"
        found.append(Check(level, f"{text}; up to {FOLDED_TOLERABLE} % is tolerable."))
    if mean is not None:
        level = "good" if mean < ICE_GOOD else "look" if mean < ICE_BAD else "bad"
        text = (
            f"Forward and inverse undo each other to {number(mean)} voxels on average (good below {ICE_GOOD}, unusable"
        )
        found.append(Check(level, f"{text} above {ICE_BAD}); 95 % of points to {number(quality['ice_p95_mm'])} mm."))
    if "jacobian_min" in quality:
        low, high = quality["jacobian_min"], quality["jacobian_max"]
        if low < VOLUME_LOW or high > VOLUME_HIGH:
            text = f"Some volume changes are extreme: factors {number(low, 2)} to {number(high, 2)}"
            found.append(Check("look", f"{text} (usual: {VOLUME_LOW} to {VOLUME_HIGH:g})."))
    return found


_MEANINGS = {
    "folded_voxels": (
        "folded voxels",
        "voxels with a Jacobian determinant of 0 or less: space is turned inside out there",
        0,
    ),
    "folded_percent": ("folded, % of the volume", "0 is right for a diffeomorphism", 4),
    "folded_percent_content": ("folded, % of the content", "the same where the scan shows something", 4),
    "jacobian_min": ("Jacobian, smallest", "strongest local shrinkage (fixed to moving), as a volume factor", 3),
    "jacobian_median": ("Jacobian, median", "typical volume factor, the alignment's scale included", 3),
    "jacobian_max": ("Jacobian, largest", "strongest local growth (fixed to moving)", 3),
    "sd_log_jacobian": ("SD of log Jacobian", "irregularity of the deformation; lower is smoother", 3),
    "ice_mean_mm": (
        "inverse consistency error, mean, mm",
        "how far a point misses itself after forward and inverse",
        4,
    ),
    "ice_p95_mm": ("inverse consistency error, 95 %, mm", "95 of 100 points stay below", 4),
    "ice_max_mm": ("inverse consistency error, largest, mm", "the worst point in the scan's content", 3),
    "ice_mean_voxel": ("inverse consistency error, mean, voxels", "the same in voxels of the fixed scan", 4),
    "inverse_method": ("inverse obtained by", "how the second direction came to be", 0),
    "residual_voxel": (
        "largest residual on the working grid, voxels",
        "worst mismatch of the two fields before they were carried to the scans",
        3,
    ),
}


def number_rows(metrics: dict) -> list[tuple[str, str, str]]:
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
        (name, number(quality[key], digits), meaning)
        for key, (name, meaning, digits) in _MEANINGS.items()
        if key in quality
    ]
    told = metrics.get("uncertainty")
    if told:
        value = " / ".join(number(told.get(f"{k}_mm"), 2) for k in ("median", "mean", "p95"))
        rows.append(("uncertainty, median / mean / 95 %, mm", value, worth(told)))
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
    for name in ("method", "preset", "metric", "device", "seed"):
        if name in metrics:
            rows.append((name, str(metrics[name]), "setting"))
    return rows


_FLAGS = {
    "transform_format": "--transform-format",
    "composite": "--composite",
    "guide_with_points": "--guide-with-points",
    "memory_gb": "--memory",
}


def command_of(job: dict) -> str:
    """The ``symreg register`` command that asks for the same job; options at their default are left out."""
    words = ["symreg", "register", job["fixed"], job["moving"], "-o", job["output"]]
    options = {**(job.get("options") or {})}
    switches = options.pop("method_options", None) or {}
    defaults = {f.name: f.default for f in (*fields(Job), *fields(Options))}
    for name, value in [*job.items(), *options.items()]:
        if name in ("fixed", "moving", "output", "options") or value is None or value == defaults.get(name):
            continue
        if name == "report":
            words.append("--no-report")
            continue
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        words += [flag] if value is True else [flag, str(value)]
    for name, value in switches.items():
        words += ["--option", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join(words)


def summary(metrics: dict, output: str) -> str:
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
        lines.append(f"uncertainty                {number(told['mean_mm'], 2)} mm mean, {number(told['p95_mm'], 2)} mm 95 % ({what})")
    if metrics["alignment"].get("unsure"):
        lines.append("the initial alignment is UNSURE: look at the report before you use this")
    report = Path(output) / "report.html"
    lines += ["", f"results in {output}" + (f", look at {report}" if report.exists() else "")]
    return "\n".join(lines)
