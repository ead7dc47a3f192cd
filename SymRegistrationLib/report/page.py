"""``report.html``: what a registration did, in pictures, numbers and words, in one file that needs nothing else.

No external resources and no libraries; pictures are inline PNGs of single slices, so a page costs well under a
second also for large volumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..console import duration, jsonable, number
from ..geometry.resampling import nearest
from ..geometry.volumes import foreground
from ..quality.checks import checks, verdict
from ..quality.outputs import OUTPUTS
from . import drawing
from .drawing import DIVERGING, FOLDED, SEQUENTIAL
from .poses import poses_section
from .rows import command_of, number_rows
from .style import SCRIPT, STYLE
from .trust import trust_section
from .views import Page, draw_maps, draw_scans

STAGES = (("before", "As scanned"), ("aligned", "Aligned"), ("after", "Registered"))
MODES = (("slide", "Slide"), ("flicker", "Flicker"), ("checker", "Checkerboard"), ("moving", "Moving only"))
BINS = 60


def write_report(path: Path, result: Any, metrics: Mapping[str, Any]) -> None:
    """Write the report of one registration.

    Args:
        path: of the HTML file.
        result: see :mod:`SymRegistrationLib.report.views`; a :class:`~SymRegistrationLib.pipeline.Result` is one.
        metrics: the content of metrics.json; parts that are missing are left out of the page.
    """
    page = Page(drawing.planes(result.fixed))
    matrix = (metrics.get("alignment") or {}).get("matrix")
    matrix = np.eye(4) if matrix is None else np.array(matrix, float)
    draw_scans(page, result, matrix)
    limits = draw_maps(page, result, matrix)
    parts = [
        _head(result, metrics),
        _verdict(metrics),
        _tiles(metrics),
        trust_section(page, result, metrics),
        _compare(page, result),
        _overview(page),
        poses_section(page, result, metrics),
        _deformation(page, limits),
        _histogram(result),
        _numbers(metrics),
        _labels(metrics),
        _landmarks(metrics),
        _repeat(metrics),
    ]
    title = escape(f"{Path(result.moving.name).name} onto {Path(result.fixed.name).name}")
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}: registration report</title><style>{STYLE}{''.join(page.rules)}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>"
    )
    Path(path).write_text(html, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- building blocks


def _card(title: str, lead: str, body: str) -> str:
    """A section; ``lead`` is HTML."""
    return f'<section class="card"><h2>{title}</h2><p class="soft">{lead}</p>{body}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]], numeric: Iterable[int]) -> str:
    """A table; cells are (HTML, class); the columns ``numeric`` are set to the right."""
    numeric = set(numeric)
    top = "".join(f'<th class="{"n" if k in numeric else ""}">{text}</th>' for k, text in enumerate(head))
    body = ""
    for row in rows:
        cells = (
            f'<td class="{"n " if k in numeric else ""}{extra}">{text}</td>' for k, (text, extra) in enumerate(row)
        )
        body += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _meter(share: float) -> tuple[str, str]:
    """A bar of ``share`` (0..1) of its cell's width."""
    return f'<span class="meter" style="width:{100 * share:.1f}%"></span>', "bars"


def _choice(name: str, options: Sequence[tuple[str, str]], chosen: str) -> str:
    """A row of buttons that set ``data-name`` of the viewer."""
    buttons = ""
    for key, text in options:
        pressed = str(key == chosen).lower()
        buttons += f'<button type="button" data-set="{name}" data-to="{key}" aria-pressed="{pressed}">{text}</button>'
    return f'<span class="choice">{buttons}</span>'


def _legend(stops: np.ndarray, ticks: Sequence[str], text: str = "") -> str:
    """A colour bar with evenly spaced ticks."""
    gradient = ",".join(f"rgb({r:.0f},{g:.0f},{b:.0f}) {100 * at:.0f}%" for at, r, g, b in stops)
    marks = "".join(f"<b>{tick}</b>" for tick in ticks)
    bar = f'<i style="background:linear-gradient(90deg,{gradient})"></i>'
    return f'<div class="legend"><span class="scale">{bar}<span>{marks}</span></span>{text}</div>'


# ---------------------------------------------------------------------------------------------- sections


def _head(result: Any, metrics: Mapping[str, Any]) -> str:
    seconds = (metrics.get("seconds") or {}).get("total")
    preset = metrics.get("preset")
    run = (metrics.get("method"), f"preset {preset}" if preset else None, metrics.get("device"), duration(seconds))
    return (
        f'<h1>Registration report</h1><p class="soft">{escape(", ".join(str(r) for r in run if r))}</p>'
        f'<dl class="names"><dt>fixed</dt><dd>{escape(result.fixed.name)}</dd>'
        f"<dt>moving</dt><dd>{escape(result.moving.name)}</dd></dl>"
    )


def _verdict(metrics: Mapping[str, Any]) -> str:
    found = checks(metrics)
    level, words = verdict(found)
    items = "".join(f'<li class="{check.level}">{escape(check.text)}</li>' for check in found)
    items += "".join(f'<li class="note">{escape(note)}</li>' for note in metrics.get("notes") or [])
    return (
        f'<section class="card verdict {level}"><h2>{escape(words)}</h2><p class="soft">Numbers show that the '
        "transforms are sound and that the scans became more alike. Whether the right structures meet, only your eyes "
        f'can tell: look at the pictures below.</p><ul class="checks">{items}</ul></section>'
    )


