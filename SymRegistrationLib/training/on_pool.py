"""Training the repeated passes of a method on a pool of pairs (see :mod:`SymRegistrationLib.training.pool`).

Pose and matching in front stay as they are: the pool's scans have already met. One optimiser step is one pass of one
pair; a pair takes a random number of passes one after the other, the state detached between them, so that the network
learns to go on from what it left over, and is seen as a block of the volume (what a pass adds is local). The coarser
levels learn first, on whole volumes (phase C), then stay as they are. Phase A learns the teacher's half-way fields
(L1), phase B the method's unsupervised terms: local correlation half-way, diffusion of both half fields, soft Dice of
all structures, and the magnitude constraint in every step. Pairs are mirrored, exchanged and changed in brightness on
the fly. Everything is a function of the seed and the number of the pair, and the state lies in one file: a run that was
stopped goes on with the same command.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import networks
from ..files import json_object, write_whole
from ..job import InputError, Progress, RegistrationError, silent
from ..networks._passes import HalfFields, MeanFramePasses
from ..registration import devices, weights
from ..report.drawing import png
from . import checkpoints, pictures
from . import result as training_result
from .judging import judged_pairs
from .logs import rows
from .pool import Pool, PoolPair
from .pool_loss import blocked, brightened, free_terms, indicators, teacher_terms, turned
from .pool_options import PoolTraining
from .samples import seed_of
from .stop import Stopper
from .synthetic import Draw

#: Steps in a row whose gradient is not finite before a run gives up.
MOST_BAD_STEPS = 20


@dataclass
class _State:
    step: int = 0
    pair: int = 0
    seconds: float = 0.0
    bad: int = 0


def train(options: PoolTraining, progress: Progress = silent) -> dict[str, Any]:
    """Train, or go on where the output folder's run was left.

    Returns:
        ``finished``, ``step``, ``steps``, ``seconds``, ``weights`` (the file; the average so far when not finished),
        ``validation`` (the last one), ``output``.

    Raises:
        InputError: no pool, a method without passes, weights or labels that do not fit, a folder with another run.
        RegistrationError: the disk is full, or no gradient is finite.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    return _Run(options, progress).run(progress)


