"""``report.html``: what a registration did, in pictures, numbers and words, in one file that needs nothing else.

Level 4. No external resources and no libraries; pictures are inline PNGs of single slices, so a page costs well under a
second also for large volumes.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from . import pictures
from .console import duration, jsonable, number
from .pictures import DIVERGING, FOLDED, SEQUENTIAL, Plane
from .report_numbers import checks, command_of, number_rows, verdict
from .report_style import SCRIPT, STYLE
from .volumes import foreground, robust_range

STAGES = (("before", "As scanned"), ("aligned", "Aligned"), ("after", "Registered"))
_OUTLINE = np.array([64, 224, 208])
_LATTICE = np.array([150, 215, 255])


@dataclass
class _Page:
    """Style rules with the pictures (each stored once, used wherever its class is named) and the planes they show."""

    planes: list[Plane]
    rules: list[str]

    def picture(self, name: str, plane: Plane, image: np.ndarray) -> None:
        """Store a uint8 picture under ``name`` for ``plane``."""
        data = base64.b64encode(pictures.png(image)).decode()
        self.rules.append(f".{name}-{plane.name}{{background-image:url(data:image/png;base64,{data})}}")

    def pane(self, plane: Plane, layers: str, extra: str = "", label: str = "") -> str:
        """One view with body letters; ``layers``: picture names, bottom first, each with ``:class,class`` of its own."""
        height, width = plane.shape
        divs = "".join(
            f'<div class="layer {name}-{plane.name} {classes.replace(",", " ")}"></div>'
            for name, _, classes in (layer.partition(":") for layer in layers.split())
        )
        edges = "".join(f'<span class="edge {side}">{letter}</span>' for side, letter in zip("tblr", plane.letters))
        return (
            f'<div class="pane" role="img" aria-label="{escape(label or plane.name)}" '
            f'style="aspect-ratio:{width}/{height};flex:{width} 1 0">{divs}{extra}{edges}</div>'
        )

    def views(self, layers: str, extra: str = "", label: str = "") -> str:
        """All three planes in a row, at one scale."""
        return (
            f'<div class="views">{"".join(self.pane(p, layers, extra, f"{label} {p.name}") for p in self.planes)}</div>'
        )


def write_report(path: Path, result, metrics: dict) -> None:
    """Write the report of one registration.

    Args:
        path: of the HTML file.
        result: offers ``fixed``, ``moving`` (Volume), ``warped_moving``, ``aligned_moving``, ``jacobian``, ``ice_mm``
            ((D, H, W) on the fixed grid), ``forward`` (DenseTransform) and ``uncertainty`` ((D, H, W) mm or None).
        metrics: the content of metrics.json; parts that are missing are left out of the page.
    """
    page = _Page(pictures.planes(result.fixed), [])
    _scan_pictures(page, result)
    limits = _map_pictures(page, result, metrics)
    parts = [
        _head(result, metrics),
        _verdict(metrics),
        _tiles(metrics),
        _compare(page, result),
        _overview(page),
        _deformation(page, limits),
        _histogram(result),
        _numbers(metrics),
        _labels(metrics),
        _landmarks(metrics),
        _repeat(metrics),
    ]
    title = f"{Path(result.moving.name).name} onto {Path(result.fixed.name).name}"
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}: registration report</title><style>{STYLE}{''.join(page.rules)}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>"
    )
    Path(path).write_text(html, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- pictures


def _scan_pictures(page: _Page, result) -> None:
    """Grey pictures of the fixed scan and of the moving scan in its three stages, and the fixed scan's outlines."""
    low, high = robust_range(result.fixed.array)
    fixed = [pictures.grey(plane.cut(result.fixed.array), low, high) for plane in page.planes]
    low, high = robust_range(result.moving.array)
    after = [pictures.grey(plane.cut(result.warped_moving), low, high) for plane in page.planes]
    # Equal medians: a bright rim of fat in one scan must not make its brain look darker than the other's.
    gain = np.clip(_median(fixed) / _median(after), 0.5, 2.0)
    for plane, fixed_cut, after_cut in zip(page.planes, fixed, after):
        before = pictures.sample_points(result.moving, plane.points(result.fixed.grid), low)
        aligned = plane.cut(result.aligned_moving)
        page.picture("fixed", plane, _bytes(fixed_cut))
        page.picture("before", plane, _bytes(gain * pictures.grey(before, low, high)))
        page.picture("aligned", plane, _bytes(gain * pictures.grey(aligned, low, high)))
        page.picture("after", plane, _bytes(gain * after_cut))
        lines = pictures.level_lines(fixed_cut, pictures.outline_levels(fixed_cut))
        page.picture(
            "lines", plane, np.dstack([np.broadcast_to(_OUTLINE, (*lines.shape, 3)), 255 * lines]).astype(np.uint8)
        )


