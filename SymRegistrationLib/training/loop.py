"""The training loop: stages with freezing, moving average, validation, early stopping, checkpoints, several processes.

Knows no method by name: a network brings its recipe, its loss per level and its parameter groups. Several
processes (``torchrun``) share each step's pairs; their gradients are summed, so the result is that of one process with
the whole batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import networks
from ..files import write_whole
from ..job import InputError, Progress, RegistrationError, silent
from ..networks._base import SymmetricNetwork
from ..registration import weights
from . import checkpoints, pictures
from . import plan as training_plan
from . import result as training_result
from .logs import last_row
from .loss import step_terms, validate
from .options import TrainingOptions
from .plan import TrainingPlan
from .processes import enable_gradient_checkpointing, joined_processes
from .samples import Samples, seed_of
from .stop import Stopper

#: Longest gradient that a step may take in one part of a network (see ``SymmetricNetwork.clip_groups``); longer ones
#: are shortened to it.
LONGEST_GRADIENT = 10.0
#: Steps in a row whose gradient is not finite before a run gives up.
MOST_BAD_STEPS = 20
#: Rate of Adam at the end of a cooled stage, as a share of its peak.
_COLD = 0.02


@dataclass
class TrainingState:
    """Where a run is; everything but tensors, kept in the checkpoint.

    Attributes:
        step: optimiser steps done.
        stage: index into the plan's stages; ``stage_step``: steps done in it.
        best, best_step: highest score of all, and when.
        stage_best, waiting: highest score in this stage, and validations since.
        bad: steps in a row without a finite gradient.
        seconds: of training so far.
        finished: nothing is left to do.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    best: float = -math.inf
    best_step: int = 0
    stage_best: float = -math.inf
    waiting: int = 0
    bad: int = 0
    seconds: float = 0.0
    finished: bool = False


