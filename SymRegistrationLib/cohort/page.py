"""``index.html`` of a batch: every pair with its picture and numbers, what needs a look first; one file, no
script from outside.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..console import duration, number
from ..quality.checks import VERDICTS
from ..report.style import STYLE
from .pair import THUMBNAIL
from .summary import LEAST, MEASURES, THRESHOLD, PairState, counts, ordered

#: The page holds so many pictures at most; what follows is ordinary.
MOST_PICTURES = 500
_STYLE = """
main{max-width:1440px}.pairs td{vertical-align:middle}.pairs th.n{white-space:normal;vertical-align:bottom;\
min-width:76px}
.pairs th{vertical-align:bottom}.pairs img{display:block;border-radius:6px;background:#000;height:80px}\
.name{min-width:130px}
.tag{font-weight:600}.tag.good{color:var(--good)}.tag.look{color:var(--look)}.tag.bad,.tag.failed{color:var(--bad)}
.why{min-width:260px;max-width:440px}.name,.why{overflow-wrap:anywhere}a{color:var(--accent)}.bar>i{display:block;height:8px;border-radius:4px;
background:var(--accent)}.bar{display:block;background:var(--line);border-radius:4px;margin:0}
"""


def page(
    states: Sequence[PairState],
    title: str,
    seconds: float,
    seconds_left: float | None = None,
    links: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text.

    Args:
        states: judged (see :func:`~SymRegistrationLib.cohort.summary.judge`).
        title: what was registered.
        seconds: the batch took so far; ``seconds_left`` while it runs.
        links: (file in the batch's folder, what it is), shown above the table.
    """
    found = counts(states)
    best = ordered(states)
    shown = [name for name in MEASURES if any(state.numbers.get(name) is not None for state in states)]
    head = "".join(f'<th class="n">{escape(MEASURES[name][0])}</th>' for name in shown)
    body = "".join(_row(state, shown, k < MOST_PICTURES) for k, state in enumerate(best))
    done = found["done"] + found["failed"]
    running = (
        ""
        if not found["waiting"]
        else (
            f'<div class="bar"><i style="width:{100 * done / max(1, found["pairs"]):.1f}%"></i></div>'
            f'<p class="soft">{found["waiting"]} pairs are still to do'
            f"{', about ' + duration(seconds_left) + ' left' if seconds_left else ''}. Load this page again later.</p>"
        )
    )
    extra = "".join(f'<li><a href="{quote(name)}">{escape(name)}</a>: {escape(text)}</li>' for name, text in links)
    more = f'<section class="card"><h2>Files</h2><ul>{extra}</ul></section>' if extra else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}: batch</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">SymRegistration {__version__}, {time.strftime("%Y-%m-%d %H:%M")}, '
        f"{duration(seconds)}</p>{_tiles(found)}{running}{more}"
        f'<section class="card"><h2>Pairs</h2><p class="soft">{_rule(found)}</p><div class="wide"><table '
        f'class="pairs"><tr><th></th>'
        f'<th>pair</th><th>what to look at</th>{head}<th class="n">time</th></tr>{body}</table></div></section>'
        '<p class="soft small about">For research; not a medical device.</p></main></body></html>'
    )


def _tiles(found: dict[str, int]) -> str:
    tiles = [
        (found["done"], "pairs done"),
        (found["failed"], "failed"),
        (found["standing_out"], "stand out"),
        (found["waiting"], "still to do"),
    ]
    boxes = "".join(f'<div class="tile"><b>{count}</b><span>{text}</span></div>' for count, text in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _rule(found: dict[str, int]) -> str:
    if found["done"] < LEAST:
        return (
            f"Pairs whose report says not to use them come first. From {LEAST} pairs on, they are also compared "
            f"with each other."
        )
    return (
        "Failed pairs first, then those that stand out, the worst first. A pair stands out when one of its numbers "
        f"lies on the bad side of the others by a robust z-score above {THRESHOLD} (0.6745 &times; distance from the "
        "median / median absolute deviation), or when its own report says not to use it. The picture is the "
        "registered scan under the fixed scan's outlines."
    )


def _row(state: PairState, shown: Sequence[str], picture: bool) -> str:
    folder = quote(state.row.identity)
    numbers = state.numbers
    cells = "".join(f'<td class="n">{number(numbers.get(name), MEASURES[name][3])}</td>' for name in shown)
    image = _image(state) if picture and state.status == "done" else ""
    has_report = state.status == "done" and state.row.job.report
    name = (
        f'<a href="{folder}/report.html">{escape(state.row.identity)}</a>' if has_report else escape(state.row.identity)
    )
    scans = (
        f'<div class="soft small">{escape(Path(state.row.job.moving).name)} onto '
        f"{escape(Path(state.row.job.fixed).name)}</div>"
    )
    return (
        f'<tr><td>{image}</td><td class="name">{name}{scans}</td><td class="why">{_why(state, numbers)}</td>{cells}'
        f'<td class="n">{duration(state.seconds)}</td></tr>'
    )


def _why(state: PairState, numbers: dict[str, Any]) -> str:
    if state.status == "failed":
        return f'<span class="tag failed">failed</span> {escape(state.reason)}'
    if state.status == "waiting":
        return '<span class="soft">not yet done</span>'
    level = numbers.get("verdict") or "look"
    words = f'<span class="tag {escape(level)}">{escape(VERDICTS.get(level, level))}</span>'
    return f"{words}<br>{escape(state.stands_out)}" if state.stands_out else words


def _image(state: PairState) -> str:
    try:
        data = (Path(state.row.job.output) / THUMBNAIL).read_bytes()
    except OSError:
        return ""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
