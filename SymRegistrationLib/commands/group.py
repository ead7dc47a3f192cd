"""``symreg group``: its arguments, and what it says.

Help and checks cost no torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from ..cohort.table import rows_of
from ..console import Console
from .batch import add_scan_arguments, cells_of, completed, dry_run, finish_rows, fixed_side, plan_of, template_of
from .parsing import add_output, command_parser

_DESCRIPTION = """Bring many scans onto one template, and see what they have in common and where they differ in size.

SCANS is a CSV or TSV file with a column image (and mask, id, ...; relative paths start at its folder), or a folder
(BIDS or flat). Every scan is registered as by symreg batch: warm workers, the same command goes on after anything.

Writes a folder per scan, with its transforms, warped_moving.nii.gz and log_jacobian.nii.gz (natural logarithm of the
volume in the scan per volume in the template, above 0 = larger in the scan), and of all:
  mean.nii.gz, sd.nii.gz               the registered scans, every voxel over the scans that reach it
  coverage.nii.gz                      how many those are
  log_jacobian_mean.nii.gz, _sd        morphometry of the group
  scans.csv                            one line a scan for your statistics; log_scale is the part of log_jacobian that
                                       the initial alignment brought (subtract it for volumes relative to the whole)
  summary.csv, index.html              as symreg batch"""

_EXAMPLES = """examples:
  symreg group scans.csv --to template.nii.gz -o cohort
  symreg group bids --to template.nii.gz -o cohort --suffix T1w --preset fast
  symreg group ct_folder --to atlas_ct.nii.gz -o cohort --intensities raw"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``symreg group``."""
    parser = command_parser("group", "SCANS --to TEMPLATE -o DIR [options]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("table", metavar="SCANS", help="CSV or TSV file, or a folder of scans")
    parser.add_argument("--to", required=True, metavar="TEMPLATE", help="the scan that everyone is brought onto")
    add_output(parser, "folder for everything; the same one again goes on")
    for kind in ("mask", "labels", "points"):
        parser.add_argument(f"--to-{kind}", metavar="FILE", help=f"{kind} of the template")
    group = parser.add_argument_group("group")
    group.add_argument(
        "--intensities",
        choices=("scaled", "raw"),
        default="scaled",
        help="mean of scans scaled to 0..1 each, or of their values as they are, for CT (default: %(default)s)",
    )
    group.add_argument(
        "--leave-out",
        choices=("failed", "outliers"),
        default="failed",
        help="which scans the means leave out; outliers: also those that stand out (default: %(default)s)",
    )
    add_scan_arguments(parser.add_argument_group("when SCANS is a folder"))
    return completed(parser)


def main(arguments: Sequence[str]) -> int:
    """Run ``symreg group``; returns the exit code. Errors are told by :mod:`cli`."""
    args = build_parser().parse_args(list(arguments))
    console = Console(args.json, args.quiet)
    to = fixed_side(args, "template", " ")
    rows = finish_rows(rows_of(*cells_of(args, template_of(args, to))), args)
    if args.dry_run:
        return dry_run(rows, args.output, console)
    from ..cohort.run import run_batch
    from ..cohort.summary import counts, summary_text
    from ..cohort.template import FILES, average

    started = time.monotonic()
    states = run_batch(rows, plan_of(args, group=True, title=f"Group on {args.to}", links=FILES), console)
    kept = [state for state in states if args.leave_out == "failed" or not state.stands_out]
    result = average(kept, args.output, args.intensities, console.progress)
    failed = {state.row.identity: state.reason for state in states if state.status == "failed"}
    text = summary_text(states, args.output, time.monotonic() - started)
    console.result(
        {**counts(states), "failures": failed, **result, "output": args.output},
        f"{text}\nmean, spread and volume maps of {result['scans']} scans are in {args.output}",
    )
    return 1 if failed else 0