def train(options: TrainingOptions, progress: Progress = silent) -> dict[str, Any]:
    """Plan and train, or go on where the output folder's run was left.

    Returns:
        ``finished``, ``step``, ``weights`` (the file, when finished), ``validation``, ``plan``, ``notes``.

    Raises:
        InputError: see :func:`SymRegistrationLib.training.plan.prepare`.
        RegistrationError: disk full, GPU lost, no finite gradient. The last checkpoint can be continued.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    with joined_processes(options) as (rank, world):
        if rank == 0:
            prepared = training_plan.prepare(options, progress, _timer(options))
            write_whole(Path(options.output, "plan.json"), prepared.plan.to_json(), checkpoints.GO_ON)
        if world > 1:
            dist.barrier()
        if rank != 0:
            prepared = training_plan.prepare(options)
        progress("train", 0.0, f"{prepared.plan.iterations} steps")
        return Trainer(prepared, options, rank, world).run(progress)


def _timer(options: TrainingOptions) -> Callable[[SymmetricNetwork, Samples, int], float]:
    """``timer(network, samples, level)``: seconds of one optimiser step."""

    def timer(network: SymmetricNetwork, samples: Samples, level: int) -> float:
        device = samples.device
        network.to(device).train()
        count = iter(range(1_000_000))

        def step() -> None:
            for _ in range(options.batch):
                drawn = samples.training(next(count), 1.0, options.weights.published > 0)
                for parts in step_terms(network, drawn, level, options.weights, 0):
                    sum(parts.values()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        step()
        return training_plan.measure(step, 3)

    return timer


class Trainer:
    """One run in one process.

    Args:
        prepared: plan and samples.
        options: of the run.
        rank, world: of this process.
    """

    def __init__(self, prepared: training_plan.Prepared, options: TrainingOptions, rank: int = 0, world: int = 1):
        self.plan: TrainingPlan = prepared.plan
        self.samples, self.device, self.options = prepared.samples, prepared.device, options
        if world > 1 and self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.samples.device = self.device
        self.rank, self.world = rank, world
        self.folder = Path(options.output)
        self.network = training_plan.new_network(options).to(self.device)
        self.ema_network = (
            networks.create(options.method, options.size, **options.method_options).to(self.device).eval()
        )
        if options.gradient_checkpointing:
            enable_gradient_checkpointing(self.network)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=1e-4)
        self.state = TrainingState()
        self.average = self._copy()
        self.best = self._copy()
        self._board = training_result.board(self.folder) if options.tensorboard and rank == 0 else None
        self._held_out = None
        self._resume()

    # ------------------------------------------------------------------------------------------ the loop

    def run(self, progress: Progress = silent) -> dict[str, Any]:
        """Train until finished, until ``stop_after``, or until Ctrl-C or SIGTERM; see :func:`train`."""
        # Several processes wait for one another in each step; there torchrun ends all, and the last checkpoint counts.
        with Stopper(self.world == 1) as stopper:
            self._loop(progress, stopper)
        if stopper.number and not self.state.finished:
            raise stopper.told(self.state.step)
        return self._outcome()

    def _loop(self, progress: Progress, stopper: Stopper) -> None:
        begun = saved = time.monotonic()
        before, first = self.state.seconds, self._work_done()
        while not self.state.finished:
            try:
                row = self._step()
            except torch.cuda.OutOfMemoryError:
                raise RegistrationError(
                    "the GPU ran out of memory.",
                    "Use --gradient-checkpointing or a larger --spacing in a "
                    "new --output, or free the GPU and give the same command again.",
                ) from None
            except RuntimeError as error:
                if "CUDA error" not in str(error):
                    raise
                raise RegistrationError(
                    f"the GPU failed in mid-run ({str(error).splitlines()[0]}).",
                    "Give the same command again: the run goes on from its last checkpoint.",
                ) from None
            now = time.monotonic()
            self.state.seconds = before + now - begun
            stopping = self._agreed(bool(self.options.stop_after) and now - begun > 60 * self.options.stop_after)
            due = self.state.step % self.plan.validate_every == 0 or self._stage_is_over()
            if self.rank == 0:
                checkpoints.append(self.folder / "log.jsonl", row)
                if self._board:
                    self._board.add_scalars("terms", row["terms"], row["step"])
                progress(f"level {row['level']}", self._fraction(first, now - begun), self._message(row))
            if due:
                progress("validation", self._fraction(first, now - begun), f"after step {self.state.step}")
                self._validate()
                self._advance()
            stopping = stopping or bool(stopper.number)
            if self.rank == 0 and (due or stopping or now - saved > 60 * self.options.checkpoint_minutes):
                self._save()
                saved = time.monotonic()
            if stopping:
                break

    def _step(self) -> dict[str, Any]:
        """One optimiser step; returns its log line."""
        state, stage = self.state, self.plan.stages[self.state.stage]
        started = time.perf_counter()
        active = self._active(stage.level, state.stage_step < stage.frozen)
        rate = learning_rate(self.plan, state.stage, state.stage_step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        share = 1 / (self.plan.batch * self.world)
        grown = min(1.0, state.stage_step / max(1, self.options.curriculum * stage.iterations))
        terms: dict[str, float] = {}
        for k in range(self.plan.batch):
            position = (state.step * self.plan.batch + k) * self.world + self.rank
            drawn = self.samples.training(position, grown, self.options.weights.published > 0)
            passes = step_terms(
                self.network, drawn, stage.level, self.options.weights, seed_of(self.options.seed, "labels", position)
            )
            while True:
                with self._precision():
                    parts = next(passes, None)
                if parts is None:
                    break
                (sum(parts.values()) * share).backward()
                for name, value in parts.items():
                    terms[name] = terms.get(name, 0.0) + float(value.detach()) / self.plan.batch
        length = self._gather(active)
        if math.isfinite(length):
            for part in self.network.clip_groups():  # one by one: a wild part must not silence the others
                torch.nn.utils.clip_grad_norm_(part, LONGEST_GRADIENT)
            self.optimiser.step()
            self._follow()
            state.bad = 0
        else:
            state.bad += 1
            if state.bad > MOST_BAD_STEPS:
                raise RegistrationError(
                    f"{state.bad} steps in a row had no finite gradient.",
                    "Lower --learning-rate, or use --precision float32, in a new --output.",
                )
        state.step += 1
        state.stage_step += 1
        return {
            "step": state.step,
            "stage": state.stage + 1,
            "level": stage.level,
            "rate": rate,
            "loss": sum(terms.values()),
            "terms": terms,
            "gradient": length if math.isfinite(length) else None,
            "pair": drawn.pair.name,
            "seconds": round(time.perf_counter() - started, 4),
        }

    def _active(self, level: int, frozen: bool) -> list[torch.nn.Parameter]:
        """Parameters that this step may change; the others' gradients are switched off."""
        first = level if frozen else min(self.options.freeze + 1, level)
        used = {id(p): p for k in range(first, level + 1) for p in self.network.parameter_groups(k)}
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in used)
        return list(used.values())

    def _gather(self, active: list[torch.nn.Parameter]) -> float:
        """Gradients summed over the processes; returns their length. What no pair touched gets zeros,
        in every process."""
        for parameter in active:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in active])
            dist.all_reduce(flat)
            for parameter, part in zip(active, flat.split([p.numel() for p in active])):
                parameter.grad.copy_(part.view_as(parameter))
        return float(torch.stack([p.grad.float().norm() for p in active]).norm())

    def _precision(self) -> AbstractContextManager:
        if self.plan.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; young averages follow faster."""
        keep = min(self.options.ema, (1 + self.state.step) / (10 + self.state.step))
        for name, value in self.network.state_dict().items():
            if value.dtype.is_floating_point and self.options.ema:
                self.average[name].lerp_(value, 1 - keep)
            else:
                self.average[name].copy_(value)

    # ------------------------------------------------------------------------------------------ judging

    def _validate(self) -> None:
        """Score the averaged weights on the held-out pairs; process 0 decides for all."""
        state, score = self.state, 0.0
        if self.rank == 0:
            if self._held_out is None:
                self._held_out = [self.samples.validation(k) for k in range(self.options.validation_pairs)]
            self.ema_network.load_state_dict(self.average)
            scores = validate(self.ema_network, self._held_out)
            score = scores.score if math.isfinite(scores.score) else -math.inf
            row = {"step": state.step, "stage": state.stage + 1, "score": score, **dataclasses.asdict(scores)}
            checkpoints.append(self.folder / "validation.jsonl", row)
            if self._board:
                self._board.add_scalars("validation", {k: v for k, v in row.items() if v is not None}, state.step)
        score = self._shared(score)
        if score > state.best:
            state.best, state.best_step = score, state.step
            self.best = {name: value.clone() for name, value in self.average.items()}
        better = score > state.stage_best
        state.stage_best, state.waiting = max(score, state.stage_best), 0 if better else state.waiting + 1

    def _stage_is_over(self) -> bool:
        stage = self.plan.stages[self.state.stage]
        return self.state.stage_step >= stage.iterations or bool(
            self.options.patience and self.state.waiting >= self.options.patience
        )

    def _advance(self) -> None:
        """On to the next stage when this one is over or no longer gains."""
        if not self._stage_is_over():
            return
        state = self.state
        if state.stage + 1 == len(self.plan.stages):
            state.finished = True
        else:
            state.stage, state.stage_step, state.stage_best, state.waiting = state.stage + 1, 0, -math.inf, 0

    def _shared(self, value: float) -> float:
        """Process 0's number, in every process."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box)

    def _agreed(self, wish: bool) -> bool:
        """Process 0's decision, in every process; asked only when time may stop the run."""
        return bool(self._shared(float(wish))) if self.options.stop_after else False

    # ------------------------------------------------------------------------------------------ keeping

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _save(self) -> None:
        tensors = checkpoints.pack(self.network, self.optimiser, {"average": self.average, "best": self.best})
        checkpoints.write(self._file, tensors, dataclasses.asdict(self.state))
        pictures.draw(self.folder, self.ema_network, self._held_out, self._board, self.state.step)

    def _resume(self) -> None:
        if self._file.is_file():
            tensors, facts = checkpoints.read(self._file)
            try:
                self.state = TrainingState(**facts)
                averages = checkpoints.unpack(tensors, self.network, self.optimiser)
            except (TypeError, KeyError, RuntimeError) as error:
                raise InputError(
                    f"the checkpoint '{self._file}' does not fit this run ({str(error).splitlines()[0]}).",
                    "Choose another --output to begin anew.",
                ) from None
            self.average, self.best = (
                {n: v.to(self.device) for n, v in averages[w].items()} for w in ("average", "best")
            )
        if self.rank == 0:
            for name in ("log.jsonl", "validation.jsonl"):
                checkpoints.cut_log(self.folder / name, self.state.step)

    def _outcome(self) -> dict[str, Any]:
        """Write the weights when there is nothing left to do."""
        result = {
            "finished": self.state.finished,
            "step": self.state.step,
            "steps": self.plan.iterations,
            "output": str(self.folder),
            "seconds": round(self.state.seconds, 1),
            "weights": None,
            "notes": list(self.plan.notes),
            "validation": last_row(self.folder / "validation.jsonl", self.state.best_step),
        }
        if self.state.finished and self.rank == 0:
            self.ema_network.load_state_dict(self.best)
            path = self.folder / f"{self.plan.method}-{self.plan.size}{weights.SUFFIX}"
            card = training_result.model_card(self.plan, self.options, result, self.state)
            weights.save(path, self.ema_network, card)
            result["weights"] = str(path)
        return result

    # ------------------------------------------------------------------------------------------ telling

    def _work_done(self) -> float:
        """Steps done, weighed by what a step of their stage costs."""
        cost = self._costs()
        stages = self.plan.stages
        return sum(stages[k].iterations * cost[k] for k in range(self.state.stage)) + (
            self.state.stage_step * cost[self.state.stage]
        )

    def _costs(self) -> list[float]:
        known = self.plan.seconds_a_step
        return [known.get(str(stage.level), 2.0**stage.level if not known else 1.0) for stage in self.plan.stages]

    def _fraction(self, first: float, elapsed: float) -> float:
        """Of what this process has to do."""
        total = sum(s.iterations * c for s, c in zip(self.plan.stages, self._costs()))
        by_work = (self._work_done() - first) / max(total - first, 1e-9)
        by_time = elapsed / (60 * self.options.stop_after) if self.options.stop_after else 0.0
        return min(1.0, max(by_work, by_time))

    def _message(self, row: dict[str, Any]) -> str:
        best = f", best score {self.state.best:.4f}" if math.isfinite(self.state.best) else ""
        return (
            f"step {row['step']} of {self.plan.iterations}, level {row['level']}, loss {row['loss']:.4f}, "
            f"{row['seconds']:.2f} s a step{best}"
        )


def learning_rate(plan: TrainingPlan, stage: int, step: int) -> float:
    """Adam's rate at a step of a stage: as published (constant, or halved), or warmed up and cooled down
    by a cosine."""
    leg = plan.stages[stage]
    if plan.rate == "published":
        return leg.learning_rate * 0.5 ** (
            max(0, step - plan.halve_after) // plan.halve_every if plan.halve_every else 0
        )
    warm = max(1, min(50, leg.iterations // 20))
    if step < warm:
        return leg.learning_rate * (step + 1) / warm
    along = (step - warm) / max(1, leg.iterations - warm)
    return leg.learning_rate * (_COLD + (1 - _COLD) * 0.5 * (1 + math.cos(math.pi * min(1.0, along))))
