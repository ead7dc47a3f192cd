"""What a training run shows and leaves: curves, a validation pair, TensorBoard events, the model card.

Pictures are drawn with numpy alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, networks
from ..fields import warp
from ..files import write_whole
from ..job import InputError
from ..report.drawing import png
from .checkpoints import GO_ON
from .options import TrainingOptions
from .plan import TrainingPlan
from .synthetic import Pair

#: 3 x 5 dots of each character, rows from top to bottom as octal digits.
_FONT = dict(
    zip(
        "0123456789.-_ abcdefghijklmnopqrstuvwxyz",
        [
            "75557",
            "26227",
            "71747",
            "71717",
            "55711",
            "74717",
            "74757",
            "71111",
            "75757",
            "75717",
            "00002",
            "00700",
            "00007",
            "00000",
            "02757",
            "44656",
            "03443",
            "11353",
            "02743",
            "32722",
            "03571",
            "44655",
            "20222",
            "10112",
            "45655",
            "62223",
            "05775",
            "06555",
            "02552",
            "06564",
            "03531",
            "03444",
            "03616",
            "27223",
            "05557",
            "05552",
            "05577",
            "05255",
            "05524",
            "07127",
        ],
    )
)
_COLOURS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (23, 190, 207),
    (140, 86, 75),
    (227, 119, 194),
)


def board(folder: Path) -> Any:
    """A TensorBoard writer. Raises InputError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs TensorBoard, which is not installed.",
            "pip install tensorboard, or leave it out: log.jsonl and curves.png hold the same.",
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log; a cut-off last line is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_row(path: Path, step: int) -> dict[str, Any] | None:
    """The validation of ``step``, or the last one, or ``None``."""
    found = rows(path)
    return next((row for row in found if row["step"] == step), found[-1] if found else None)


# ---------------------------------------------------------------------------------------------- pictures


def draw(folder: Path, judge, held_out: Sequence[Pair] | None, writer: Any = None, step: int = 0) -> None:
    """Write curves.png, and validation.png from the first held-out pair. Raises RegistrationError when it cannot."""
    pictures = {"curves": curves(rows(folder / "log.jsonl"), rows(folder / "validation.jsonl"))}
    if held_out:
        pictures["validation"] = pair_picture(judge, held_out[0])
    for name, picture in pictures.items():
        write_whole(folder / f"{name}.png", png(picture), GO_ON)
        if writer:
            writer.add_image(name, picture, step, dataformats="HWC" if picture.ndim == 3 else "HW")


@torch.no_grad()
def pair_picture(network, pair: Pair) -> np.ndarray:
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
    """(h, w, 3) uint8: loss terms above (each scaled to its own range), validation below; stages as grey lines."""
    terms: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for name, value in {"loss": row["loss"], **row["terms"]}.items():
            terms.setdefault(name, []).append((row["step"], value))
    terms = {name: _smoothed(points) for name, points in list(terms.items())[:8]}
    names = ("dice", "end_point", "landmarks", "similarity", "score")
    checks = {name: [(row["step"], row[name]) for row in judged if row.get(name) is not None] for name in names}
    borders = [a["step"] for a, b in itertools.pairwise(log) if a["stage"] != b["stage"]]
    last = max([row["step"] for row in (*log, *judged)], default=1)
    return np.vstack([_plot(terms, last, borders), _plot({k: v for k, v in checks.items() if v}, last, borders)])


def _smoothed(points: list[tuple[float, float]], bins: int = 200) -> list[tuple[float, float]]:
    if len(points) <= bins:
        return points
    return [tuple(np.mean(part, axis=0)) for part in np.array_split(np.array(points), bins)]


def _plot(lines: Mapping[str, list[tuple[float, float]]], last: float, borders: Sequence[float]) -> np.ndarray:
    """(260, 900, 3): lines over steps 0..last, a legend with first and last value on the right."""
    image = np.full((260, 900, 3), 255, np.uint8)
    image[10:251, 20] = image[250, 20:620] = 120

    def column(step: float) -> float:
        return 20 + 600 * step / max(last, 1)

    for step in borders:
        image[10:250, int(column(step))] = 205
    for number, (name, points) in enumerate(lines.items()):
        values = np.array([v for _, v in points], float)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        x = np.linspace(column(points[0][0]), column(points[-1][0]), 1800)
        y = 245 - 230 * (np.interp(x, [column(s) for s, _ in points], values) - low) / max(high - low, 1e-12)
        shown = np.isfinite(y)
        for thick in (0, 1):
            image[(y[shown] + thick).astype(int).clip(0, 259), x[shown].astype(int).clip(0, 899)] = _COLOURS[number % 8]
        text = f"{name[:14]:14s} {values[0]:.3g} {values[-1]:.3g}"
        _write(image, text, 20 + 26 * number, 640, _COLOURS[number % 8])
    _write(image, f"step {int(last)}", 252, 560, (90, 90, 90), 1)
    return image


