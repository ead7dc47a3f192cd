"""``symreg pool``: its arguments, and what it says. Help and checks cost no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..console import Console, number
from ..job import existing_file
from ..training.pool_options import PoolOptions
from .parsing import add_numbers, add_output, add_verbosity_options, command_parser, numbers

_DESCRIPTION = """Make a pool of training pairs from label maps: once, for any number of trainings.

Every pair holds two realistic scans that the shipped pose and matching have already brought together, the label maps
of both, and as a teacher the half-way displacement fields that syn finds on clean renderings (--no-teacher leaves
them out, for trainings with --teacher-steps 0). A pair takes about ten seconds of one processor and 5 MB. A pool that
was cut off goes on with the same command; a larger --pairs adds to it. Several processes may work on one pool.
Train with: symreg train --pool DIR --method NAME -o RUN"""

_EXAMPLES = """examples:
  symreg pool label_maps -o pool --pairs 600
  symreg pool label_maps -o pool --pairs 600 --held-out labels_17,labels_18
  symreg pool label_maps -o mixed --pairs 300 --random-contrast 0.5"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``symreg pool``; defaults are those of :class:`PoolOptions`."""
    d = PoolOptions()
    parser = command_parser("pool", "LABELS -o DIR [options]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("labels", metavar="LABELS", help="folder or table of label maps")
    add_output(parser, "folder of the pool")
    parser.add_argument(
        "--pairs", type=int, default=600, metavar="N", help="the pool is to have (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", default="0", metavar="NAMES", help="comma-separated parts of file names to leave out"
    )
    parser.add_argument(
        "--prealign", default="sm-gicnet", metavar="W", help="weights file or method whose pose and matching are used"
    )
    add_numbers(
        parser,
        d,
        """
        spacing         MM    working voxel
        rotation        DEG   largest pose
        shift           MM    largest pose
        scale           SHARE largest change of size
        warp            MM    largest warp of a scan
        two_people      SHARE of pairs of two label maps
        pose_only       SHARE of pairs that only the pose brought together
        random_contrast SHARE of scans that do not look T1-weighted
        strip           SHARE of pairs without what lies outside the brain
        thick           SHARE of scans with thick slices
        noise           SHARE largest noise, of the scan's range
        bias            X     largest logarithm of the bias field
        seed            N     of everything random
        """,
    )
    shape = "working grid, multiples of 16 (default: 80,96,80)"
    parser.add_argument("--shape", type=numbers(int, 3), default=d.shape, metavar="D,H,W", help=shape)
    parser.add_argument(
        "--no-teacher", dest="teacher", action="store_false", help="no fields by syn: for --teacher-steps 0, cheaper"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    add_verbosity_options(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run ``symreg pool``; returns the exit code. Errors are told by :mod:`cli`."""
    args = build_parser().parse_args(list(arguments))
    existing_file(args.labels, "label maps")
    options = PoolOptions(**{name: getattr(args, name) for name in PoolOptions.__dataclass_fields__})
    console = Console(args.json, args.quiet)
    import torch

    from ..training.pool_making import make

    if args.threads:
        torch.set_num_threads(args.threads)
    result = make(args.output, args.labels, args.pairs, options, args.held_out, args.prealign, console.progress)
    taught = f", {number(result['dice_teacher'])} by the teacher" if options.teacher else ""
    console.result(
        result,
        f"{result['pairs']} pairs in {result['folder']}, {result['made']} of them new; Dice "
        f"{number(result['dice_before'])} as they meet{taught}",
    )
    return 0
