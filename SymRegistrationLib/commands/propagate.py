"""``symreg propagate``: its arguments, and what it says.

Help and checks cost no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..cohort.table import Cells, read_cells, rows_of
from ..console import Console, number, table
from ..job import InputError, existing_file
from .batch import completed, dry_run, finish_rows, plan_of, template_of
from .parsing import add_output, command_parser

_DESCRIPTION = """Carry labels from one or several atlases to a scan. Every atlas is registered to TARGET (as by
symreg batch: warm workers, the same command goes on after anything), its labels are carried along, and all are made
into one map: majority (a draw goes to the atlas that fits best) or STAPLE (atlases weighted by how they perform).

Writes:
  labels.nii.gz       the labels on the target's grid, values as in the atlases
  agreement.nii.gz    per voxel the share of the atlases (that reach there) which say the same: low = look here
  volumes.csv         voxels, millilitres, mean agreement of every label; Dice with --target-labels
  ID/                 a folder per atlas: transforms, and its own labels.nii.gz on the target
  summary.csv, index.html"""

_EXAMPLES = """examples:
  symreg propagate scan.nii.gz --atlas atlas.nii.gz atlas_labels.nii.gz -o out
  symreg propagate scan.nii.gz --atlases atlases.csv --fusion staple -o out      columns: image, labels, (id, mask)"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``symreg propagate``."""
    parser = command_parser(
        "propagate", "TARGET (--atlas IMAGE LABELS ... | --atlases TABLE) -o DIR [options]", _DESCRIPTION, _EXAMPLES
    )
    parser.add_argument("target", metavar="TARGET", help="the scan that gets the labels")
    add_output(parser, "folder for everything; the same one again goes on")
    group = parser.add_argument_group("atlases")
    group.add_argument(
        "--atlas", nargs=2, action="append", default=[], metavar=("IMAGE", "LABELS"), help="an atlas; repeatable"
    )
    group.add_argument(
        "--atlases", metavar="TABLE", help="CSV or TSV file with the columns image, labels and, if you like, id, mask"
    )
    group.add_argument("--target-mask", metavar="FILE", help="compare the scans only here")
    group.add_argument("--target-labels", metavar="FILE", help="labels that the target has, for Dice")
    group.add_argument("--fusion", choices=("majority", "staple"), default="majority", help="(default: %(default)s)")
    group.add_argument(
        "--interpolation",
        choices=("smooth", "nearest"),
        default="smooth",
        help="smooth: boundaries between voxels, labels never mixed (default: %(default)s)",
    )
    return completed(parser)


def main(arguments: Sequence[str]) -> int:
    """Run ``symreg propagate``; returns the exit code. Errors are told by :mod:`cli`."""
    args = build_parser().parse_args(list(arguments))
    console = Console(args.json, args.quiet)
    existing_file(args.target, "target")
    for name in ("target_mask", "target_labels"):
        if getattr(args, name):
            existing_file(getattr(args, name), name.replace("_", " "))
    cells = _atlases(args)
    files = [str(cells.base / line["labels"]) for _, line in cells.lines]
    scans = Cells(
        cells.name,
        cells.base,
        tuple((at, {k: v for k, v in line.items() if k != "labels"}) for at, line in cells.lines),
    )
    rows = finish_rows(
        rows_of(scans, args.output, template_of(args, {"fixed": args.target, "fixed_mask": args.target_mask})), args
    )
    labels = {row.identity: path for row, path in zip(rows, files)}
    from ..cohort.propagation import FILES, PropagationOptions, check_labels, propagate

    carrying = PropagationOptions(args.fusion, args.interpolation, args.target_labels)
    check_labels(labels, carrying)
    if args.dry_run:
        return dry_run(rows, args.output, console)
    from ..cohort.run import run_batch

    states = run_batch(
        rows, plan_of(args, group=True, title=f"Atlases on {Path(args.target).name}", links=FILES), console
    )
    failed = {state.row.identity: state.reason for state in states if state.status == "failed"}
    result = propagate(states, labels, args.output, carrying, console.progress)
    for note in result["notes"]:
        console.note(note)
    console.result({**result, "failures": failed, "output": args.output}, _text(result, args.output))
    return 1 if failed else 0


def _atlases(args: argparse.Namespace) -> Cells:
    """The atlases as table cells with ``image`` and ``labels``. Raises InputError."""
    if bool(args.atlas) == bool(args.atlases):
        raise InputError(
            "give either --atlas or --atlases." if args.atlas else "no atlas is given.",
            "Add --atlas IMAGE LABELS, as often as you like, or --atlases TABLE.",
        )
    if args.atlas:
        lines = ({"image": image, "labels": labels} for image, labels in args.atlas)
        return Cells("--atlas", Path("."), tuple(enumerate(lines, 1)))
    cells = read_cells(args.atlases)
    for column in ("image", "labels"):
        if column not in cells.lines[0][1]:
            raise InputError(
                f"table '{cells.name}' has no column '{column}'.", "Its first line must name image and labels."
            )
    for line, values in cells.lines:
        if not values["labels"]:
            raise InputError(f"table '{cells.name}', line {line}: 'labels' is empty.", "An atlas needs its label map.")
    return cells


def _text(result: dict, output: str) -> str:
    with_dice = result["mean_dice"] is not None
    rows = [
        (
            name,
            number(row["voxels"]),
            number(row["ml"], 2),
            number(row["agreement"]),
            *([number(row["dice"])] if with_dice else []),
        )
        for name, row in list(result["labels"].items())[:40]
    ]
    text = table(("label", "voxels", "ml", "agreement", *(["Dice"] if with_dice else [])), rows)
    more = f"\nand {len(result['labels']) - 40} more labels" if len(result["labels"]) > 40 else ""
    mean = f"\nmean Dice {number(result['mean_dice'])}" if with_dice else ""
    return (
        f"{text}{more}{mean}\n\n{result['fusion']} of {len(result['atlases'])} atlases in "
        f"{Path(output) / 'labels.nii.gz'}"
    )