def _write(image: np.ndarray, text: str, row: int, column: int, colour: Sequence[int], zoom: int = 2) -> None:
    for number, letter in enumerate(text.lower()):
        for y, digit in enumerate(_FONT.get(letter, "00700")):
            for x in range(3):
                if int(digit) >> (2 - x) & 1:
                    top, left = row + y * zoom, column + (4 * number + x) * zoom
                    image[top : top + zoom, left : left + zoom] = colour


# ---------------------------------------------------------------------------------------------- model card


def model_card(plan: TrainingPlan, options: TrainingOptions, result: Mapping[str, Any], state) -> dict[str, Any]:
    """What the weights are: everything needed to judge them or to make them again; plain JSON."""
    card = networks.card(plan.method)
    log = rows(Path(options.output) / "log.jsonl")
    judged = rows(Path(options.output) / "validation.jsonl")
    return {
        "title": card.title,
        "publication": card.publication,
        "licence": options.licence,
        "trained_on": _data_words(plan, options),
        "data": {**plan.data, "held_out": list(plan.held_out)},
        "plan": {k: v for k, v in json.loads(plan.to_json()).items() if k not in ("options", "data", "held_out")},
        "training": {
            "steps": state.step,
            "of_planned": plan.iterations,
            "of_published": _published(plan),
            "weights_of_step": state.best_step,
            "seconds": round(state.seconds),
            "seed": options.seed,
            "averaged": options.ema,
            "loss_weights": dataclasses.asdict(options.weights),
            "poses": {"rotation_degrees": options.rotation, "shift_mm": options.shift, "scale": options.scale},
        },
        "curves": _summary(log),
        "validation": {"pairs": options.validation_pairs, "final": result["validation"], "all": judged[-40:]},
        "limits": _limits(plan, options),
        "command": options.command,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What trained the weights."""
    return {
        "symregistration": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _data_words(plan: TrainingPlan, options: TrainingOptions) -> str:
    parts = []
    if options.data:
        parts.append(f"{plan.data.get('scans', 0)} real scans")
    if options.labels:
        parts.append(f"scans synthesised on-line from {plan.data.get('label maps', 0)} label maps")
    parts.append("random shapes without anatomy")
    return ", ".join(parts) + f"; {len(plan.held_out)} held out for validation"


def _published(plan: TrainingPlan) -> int:
    return sum(stage.iterations for stage in networks.network_class(plan.method).recipe.stages)


def _summary(log: Sequence[Mapping], points: int = 12) -> list[dict[str, float]]:
    """Mean of every term over a dozen legs of the run."""
    legs = [part for part in np.array_split(np.arange(len(log)), min(points, max(len(log), 1))) if len(part)]
    out = []
    for part in legs:
        lines = [log[k] for k in part]
        names = {name for line in lines for name in line["terms"]}
        out.append(
            {
                "step": lines[-1]["step"],
                **{
                    name: round(float(np.mean([line["terms"][name] for line in lines if name in line["terms"]])), 5)
                    for name in sorted(names)
                },
            }
        )
    return out


def _limits(plan: TrainingPlan, options: TrainingOptions) -> list[str]:
    share = 100 * plan.iterations / _published(plan)
    limits = [
        f"Trained at {plan.spacing:g} mm on {'x'.join(map(str, plan.shape))} voxels; detail finer than that was not "
        f"seen.",
        f"Poses up to {options.rotation:g} degrees, {options.shift:g} mm and {100 * options.scale:g} % were seen.",
        "Not for clinical use.",
    ]
    if share < 99:
        limits.insert(0, f"{share:.3g} % of the published number of steps.")
    if not options.data:
        limits.append("No real scan was seen in training; pathology that changes the shape of tissues was not either.")
    return limits