def _median(cuts: list[np.ndarray]) -> float:
    """Of what the pictures show; 1 when they show nothing."""
    shown = np.concatenate([cut[cut > 0.1] for cut in cuts])
    return float(np.median(shown)) if shown.size else 1.0


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _map_pictures(page: _Page, result, metrics: dict) -> dict[str, float]:
    """Coloured maps over the fixed scan; returns the upper ends of their scales (Jacobian: log2)."""
    fixed_range = robust_range(result.fixed.array)
    cuts = [(plane, 0.85 * pictures.grey(plane.cut(result.fixed.array), *fixed_range)) for plane in page.planes]
    logs = np.concatenate([np.abs(np.log2(np.maximum(p.cut(result.jacobian), 1e-3)))[grey > 0.1] for p, grey in cuts])
    limits = {"jacobian": _round_up(np.percentile(logs, 99) if logs.size else 0.5, (0.25, 0.5, 1, 1.5, 2, 3))}
    for plane, grey in cuts:
        determinant = plane.cut(result.jacobian)
        share = np.log2(np.maximum(determinant, 1e-6)) / limits["jacobian"]
        picture = pictures.overlay(
            grey, pictures.colour(0.5 + share / 2, DIVERGING), np.clip(1.1 * np.abs(share), 0.0, 0.85)
        )
        picture[determinant <= 0] = FOLDED
        page.picture("jacobian", plane, picture)
    matrix = np.array(metrics.get("alignment", {}).get("matrix") or np.eye(4), float)
    extent = max(max(p.shape) * p.pixel_mm for p in page.planes)
    limits["lattice"] = _round_up(extent / 28, (1, 2, 5, 10, 20, 50))
    for plane, grey in cuts:
        lines = pictures.lattice_lines(_unaligned(plane, result, matrix), limits["lattice"])
        page.picture(
            "lattice", plane, pictures.overlay(0.55 * grey, np.broadcast_to(_LATTICE, (*lines.shape, 3)), 0.9 * lines)
        )
    for name, values in (("ice", result.ice_mm), ("uncertainty", result.uncertainty)):
        if values is None:
            continue
        shown = [plane.cut(values) for plane, _ in cuts]
        inside = np.concatenate([v[grey > 0.1] for v, (_, grey) in zip(shown, cuts)])
        limits[name] = _round_up(
            np.percentile(inside, 99) if inside.size else 0.1, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        )
        for value, (plane, grey) in zip(shown, cuts):
            share = np.clip(value / limits[name], 0, 1)
            page.picture(
                name, plane, pictures.overlay(grey, pictures.colour(share, SEQUENTIAL), 0.25 + 0.6 * np.sqrt(share))
            )
    return limits


