"""``symreg batch``: its arguments, and what it says.

Help and checks cost no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cohort.table import COLUMNS, UNSET, Cells, Row, read_cells, rows_of, write_cells
from ..console import Console
from ..job import InputError, Job, existing_file
from .arguments import add_options, options_of
from .parsing import add_output, add_verbosity_options, command_parser

#: Seconds that stand for never in --timeout: threads refuse to wait for centuries.
LONGEST_SILENCE = 1e9
_DESCRIPTION = f"""Register many pairs. Workers stay warm between pairs; one bad pair stops nothing.

TABLE is a CSV or TSV file, one pair a line; its first line names the columns:
  {", ".join(COLUMNS)}
fixed and moving are needed, the rest is optional; relative paths start at the table's folder. Or TABLE is a folder of
scans (BIDS or flat): every later session goes onto the first one of its subject; --to FILE: every scan onto one;
--pairs all.

Writes a folder per pair (named by its id, as symreg register writes it), summary.csv, and index.html: every pair with
its picture, failed ones and outliers first. After Ctrl-C, a crash or a reboot, the SAME command goes on: a pair counts
as finished only when the SHA-256 of its inputs and its options are those recorded with its results."""

_EXAMPLES = """examples:
  symreg batch pairs.csv -o out --dry-run                         check every row in seconds, register nothing
  symreg batch pairs.csv -o out --preset fast
  symreg batch bids -o out --to template.nii.gz --suffix T1w      every T1w scan onto the template
  symreg batch bids -o out --save-table pairs.csv --dry-run       the sessions of every subject, as a table to edit
  symreg batch pairs.csv -o out --scheduler tcp://node7:8786      the same pairs on a Dask cluster

exit code: 0 every pair is done, 1 some failed (summary.csv says which and why), 2 bad input"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``symreg batch``."""
    parser = command_parser("batch", "TABLE -o DIR [options]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("table", metavar="TABLE", help="CSV or TSV file, or a folder of scans")
    add_output(parser, "folder for everything; the same one again goes on")
    parser.add_argument(
        "--to", metavar="FILE", help="the fixed scan of every row; the table then needs no column 'fixed'"
    )
    for kind in ("mask", "labels", "points"):
        parser.add_argument(f"--to-{kind}", metavar="FILE", help=f"{kind} of --to")
    add_folder_arguments(parser)
    return completed(parser)


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which scans of a folder make pairs."""
    group = parser.add_argument_group("when TABLE is a folder")
    group.add_argument(
        "--pairs", choices=("sessions", "all"), help="which scans make pairs (default: sessions, where there are any)"
    )
    add_scan_arguments(group)


def add_scan_arguments(group: Any) -> None:
    """What chooses scans of a folder."""
    group.add_argument(
        "--suffix", metavar="NAME", help="scans whose BIDS name ends so (default: T1w, or the only kind there is)"
    )
    group.add_argument("--save-table", metavar="FILE", help="also write the table that was made, to look at or edit")


def completed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with what every command that registers many pairs takes: how they are run, how registered,
    what is said."""
    group = parser.add_argument_group("how to run")
    group.add_argument("--dry-run", action="store_true", help="check every row by the files' headers, register nothing")
    group.add_argument(
        "--workers",
        default="auto",
        metavar="N",
        help="processes; auto: one per GPU, or as many as processors and memory allow (default: %(default)s)",
    )
    group.add_argument("--scheduler", metavar="ADDRESS", help="hand the pairs to the Dask cluster at ADDRESS instead")
    group.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="MIN",
        help="replace a worker that has said nothing for so long (default: %(default)g)",
    )
    group.add_argument(
        "--verify", action="store_true", help="compare finished pairs by the SHA-256 of their outputs too"
    )
    add_options(parser)
    add_verbosity_options(parser)
    return parser


def plan_of(args: argparse.Namespace, **more: Any) -> Any:
    """The :class:`~SymRegistrationLib.cohort.run.CohortPlan` that the arguments ask for. Raises InputError."""
    from ..cohort.run import CohortPlan

    workers = None
    if args.workers != "auto":
        try:
            workers = int(args.workers)
        except ValueError:
            workers = 0
        if workers < 1:
            raise InputError(f"--workers is '{args.workers}'.", "Give auto, or a number from 1.")
    if not args.timeout > 0:
        raise InputError(f"--timeout is {args.timeout:g} minutes.", "Give a positive number.")
    worker_timeout_s = min(60 * args.timeout, LONGEST_SILENCE)
    return CohortPlan(args.output, workers, args.scheduler, worker_timeout_s, verify_outputs=args.verify, **more)


def template_of(args: argparse.Namespace, to: dict[str, Any]) -> Job:
    """What holds for every row; ``to``: fixed, fixed_mask, fixed_labels, fixed_points, where one fixed scan is given.

    The moving scan is a stand-in until a row gives its own. Labels and landmarks of the fixed scan are paired
    only then too.
    """
    stand_ins: dict[str, Any] = {f"moving_{kind}": UNSET for kind in ("labels", "points") if to.get(f"fixed_{kind}")}
    return Job(
        fixed=to.get("fixed") or UNSET,
        moving=UNSET,
        output=args.output,
        transform_format=args.transform_format,
        composite=args.composite,
        dense=args.dense,
        report=not args.no_report,
        **{name: path for name, path in to.items() if name != "fixed"},
        **stand_ins,
        options=options_of(args),
    )