def _tiles(metrics: Mapping[str, Any]) -> str:
    tiles = []
    similarity, labels = metrics.get("similarity"), metrics.get("labels")
    marks, quality = metrics.get("landmarks"), metrics.get("quality")
    if similarity:
        tiles.append((_change(similarity["before"], similarity["after"], 2), f"similarity ({similarity['name']})"))
    if labels:
        tiles.append((_change(labels["mean_before"], labels["mean_after"], 2), "mean Dice of the labels"))
    if marks:
        error = _change(marks["mean_before_mm"], marks["mean_after_mm"], 1)
        tiles.append((f"{error} mm", f"error at {marks['count']} landmarks"))
    if quality:
        tiles.append((number(quality["folded_voxels"]), "folded voxels"))
        tiles.append((f"{number(quality['ice_mean_mm'])} mm", "inverse consistency error"))
    if metrics.get("seconds"):
        memory = number(metrics.get("peak_memory_gb"), 1)
        tiles.append((duration(metrics["seconds"].get("total")), f"on {metrics.get('device', '?')}, peak {memory} GB"))
    boxes = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _change(before: float, after: float, digits: int) -> str:
    return f"{number(before, digits)} \u2192 {number(after, digits)}"


def _compare(page: Page, result: Any) -> str:
    tilt = drawing.tilt_degrees(result.fixed.grid)
    oblique = (
        f" The fixed scan is tilted by {tilt:.0f}\u00b0; letters name the nearest body direction." if tilt > 5 else ""
    )
    slider = '<input type="range" min="0" max="100" value="50" aria-label="slider">'
    bar = (
        f'<div class="bar">{_choice("stage", STAGES, "after")}{_choice("mode", MODES, "slide")}'
        f"{_choice('lines', (('yes', 'Outlines'),), 'no')}"
        f'<label class="sliding small soft">fixed {slider} moving</label></div>'
    )
    layers = "fixed before:stage,before aligned:stage,aligned after:stage,after lines:outline"
    return (
        '<section class="card viewer" data-stage="after" data-mode="slide" data-lines="no" style="--cut:50%">'
        '<h2>Compare</h2><p class="soft">Left of the line the fixed scan, right of it the moving scan. Move the '
        f"pointer over a picture to shift the line. L is the patient's left.{oblique}</p>{bar}"
        f'{page.views(layers, """<div class="cut"></div>""", "compare")}</section>'
    )


def _overview(page: Page) -> str:
    cells = "".join(f'<div class="head">{text}</div>' for text in ("Fixed", *(text for _, text in STAGES)))
    for plane in page.planes:
        for name, text in (("fixed", "Fixed"), *STAGES):
            cells += page.pane(plane, f"{name} lines", label=f"{text}, {plane.name}")
    lead = (
        "The lines are outlines of the <em>fixed</em> scan, drawn over each picture. In the last column they should "
        "follow the anatomy of the moving scan."
    )
    return _card("Step by step", lead, f'<div class="overview">{cells}</div>')


def _deformation(page: Page, limits: dict[str, float]) -> str:
    top = limits["jacobian"]
    ticks = [number(2.0**x, 2) for x in (-top, -top / 2, 0, top / 2, top)]
    folded = f'<span><i class="chip" style="background:rgb{FOLDED}"></i>folded (0 or less)</span>'
    body = (
        f'<h3>Deformed grid</h3><p class="soft">A lattice of {limits["lattice"]:g} mm along the fixed scan\'s axes '
        "as the deformation bends it, the initial alignment taken off. Lines must not cross.</p>"
        f"{page.views('lattice', label='deformed grid')}"
    )
    for output in OUTPUTS:
        name = output.name
        if name in limits and output.colours == "sequential":
            marks = [f"{number(limits[name] * x, 2 if limits[name] > 0.1 else 3)} {output.unit}" for x in (0, 0.5, 1)]
            body += (
                f'<h3>{output.title}</h3><p class="soft">{output.meaning}</p>'
                f"{page.views(name, label=output.title)}{_legend(SEQUENTIAL, marks)}"
            )
    lead = (
        "Local volume change (Jacobian determinant): 1 = no change. Above 1 (orange) a region is larger in the moving "
        "scan than in the fixed scan, below 1 (blue) smaller; the alignment's scale counts too."
    )
    return _card(
        "Deformation", lead, page.views("jacobian", label="Jacobian") + _legend(DIVERGING, ticks, folded) + body
    )


