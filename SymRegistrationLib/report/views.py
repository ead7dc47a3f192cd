"""The pictures of ``report.html``: slices of the scans in their stages, and coloured maps over the fixed scan.

A result is anything that offers ``fixed``, ``moving`` (Volume), ``warped_moving``, ``uncertainty`` ((D, H, W) on the
fixed grid, the last may be None), ``jacobian``, ``ice_mm`` ((D, H, W) on ``map_grid``) and ``forward``.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from ..geometry.grid import transform_points
from ..geometry.volumes import Volume, robust_range
from ..quality.outputs import OUTPUTS
from . import drawing
from .drawing import DIVERGING, FOLDED, SEQUENTIAL, Plane

OUTLINE = np.array([64, 224, 208])
LATTICE = np.array([150, 215, 255])
_LATTICE_STEPS = (1, 2, 5, 10, 20, 50)
_VOLUME_STEPS = (0.25, 0.5, 1, 1.5, 2, 3)
_MM_STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


@dataclass
class Page:
    """Style rules that hold the pictures, each stored once and used wherever its class is named.

    Attributes:
        planes: what is shown.
        rules: one CSS rule a picture.
    """

    planes: list[Plane]
    rules: list[str] = field(default_factory=list)

    def picture(self, name: str, plane: Plane, image: np.ndarray) -> None:
        """Store a uint8 picture under ``name`` for ``plane``."""
        data = base64.b64encode(drawing.png(image)).decode()
        self.rules.append(f".{name}-{plane.name}{{background-image:url(data:image/png;base64,{data})}}")

    def pane(self, plane: Plane, layers: str, extra: str = "", label: str = "") -> str:
        """One view with body letters; ``layers``: picture names, bottom first, each with ``:class,class`` if wanted."""
        height, width = plane.shape
        divs = ""
        for layer in layers.split():
            name, _, classes = layer.partition(":")
            divs += f'<div class="layer {name}-{plane.name} {classes.replace(",", " ")}"></div>'
        edges = "".join(f'<span class="edge {side}">{letter}</span>' for side, letter in zip("tblr", plane.letters))
        return (
            f'<div class="pane" role="img" aria-label="{escape(label or plane.name)}" '
            f'style="aspect-ratio:{width}/{height};flex:{width} 1 0">{divs}{extra}{edges}</div>'
        )

    def views(self, layers: str, extra: str = "", label: str = "") -> str:
        """All three planes in a row, at one scale."""
        panes = (self.pane(plane, layers, extra, f"{label} {plane.name}") for plane in self.planes)
        return f'<div class="views">{"".join(panes)}</div>'


def draw_scans(page: Page, result: Any, matrix: np.ndarray) -> None:
    """Grey pictures of the fixed scan and of the moving scan in its three stages, and the fixed scan's outlines.

    Stores ``fixed``, ``before``, ``aligned``, ``after`` and ``lines``.

    Args:
        page: gets the pictures.
        result: see the module.
        matrix: (4, 4) LPS mm, fixed -> moving, the initial alignment.
    """
    low, high = robust_range(result.fixed.array)
    fixed = [drawing.grey(plane.cut(result.fixed.array), low, high) for plane in page.planes]
    low, high = robust_range(result.moving.array)
    after = [drawing.grey(plane.cut(result.warped_moving), low, high) for plane in page.planes]
    # Equal medians: a bright rim of fat in one scan must not make its brain look darker than the other's.
    gain = np.clip(_median(fixed) / _median(after), 0.5, 2.0)
    for plane, fixed_cut, after_cut in zip(page.planes, fixed, after):
        points = plane.points(result.fixed.grid)
        before = drawing.sample_points(result.moving, points, low)
        aligned = drawing.sample_points(result.moving, transform_points(matrix, points), low)
        page.picture("fixed", plane, _bytes(fixed_cut))
        page.picture("before", plane, _bytes(gain * drawing.grey(before, low, high)))
        page.picture("aligned", plane, _bytes(gain * drawing.grey(aligned, low, high)))
        page.picture("after", plane, _bytes(gain * after_cut))
        lines = drawing.level_lines(fixed_cut, drawing.outline_levels(fixed_cut))
        ink = np.broadcast_to(OUTLINE, (*lines.shape, 3))
        page.picture("lines", plane, np.dstack([ink, 255 * lines]).astype(np.uint8))


def draw_maps(page: Page, result: Any, matrix: np.ndarray) -> dict[str, float]:
    """Coloured maps over the fixed scan: ``jacobian``, ``lattice`` and every sequential map of the table of outputs.

    Args:
        page: gets the pictures.
        result: see the module.
        matrix: (4, 4) LPS mm, the initial alignment, taken off for the deformed lattice.

    Returns:
        Per picture the upper end of its scale: log2 of a volume factor, mm between lines, mm, mm.
    """
    low, high = robust_range(result.fixed.array)
    greys = [0.85 * drawing.grey(plane.cut(result.fixed.array), low, high) for plane in page.planes]
    limits = {
        "jacobian": _draw_jacobian(page, greys, _cuts(page, result, result.jacobian)),
        "lattice": _draw_lattice(page, greys, result, matrix),
    }
    for output in OUTPUTS:
        values = getattr(result, output.field) if output.colours == "sequential" else None
        if values is not None:
            limits[output.name] = _draw_millimetres(page, greys, output.name, _cuts(page, result, values))
    return limits


def _cuts(page: Page, result: Any, values: np.ndarray) -> list[np.ndarray]:
    """(h, w) per plane: a map on the fixed grid, or on the coarser ``map_grid``, as the planes of the fixed
    scan show it."""
    if values.shape == result.fixed.grid.shape:
        return [plane.cut(values) for plane in page.planes]
    volume = Volume(values, result.map_grid)
    return [drawing.sample_points(volume, plane.points(result.fixed.grid), 0.0) for plane in page.planes]


def _draw_jacobian(page: Page, greys: list[np.ndarray], cuts: list[np.ndarray]) -> float:
    limit = _scale([np.abs(np.log2(np.maximum(cut, 1e-3))) for cut in cuts], greys, _VOLUME_STEPS)
    for plane, grey, cut in zip(page.planes, greys, cuts):
        share = np.log2(np.maximum(cut, 1e-6)) / limit
        alpha = np.clip(1.1 * np.abs(share), 0.0, 0.85)
        picture = drawing.overlay(grey, drawing.colour(0.5 + share / 2, DIVERGING), alpha)
        picture[cut <= 0] = FOLDED
        page.picture("jacobian", plane, picture)
    return limit


def _draw_lattice(page: Page, greys: list[np.ndarray], result: Any, matrix: np.ndarray) -> float:
    extent = max(max(plane.shape) * plane.pixel_mm for plane in page.planes)
    spacing = _round_up(extent / 28, _LATTICE_STEPS)
    for plane, grey in zip(page.planes, greys):
        lines = drawing.lattice_lines(unaligned(plane, result, matrix), spacing)
        ink = np.broadcast_to(LATTICE, (*lines.shape, 3))
        page.picture("lattice", plane, drawing.overlay(0.55 * grey, ink, 0.9 * lines))
    return spacing


def _draw_millimetres(page: Page, greys: list[np.ndarray], name: str, cuts: list[np.ndarray]) -> float:
    limit = _scale(cuts, greys, _MM_STEPS)
    for plane, grey, cut in zip(page.planes, greys, cuts):
        share = np.clip(cut / limit, 0, 1)
        page.picture(name, plane, drawing.overlay(grey, drawing.colour(share, SEQUENTIAL), 0.25 + 0.6 * np.sqrt(share)))
    return limit


def unaligned(plane: Plane, result: Any, matrix: np.ndarray) -> np.ndarray:
    """(h, w, 2) mm along the plane's axes: where the deformation, without the alignment, carries the pixels."""
    grid = result.fixed.grid
    points = plane.points(grid)
    moved = result.forward.map_points(points.reshape(-1, 3))
    back = (moved - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    axes = list(plane.axes[1:])
    return grid.indices(back).reshape(points.shape)[..., axes] * grid.spacing[axes]


def _scale(cuts: list[np.ndarray], greys: list[np.ndarray], steps: Sequence[float]) -> float:
    """A round upper end that leaves out one percent of the values where the scan shows something."""
    shown = np.concatenate([cut[grey > 0.1] for cut, grey in zip(cuts, greys)])
    return _round_up(np.percentile(shown, 99) if shown.size else steps[0], steps)


def _round_up(value: float, steps: Sequence[float]) -> float:
    return float(next((step for step in steps if step >= value), steps[-1]))


def _median(cuts: list[np.ndarray]) -> float:
    """Of what the pictures show; 1 when they show nothing."""
    shown = np.concatenate([cut[cut > 0.1] for cut in cuts])
    return float(np.median(shown)) if shown.size else 1.0


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
