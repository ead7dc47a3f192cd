"""Slices, lines and colours for the report: arrays in, PNG bytes out.

Numpy only. Pictures are cut along the array axes nearest to the body's axes and shown the radiological way:
the patient's left on the right, the front up (axial) or on the left (sagittal). Pixels are square in mm.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..geometry.grid import Grid
from ..geometry.interpolation import interpolate
from ..geometry.volumes import Volume, foreground

#: Longest side of the largest picture, pixels.
PIXELS = 340
MARGIN_MM = 12.0
#: name: (normal, row, column) as LPS axes, and the directions in which rows run down and columns run right.
_VIEWS = {"axial": (2, 1, 0, 1, 1), "coronal": (1, 2, 0, -1, 1), "sagittal": (0, 2, 1, -1, 1)}
_LETTERS = (("R", "L"), ("A", "P"), ("I", "S"))

#: Colours of ``colour``: rows of (position, red, green, blue).
DIVERGING = np.array(
    [(0, 33, 82, 190), (0.25, 98, 160, 230), (0.5, 236, 236, 236), (0.75, 240, 150, 80), (1, 190, 45, 20)], float
)
SEQUENTIAL = np.array(
    [(0, 20, 20, 40), (0.25, 70, 30, 120), (0.5, 180, 55, 110), (0.75, 245, 135, 60), (1, 252, 240, 160)], float
)
FOLDED = (255, 0, 220)


@dataclass(frozen=True, eq=False)
class Plane:
    """One view through the fixed grid.

    Attributes:
        name: axial, coronal or sagittal.
        axes: array axes (normal, row, column).
        position: index along the normal.
        rows, columns: fractional array indices of the pixel rows (top to bottom) and columns (left to right).
        pixel_mm: side of a pixel.
        letters: body directions (top, bottom, left, right).
    """

    name: str
    axes: tuple[int, int, int]
    position: int
    rows: np.ndarray
    columns: np.ndarray
    pixel_mm: float
    letters: tuple[str, str, str, str]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return len(self.rows), len(self.columns)

    def points(self, grid: Grid) -> np.ndarray:
        """(h, w, 3) LPS mm of the pixels; ``grid`` is the one the plane was made for."""
        index = np.empty((*self.shape, 3))
        index[..., self.axes[0]] = self.position
        index[..., self.axes[1]] = self.rows[:, None]
        index[..., self.axes[2]] = self.columns[None, :]
        return grid.points(index)

    def cut(self, array: np.ndarray) -> np.ndarray:
        """(h, w[, C]) float32: the slice of a (D, H, W[, C]) array on the plane's grid, bilinear."""
        normal, row, column = self.axes
        flat = array.take(self.position, axis=normal).astype(np.float32)
        flat = flat if row < column else flat.swapaxes(0, 1)
        pixels = np.stack(np.meshgrid(self.rows, self.columns, indexing="ij"), -1)
        return interpolate(flat, pixels).astype(np.float32)


