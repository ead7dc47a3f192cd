"""From data and machine to a plan: spacing, size, schedule, precision, memory; printed and written before
hours are spent.

The idea is nnU-Net's (Isensee 2021): what can be learned from the data set and the memory is not asked of the user.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import networks
from ..console import duration
from ..job import InputError, Progress, silent
from ..networks._base import Recipe, SymmetricNetwork, parameter_count
from ..registration import devices, weights
from . import dataset, pictures
from .dataset import Cache, Facts, Listing
from .footprint import working_footprint
from .options import TrainingOptions
from .samples import Mixture, Part, Samples, all_pairs
from .synthetic import Synthesis

#: Plans of fewer steps than this share of the published ones learn faster and cool down.
SHORT = 0.5


@dataclass(frozen=True)
class StagePlan:
    """One leg; see ``networks._base.Stage``."""

    level: int
    iterations: int
    learning_rate: float
    frozen: int


@dataclass(frozen=True)
class TrainingPlan:
    """Everything a run does, as written to plan.json.

    Attributes:
        spacing, shape: of the working grid, mm and voxels.
        precision: ``float32`` or ``bfloat16``.
        rate: ``published`` or ``cosine``.
        halve_every, halve_after: steps, for ``published``; see ``networks._base.Recipe``.
        memory_gb, room_gb: what a step is expected to take, and what there is.
        data: counts of what was found.
        held_out: names of what validates.
        notes: what was decided for the user, in words.
        options: of the run.
    """

    method: str
    size: str
    spacing: float
    shape: tuple[int, int, int]
    batch: int
    device: str
    precision: str
    stages: tuple[StagePlan, ...]
    rate: str
    halve_every: int | None
    validate_every: int
    memory_gb: float
    room_gb: float
    data: dict[str, Any]
    held_out: tuple[str, ...]
    notes: tuple[str, ...]
    options: dict[str, Any]
    seconds_a_step: dict[str, float] = field(default_factory=dict)
    halve_after: int = 0

    @property
    def iterations(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.iterations for stage in self.stages)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingPlan:
        """Read :meth:`to_json`. Raises InputError when it is damaged."""
        try:
            raw = json.loads(text)
            return cls(
                **{
                    **raw,
                    "shape": tuple(raw["shape"]),
                    "notes": tuple(raw["notes"]),
                    "held_out": tuple(raw["held_out"]),
                    "stages": tuple(StagePlan(**stage) for stage in raw["stages"]),
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"the plan of the earlier run is damaged ({error}).", "Choose another --output.") from None

    def table(self) -> str:
        """For people."""
        total = sum(s.iterations * self.seconds_a_step.get(str(s.level), 0.0) for s in self.stages)
        lines = [
            f"method      {self.method}, size {self.size}",
            f"grid        {'x'.join(map(str, self.shape))} voxels of {self.spacing:g} mm",
            "data        "
            f"{', '.join(f'{count} {what}' for what, count in self.data.items() if count) or 'shapes only'}",
            f"validation  {', '.join(self.held_out) or 'shapes'}",
            f"machine     {self.device}, {self.precision}, about {self.memory_gb:.2f} of {self.room_gb:.1f} GB",
        ]
        lines += [
            f"stage {k}     level {s.level}, {s.iterations} steps, learning rate {s.learning_rate:g}"
            + (f", coarser levels frozen for {s.frozen}" if s.frozen else "")
            for k, s in enumerate(self.stages, 1)
        ]
        if total:
            lines.append(f"time        about {duration(total)} on this machine")
        return "\n".join([*lines, *(f"note        {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan with what carries it out."""

    plan: TrainingPlan
    samples: Samples
    device: torch.device


def new_network(options: TrainingOptions) -> SymmetricNetwork:
    """The network of a run: fresh by its seed, or filled from ``start``. Raises InputError."""
    torch.manual_seed(options.seed)
    network = networks.create(options.method, options.size, **options.method_options)
    if options.start:
        weights.fill(network, weights.load(options.start, options.method))
    return network


def prepare(options: TrainingOptions, progress: Progress = silent, timer: Callable | None = None) -> Prepared:
    """Check the data, plan, and fill the cache; an output folder that has a plan keeps it.

    Args:
        timer: ``timer(network, samples, level) -> seconds a step``, asked when ``minutes`` is set.

    Raises:
        InputError: anything that would fail later: bad scans, too few, no memory, no disk, no such device.
    """
    device = devices.resolve(options.device)
    network = new_network(options)
    notes = [note for note in [pictures.missing()] if note]
    scans, scan_facts = _listing(options.data, options, progress, notes)
    maps, map_facts = _listing(options.labels, options, progress, notes, only_labels=True)
    training, validation = _parts(scans, maps, notes)
    old = Path(options.output) / "plan.json"
    if old.is_file():
        plan = TrainingPlan.from_json(old.read_text(encoding="utf-8"))
        _same_run(plan, options)
    else:
        plan = _plan(options, network, [*scan_facts, *map_facts], device, notes)
    cache = Cache(Path(options.output) / "cache", plan.spacing, plan.shape)
    mixture = Mixture(
        options.real if options.labels else 1.0,
        options.shapes if options.labels else 1.0,
        options.two_people,
        options.supervised,
    )
    samples = Samples(training, validation, cache, synthesis_of(plan, options), mixture, options.seed, device)
    held = {case for case in (*validation.scans, *validation.maps) if case.split == "validation"}
    if not old.is_file():
        plan = replace(
            plan,
            data={
                "scans": len(scans.cases),
                "label maps": len(maps.cases),
                "pairs": len(training.pairs),
                "bad scans left out": len(scans.problems) + len(maps.problems),
            },
            held_out=tuple(Path(c.name).name for c in (*scans.cases, *maps.cases) if c in held),
        )
    _check_disk(Path(options.output), network, plan, len(scans.cases) + len(maps.cases))
    _fill_cache(cache, training, validation, progress)
    if not old.is_file():
        plan = _scheduled(plan, options, network, samples, timer)
    return Prepared(plan, samples, device)


