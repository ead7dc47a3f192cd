"""``symreg train``: its arguments, and what it says.

Help and checks cost no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from typing import Any

from ..console import Console, duration, number
from ..job import InputError, existing_file
from ..training.checks import PRECISIONS
from ..training.options import BAD_SCANS, RATES, TrainingOptions, Weighting
from .parsing import add_numbers, add_output, add_verbosity_options, command_parser, numbers

_DESCRIPTION = """Train a network on your own scans, on scans synthesised from label maps, or on both.

Everything is checked before the first step, and a plan (voxel size, grid, schedule, memory) is printed and written.
The folder of the run holds:
  METHOD-SIZE.safetensors    the weights, with a model card beside it: give it to symreg register --weights
  plan.json                  what is done, and what was decided for you
  log.jsonl, curves.png      every loss term of every step
  validation.jsonl, .png     scores on pairs that training never sees, and one of them as a picture
  checkpoint.safetensors     the state: after Ctrl-C, a crash or a power cut, the SAME command goes on and ends with
                             the same weights as a run that was not interrupted

Scans:       --data takes a folder (BIDS or flat; label maps, masks and landmarks are found by name: _aseg, _dseg,
             _labels, _mask, _landmarks) or a CSV/TSV table with the columns image, labels, mask, points, subject,
             split; or fixed, moving, fixed_labels, moving_labels, ... for fixed pairs. What lies outside a mask is
             made black, as in a skull-stripped scan: give the network such scans later, too.
Label maps:  --labels takes a folder or table of label maps. Scans of random contrast, pose and quality are made of them
             while training; the true map of each pair is known. Nothing else is needed.
Pool:        --pool takes a folder that symreg pool made, and trains the repeated passes of a method on it; its options
             are told by: symreg train --pool x --help
Several GPUs: torchrun --nproc-per-node N -m SymRegistrationLib train ..."""

_EXAMPLES = """examples:
  symreg train --method hsyn --labels label_maps -o run --hours 10             one night; no scan needed
  symreg train --method sm-gicnet --data scans.csv -o run                      published schedule on real scans
  symreg train --method hsyn --data bids --labels label_maps -o run --bad-scans skip --validation sub-07,sub-08
  symreg train --method hsyn -o tiny --shape 32,32,32 --iterations 60          see it run: random shapes, a minute
  symreg train --method hsyn --labels label_maps -o run --hours 10 --stop-after 30   a slice of 30 min; repeat to go on
  symreg register a.nii.gz b.nii.gz -o out --method hsyn --weights run/hsyn-small.safetensors"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``symreg train``; every default is that of :class:`TrainingOptions`."""
    parser = command_parser("train", "--method NAME [--data D] [--labels L] -o DIR [options]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--method", required=True, help="which network; see 'symreg methods'")
    add_output(parser, "folder of the run; one that exists goes on")
    for add in (_data_arguments, _schedule_arguments, _loss_arguments, _machine_arguments):
        add(parser)
    add_verbosity_options(parser)
    return parser


#: Where every default is read, so that it stands in one place only.
_DEFAULTS = TrainingOptions("", "")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="D", help="folder or table of scans")
    group.add_argument("--labels", metavar="L", help="folder or table of label maps to synthesise scans from")
    bad = "a scan that cannot be used: leave it out, or stop (default: %(default)s)"
    group.add_argument("--bad-scans", choices=BAD_SCANS, default=_DEFAULTS.bad_scans, help=bad)
    held_out = "held out: a share, or comma-separated parts of file names (default: %(default)s)"
    group.add_argument("--validation", default=_DEFAULTS.validation, metavar="WHAT", help=held_out)
    add_numbers(
        group,
        _DEFAULTS,
        """
        real         SHARE of the steps on real scans when there are label maps too
        shapes       SHARE of synthetic pairs that show random shapes
        two_people   SHARE of synthetic pairs made of two label maps
        one_contrast SHARE of synthetic pairs whose scans have one contrast
        t1           SHARE of synthetic scans of FreeSurfer's labels that look T1-weighted
        rotation     DEG   largest pose
        shift        MM    largest pose
        scale        SHARE largest change of size
        """,
    )
    group.add_argument("--licence", default=_DEFAULTS.licence, help="of the weights, for the model card")


