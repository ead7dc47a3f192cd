"""The small picture of a pair: the registered moving scan in three planes under the outlines of the fixed one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..geometry.volumes import robust_range
from ..report import drawing

#: Longest side of one plane, pixels.
SIDE = 120
OUTLINE = np.array([64, 224, 208], float)


def thumbnail(result: Any) -> bytes:
    """A PNG, three planes beside each other.

    Args:
        result: offers ``fixed``, ``moving`` (Volume) and ``warped_moving`` ((D, H, W) on the fixed grid).
    """
    step = max(1, round(drawing.PIXELS / SIDE))
    planes = [
        replace(plane, rows=plane.rows[::step], columns=plane.columns[::step]) for plane in drawing.planes(result.fixed)
    ]
    tiles = []
    for plane in planes:
        fixed = drawing.grey(plane.cut(result.fixed.array), *robust_range(result.fixed.array))
        moving = drawing.grey(plane.cut(result.warped_moving), *robust_range(result.moving.array))
        lines = drawing.level_lines(fixed, drawing.outline_levels(fixed), width=0.4)
        tiles.append(drawing.overlay(moving, np.broadcast_to(OUTLINE, (*lines.shape, 3)), 0.8 * lines))
    height = max(tile.shape[0] for tile in tiles)
    padded = []
    for tile in tiles:
        above = (height - tile.shape[0]) // 2
        padded.append(np.pad(tile, ((above, height - tile.shape[0] - above), (0, 2), (0, 0))))
    return drawing.png(np.concatenate(padded, axis=1))
