"""Pictures of a training run: curves of losses and scores (matplotlib, where it is installed), a validation pair."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..fields import warp
from ..files import write_whole
from ..report.drawing import png
from .checkpoints import GO_ON
from .logs import rows
from .synthetic import Pair

#: Numbers of a validation that are shown.
SCORES = ("dice", "end_point", "landmarks", "similarity", "score")
#: Points of a curve; more are averaged.
POINTS = 200


def missing() -> str:
    """Why curves are not drawn, in words; "" when they are."""
    if importlib.util.find_spec("matplotlib"):
        return ""
    return "curves.png is not drawn, because matplotlib is not installed (pip install matplotlib); log.jsonl holds all"


def draw(folder: Path, judge: Any, held_out: Sequence[Pair] | None, writer: Any = None, step: int = 0) -> None:
    """Write curves.png, and validation.png from the first held-out pair.

    Args:
        folder: of the run, with its logs.
        judge: network that carries the pair.
        held_out: pairs that are not trained on.
        writer: of TensorBoard, gets the same pictures.
        step: of the run.

    Raises:
        RegistrationError: the disk refuses.
    """
    pictures = {}
    if not missing():
        pictures["curves"] = curves(rows(folder / "log.jsonl"), rows(folder / "validation.jsonl"))
    if held_out:
        pictures["validation"] = pair_picture(judge, held_out[0])
    for name, picture in pictures.items():
        write_whole(folder / f"{name}.png", png(picture), GO_ON)
        if writer:
            writer.add_image(name, picture, step, dataformats="HWC" if picture.ndim == 3 else "HW")


@torch.no_grad()
def pair_picture(network: Any, pair: Pair) -> np.ndarray:
    """(h, w) uint8: three middle slices (rows) of fixed, moving, warped moving, |fixed - moving|, |fixed - warped|."""
    u = network(pair.moving, pair.fixed).pair.fixed_to_moving.float()
    images = [x.float().cpu()[0, 0].numpy() for x in (pair.fixed, pair.moving, warp(pair.moving, u))]
    images += [np.abs(images[0] - images[1]), np.abs(images[0] - images[2])]
    lines = []
    for axis in range(3):
        cuts = [x.take(x.shape[axis] // 2, axis)[::-1] for x in images]
        lines.append(np.hstack([np.pad(c, 1, constant_values=0.5) for c in cuts]))
    width = max(line.shape[1] for line in lines)
    whole = np.vstack([np.pad(line, ((0, 0), (0, width - line.shape[1]))) for line in lines])
    zoom = max(1, 900 // width)
    return (np.clip(whole, 0, 1) * 255).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)


def curves(log: Sequence[Mapping], judged: Sequence[Mapping]) -> np.ndarray:
    """(h, w, 3) uint8: loss terms above, validation below, each line scaled to its own range; stages as grey lines.

    Args:
        log: rows of log.jsonl: step, stage, loss, terms.
        judged: rows of validation.jsonl: step and :data:`SCORES`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot nothing is global and no window opens
    from matplotlib.figure import Figure

    terms: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for name, value in {"loss": row["loss"], **row["terms"]}.items():
            terms.setdefault(name, []).append((row["step"], value))
    scores = {name: [(row["step"], row[name]) for row in judged if row.get(name) is not None] for name in SCORES}
    borders = [a["step"] for a, b in itertools.pairwise(log) if a["stage"] != b["stage"]]
    figure = Figure(figsize=(9, 5.2), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, lines in ((above, terms), (below, scores)):
        for name, points in lines.items():
            if points:
                _line(axes, name, points)
        for step in borders:
            axes.axvline(step, color="0.8", zorder=0)
        axes.set_yticks([])
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
    above.set_title("loss terms", loc="left", fontsize="small")
    below.set_title("validation", loc="left", fontsize="small")
    below.set_xlabel("step")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _line(axes: Any, name: str, points: list[tuple[float, float]]) -> None:
    """One curve between 0 and 1, its first and last value in the legend."""
    values = np.array(points, float)
    label = f"{name} {values[0, 1]:.3g} to {values[-1, 1]:.3g}"
    if len(values) > POINTS:
        values = np.stack([part.mean(0) for part in np.array_split(values, POINTS)])
    finite = values[np.isfinite(values[:, 1]), 1]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    axes.plot(values[:, 0], (values[:, 1] - low) / max(high - low, 1e-12), label=label, linewidth=1.2)