def _schedule_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network and schedule")
    size = "of the network: published or small (default: %(default)s)"
    group.add_argument("--size", default=_DEFAULTS.size, help=size)
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a switch of the method; repeatable"
    )
    group.add_argument("--start", metavar="FILE", help="weights to start from")
    group.add_argument("--shape", type=numbers(int), metavar="D,H,W", help="working grid, voxels (default: planned)")
    group.add_argument("--hours", type=float, metavar="H", help="make the whole plan fit in this time")
    stages = "share of the work per stage, coarsest first; on a CPU coarse levels first pay off"
    group.add_argument("--stages", type=numbers(float), metavar="A,B,..", help=stages)
    rate = "its course (default: cosine for short plans)"
    group.add_argument("--rate", choices=RATES, default=_DEFAULTS.rate, help=rate)
    add_numbers(
        group,
        _DEFAULTS,
        """
        spacing          MM    working voxel (default: planned)
        iterations       N     steps of all stages (default: as published)
        minutes          M     make the whole plan fit in this time
        freeze           LEVEL levels up to this one stay as they are while finer ones are trained
        stop_after       M     stop this process after so many minutes, to be continued
        batch            N     pairs per step and process
        learning_rate    R     peak (default: published, higher for short plans)
        ema              D     decay of the weights' average
        curriculum       SHARE of each stage over which poses grow to full size
        validate_every   N     steps (default: a 20th of the plan)
        validation_pairs N     number of pairs that judge
        patience         N     validations without gain that end a stage; 0 = never
        """,
    )


def _loss_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss", "weights of the terms; 0 leaves one out")
    told = {
        "published": "the method's own loss",
        "dice": "soft Dice of warped labels",
        "end_point": "distance to the true map, voxels",
        "landmarks": "distance of landmarks, voxels",
        "smooth": "smoothness on supervised steps",
        "fold": "folding on supervised steps",
    }
    for field in dataclasses.fields(Weighting):
        flag, text = f"--{field.name.replace('_', '-')}-weight", f"{told[field.name]} (default: {field.default:g})"
        group.add_argument(flag, type=float, default=field.default, metavar="W", help=text)
    add_numbers(group, _DEFAULTS, "supervised SHARE of synthetic steps that learn from labels and true maps")


def _machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default=_DEFAULTS.device, help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    precision = "auto takes bfloat16 on a GPU (default: %(default)s)"
    group.add_argument("--precision", choices=PRECISIONS, default=_DEFAULTS.precision, help=precision)
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    group.add_argument("--memory", type=float, metavar="GB", help="stay below this much memory (default: what is free)")
    add_numbers(
        group,
        _DEFAULTS,
        """
        checkpoint_minutes M at most so much is lost
        threads            N CPU threads (default: all)
        seed               N of everything random
        """,
    )


def options_of(args: argparse.Namespace, command: str) -> TrainingOptions:
    """The run that was asked for. Raises InputError."""
    from .arguments import switches

    if args.hours and args.minutes:
        raise InputError("both --hours and --minutes are given.", "Give one of them.")
    for name in ("data", "labels", "start"):
        if getattr(args, name):
            existing_file(getattr(args, name), f"--{name}")
    apart = {"weights", "method_options", "memory_gb", "minutes", "command"}
    names = {f.name for f in dataclasses.fields(TrainingOptions)} - apart
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    weighting = Weighting(**{f.name: getattr(args, f"{f.name}_weight") for f in dataclasses.fields(Weighting)})
    return TrainingOptions(
        **values,
        weights=weighting,
        method_options=switches(args.option),
        memory_gb=args.memory,
        minutes=60 * args.hours if args.hours else args.minutes,
        command=command,
    )


def main(arguments: Sequence[str]) -> int:
    """Run ``symreg train``; returns the exit code. Errors are told by :mod:`cli`."""
    arguments = list(arguments)
    if any(word == "--pool" or word.startswith("--pool=") for word in arguments):
        from . import train_pool

        return train_pool.main(arguments)
    args = build_parser().parse_args(arguments)
    options = options_of(args, "symreg train " + shlex.join(arguments))
    first = int(os.environ.get("RANK", "0")) == 0
    console = Console(args.json and first, args.quiet or not first)
    from ..training.loop import train

    told = {"plan": False}

    def progress(stage: str, fraction: float, message: str) -> None:
        if stage == "train" and not told["plan"]:
            told["plan"] = True
            _tell_plan(console, options)
        console.progress(stage, fraction, message)

    result = train(options, progress)
    console.result(result, _summary(result))
    return 0


def _tell_plan(console: Console, options: TrainingOptions) -> None:
    import json
    from pathlib import Path

    from ..training.plan import TrainingPlan

    text = Path(options.output, "plan.json").read_text(encoding="utf-8")
    console.event("plan", plan=json.loads(text))
    for line in TrainingPlan.from_json(text).table().splitlines():
        console.note(line)


def _summary(result: dict[str, Any]) -> str:
    state = "finished" if result["finished"] else "stopped"
    lines = [f"{state} at step {result['step']} of {result['steps']} after {duration(result['seconds'])} of training"]
    judged = result["validation"]
    if judged:
        for name, text in (
            ("dice", "Dice"),
            ("end_point", "end-point error, voxels"),
            ("landmarks", "landmarks, voxels"),
            ("similarity", "local correlation"),
        ):
            if judged.get(name) is not None:
                lines.append(f"held out: {text} {number(judged[name + '_before'])} -> {number(judged[name])}")
    lines.append(
        f"wrote {result['weights']}"
        if result["weights"]
        else f"give the same command again to go on; the state is in {result['output']}"
    )
    return "\n".join(lines)
