"""The page "Can I trust it?" of the report: traffic lights with their thresholds, the worst places, what
to try next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np

from ..console import number
from ..geometry.volumes import robust_range
from ..quality.checks import (
    FOLDED_TOLERABLE,
    ICE_BAD,
    ICE_GOOD,
    UNCERTAIN_BAD,
    UNCERTAIN_GOOD,
    sliding_statement,
    uncertainty_statement,
)
from . import drawing
from .drawing import SEQUENTIAL
from .views import Page

#: So many of the worst regions get a picture.
SHOWN = 3
#: A landmark that lies further off than this many times its 68 % radius was not foreseen.
SURPRISE = 2.0
WORDS = {"good": "green", "look": "yellow", "bad": "red", "open": "not known"}


@dataclass(frozen=True)
class Light:
    """One line of the summary: ``level`` is good, look, bad or open (not measured); ``advice`` is empty when
    all is well."""

    level: str
    what: str
    found: str
    threshold: str
    advice: str = ""


def lights(metrics: Mapping[str, Any]) -> list[Light]:
    """The traffic lights of a run, in the order in which things go wrong."""
    alignment, quality = metrics.get("alignment") or {}, metrics.get("quality") or {}
    found = []
    if alignment.get("kind") not in (None, "none"):
        found.append(
            Light(
                "bad" if alignment.get("unsure") else "good",
                "start position",
                f"confidence {number(alignment.get('confidence'), 2)}",
                "green: no other position fits nearly as well",
                "Give landmarks (--fixed-points, --moving-points, --guide-with-points) or a start transform "
                "(--initial FILE).",
            )
        )
    similarity = metrics.get("similarity") or {}
    if similarity:
        before, after = similarity["aligned"], similarity["after"]
        found.append(
            Light(
                "good" if after > before else "bad",
                "likeness",
                f"{similarity['name']} {number(before, 2)} aligned, {number(after, 2)} registered",
                "green: rises",
                "Try --similarity mind for two different contrasts, or masks that leave out what only one scan shows.",
            )
        )
    if "folded_percent" in quality:
        share, places = quality["folded_percent"], (metrics.get("folding") or {}).get("count")
        level = "good" if share == 0 else "look" if share <= FOLDED_TOLERABLE else "bad"
        where = f" in {places} places" if places else ""
        found.append(
            Light(
                level,
                "folding",
                f"{number(quality['folded_voxels'])} voxels{where}",
                f"green: none; yellow: up to {FOLDED_TOLERABLE} %",
                "Use --method syn or a method with a velocity field, or a coarser --spacing.",
            )
        )
    if "ice_mean_voxel" in quality:
        mean = quality["ice_mean_voxel"]
        level = "good" if mean < ICE_GOOD else "look" if mean < ICE_BAD else "bad"
        found.append(
            Light(
                level,
                "there and back",
                f"{number(mean)} voxels on average",
                f"green: below {ICE_GOOD}; yellow: below {ICE_BAD}",
                "Add --refine 1, or use --method syn.",
            )
        )
    return [*found, _uncertain(metrics.get("uncertainty")), *_measured(metrics)]


def _uncertain(told: dict | None) -> Light:
    again = "Run again with --uncertainty 8 (or --uncertainty fast, which costs next to nothing)."
    if not told:
        return Light("open", "uncertainty", "not asked for", "", again)
    if told.get("disagreement"):
        return Light(
            "bad",
            "uncertainty",
            told["disagreement"],
            "green: runs agree to 3 voxels in 90 % of the content",
            "Find out which run is right by eye; improve the start position first.",
        )
    if not told.get("calibrated"):
        return Light(
            "open",
            "uncertainty",
            "relative only: shows where, not how many mm",
            "",
            "Use a method and preset with a calibration (symreg with --method syn and the similarity lncc).",
        )
    share = told["p95_mm"] / told["voxel_mm"]
    level = "good" if share < UNCERTAIN_GOOD else "look" if share < UNCERTAIN_BAD else "bad"
    text = (
        f"68 % radius: median {number(told['median_mm'], 2)} mm, below {number(told['p95_mm'], 2)} mm in 95 % of "
        f"the content"
    )
    return Light(
        level,
        "uncertainty",
        text,
        f"95 % of the content, in voxels of the working grid ({number(told['voxel_mm'], 2)} mm): green below "
        f"{UNCERTAIN_GOOD:g}, yellow below {UNCERTAIN_BAD:g}",
        "Try --preset thorough, or a finer --spacing.",
    )


def _measured(metrics: Mapping[str, Any]) -> list[Light]:
    found, labels, marks = [], metrics.get("labels"), metrics.get("landmarks")
    if labels:
        better = labels["mean_after"] >= max(labels["mean_aligned"], labels["mean_before"])
        found.append(
            Light(
                "good" if better else "bad",
                "labels",
                f"mean Dice {number(labels['mean_aligned'], 2)} aligned, {number(labels['mean_after'], 2)} registered",
                "green: rises",
                "Look at the labels that became worse; try --preset thorough or a mask.",
            )
        )
    if marks:
        better = marks["mean_after_mm"] <= min(marks["mean_aligned_mm"], marks["mean_before_mm"])
        found.append(
            Light(
                "good" if better else "bad",
                "landmarks",
                f"mean error {number(marks['mean_after_mm'], 2)} mm",
                "green: smaller than aligned and as scanned",
                "Check that the landmarks correspond; guide with them.",
            )
        )
        radii = marks.get("radius_mm")
        if radii:
            off = [
                k
                for k, (error, radius) in enumerate(zip(marks["after_mm"], radii))
                if radius is not None and error > SURPRISE * radius
            ]
            names = [marks["labels"][k] or f"#{k + 1}" for k in off[:5]]
            level = "good" if len(off) <= 0.05 * len(radii) else "look" if len(off) <= 0.2 * len(radii) else "bad"
            told = f"{len(off)} of {len(radii)} lie further off than {SURPRISE:g} radii" + (
                f" ({', '.join(names)})" if names else ""
            )
            found.append(
                Light(
                    level,
                    "landmarks and radii",
                    told,
                    "green: up to 5 %; yellow: up to 20 %",
                    "Between two people, or where organs slide, real errors exceed the calibrated radius.",
                )
            )
    return found


def trust_section(page: Page, result: Any, metrics: Mapping[str, Any]) -> str:
    """The page, as HTML; adds pictures of the worst regions to ``page``."""
    found = lights(metrics)
    worst = next((level for level in ("bad", "look", "open") if any(light.level == level for light in found)), "good")
    words = {
        "good": "Nothing speaks against it",
        "look": "With care: something deserves a look",
        "bad": "Not as it is",
        "open": "Nothing speaks against it, but not all was asked",
    }[worst]
    rows = ""
    for light in found:
        rows += (
            f'<tr><td><span class="light {light.level}" role="img" aria-label="{WORDS[light.level]}"></span></td>'
            f"<td>{escape(light.what)}</td><td>{escape(light.found)}</td><td "
            f'class="soft">{escape(light.threshold)}</td></tr>'
        )
    advice = [
        f"<li>{escape(light.what)}: {escape(light.advice)}</li>"
        for light in found
        if light.level != "good" and light.advice
    ]
    told, slid = metrics.get("uncertainty"), sliding_statement(metrics.get("sliding") or {})
    body = (
        f'<div class="wide"><table '
        f'class="lights"><tr><th></th><th>what</th><th>found</th><th>threshold</th></tr>{rows}</table></div>'
        + (f'<p class="soft">{escape(uncertainty_statement(told))}</p>' if told else "")
        + (f'<p class="soft">{escape(slid)}</p>' if slid else "")
        + (f"<h3>What to try next</h3><ul>{''.join(advice)}</ul>" if advice else "")
        + _worst_places(page, result, told)
        + _folds(metrics.get("folding"))
        + _volume_table(metrics.get("volumes"))
    )
    return f'<section class="card" id="trust"><h2>Can I trust it? {escape(words)}.</h2>{body}</section>'


def _worst_places(page: Page, result: Any, told: dict | None) -> str:
    told = told or {}
    places = told.get("worst") or []
    if not places or result.uncertainty is None:
        return ""
    low, high = robust_range(result.fixed.array)
    top = max(place["worst"] for place in places[:SHOWN])
    html = ""
    unit = "radius" if told.get("calibrated") else "relative"
    for k, place in enumerate(places[:SHOWN], start=1):
        index = np.round(result.fixed.grid.indices(np.array(place["centre"]))).astype(int)
        views = [
            replace(
                plane,
                name=f"{plane.name}{k}",
                position=int(np.clip(index[plane.axes[0]], 0, result.fixed.grid.shape[plane.axes[0]] - 1)),
            )
            for plane in page.planes
        ]
        panes = ""
        for view in views:
            share = np.clip(view.cut(result.uncertainty) / max(top, 1e-9), 0, 1)
            grey = 0.85 * drawing.grey(view.cut(result.fixed.array), low, high)
            page.picture("worst", view, drawing.overlay(grey, drawing.colour(share, SEQUENTIAL), 0.75 * share))
            panes += page.pane(view, "worst", label=f"worst place {k}, {view.name}")
        at = ", ".join(number(x, 1) for x in place["centre"])
        html += (
            f'<p class="soft">Place {k}: {number(place["ml"], 1)} ml around ({at}) mm LPS, up to '
            f'{number(place["worst"], 2)} mm ({unit})</p><div class="views">{panes}</div>'
        )
    return f"<h3>Where it is least certain</h3>{html}"


def _folds(folding: dict | None) -> str:
    if not folding or not folding["count"]:
        return ""
    rows = "".join(
        f'<tr><td>{", ".join(number(x, 1) for x in r["centre"])}</td><td class="n">{r["voxels"]}</td>'
        f'<td class="n">{number(r["ml"], 3)}</td><td class="n">{number(r["worst"], 2)}</td></tr>'
        for r in folding["regions"]
    )
    more = (
        f" The {len(folding['regions'])} largest of {folding['count']}."
        if folding["count"] > len(folding["regions"])
        else ""
    )
    return (
        f'<h3>Folded places</h3><p class="soft">Centres in mm, LPS.{more}</p><div '
        f'class="wide"><table><tr><th>centre</th>'
        f'<th class="n">voxels</th><th class="n">ml</th><th class="n">smallest Jacobian</th></tr>{rows}</table></div>'
    )


def _volume_table(volumes: dict | None) -> str:
    if not volumes:
        return ""
    rows = ""
    for name, v in volumes.items():
        plus = "" if v["plus_minus_ml"] is None else f"\u00b1 {number(v['plus_minus_ml'], 2)}"
        rows += (
            f'<tr><td>label {escape(name)}</td><td class="n">{number(v["fixed_ml"], 2)}</td><td '
            f'class="n">{number(v["moving_ml"], 2)}</td>'
            f'<td class="n">{number(v["change_ml"], 2)} {plus}</td><td '
            f'class="n">{number(v["change_percent"], 1)}</td></tr>'
        )
    return (
        '<h3>Volume changes</h3><p class="soft">Each label of the fixed scan and the volume of where the transform '
        "takes it in the moving scan. The \u00b1 is one standard deviation from the calibrated uncertainty of its "
        "border; empty when there is none.</p>"
        '<div class="wide"><table><tr><th>label</th><th class="n">fixed, ml</th><th class="n">moving, ml</th>'
        f'<th class="n">change, ml</th><th class="n">%</th></tr>{rows}</table></div>'
    )
