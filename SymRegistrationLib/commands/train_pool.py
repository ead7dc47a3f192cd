"""``symreg train --pool``: its arguments, and what it says. Help and checks cost no torch."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence

from ..console import Console, duration, number
from ..job import existing_file
from ..training.checks import PRECISIONS
from ..training.pool_options import PoolTraining
from .arguments import switches
from .parsing import add_numbers, add_output, add_verbosity_options, command_parser, numbers

_DESCRIPTION = """Train the repeated passes of a method on a pool of pairs (see symreg pool).

Pose and matching come from the weights to start from and stay as they are. Phase C trains the coarser levels, phase A
the finest one on the teacher's fields, phase B on local correlation, smoothness and overlap of labels. The run's folder
holds weights with a model card, log.jsonl, validation.jsonl, curves.png and the checkpoint with which the SAME command
goes on."""

_EXAMPLES = """examples:
  symreg train --pool pool --method hsyn -o run --coarse-steps 600
  symreg train --pool pool --method sm-gicnet -o run --keep pose.,match.,inner.nets.0.,inner.nets.1.,inner.nets.2.
  symreg train --pool pool --method hsyn -o more --continue-from shipped --teacher-steps 0 --free-steps 1000
  symreg train --pool pool --method hsyn -o run --stop-after 30 --judge pairs.csv"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``symreg train --pool``; defaults are those of :class:`PoolTraining`."""
    d = PoolTraining("", "", "")
    parser = command_parser("train --pool", "POOL --method NAME -o DIR [options]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--pool", required=True, metavar="POOL", help="folder that symreg pool made")
    parser.add_argument("--method", required=True, help="which network; see 'symreg methods'")
    add_output(parser, "folder of the run; one that exists goes on")
    parser.add_argument("--size", default=d.size, help="of the network (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a switch of the method")
    parser.add_argument("--start", metavar="W", help="weights file or method to start from (default: the method's own)")
    keep = "beginnings of the tensors taken from there (default: %(default)s)"
    parser.add_argument("--keep", default=",".join(d.keep), metavar="NAMES", help=keep)
    onward = "go on from all weights of a file, or 'shipped', with their switches"
    parser.add_argument("--continue-from", metavar="W", help=onward)
    for what, phase in (("coarse", "C"), ("teacher", "A"), ("free", "B")):
        text, steps = f"of phase {phase} (default: %(default)s)", f"steps_{what}"
        parser.add_argument(f"--{what}-steps", dest=steps, type=int, default=getattr(d, steps), metavar="N", help=text)
    add_numbers(
        parser,
        d,
        """
        learning_rate      R     peak of Adam's rate
        last_rate          R     rate at the end
        inverse_rate       R     rate of a learned inverse
        most_passes        N     passes of a pair
        inverse_share      SHARE of passes at which a learned inverse learns
        clip               X     longest gradient of each part
        ema                D     decay of the weights' average
        magnitude          W     weight of the half fields' sum, mm^2
        judge_every        N     steps
        checkpoint_minutes M     between checkpoints
        seed               N     of everything random
        """,
    )
    block = "voxels that a step sees, or 'all' (default: 48,64,48)"
    parser.add_argument("--block", type=_block, default=d.block, metavar="D,H,W", help=block)
    parser.add_argument("--judge", metavar="TABLE", help="CSV of labelled pairs of real scans that only judge")
    parser.add_argument("--stop-after", type=float, metavar="M", help="stop after so many minutes, to be continued")
    parser.add_argument("--precision", choices=PRECISIONS, default=d.precision)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--licence", default=d.licence, help="of the weights, for the model card")
    add_verbosity_options(parser)
    return parser


def _block(text: str) -> tuple[int, ...] | None:
    return None if text == "all" else numbers(int, 3)(text)


def options_of(args: argparse.Namespace, command: str) -> PoolTraining:
    """The run that was asked for. Raises InputError."""
    existing_file(args.pool, "--pool")
    if args.judge:
        existing_file(args.judge, "--judge")
    same = {f.name for f in dataclasses.fields(PoolTraining)} & set(vars(args)) - {"keep", "start", "licence"}
    values = {name: getattr(args, name) for name in same}
    start = args.continue_from or args.start
    return PoolTraining(
        **values,
        method_options=switches(args.option),
        start=None if start == "shipped" else start,
        keep=("",) if args.continue_from else tuple(args.keep.split(",")),
        judged=args.judge,
        licence=args.licence,
        command=command,
    )


def main(arguments: Sequence[str]) -> int:
    """Run ``symreg train --pool``; returns the exit code. Errors are told by :mod:`cli`."""
    arguments = list(arguments)
    args = build_parser().parse_args(arguments)
    options = options_of(args, "symreg train " + shlex.join(arguments))
    console = Console(args.json, args.quiet)
    from ..training.on_pool import train

    result = train(options, console.progress)
    state = "finished" if result["finished"] else "stopped"
    lines = [f"{state} at step {result['step']} of {result['steps']} after {duration(result['seconds'])} of training"]
    if result["validation"]:
        before, after = (number(result["validation"][name]) for name in ("dice_before", "dice"))
        lines.append(f"real pairs: Dice {before} as they meet, {after} by the method's own levels")
    lines += result["notes"]
    lines.append(f"wrote {result['weights']}" + ("" if result["finished"] else "; the same command goes on"))
    console.result(result, "\n".join(lines))
    return 0
