"""``symreg update``, ``repair``, ``undo``, ``redo``, ``history``: going on from a finished registration."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Console
from ..job import PRESETS, SIMILARITIES, SLIDING, InputError

UPDATE = """Go on from a finished registration instead of starting again: new landmark pairs or labels pull, the rest
follows. Takes seconds. What is not given stays as it was in the last step.

The folder DIR must have been written with its state (the default of 'symreg register')."""

UPDATE_EXAMPLES = """examples:
  symreg update out --fixed-points a.mrk.json --moving-points b.mrk.json
  symreg update out --fixed-points a.csv --moving-points b.csv --landmark-tolerance 1.5
  symreg update out --fixed-labels a.nii.gz --moving-labels b.nii.gz --drive-labels 4,43,17,53
  symreg undo out"""

REPAIR = """Register again only in one region of a finished registration. Outside the rim around the region nothing
changes, in both directions, and the two stay inverse to each other."""

REPAIR_EXAMPLES = """examples:
  symreg repair out --region mask.nii.gz                         a mask on the fixed scan
  symreg repair out --sphere=12,-30,45,20                        centre and radius, LPS mm of the fixed scan
  symreg repair out --region mask.nii.gz --stiffness 2 --similarity mind
  symreg undo out"""

UNDO = "Show the step before in the folder of a result again. Nothing is optimised; 'symreg redo' comes back."
REDO = "Show the step that was undone last again."
HISTORY = """List the steps of a result and their numbers side by side.
'symreg register --job DIR/history.json -o AGAIN' does them all again."""


def add_steering_options(parser: argparse.ArgumentParser) -> None:
    """What may pull, and how stiff the field is, for registrations, updates and repairs alike."""
    group = parser.add_argument_group("what steers it")
    group.add_argument(
        "--landmark-weight",
        type=float,
        metavar="W",
        help="let the landmarks pull: share of what is left that each step takes away, 0 to 1",
    )
    group.add_argument(
        "--landmark-tolerance",
        metavar="MM",
        help="within this a pair counts as met; one number, or one for each pair, separated by commas (default: 2)",
    )
    group.add_argument(
        "--drive-labels", metavar="WHICH", help="let labels pull: 'all', or their numbers separated by commas"
    )
    group.add_argument(
        "--label-weight",
        type=float,
        metavar="W",
        help="labels against images where labels speak, 0 to 1 (default: 0.8)",
    )
    group.add_argument("--stiffness", type=float, metavar="F", help="above 1 it bends less, below 1 more (default: 1)")


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """Where to go on from, and whether that will be possible afterwards."""
    group = parser.add_argument_group("going on from a finished registration (see also update, repair, undo)")
    group.add_argument("--start-from", metavar="DIR", help="folder of a finished registration of these two scans")
    _add_region(group)
    group.add_argument(
        "--keep-state",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write the state, a few MB, so that the result can be gone on from",
    )


def _add_region(group: Any) -> None:
    group.add_argument("--region", metavar="FILE", help="mask on the fixed scan: register again only there")
    group.add_argument("--sphere", metavar="X,Y,Z,R", help="the same as centre and radius, LPS mm of the fixed scan")
    group.add_argument(
        "--rim-mm", type=float, default=10.0, metavar="MM", help="the change fades out over this (default: %(default)s)"
    )


def continuing_arguments(parser: argparse.ArgumentParser, region: bool) -> None:
    """Arguments of ``update``, and with ``region`` of ``repair``."""
    parser.add_argument("folder", metavar="DIR", help="folder of a finished registration")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for the new result (default: the same)")
    if region:
        _add_region(parser.add_argument_group("where"))
    extra = parser.add_argument_group("more about the scans")
    kinds = (
        ("labels", "label map"),
        ("points", "landmarks (.csv, .fcsv, .mrk.json)"),
        ("sliding-mask", "label map of what slides along its surroundings, with --sliding"),
    )
    for kind, text in kinds:
        for side in ("fixed", "moving"):
            extra.add_argument(f"--{side}-{kind}", metavar="FILE", help=f"{side} scan: {text}")
    add_steering_options(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--preset", choices=PRESETS, help="how much time a repair may take (default: as before)")
    add_similarity(how, "what is maximised (default: as before)")
    how.add_argument("--sliding", choices=SLIDING, help="what may slide (default: as before)")
    how.add_argument("--spacing", type=float, metavar="MM", help="finer working voxel size")
    how.add_argument("--no-report", action="store_true", help="no report.html")


def add_similarity(group: Any, text: str, default: str | None = None) -> None:
    """The option ``--similarity`` with this help; its former name ``--metric`` still works, unseen."""
    group.add_argument("--similarity", choices=SIMILARITIES, default=default, help=text)
    group.add_argument(
        "--metric", dest="similarity", choices=SIMILARITIES, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def folder_argument(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``undo``, ``redo`` and ``history``."""
    parser.add_argument("folder", metavar="DIR", help="folder of a finished registration")


def go_on(args: argparse.Namespace, console: Console) -> int:
    """Run ``update`` or ``repair``; returns the exit code."""
    from ..jobs.history import continuing_job
    from ..jobs.register import run

    files = [f"{side}_{kind}" for side in ("fixed", "moving") for kind in ("labels", "points", "sliding_mask")]
    names = (*files, "region", "sphere", "rim_mm")
    changes = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    steers = ("landmark_weight", "landmark_tolerance", "drive_labels", "label_weight", "stiffness")
    options = {name: getattr(args, name) for name in (*steers, "preset", "similarity", "sliding", "spacing")}
    options = {name: value for name, value in options.items() if value is not None}
    if "fixed_points" in changes:
        options.setdefault("landmark_weight", 1.0)
    if "fixed_labels" in changes:
        options.setdefault("drive_labels", "all")
    if args.command == "repair" and not ("region" in changes or "sphere" in changes):
        raise InputError("no region is given.", "Add --region FILE or --sphere X,Y,Z,R.")
    if args.no_report:
        changes["report"] = False
    job = continuing_job(args.folder, args.output, changes, options)
    return told(run(job, console.progress), job.output, console)


def step_back(args: argparse.Namespace, console: Console) -> None:
    """Run ``undo`` or ``redo``."""
    from ..jobs import history

    metrics = (history.undo if args.command == "undo" else history.redo)(args.folder, console.progress)
    told(metrics, args.folder, console)


def list_history(args: argparse.Namespace, console: Console) -> None:
    """Run ``history``."""
    from ..jobs.history import history_table, read

    history = read(args.folder)
    console.result({"current": history.current, "steps": list(history.steps)}, history_table(history))


def told(metrics: Any, output: str, console: Console) -> int:
    """Say the notes and the result of a run; returns the exit code: 1 when its verdict is "not registered", else 0."""
    from ..report.rows import summary

    for note in metrics.get("notes", []):
        console.note(note)
    console.result(metrics, summary(metrics, output))
    verdict = metrics.get("verdict", {})
    if verdict.get("registered", True):
        return 0
    console.failure(f"{' '.join(verdict['reasons'])} The outputs are in {output}.")
    return 1


COMMANDS = {"update": go_on, "repair": go_on, "undo": step_back, "redo": step_back, "history": list_history}