def planes(volume: Volume) -> list[Plane]:
    """Axial, coronal and sagittal view through the middle of the scan's content, cropped to it."""
    grid = volume.grid
    step = np.maximum(1, np.array(grid.shape) // 64)
    content = np.argwhere(foreground(volume.array[tuple(slice(None, None, s) for s in step)])) * step
    middle = content.mean(axis=0) if len(content) else (np.array(grid.shape) - 1) / 2
    margin = MARGIN_MM / grid.spacing + step
    low = np.maximum(np.percentile(content, 0.5, axis=0) - margin, -0.5) if len(content) else np.full(3, -0.5)
    high = (
        np.minimum(np.percentile(content, 99.5, axis=0) + margin, np.array(grid.shape) - 0.5)
        if len(content)
        else np.array(grid.shape) - 0.5
    )
    pixel = float(((high - low) * grid.spacing).max() / PIXELS)
    order, signs = body_axes(grid)
    views = []
    for name, (normal, row, column, down, right) in _VIEWS.items():
        lines: list[np.ndarray] = []
        letters: list[str] = []
        for body, direction in ((row, down), (column, right)):
            axis = order[body]
            count = max(1, round((high[axis] - low[axis]) * grid.spacing[axis] / pixel))
            line = low[axis] + (np.arange(count) + 0.5) * (high[axis] - low[axis]) / count
            lines.append(line if signs[body] * direction > 0 else line[::-1])
            letters += _LETTERS[body] if direction > 0 else _LETTERS[body][::-1]
        axes = order[normal], order[row], order[column]
        views.append(
            Plane(
                name,
                axes,
                int(round(middle[axes[0]])),
                lines[0],
                lines[1],
                pixel,
                (letters[0], letters[1], letters[2], letters[3]),
            )
        )
    return views


def body_axes(grid: Grid) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Per body axis L, P, S: the array axis that runs closest to it, and +1 or -1 for its direction."""
    axes = grid.axes
    order: tuple[int, int, int] = max(
        itertools.permutations((0, 1, 2), 3), key=lambda order: sum(abs(axes[k, order[k]]) for k in range(3))
    )
    first, second, third = (1 if axes[k, order[k]] >= 0 else -1 for k in range(3))
    return order, (first, second, third)


def tilt_degrees(grid: Grid) -> float:
    """Largest angle between an array axis and the body axis it stands for."""
    order, _ = body_axes(grid)
    return float(np.degrees(np.arccos(min(1.0, min(abs(grid.axes[k, order[k]]) for k in range(3))))))


def sample_points(volume: Volume, points: np.ndarray, outside: float) -> np.ndarray:
    """(...) float32: a volume at (..., 3) LPS mm, trilinear; ``outside`` beyond its field of view."""
    shape = np.array(volume.grid.shape)
    where = volume.grid.indices(points)
    inside = ((where >= -0.5) & (where <= shape - 0.5)).all(axis=-1)
    return np.where(inside, interpolate(volume.array, where), outside).astype(np.float32)


# ---------------------------------------------------------------------------------------------- lines


def outline_levels(image: np.ndarray) -> tuple[float, float]:
    """Two levels of a (h, w) picture in 0..1: around the body, and between its darker and brighter tissues."""
    content = image[image > 0.1]
    return 0.12, float(np.median(content)) if content.size else 0.5


def level_lines(image: np.ndarray, levels: Sequence[float], width: float = 0.8) -> np.ndarray:
    """(h, w) in 0..1: smooth lines where ``image`` (0..1) crosses ``levels``; faint edges are left out."""
    smooth = _blur(_blur(image))
    slope = np.hypot(*np.gradient(smooth))
    distance = np.min([np.abs(smooth - level) for level in levels], axis=0) / np.maximum(slope, 1e-6)
    return np.clip(0.5 + width - distance, 0, 1) * np.clip(slope * 40 - 0.4, 0, 1)


def lattice_lines(coordinates: np.ndarray, spacing: float) -> np.ndarray:
    """(h, w) in 0..1: lines where one of the (h, w, 2) coordinate maps (mm) crosses a multiple of ``spacing`` mm."""
    lines = np.zeros(coordinates.shape[:2], np.float32)
    for k in range(2):
        value = coordinates[..., k]
        slope = np.hypot(*np.gradient(value))
        distance = np.abs(value - spacing * np.round(value / spacing)) / np.maximum(slope, 1e-6)
        lines = np.maximum(lines, np.clip(1.1 - distance, 0, 1))
    return lines


def _blur(image: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        padded = np.pad(image, [(2, 2) if k == axis else (0, 0) for k in (0, 1)], mode="edge")
        n = image.shape[axis]
        parts = [w * padded.take(range(k, k + n), axis) for k, w in enumerate((1, 4, 6, 4, 1))]
        image = np.sum(parts, axis=0) / 16
    return image


# ---------------------------------------------------------------------------------------------- colours and files


def grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """(h, w) in 0..1."""
    return np.clip((image - low) / max(high - low, 1e-12), 0, 1)


def colour(values: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """(h, w) in 0..1 -> (h, w, 3) in 0..255."""
    return np.stack([np.interp(values, stops[:, 0], stops[:, k]) for k in (1, 2, 3)], axis=-1)


def overlay(background: np.ndarray, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8: ``colours`` (0..255) over a grey ``background`` (0..1) with opacity ``alpha`` (0..1)."""
    alpha = alpha[..., None]
    return np.rint(255 * background[..., None] * (1 - alpha) + colours * alpha).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """A PNG file of a uint8 array: (h, w) grey, (h, w, 2) grey with alpha, (h, w, 3) RGB or (h, w, 4) RGBA."""
    image = np.ascontiguousarray(image if image.ndim == 3 else image[..., None])
    height, width, channels = image.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = image.reshape(height, -1)
    up = rows - np.vstack(
        [np.zeros_like(rows[:1]), rows[:-1]]
    )  # PNG's filter 2: differences to the row above, modulo 256
    data = np.hstack([np.full((height, 1), 2, np.uint8), up]).tobytes()

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 4)) + chunk(b"IEND", b"")