def synthesis_of(plan: TrainingPlan, options: TrainingOptions) -> Synthesis:
    """How far the pairs of a plan vary."""
    return Synthesis.posed(plan.shape, plan.spacing, options, one_contrast=options.one_contrast, t1=options.t1)


# ---------------------------------------------------------------------------------------------- data

_EMPTY = Listing(())


def _listing(
    source: str | None, options: TrainingOptions, progress: Progress, notes: list[str], only_labels: bool = False
) -> tuple[Listing, list[Facts]]:
    if source is None:
        return _EMPTY, []
    listing, facts = dataset.check(dataset.find(source, only_labels), options.bad_scans, progress)
    for _, problem in listing.problems:
        notes.append(f"left out: {problem}")
    with_labels = sum(case.labels is not None for case in listing.cases)
    if not only_labels and 0 < with_labels < len(listing.cases):
        notes.append(
            f"{len(listing.cases) - with_labels} of {len(listing.cases)} scans have no labels: pairs with them learn "
            "from intensities only"
        )
    if len({round(f.spacing, 2) for f in facts}) > 1:
        notes.append(
            f"voxel sizes differ ({min(f.spacing for f in facts):g} to {max(f.spacing for f in facts):g} mm); all are "
            "resampled to one grid along their own anatomical axes"
        )
    return dataset.divide(listing, options.validation, options.seed), facts


def _parts(scans: Listing, maps: Listing, notes: list[str]) -> tuple[Part, Part]:
    """Training and validation. Raises InputError for too few scans."""
    parts = []
    for split in ("train", "validation"):
        at = scans.part(split)
        cases = tuple(scans.cases[k] for k in at)
        if scans.pairs is None:
            pairs = all_pairs(cases)
        else:
            place = {old: new for new, old in enumerate(at)}
            pairs = tuple((place[m], place[f]) for m, f in scans.pairs if m in place and f in place)
        parts.append(Part(cases, pairs, tuple(maps.cases[k] for k in maps.part(split))))
    training, validation = parts
    if validation.scans and not validation.pairs and scans.pairs is None:
        # One held-out subject has no partner among its like: it is paired with those that training knows.
        cases = (*validation.scans, *training.scans)
        mixed = tuple((m, f) for m, f in all_pairs(cases) if (m < len(validation.scans)) != (f < len(validation.scans)))
        validation = replace(validation, scans=cases, pairs=mixed)
    if scans.cases and not training.pairs:
        raise InputError(
            f"'{scans.source}' leaves {len(training.scans)} scans for training, which make no pair of two subjects.",
            "At least two subjects are needed beside those held out; lower --validation, or add --labels.",
        )
    if maps.cases and not training.maps:
        raise InputError(f"'{maps.source}' leaves no label map for training.", "Lower --validation.")
    if 0 < len({c.subject for c in training.scans}) < 5 and not maps.cases:
        notes.append(
            f"only {len({c.subject for c in training.scans})} subjects to learn from: expect a network that knows "
            "these, not people; add --labels or more scans"
        )
    if not (validation.pairs or validation.maps):
        notes.append("nothing is held out: random shapes validate, so early stopping sees no anatomy")
    return training, validation


def _same_run(plan: TrainingPlan, options: TrainingOptions) -> None:
    """Refuse to go on with a run under other options; what only limits this process may change."""
    free = {"stop_after", "threads", "device", "checkpoint_minutes", "command", "tensorboard", "memory_gb", "licence"}
    now = json.loads(json.dumps(dataclasses.asdict(options)))
    differ = [name for name in now if name not in free and plan.options.get(name) != now[name]]
    if differ:
        raise InputError(
            f"'{options.output}' holds a run with other options: {', '.join(differ)}.",
            "Use the same options to go on, or another --output to begin anew.",
        )


def _fill_cache(cache: Cache, training: Part, validation: Part, progress: Progress) -> None:
    jobs = [(cache.scan, c) for p in (training, validation) for c in p.scans]
    jobs += [(cache.labels, c) for p in (training, validation) for c in p.maps]
    for k, (make, case) in enumerate(jobs):
        progress("cache", k / len(jobs), f"resampling {Path(case.name).name}")
        make(case)