def _unaligned(plane: Plane, result, matrix: np.ndarray) -> np.ndarray:
    """(h, w, 2) mm: where the deformation alone, the alignment taken off, carries the pixels, along the plane's axes."""
    points = plane.points(result.fixed.grid)
    moved = result.forward.map_points(points.reshape(-1, 3))
    back = (moved - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    index = result.fixed.grid.indices(back).reshape(points.shape)
    return index[..., plane.axes[1:]] * result.fixed.grid.spacing[list(plane.axes[1:])]


def _round_up(value: float, steps) -> float:
    return float(next((step for step in steps if step >= value), steps[-1]))


# ---------------------------------------------------------------------------------------------- sections


def _head(result, metrics: dict) -> str:
    run = [
        metrics.get("method"),
        metrics.get("preset") and f"preset {metrics['preset']}",
        metrics.get("device"),
        metrics.get("seconds") and duration(metrics["seconds"].get("total")),
    ]
    return (
        f'<h1>Registration report</h1><p class="soft">{escape(", ".join(str(r) for r in run if r))}</p>'
        f'<dl class="names"><dt>fixed</dt><dd>{escape(result.fixed.name)}</dd><dt>moving</dt><dd>{escape(result.moving.name)}</dd></dl>'
    )


def _verdict(metrics: dict) -> str:
    found = checks(metrics)
    level, words = verdict(found)
    items = "".join(f'<li class="{check.level}">{escape(check.text)}</li>' for check in found)
    notes = "".join(f'<li class="look">{escape(note)}</li>' for note in metrics.get("notes") or [])
    return (
        f'<section class="card verdict {level}"><h2>{escape(words)}</h2><p class="soft">Numbers show that the transforms are '
        "sound and that the scans became more alike. Whether the right structures meet, only your eyes can tell: look at the "
        f'pictures below.</p><ul class="checks">{items}{notes}</ul></section>'
    )


def _tiles(metrics: dict) -> str:
    quality, similarity = metrics.get("quality") or {}, metrics.get("similarity") or {}
    tiles = []
    if similarity:
        tiles.append(
            (
                f"{number(similarity['before'], 2)} \u2192 {number(similarity['after'], 2)}",
                f"similarity ({similarity['name']})",
            )
        )
    if metrics.get("labels"):
        tiles.append(
            (
                f"{number(metrics['labels']['mean_before'], 2)} \u2192 {number(metrics['labels']['mean_after'], 2)}",
                "mean Dice of the labels",
            )
        )
    if metrics.get("landmarks"):
        marks = metrics["landmarks"]
        tiles.append(
            (
                f"{number(marks['mean_before_mm'], 1)} \u2192 {number(marks['mean_after_mm'], 1)} mm",
                f"error at {marks['count']} landmarks",
            )
        )
    if quality:
        tiles.append((f"{number(quality['folded_voxels'])}", "folded voxels"))
        tiles.append((f"{number(quality['ice_mean_mm'])} mm", "inverse consistency error"))
    if metrics.get("seconds"):
        tiles.append(
            (
                duration(metrics["seconds"].get("total")),
                f"on {metrics.get('device', '?')}, peak {number(metrics.get('peak_memory_gb'), 1)} GB",
            )
        )
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _choice(name: str, options, chosen: str) -> str:
    buttons = "".join(
        f'<button type="button" data-set="{name}" data-to="{key}" aria-pressed="{str(key == chosen).lower()}">{text}</button>'
        for key, text in options
    )
    return f'<span class="choice">{buttons}</span>'


def _compare(page: _Page, result) -> str:
    modes = (("slide", "Slide"), ("flicker", "Flicker"), ("checker", "Checkerboard"), ("moving", "Moving only"))
    bar = (
        f'<div class="bar">{_choice("stage", STAGES, "after")}{_choice("mode", modes, "slide")}{_choice("lines", (("yes", "Outlines"),), "no")}'
        '<label class="sliding small soft">fixed <input type="range" min="0" max="100" value="50" aria-label="slider"> moving</label></div>'
    )
    tilt = pictures.tilt_degrees(result.fixed.grid)
    oblique = (
        f" The fixed scan is tilted by {tilt:.0f}\u00b0; letters name the nearest body direction." if tilt > 5 else ""
    )
    views = page.views(
        "fixed before:stage,before aligned:stage,aligned after:stage,after lines:outline",
        '<div class="cut"></div>',
        "compare",
    )
    return (
        f'<section class="card viewer" data-stage="after" data-mode="slide" data-lines="no" style="--cut:50%"><h2>Compare</h2>'
        f'<p class="soft">Left of the line the fixed scan, right of it the moving scan. Move the pointer over a picture to shift the '
        f"line. L is the patient's left.{oblique}</p>{bar}{views}</section>"
    )


def _overview(page: _Page) -> str:
    cells = "".join(f'<div class="head">{text}</div>' for text in ("Fixed", *(text for _, text in STAGES)))
    for plane in page.planes:
        cells += page.pane(plane, "fixed lines", label=f"fixed, {plane.name}")
        cells += "".join(page.pane(plane, f"{name} lines", label=f"{text}, {plane.name}") for name, text in STAGES)
    return (
        f'<section class="card"><h2>Step by step</h2><p class="soft">The lines are outlines of the <em>fixed</em> scan, drawn over each '
        f'picture. In the last column they should follow the anatomy of the moving scan.</p><div class="overview">{cells}</div></section>'
    )


def _legend(stops: np.ndarray, ticks: list[str], text: str = "") -> str:
    gradient = ",".join(f"rgb({r:.0f},{g:.0f},{b:.0f}) {100 * at:.0f}%" for at, r, g, b in stops)
    marks = "".join(f"<b>{tick}</b>" for tick in ticks)
    return (
        f'<div class="legend"><span class="scale"><i style="background:linear-gradient(90deg,{gradient})"></i><span>{marks}</span></span>'
        f"{text}</div>"
    )


def _deformation(page: _Page, limits: dict[str, float]) -> str:
    top = limits["jacobian"]
    ticks = [number(2.0**x, 2) for x in (-top, -top / 2, 0, top / 2, top)]
    folded = f'<span><i class="chip" style="background:rgb{FOLDED}"></i>folded (0 or less)</span>'
    html = (
        '<section class="card"><h2>Deformation</h2><h3>Local volume change (Jacobian determinant)</h3><p class="soft">1 = no change. '
        "Above 1 (orange) a region is larger in the moving scan than in the fixed scan, below 1 (blue) smaller; the alignment counts too."
        f"</p>{page.views('jacobian', label='Jacobian')}{_legend(DIVERGING, ticks, folded)}"
        f'<h3>Deformed grid</h3><p class="soft">A lattice of {limits["lattice"]:g} mm of the fixed scan\'s axes as the deformation bends it, the '
        f"initial alignment taken off. Lines must not cross.</p>{page.views('lattice', label='deformed grid')}"
    )
    for name, title, text in (
        ("ice", "Inverse consistency error", "How far a point misses itself after going to the moving scan and back."),
        ("uncertainty", "Uncertainty", "Spread of the result over perturbed runs."),
    ):
        if name in limits:
            ticks = [f"{number(limits[name] * x, 2 if limits[name] > 0.1 else 3)} mm" for x in (0, 0.5, 1)]
            html += (
                f'<h3>{title}</h3><p class="soft">{text}</p>{page.views(name, label=title)}{_legend(SEQUENTIAL, ticks)}'
            )
    return html + "</section>"


def _histogram(result) -> str:
    """Log-Jacobian inside the scan's content, at most about a million voxels, as inline SVG."""
    step = max(1, round((result.jacobian.size / 1e6) ** (1 / 3)))
    part = (slice(None, None, step),) * 3
    values = result.jacobian[part][foreground(result.fixed.array[part])]
    positive = np.log2(values[values > 0])
    limit = _round_up(np.percentile(np.abs(positive), 99.8) if positive.size else 1, (0.5, 1, 1.5, 2, 3))
    counts, edges = np.histogram(np.clip(positive, -limit, limit), bins=60, range=(-limit, limit))
    width, height, base = 1000, 190, 165
    colours = pictures.colour((edges[1:] + edges[:-1]) / (4 * limit) + 0.5, DIVERGING)
    bars = "".join(
        f'<rect x="{k * width / 60:.1f}" y="{base - 155 * c / max(counts.max(), 1):.1f}" width="{width / 60 - 1.5:.1f}" '
        f'height="{155 * c / max(counts.max(), 1):.1f}" fill="rgb({r:.0f},{g:.0f},{b:.0f})" stroke="#8886" stroke-width=".5"/>'
        for k, (c, (r, g, b)) in enumerate(zip(counts, colours))
    )
    ticks = "".join(
        f'<text x="{width * (x + 1) / 2:.0f}" y="{height - 6}" text-anchor="{anchor}">{number(2.0 ** (x * limit), 2)}</text>'
        for x, anchor in ((-1, "start"), (-0.5, "middle"), (0, "middle"), (0.5, "middle"), (1, "end"))
    )
    return (
        f'<section class="card"><h2>Distribution of the local volume change</h2><p class="soft">Inside the scan\'s content, on a '
        f"logarithmic scale; {number(int((values <= 0).sum()))} of {number(int(values.size))} sampled voxels are folded. A narrow hill means a gentle "
        f'deformation.</p><svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="histogram of the log Jacobian">{bars}'
        f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/><line class="axis" x1="{width / 2}" x2="{width / 2}" y1="4" '
        f'y2="{base}" stroke-dasharray="3 4"/>{ticks}</svg></section>'
    )


def _numbers(metrics: dict) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{escape(value)}</td><td class="soft">{escape(meaning)}</td></tr>'
        for name, value, meaning in number_rows(metrics)
    )
    return (
        f'<section class="card"><h2>All numbers</h2><div class="wide"><table><tr><th>what</th><th class="n">value</th><th>what it means</th></tr>'
        f"{rows}</table></div></section>"
    )