class _Run:
    def __init__(self, options: PoolTraining, progress: Progress):
        self.options, self.pool, self.folder = options, Pool(options.pool), Path(options.output)
        if options.precision == "auto":
            self.half = devices.half_precision_pays()
        else:
            self.half = options.precision == "bfloat16"
        if options.steps_teacher and not self.pool.manifest["options"].get("teacher", True):
            raise InputError(f"the pool '{options.pool}' was made without a teacher.", "Add --teacher-steps 0.")
        torch.manual_seed(options.seed)
        self.network = networks.create(options.method, options.size, **{**options.method_options, "prealign": True})
        self.inner: MeanFramePasses = self.network.inner
        if not isinstance(self.inner, MeanFramePasses) or not self.inner.switches.passes:
            raise InputError(
                f"{options.method} with these options has no passes to train on a pool.", "Add --option passes=4."
            )
        self._settle_folder()
        self.begun_from = start_file(options.start or options.method)
        self.taken = take_over(self.network, self.begun_from, options.keep)
        device = torch.device("cpu")
        self.network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if not any(name.startswith("pose.") for name in self.taken):
            raise InputError(
                "the weights to start from hold no pose and matching.", "Give --start METHOD or a weights file."
            )
        learned_inverse = {id(p) for p in self.inner.di.parameters()} if hasattr(self.inner, "di") else set()
        own = [p for p in self.inner.parameters() if id(p) not in learned_inverse]
        groups = [{"params": own, "lr": options.learning_rate}]
        if learned_inverse:
            groups.append({"params": list(self.inner.di.parameters()), "lr": options.inverse_rate})
        self.optimiser = torch.optim.Adam(groups)
        self.network.requires_grad_(False)
        self.inner.requires_grad_(True)
        self.average = self._copy()
        self.state = _State()
        self.coarse: dict[tuple[int, bool], HalfFields] = {}
        self.pairs = lru_cache(256)(self.pool.pair)
        self._resume()
        self.judged = (
            judged_pairs(options.judged, self.network, self.pool.manifest["options"]["spacing"], progress)
            if options.judged
            else []
        )

    # ------------------------------------------------------------------------------------------ loop

    def run(self, progress: Progress) -> dict[str, Any]:
        """Until finished, ``stop_after``, or Ctrl-C."""
        begun = saved = time.monotonic()
        before, options, state = self.state.seconds, self.options, self.state
        with Stopper(True) as stopper:
            if state.step == 0 and self.judged:
                self._judge()
            while state.step < options.steps:
                row = self._pair()
                now = time.monotonic()
                state.seconds = before + now - begun
                checkpoints.append(self.folder / "log.jsonl", row)
                progress(
                    "train",
                    state.step / options.steps,
                    f"step {state.step} of {options.steps}, phase {row['stage']}, loss "
                    f"{row['loss']:.4f}, {row['seconds']:.2f} s a pass",
                )
                due = state.step // options.judge_every > (state.step - row["passes"]) // options.judge_every
                if self.judged and (due or state.step >= options.steps):
                    self._judge()
                stop = bool(stopper.number) or (options.stop_after and now - begun > 60 * options.stop_after)
                if due or stop or now - saved > 60 * options.checkpoint_minutes:
                    self._save()
                    saved = now
                if stop:
                    break
        self._save()
        return self._outcome()

    def _pair(self) -> dict[str, Any]:
        """All passes of the next pair; its line in the log."""
        options, state, started = self.options, self.state, time.perf_counter()
        draw = Draw(seed_of(options.seed, "pool pair", state.pair))
        number, mirrored, exchanged = draw.integer(0, len(self.pool) - 1), draw.chance(0.5), draw.chance(0.5)
        pair = turned(self.pairs(number), mirrored, exchanged)
        phase = options.phase(state.step)
        end = {"C": options.steps_coarse, "A": options.steps_coarse + options.steps_teacher, "B": options.steps}[phase]
        count = 1 if phase == "C" else min(draw.integer(1, options.most_passes), end - state.step)
        self.network.train()
        fields = None
        if phase != "C":
            fields = self._coarse(number, mirrored, exchanged, pair)
            pair, fields = blocked(pair, fields, options.block, draw)
        pair = brightened(pair, draw)
        hot = indicators(pair) if phase == "B" else None
        terms: dict[str, float] = {}
        for _ in range(count):
            self._rates()
            self.optimiser.zero_grad(set_to_none=True)
            with self._precision():
                if phase == "C":
                    fields = self.inner.coarse_halves(pair.moving, pair.fixed)
                else:
                    fields = self.inner.refined(pair.moving, pair.fixed, fields.detached(), both=False)
            parts = (
                free_terms(fields, pair, hot, options.magnitude)
                if phase == "B"
                else teacher_terms(fields, pair, options.magnitude)
            )
            if hasattr(self.inner, "learned_inverse_terms") and draw.chance(options.inverse_share):
                parts.update(self.inner.learned_inverse_terms([fields.to_moving.detach(), fields.to_fixed.detach()]))
            sum(parts.values()).backward()
            self._update()
            for name, value in parts.items():
                terms[name] = terms.get(name, 0.0) + float(value.detach()) / count
            state.step += 1
        state.pair += 1
        return {
            "step": state.step,
            "stage": phase,
            "pair": number,
            "passes": count,
            "loss": sum(terms.values()),
            "terms": {k: round(v, 6) for k, v in terms.items()},
            "seconds": round((time.perf_counter() - started) / count, 3),
        }

    def _coarse(self, number: int, mirrored: bool, exchanged: bool, pair: PoolPair) -> HalfFields:
        """The coarser levels' field of a whole pair, kept: those levels change no more. Exchanging the scans
        turns it round."""
        key = number, mirrored
        if key not in self.coarse:
            images = (pair.fixed, pair.moving) if exchanged else (pair.moving, pair.fixed)
            with torch.no_grad():
                self.inner.eval()
                found = self.inner.coarse_halves(*images)
                self.inner.train()
            self.coarse[key] = HalfFields(
                *(None if u is None else u.half() for u in (found.to_moving, found.to_fixed, found.velocity))
            )
        a, b, h = (None if u is None else u.float() for u in vars(self.coarse[key]).values())
        return HalfFields(b, a, None if h is None else -h) if exchanged else HalfFields(a, b, h)

    def _rates(self) -> None:
        options = self.options
        along = self.state.step / options.steps
        warm = min(1.0, (self.state.step + 1) / 20)
        rate = options.last_rate + (options.learning_rate - options.last_rate) * 0.5 * (1 + math.cos(math.pi * along))
        self.optimiser.param_groups[0]["lr"] = warm * rate

    def _update(self) -> None:
        state = self.state
        for group in self.inner.clip_groups():
            lengths = [p.grad.float().norm() for p in group if p.grad is not None]
            if lengths and not math.isfinite(float(torch.stack(lengths).norm())):
                state.bad += 1
                if state.bad > MOST_BAD_STEPS:
                    raise RegistrationError(
                        f"{state.bad} steps in a row had no finite gradient.",
                        "Lower --learning-rate, or use --precision float32, in a new --output.",
                    )
                return
            nn.utils.clip_grad_norm_(group, self.options.clip)
        state.bad = 0
        self.optimiser.step()
        keep = min(self.options.ema, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if name.startswith("inner.") and value.dtype.is_floating_point:
                    self.average[name].lerp_(value, 1 - keep)

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    # ------------------------------------------------------------------------------------------ judging and keeping

    def _averaged(self) -> Any:
        """A network with the averaged weights, in evaluation mode."""
        judge = networks.create(
            self.options.method, self.options.size, **{**self.options.method_options, "prealign": True}
        )
        judge.load_state_dict(self.average)
        return judge.eval()

    def _judge(self) -> None:
        judge = self._averaged()
        rows = {pair.name: pair.scores(judge) for pair in self.judged}
        mean = {name: float(np.mean([row[name] for row in rows.values()])) for name in next(iter(rows.values()))}
        checkpoints.append(
            self.folder / "validation.jsonl", {"step": self.state.step, "score": mean["dice"], **mean, "pairs": rows}
        )

    def _settle_folder(self) -> None:
        """Write what the run is, or check that it is the same."""
        free = {
            "stop_after",
            "threads",
            "checkpoint_minutes",
            "command",
            "licence",
            "judge_every",
            "judged",
            "precision",
        }
        about = {name: value for name, value in asdict(self.options).items() if name not in free}
        path = self.folder / "plan.json"
        if path.is_file():
            old = json_object(path) or {}
            differ = [name for name in about if old.get(name) != json.loads(json.dumps(about[name]))]
            if differ:
                raise InputError(
                    f"'{self.folder}' holds a run with other options: {', '.join(differ)}.",
                    "Use the same options to go on, or another --output to begin anew.",
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"output folder '{self.folder}' cannot be written ({error.strerror}).", "Choose another --output."
            ) from None
        write_whole(path, json.dumps(about, indent=1))

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _save(self) -> None:
        tensors = checkpoints.pack(self.network, self.optimiser, {"average": self.average})
        checkpoints.write(self._file, tensors, asdict(self.state))
        log = rows(self.folder / "log.jsonl")
        if log and not pictures.missing():
            picture = pictures.curves(log, rows(self.folder / "validation.jsonl"))
            write_whole(self.folder / "curves.png", png(picture))

    def _resume(self) -> None:
        if self._file.is_file():
            tensors, facts = checkpoints.read(self._file)
            try:
                self.state = _State(**facts)
                self.average = checkpoints.unpack(tensors, self.network, self.optimiser)["average"]
            except (TypeError, KeyError, RuntimeError) as error:
                raise InputError(
                    f"the checkpoint '{self._file}' does not fit this run ({str(error).splitlines()[0]}).",
                    "Choose another --output to begin anew.",
                ) from None
        for name in ("log.jsonl", "validation.jsonl"):
            checkpoints.cut_log(self.folder / name, self.state.step)

    def _outcome(self) -> dict[str, Any]:
        """Write the averaged weights and their card, finished or not."""
        options, state = self.options, self.state
        judged = rows(self.folder / "validation.jsonl")
        result = {
            "finished": state.step >= options.steps,
            "step": state.step,
            "steps": options.steps,
            "seconds": round(state.seconds, 1),
            "output": str(self.folder),
            "validation": judged[-1] if judged else None,
            "notes": [note for note in [pictures.missing()] if note],
        }
        path = self.folder / f"{options.method}-{options.size}{weights.SUFFIX}"
        weights.save(path, self._averaged(), self._card(judged))
        return {**result, "weights": str(path)}

    def _card(self, judged: list[dict]) -> dict[str, Any]:
        options, state, manifest = self.options, self.state, self.pool.manifest
        card = networks.card(options.method)
        published = sum(stage.iterations for stage in networks.network_class(options.method).recipe.stages)
        return {
            "title": card.title,
            "publication": card.publication,
            "licence": options.licence,
            "deviations": list(self.network.card.deviations),
            "trained_on": f"a pool of {len(self.pool)} pairs of scans synthesised from "
            f"{len(manifest['label_maps'])} label maps",
            "data": {"pairs": len(self.pool), "label maps": len(manifest["label_maps"]), "pool": manifest},
            "plan": {
                "method": options.method,
                "size": options.size,
                "spacing": manifest["options"]["spacing"],
                "shape": manifest["options"]["shape"],
                "precision": "bfloat16" if self.half else "float32",
                "options": {
                    k: v
                    for k, v in asdict(options).items()
                    if k not in ("pool", "output", "command", "judged", "start")
                },
            },
            "training": {
                "steps": state.step,
                "of_planned": options.steps,
                "of_published": published,
                "pairs_seen": state.pair,
                "seconds": round(state.seconds),
                "seed": options.seed,
                "averaged": options.ema,
            },
            "curves": training_result._summary(rows(self.folder / "log.jsonl")),
            "validation": {"final": judged[-1] if judged else None, "all": judged[-40:]},
            "limits": [
                f"{100 * state.step / published:.3g} % of the published number of steps.",
                "No real scan was seen in training; pathology that changes the shape of tissues was not either.",
                "Not for clinical use.",
            ],
            "command": options.command,
            "begun_from": ancestry(self.begun_from, all_of_it="" in options.keep),
            "front": weights.read_card(self.begun_from).get("front"),
            "versions": training_result.versions(),
        }


def start_file(source: str) -> Path:
    """A weights file, or the shipped one where ``source`` is the name of a method. Raises InputError: none."""
    return weights.find(source) if source in networks.names() else Path(source)


def ancestry(path: Path, all_of_it: bool) -> dict[str, Any]:
    """What a model card says of the weights that a run began from; of all of it, with their own training."""
    card = weights.read_card(path)
    own = ("sha256", "trained_on", "training", "command", "begun_from") if all_of_it else ("sha256",)
    taken = "all weights" if all_of_it else "pose and matching"
    return {"taken": taken, **{name: card[name] for name in own if card.get(name)}}


def take_over(network: nn.Module, path: Path, keep: tuple[str, ...] = ("",)) -> list[str]:
    """Put tensors of a weights file into a network; their names.

    Args:
        path: the weights file.
        keep: beginnings of the names of those that are taken; each must be there in the network's shape.

    Raises:
        InputError: no such weights, or a tensor that is to be taken does not fit.
    """
    found = weights.load(path).tensors
    own = network.state_dict()
    fit = {name: value for name, value in found.items() if name.startswith(tuple(keep))}
    for name, value in fit.items():
        if name not in own or own[name].shape != value.shape:
            raise InputError(
                f"'{name}' of '{path}' does not fit the network that is to be trained.",
                "Keep less of it: --keep pose.,match.",
            )
    fit = {name: value.to(own[name].dtype) for name, value in fit.items()}
    network.load_state_dict({**own, **fit})
    return sorted(fit)