def _check_disk(output: Path, network: SymmetricNetwork, plan: TrainingPlan, files: int) -> None:
    """Raises InputError when cache and checkpoints will not fit, or the folder cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").write_text("")
        (output / ".writable").unlink()
    except OSError as error:
        raise InputError(
            f"output folder '{output}' cannot be written ({error.strerror}).", "Choose another --output."
        ) from None
    need = 2 * 5 * 4 * parameter_count(network) + files * 7 * math.prod(plan.shape) + 50e6
    free = shutil.disk_usage(output).free
    if free < need:
        raise InputError(
            f"'{output}' has {free / 1e9:.2f} GB free, and cache and checkpoints take about {need / 1e9:.2f} GB.",
            "Free disk space, or choose another --output.",
        )


# ---------------------------------------------------------------------------------------------- size and memory


def _plan(
    options: TrainingOptions, network: SymmetricNetwork, facts: list[Facts], device: torch.device, notes: list[str]
) -> TrainingPlan:
    grid = working_footprint(options, network, facts, device, notes)
    precision = options.precision if options.precision != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return TrainingPlan(
        network.card.name,
        options.size,
        grid.spacing,
        grid.shape,
        options.batch,
        str(device),
        precision,
        (),
        "published",
        None,
        1,
        round(grid.need_gb, 3),
        round(grid.room_gb, 3),
        {},
        (),
        tuple(notes),
        json.loads(json.dumps(dataclasses.asdict(options))),
    )


# ---------------------------------------------------------------------------------------------- schedule


def _scheduled(
    plan: TrainingPlan, options: TrainingOptions, network: SymmetricNetwork, samples: Samples, timer: Callable | None
) -> TrainingPlan:
    """The published stages, shortened to ``iterations`` or ``minutes``."""
    recipe: Recipe = network.recipe
    published = [stage.iterations for stage in recipe.stages]
    if options.stages is not None and len(options.stages) != len(published):
        raise InputError(
            f"--stages has {len(options.stages)} shares and {plan.method} has {len(published)} stages.",
            "Give one share per stage, coarsest first.",
        )
    seconds: dict[str, float] = {}
    if options.minutes and not options.iterations:
        counts, seconds = _by_time(plan, options, recipe, timer, samples)
    else:
        shares = options.stages or published
        total = options.iterations or sum(published)
        counts = [max(1, round(total * share / sum(shares))) if share else 0 for share in shares]
    scale = sum(counts) / sum(published)
    short = scale < SHORT
    rate = options.rate if options.rate != "auto" else "cosine" if short else "published"
    notes = list(plan.notes)
    factor = 4.0 if short and rate == "cosine" else 1.0
    if short and not options.learning_rate and factor > 1:
        notes.append(
            f"{100 * scale:.3g} % of the published steps: the learning rate starts {factor:g} times higher and cools "
            "down in each stage"
        )
    stages = tuple(
        StagePlan(
            stage.level,
            count,
            options.learning_rate or factor * stage.learning_rate,
            round(stage.frozen * count / stage.iterations),
        )
        for stage, count in zip(recipe.stages, counts)
        if count
    )
    halve = round(recipe.halve_every * scale) or 1 if recipe.halve_every else None
    every = options.validate_every or max(1, sum(counts) // 20)
    return replace(
        plan,
        stages=stages,
        rate=rate,
        halve_every=halve,
        halve_after=round(recipe.halve_after * scale),
        validate_every=every,
        notes=tuple(notes),
        seconds_a_step={level: round(s, 4) for level, s in seconds.items()},
    )


def _by_time(
    plan: TrainingPlan, options: TrainingOptions, recipe: Recipe, timer: Callable, samples: Samples
) -> tuple[list[int], dict[str, float]]:
    """Steps of each stage that fit ``minutes``, with a tenth kept for validation and checkpoints."""
    network = new_network(options)
    seconds = {str(stage.level): timer(network, samples, stage.level) for stage in recipe.stages}
    cost = [seconds[str(stage.level)] for stage in recipe.stages]
    published = [stage.iterations for stage in recipe.stages]
    work = 0.9 * 60 * options.minutes
    shares = list(options.stages or [1.0] * len(published))
    if options.stages is not None or plan.device == "cpu":
        # Coarse levels carry the pose and cost little, so on a CPU every stage gets the same time.
        counts = [work * share / sum(shares) / c for share, c in zip(shares, cost)]
    else:
        factor = work / sum(n * c for n, c in zip(published, cost))
        counts = [factor * n for n in published]
    counts = [min(int(n), most) if n >= 1 else 0 for n, most in zip(counts, published)]
    if any(share and not count for share, count in zip(shares, counts)):
        least = sum(cost) / 54
        raise InputError(
            f"{options.minutes:g} minutes are too short: one step of each stage takes {sum(cost):.1f} s.",
            f"Give more than {max(least, 1):.0f} minutes, a larger --spacing, or a smaller --size.",
        )
    return counts, seconds


def measure(step: Callable[[], None], repeats: int = 2) -> float:
    """Seconds of one step, the faster of a few."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return best
