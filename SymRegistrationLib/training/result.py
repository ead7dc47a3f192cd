"""What a training run leaves: its logs, TensorBoard events, the model card."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, networks
from ..job import InputError
from .logs import rows
from .options import TrainingOptions
from .plan import TrainingPlan


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


# ---------------------------------------------------------------------------------------------- model card


def model_card(plan: TrainingPlan, options: TrainingOptions, result: Mapping[str, Any], state: Any) -> dict[str, Any]:
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
