"""What the numbers of a run mean: thresholds, single checks and the verdict; no torch, so every view can
say the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..console import number
from .schema import Verdict

# The first four are judgements of what a use can bear; none was fitted to failures.
#: Folded voxels up to this share (%) are tolerable, none is good: a diffeomorphism has none.
FOLDED_TOLERABLE = 0.01
#: Mean inverse consistency error in voxels of the working grid: good below the first, unusable above the second. Brains
#: reach 0.02 to 0.03 (results/brains.md); half a voxel is what a nearest-neighbour label may be off by anyway.
ICE_GOOD, ICE_BAD = 0.1, 0.5
#: Local volume changes beyond these factors deserve a look: no healthy tissue of one kind shrinks or grows tenfold.
VOLUME_LOW, VOLUME_HIGH = 0.1, 10.0
#: 95 % of the content have a calibrated 68 % radius of so many voxels of the working grid: good below, unusable above.
UNCERTAIN_GOOD, UNCERTAIN_BAD = 1.5, 3.0
#: A similarity that fell by less than this is unchanged: interpolation and rounding move it as much.
SIMILARITY_TOLERANCE = 0.005
#: Scans that are this alike (local correlation) as they are need not become more so.
ALIKE = 0.9
#: Standard errors by which the inside must agree better than moved apart: below the first the scans do not belong
#: together as they lie, below the second look. Measured (RESULTS.md): right poses 7.7 to 15, poses 20 degrees or 10 to
#: 12 mm off at most 3.9, lungs of two people 2.7 before they are bent, other organs at most 1.0.
STRUCTURE_FAIL, STRUCTURE_LOOK = 2.0, 5.0
#: Share by which the mutual information may grow when the moving scan is mirrored: above the first the scan is
#: mirrored, above the second the images do not tell. Measured (RESULTS.md): mirrored scans of one person 0.06 to 0.18,
#: of two people -0.004 to 0.03; right scans of one person -0.58 to -0.04, of two people -0.03 to 0.004.
MIRRORED, MIRRORED_LOOK = 0.04, -0.005
#: Share of the smaller content that must lie on content of the other scan.
COVERED_FAIL, COVERED_LOOK = 0.5, 0.7
#: Share of one scan's content that must lie on content of the other, within the fields of view. Measured: one person at
#: the true pose 1.00, one of the two scans half empty 0.43 to 0.59.
SHARED_LOOK = 0.7

#: What ``metrics.json`` calls the levels.
PASS_WARN_FAIL = {"good": "PASS", "look": "WARN", "bad": "FAIL"}

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


def conclusion(metrics: Mapping[str, Any]) -> Verdict:
    """The ``verdict`` of metrics.json: PASS, WARN or FAIL, whether the scans count as registered, and the reasons."""
    judged = checks(metrics)
    level, _ = verdict(judged)
    reasons = [check.text for check in judged if check.level == level] if level != "good" else []
    return {
        "level": PASS_WARN_FAIL[level],
        "registered": not any(check.level == "bad" for check in _evident(metrics)),
        "reasons": reasons,
    }


def checks(metrics: Mapping[str, Any]) -> list[Check]:
    """Judge the numbers of metrics.json one by one, thresholds stated; parts that are missing are not judged."""
    found = _evident(metrics)
    alignment, similarity = metrics.get("alignment") or {}, metrics.get("similarity") or {}
    if alignment.get("kind") not in (None, "none"):
        name = f"The initial alignment ({alignment['kind']}) is"
        if alignment.get("unsure"):
            found.append(Check("bad", f"{name} unsure: another position fits nearly as well."))
        else:
            found.append(Check("good", f"{name} clear: no other position fits as well."))
    two_contrasts = bool(metrics.get("evidence")) and alignment.get("measure") == "mi"
    if similarity and not two_contrasts:  # local correlation says little across contrasts, the evidence does
        found.append(_alike(similarity))
    return (
        found
        + _measured(metrics)
        + _sound(metrics.get("quality") or {})
        + [Check("good", text) for text in [sliding_statement(metrics.get("sliding") or {})] if text]
        + _certain(metrics.get("uncertainty") or {})
    )


def _alike(similarity: dict) -> Check:
    """Whether the scans became more alike than they were, and not less than the alignment had made them."""
    before, aligned, after = (similarity[stage] for stage in STAGES)
    change = (
        f"{similarity['name']} went {_way(similarity, '{}')} (a loss below {SIMILARITY_TOLERANCE:g} counts as none)"
    )
    if after < max(before, aligned) - SIMILARITY_TOLERANCE:
        return Check("bad", f"The scans became LESS alike: {change}.")
    if after > before + SIMILARITY_TOLERANCE:
        return Check("good", f"The scans became more alike: {change}.")
    if after >= ALIKE:
        return Check("good", f"The scans were and are alike: {change}.")
    return Check("look", f"The scans became NO more alike, and {number(after, 2)} is below {ALIKE:g}: {change}.")


def _evident(metrics: Mapping[str, Any]) -> list[Check]:
    """Whether the run ended better than it began, and whether the scans belong together at all."""
    evidence, mirrored = metrics.get("evidence"), (metrics.get("alignment") or {}).get("mirrored_gain")
    if not evidence:
        return []
    found, delivered = [], evidence["delivered"]
    if mirrored is not None and mirrored > MIRRORED_LOOK:
        text = "mirrored left to right, the moving scan shares"
        if mirrored > MIRRORED:
            text = f"NOT REGISTERED: {text} {number(100 * mirrored, 0)} % more with the fixed one"
            found.append(Check("bad", f"{text}; one of the two is stored mirrored."))
        else:
            found.append(Check("look", f"{text[:1].upper()}{text[1:]} as much: check that left is left in both."))
    if delivered == "aligned":  # which is what to expect of one patient, whom only the images can bend
        level = "good" if (metrics.get("alignment") or {}).get("kind") == "rigid" else "look"
        text = "The deformation did not make the scans share clearly more: the alignment alone was delivered."
        found.append(Check(level, text))
    if delivered == "as scanned":
        way = " -> ".join(number(evidence[stage], 3) for stage in STAGES)
        text = f"NOT REGISTERED: the scans share less information than before ({way})"
        found.append(Check("bad", f"{text}; they were left where they lay."))
    structure = evidence["structure"]
    if structure is not None:
        text = f"the insides agree better than moved apart by {number(structure, 1)} standard errors"
        if structure < STRUCTURE_FAIL:
            found.append(Check("bad", f"NOT REGISTERED: {text} only (at least {STRUCTURE_FAIL:g})."))
        elif structure < STRUCTURE_LOOK:
            found.append(Check("look", f"{text[:1].upper()}{text[1:]} (clear from {STRUCTURE_LOOK:g} on)."))
        else:
            found.append(Check("good", f"{text[:1].upper()}{text[1:]}."))
    covered = evidence["covered"]
    if covered < COVERED_LOOK:
        level = "bad" if covered < COVERED_FAIL else "look"
        found.append(Check(level, f"Only {number(100 * covered, 0)} % of the smaller content lies on the other's."))
    shared = evidence.get("shared", 1.0)
    if shared < SHARED_LOOK:
        text = f"Only {number(100 * shared, 0)} % of one scan's content has a counterpart in the other"
        found.append(Check("look", f"{text}: one is cut, empty in part, or shows less (a brain without its skull)."))
    return found


def uncertainty_statement(told: dict) -> str:
    """What the uncertainty map of a run is worth, in one or two sentences; ``told`` is that part of metrics.json."""
    if not told.get("calibrated"):
        return "Uncertainty: relative only. The map shows where the result is less stable, not by how many mm it errs."
    judged = told.get("judged") or {}
    text = f"Uncertainty: calibrated on {told.get('on')}."
    if judged:
        text += (
            f" On other scans with known warps the 68 % radius held {number(judged.get('coverage_68'), 0)} % of the "
            f"true errors; rank correlation with them {number(judged.get('rank'), 2)}."
        )
    return (
        text
        + " Scans of two people, or organs that slide, err by more: at landmarks of breathing livers about twice as "
        "much."
    )


def sliding_statement(told: Mapping[str, Any]) -> str:
    """What slid, and how maps are to be read there; "" when nothing did. ``told`` is that part of metrics.json."""
    if not told:
        return ""
    return (
        f"{told['regions']} region{'s' if told['regions'] > 1 else ''} could slide: at the surfaces "
        f"({number(told['surface_percent'], 0)} % of the content) neighbouring voxels of the working grid part by "
        f"{number(told['shear_mean_mm'], 1)} mm on average; there volume change and inverse consistency show shear."
    )


def _certain(told: dict) -> list[Check]:
    """The uncertainty map, where there is one that can be judged."""
    if told.get("disagreement"):
        text = told["disagreement"]
        return [Check("bad", f"{text[:1].upper()}{text[1:]}.")]
    if not told.get("calibrated"):
        return []
    share = told["p95_mm"] / told["voxel_mm"]
    level = "good" if share < UNCERTAIN_GOOD else "look" if share < UNCERTAIN_BAD else "bad"
    return [
        Check(
            level,
            f"Calibrated uncertainty: 68 % of errors below {number(told['median_mm'], 2)} mm at the median place, "
            f"below {number(told['p95_mm'], 2)} mm in 95 % of the content (good below {UNCERTAIN_GOOD:g}, unusable "
            f"above {UNCERTAIN_BAD:g} voxels of the working grid).",
        )
    ]


def _measured(metrics: Mapping[str, Any]) -> list[Check]:
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