def _labels(metrics: dict) -> str:
    if not metrics.get("labels"):
        return ""
    labels = metrics["labels"]
    rows = [("mean", {name: labels[f"mean_{name}"] for name, _ in STAGES})]
    rows += [(f"label {name}", values) for name, values in labels["per_label"].items()]
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="n">{number(values.get(stage))}</td>' for stage, _ in STAGES)
        + f'<td style="width:40%"><span class="meter" style="width:{100 * (values.get("after") or 0):.0f}%"></span></td></tr>'
        for name, values in rows
    )
    head = "".join(f'<th class="n">{text.lower()}</th>' for _, text in STAGES)
    return (
        f'<section class="card"><h2>Labels</h2><p class="soft">Dice overlap with the fixed labels: 1 = the same voxels, 0 = none in common.</p>'
        f'<div class="wide"><table><tr><th>label</th>{head}<th></th></tr>{body}</table></div></section>'
    )


def _landmarks(metrics: dict) -> str:
    if not metrics.get("landmarks"):
        return ""
    marks = metrics["landmarks"]
    after, before = marks.get("after_mm") or [], marks.get("before_mm") or []
    names = marks.get("labels") or [""] * len(after)
    longest = max([*after, *before, 1e-6])
    rows = ""
    for k, value in enumerate(after):
        was = before[k] if k < len(before) else None
        judged = "" if was is None else "better" if value < was else "worse"
        rows += (
            f'<tr><td class="n">{k + 1}</td><td>{escape(names[k])}</td><td class="n">{number(was, 2)}</td><td class="n {judged}">{number(value, 2)}</td>'
            f'<td style="width:40%"><span class="meter" style="width:{100 * value / longest:.1f}%"></span></td></tr>'
        )
    return (
        f'<section class="card"><h2>Landmarks</h2><p class="soft">Distance in mm between each landmark of the fixed scan, carried to the moving scan, '
        f"and its partner there. Mean {number(marks['mean_before_mm'], 2)} mm as scanned, {number(marks['mean_aligned_mm'], 2)} mm aligned, "
        f"{number(marks['mean_after_mm'], 2)} mm registered.</p>"
        f'<div class="wide"><table><tr><th class="n">#</th><th>name</th><th class="n">as scanned</th><th class="n">registered</th><th></th></tr>{rows}'
        "</table></div></section>"
    )


def _repeat(metrics: dict) -> str:
    job = metrics.get("job")
    html = '<section class="card"><h2>To repeat this run</h2>'
    if job:
        html += (
            f'<pre id="command">{escape(command_of(job))}</pre><button class="copy" data-of="command">copy command</button>'
            f'<details><summary>job as JSON (symreg register --job FILE)</summary><pre id="job">{escape(json.dumps(jsonable(job), indent=1))}</pre>'
            '<button class="copy" data-of="job">copy JSON</button></details>'
        )
    versions = ", ".join(f"{name} {value}" for name, value in (metrics.get("environment") or {}).items())
    return html + (
        f'<p class="soft small" style="margin-top:12px">SymRegistration {escape(str(metrics.get("version", "")))}'
        f"{'; ' + escape(versions) if versions else ''}. For research; not a medical device.</p></section>"
    )
