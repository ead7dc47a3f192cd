"""The section of the report that shows which poses the alignment looked at, and why it took the one it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html import escape
from string import ascii_lowercase
from typing import Any

import numpy as np

from ..console import number
from ..geometry.grid import transform_points
from ..geometry.volumes import robust_range
from . import drawing
from .views import OUTLINE, Page

#: Every so manyth pixel of the large pictures.
COARSE = 2
NAMES = {"headers": "As scanned", "headers, refined": "As scanned, refined", "taken": "Taken"}


def poses_section(page: Page, result: Any, metrics: Mapping[str, Any]) -> str:
    """Pictures of the moving scan at each pose under outlines of the fixed one, scores, and each decision in a
    sentence; "" for runs that compared no poses."""
    told = metrics.get("alignment") or {}
    candidates = told.get("candidates") or []
    if not candidates:
        return ""
    small = Page([replace(p, rows=p.rows[::COARSE], columns=p.columns[::COARSE]) for p in page.planes], page.rules)
    fixed = [plane.cut(result.fixed.array) for plane in small.planes]
    low, high = robust_range(result.fixed.array)
    for plane, cut in zip(small.planes, fixed):
        grey = drawing.grey(cut, low, high)
        lines = drawing.level_lines(grey, drawing.outline_levels(grey))
        ink = np.broadcast_to(OUTLINE, (*lines.shape, 3))
        page.picture("outline", plane, np.dstack([ink, 255 * lines]).astype(np.uint8))
    low, high = robust_range(result.moving.array)
    cells = "".join(f'<div class="head">{text}</div>' for text in ("", *(plane.name for plane in small.planes)))
    for picture, one in zip(ascii_lowercase, candidates):
        taken = one["name"] == "taken"
        name = NAMES.get(one["name"], one["name"].capitalize())
        away = "" if taken else f"<br>{number(one['degrees'], 0)}\u00b0 and {number(one['mm'], 0)} mm away"
        cells += (
            f'<div><b>{escape(name)}</b><br><span class="soft small">score {number(one["score"], 3)}{away}</span></div>'
        )
        for plane in small.planes:
            points = transform_points(np.array(one["matrix"], float), plane.points(result.fixed.grid))
            seen = drawing.grey(drawing.sample_points(result.moving, points, low), low, high)
            page.picture(f"pose{picture}", plane, np.rint(255 * seen).astype(np.uint8))
            cells += small.pane(plane, f"pose{picture} outline", label=f"{name}, {plane.name}")
    items = "".join(f'<li class="note">{escape(text)}</li>' for text in told.get("reasons") or [])
    return (
        '<section class="card"><h2>What the alignment looked at</h2><p class="soft">The moving scan at each pose, '
        "under outlines of the <em>fixed</em> scan. All scores were taken on one coarse level; higher is better.</p>"
        f'<ul class="checks">{items}</ul><div class="overview">{cells}</div></section>'
    )