def _histogram(result: Any) -> str:
    """Log-Jacobian inside the scan's content, at most about a million voxels, as inline SVG."""
    step = max(1, round((result.jacobian.size / 1e6) ** (1 / 3)))
    part = (slice(None, None, step),) * 3
    values = result.jacobian[part][nearest(foreground(result.fixed.array), result.fixed.grid, result.map_grid)[part]]
    logs = np.log2(values[values > 0])
    widest = np.percentile(np.abs(logs), 99.8) if logs.size else 1.0
    limit = float(next((step for step in (0.5, 1, 1.5, 2, 3) if step >= widest), 3))
    counts, edges = np.histogram(np.clip(logs, -limit, limit), bins=BINS, range=(-limit, limit))
    lead = (
        f"Inside the scan's content, on a logarithmic scale; {number(int((values <= 0).sum()))} of "
        f"{number(int(values.size))} sampled voxels are folded. A narrow hill means a gentle deformation."
    )
    return _card("Distribution of the local volume change", lead, _bars(counts, edges, limit))


def _bars(counts: np.ndarray, edges: np.ndarray, limit: float) -> str:
    width, height, base, tallest = 1000, 190, 165, 155
    colours = drawing.colour((edges[1:] + edges[:-1]) / (4 * limit) + 0.5, DIVERGING)
    each = width / BINS
    bars = ""
    for k, (count, (r, g, b)) in enumerate(zip(counts, colours)):
        tall = tallest * count / max(counts.max(), 1)
        bars += (
            f'<rect x="{k * each:.1f}" y="{base - tall:.1f}" width="{each - 1.5:.1f}" height="{tall:.1f}" '
            f'fill="rgb({r:.0f},{g:.0f},{b:.0f})" stroke="#8886" stroke-width=".5"/>'
        )
    ticks = ""
    for x, anchor in ((-1, "start"), (-0.5, "middle"), (0, "middle"), (0.5, "middle"), (1, "end")):
        text = number(2.0 ** (x * limit), 2)
        ticks += f'<text x="{width * (x + 1) / 2:.0f}" y="{height - 6}" text-anchor="{anchor}">{text}</text>'
    middle = width / 2
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="histogram of the log Jacobian">{bars}'
        f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>'
        f'<line class="axis" x1="{middle}" x2="{middle}" y1="4" y2="{base}" stroke-dasharray="3 4"/>{ticks}</svg>'
    )


def _numbers(metrics: Mapping[str, Any]) -> str:
    rows = [[(escape(cell), extra) for cell, extra in zip(row, ("", "", "soft"))] for row in number_rows(metrics)]
    return _card("All numbers", "Everything that was measured.", _table(("what", "value", "what it means"), rows, (1,)))


def _labels(metrics: Mapping[str, Any]) -> str:
    labels = metrics.get("labels")
    if not labels:
        return ""
    entries = {"mean": {name: labels[f"mean_{name}"] for name, _ in STAGES}}
    entries |= {f"label {name}": values for name, values in labels["per_label"].items()}
    rows = []
    for name, values in entries.items():
        cells = [(number(values.get(stage)), "") for stage, _ in STAGES]
        rows.append([(escape(name), ""), *cells, _meter(values.get("after") or 0)])
    head = ("label", *(text.lower() for _, text in STAGES), "")
    lead = "Dice overlap with the fixed labels: 1 = the same voxels, 0 = none in common."
    return _card("Labels", lead, _table(head, rows, (1, 2, 3)))


def _landmarks(metrics: Mapping[str, Any]) -> str:
    marks = metrics.get("landmarks")
    if not marks:
        return ""
    after, before = marks.get("after_mm") or [], marks.get("before_mm") or []
    names = marks.get("labels") or [""] * len(after)
    longest = max([*after, *before, 1e-6])
    radii = marks.get("radius_mm")
    rows = []
    for k, (name, was, value) in enumerate(zip(names, before, after), start=1):
        judged = "better" if value < was else "worse"
        cells = [(str(k), ""), (escape(name), ""), (number(was, 2), ""), (number(value, 2), judged)]
        rows.append([*cells, (number(radii[k - 1], 2) if radii else "", "soft"), _meter(value / longest)])
    means = (f"{number(marks[f'mean_{name}_mm'], 2)} mm {text.lower()}" for name, text in STAGES)
    lead = (
        "Distance in mm between each landmark of the fixed scan, carried to the moving scan, and its partner there. "
        f"Mean: {', '.join(means)}."
    )
    head = ("#", "name", "as scanned", "registered", "68 % radius" if radii else "", "")
    return _card("Landmarks", lead, _table(head, rows, (0, 2, 3, 4)))


def _repeat(metrics: Mapping[str, Any]) -> str:
    job, body = metrics.get("job"), ""
    if job:
        text = escape(json.dumps(jsonable(job), indent=1))
        body = (
            f'<pre id="command">{escape(command_of(job))}</pre>'
            '<button class="copy" data-of="command">copy command</button>'
            f'<details><summary>job as JSON (symreg register --job FILE)</summary><pre id="job">{text}</pre>'
            '<button class="copy" data-of="job">copy JSON</button></details>'
        )
    versions = ", ".join(f"{name} {value}" for name, value in (metrics.get("environment") or {}).items())
    about = escape(f"SymRegistration {metrics.get('version', '')}; {versions}".strip("; "))
    body += f'<p class="soft small about">{about}. For research; not a medical device.</p>'
    return _card("To repeat this run", "The command, the job and the versions that made this.", body)