def fixed_side(args: argparse.Namespace, said: str, joint: str) -> dict[str, str | None]:
    """The files of ``--to``, ``--to-mask``, ... as a job names them; all that are given exist. Raises InputError.

    Args:
        said, joint: how messages name them, as ``--to`` and ``-`` in "--to-mask".
    """
    to = {"fixed": args.to, **{f"fixed_{kind}": getattr(args, f"to_{kind}") for kind in ("mask", "labels", "points")}}
    for name, path in to.items():
        if path:
            existing_file(path, said + name[5:].replace("_", joint))
    return to


def main(arguments: Sequence[str]) -> int:
    """Run ``symreg batch``; returns the exit code. Errors are told by :mod:`cli`."""
    args = build_parser().parse_args(list(arguments))
    console = Console(args.json, args.quiet)
    to = fixed_side(args, "--to", "-")
    for name, path in to.items():
        if path and not args.to:
            raise InputError(f"--to{name[5:].replace('_', '-')} is given without --to.", "Add --to FILE.")
    plan = plan_of(args, title=f"Batch {Path(args.table).name}")
    rows = finish_rows(rows_of(*cells_of(args, template_of(args, to))), args)
    if args.dry_run:
        return dry_run(rows, args.output, console)
    return tell(rows, plan, console)


def cells_of(args: argparse.Namespace, template: Job) -> tuple[Cells, str, Job]:
    """The table that is given, or that a folder makes; and what :func:`rows_of` takes beside it. Raises InputError."""
    path = existing_file(args.table, "table")
    if path.is_dir():
        from ..cohort.bids import folder_cells

        cells = folder_cells(path, template, getattr(args, "pairs", None), args.suffix)
        if args.save_table:
            save_table(args.save_table, cells)
    else:
        for name in ("pairs", "suffix", "save_table"):
            if getattr(args, name, None):
                raise InputError(f"--{name.replace('_', '-')} is for folders; '{path}' is a table.", "Leave it out.")
        cells = read_cells(path)
    return cells, args.output, template


def save_table(path: str, cells: Cells) -> None:
    """Write the table of a folder with absolute paths, so that it may lie anywhere. Raises InputError."""
    lines = [
        {name: str((cells.base / text).resolve()) if text else "" for name, text in line.items()}
        for _, line in cells.lines
    ]
    columns = [name for name in COLUMNS if any(line.get(name) for line in lines)]
    try:
        write_cells(path, columns, [{name: line[name] for name in columns} for line in lines])
    except OSError as error:
        raise InputError(f"--save-table '{path}' could not be written ({error.strerror}).") from None


def finish_rows(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """What needs a whole row: landmarks that guide where there are any, and no stand-in left. Raises InputError."""
    from dataclasses import replace

    finished = []
    for row in rows:
        job = row.job
        gone: dict[str, Any] = {
            f"{side}_{kind}": None
            for kind in ("labels", "points")
            for side in ("fixed", "moving")
            if getattr(job, f"moving_{kind}") == UNSET
        }
        job = replace(job, **gone)
        finished.append(
            replace(row, job=replace(job, guide_with_points=bool(args.guide_with_points and job.fixed_points)))
        )
    if args.guide_with_points and not any(row.job.guide_with_points for row in finished):
        raise InputError("--guide-with-points needs landmarks.", "Add columns fixed_points and moving_points.")
    return finished


def dry_run(rows: Sequence[Row], output: str, console: Console) -> int:
    """Check every row and say what was found; 2 when a row cannot run."""
    from ..cohort.run import check_rows

    states, checker = check_rows(rows, output, console)
    bad = [state for state in states if state.status == "failed"]
    lines = [f"{len(rows)} pairs, {len(rows) - len(bad)} can be registered, {len(bad)} cannot"]
    if len(bad) < len(states):
        need = max(checker.memory_gb(state.row.job) for state in states if state.status != "failed")
        lines.append(f"a worker needs about {need:.1f} GB of memory")
    if bad:
        told = [
            (f"line {state.row.line}", f"{state.row.identity}: {' '.join(state.reason.split())}") for state in bad[:50]
        ]
        lines += [
            "",
            *(f"  {line}  {text}" for line, text in told),
            *([f"  and {len(bad) - 50} more"] if len(bad) > 50 else []),
        ]
    result = {
        "pairs": [{"id": s.row.identity, "line": s.row.line, "problem": s.reason or None} for s in states],
        "bad": len(bad),
    }
    console.result(result, "\n".join(lines))
    return 2 if bad else 0


def tell(rows: Sequence[Row], plan: Any, console: Console) -> int:
    """Run the batch and say how it went; returns the exit code."""
    import time

    from ..cohort.run import run_batch
    from ..cohort.summary import counts, summary_text

    started = time.monotonic()
    states = run_batch(rows, plan, console)
    found = counts(states)
    failed = {state.row.identity: state.reason for state in states if state.status == "failed"}
    console.result(
        {**found, "failures": failed, "output": plan.output},
        summary_text(states, plan.output, time.monotonic() - started),
    )
    return 1 if failed else 0
