"""``symreg``: the command line.

Level 5. Parsing and checking cost no torch; a command loads what it needs when it runs. Exit codes: 0 done, 1 failed
while running, 2 bad usage or input, 130 and 143 stopped by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Sequence

from . import __version__
from .console import Console, jsonable, number
from .job import FORMATS, INITIALS, METRICS, PRESETS, InputError, Job, Options, RegistrationError, existing_file

#: Commands of rooms that may not be there; each module offers ``main(arguments) -> exit code``.
_ROOMS = {
    "train": ("training", "train a network on your own scans"),
    "batch": ("batch", "register many pairs from a table"),
    "worker": ("worker", "serve jobs as JSON lines (what the Slicer module talks to)"),
}
_INPUTS = ("fixed", "moving", "fixed_mask", "moving_mask", "fixed_labels", "moving_labels", "fixed_points", "moving_points")

_OVERVIEW = """examples:
  symreg demo                                          see it work on real brain scans
  symreg register fixed.nii.gz moving.nii.gz -o out    register; look at out/report.html
  symreg apply labels.nii.gz --labels --transform out/forward.h5 --reference fixed.nii.gz -o labels_on_fixed.nii.gz
  symreg evaluate --transform out/forward.h5 --inverse out/inverse.h5 --fixed fixed.nii.gz

'symreg COMMAND --help' explains a command with examples."""

_REGISTER = """Register two 3-D scans both ways. The scans may lie anywhere in space: an initial alignment is found first.

Writes into the folder DIR:
  forward.h5                 transform that brings the moving scan onto the fixed one, alignment included
  inverse.h5                 the other way
  warped_moving.nii.gz       moving scan on the fixed grid; warped_fixed.nii.gz the other way
  jacobian.nii.gz            local volume change (1 = none, 0 or less = folding)
  inverse_consistency.nii.gz how far forward and inverse miss each other, mm
  metrics.json, report.html  all numbers, and pictures to judge by eye"""

_REGISTER_EXAMPLES = """examples:
  symreg register fixed.nii.gz moving.nii.gz -o out
  symreg register t1.nrrd t2.mha -o out --metric mind                  two contrasts
  symreg register a.nii.gz b.nii.gz -o out --preset thorough --fixed-mask liver.nii.gz
  symreg register a.nii.gz b.nii.gz -o out --fixed-labels aseg_a.nii.gz --moving-labels aseg_b.nii.gz
  symreg register --job out/metrics.json -o again                      repeat an earlier run"""

_APPLY = """Carry an image, a label map or landmarks through a transform file.

Images and points go opposite ways, and this command gets it right: forward.h5 warps the moving IMAGE onto the fixed grid;
with the same file, POINTS of the moving scan are carried to the fixed scan by the inverse of that run (found through the
metrics.json beside it), or by a numerical inverse whose error is told."""

_APPLY_EXAMPLES = """examples:
  symreg apply moving.nii.gz --transform out/forward.h5 --reference fixed.nii.gz -o on_fixed.nii.gz
  symreg apply aseg.nii.gz --labels --transform out/forward.h5 --reference fixed.nii.gz -o aseg_on_fixed.nii.gz
  symreg apply moving.mrk.json --points --transform out/forward.h5 -o on_fixed.mrk.json
  symreg apply fixed.csv --points --from fixed --transform out/forward.h5 -o on_moving.csv"""

_EVALUATE = """Score transform files of any program that writes ITK transforms: Dice per label, landmark error, folding and
volume change, and how far a transform and its inverse miss each other."""

_EVALUATE_EXAMPLES = """examples:
  symreg evaluate --transform out/forward.h5 --inverse out/inverse.h5 --fixed fixed.nii.gz
  symreg evaluate --transform out/forward.h5 --fixed-labels a.nii.gz --moving-labels b.nii.gz
  symreg evaluate --fixed-points a.csv --moving-points b.csv          how far apart they are now"""


class _Stopped(BaseException):
    """SIGTERM, raised in the main thread so that everything half-written is cleaned up on the way out."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as InputError."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message[:1].lower()}{message[1:]}.", f"Try '{self.prog} --help'.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises for what a user can cause."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(events="--json" in arguments, quiet="--quiet" in arguments or "-q" in arguments)
    before = _catch_sigterm()
    try:
        if arguments and arguments[0] in _rooms():
            return importlib.import_module(f".{_ROOMS[arguments[0]][0]}", __package__).main(arguments[1:])
        args = build_parser().parse_args(arguments)
        if args.command is None:
            build_parser().print_help()
            return 0
        args.run(args, console)
        return 0
    except RegistrationError as error:
        console.error(error)
        return _fail(arguments, error.exit_code)
    except MemoryError:
        console.error(RegistrationError("there is not enough memory.", "Try a larger --spacing or --preset fast."))
        return _fail(arguments, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, _Stopped) as stop:
        console.error(RegistrationError("stopped; nothing was written."))
        return 143 if isinstance(stop, _Stopped) else 130
    except Exception as error:  # a bug, or a library that gave up: one line for the user, the traceback for us
        console.error(RegistrationError(f"{type(error).__name__}: {error}.", "Run it again with --debug and report what it prints."))
        return _fail(arguments, 1)
    finally:
        console.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _fail(arguments: list[str], code: int) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    return code


def _catch_sigterm() -> Any:
    def stop(number: int, frame: Any) -> None:
        raise _Stopped

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        return None


def _rooms() -> list[str]:
    return [name for name, (module, _) in _ROOMS.items() if importlib.util.find_spec(f".{module}", __package__)]


# ---------------------------------------------------------------------------------------------- parsers

def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands that exist."""
    parser = _Parser("symreg", description="Symmetric deformable registration of 3-D scans: forward and inverse, with the "
                     "evidence of how good they are.", epilog=_OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"symreg {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=_Parser)
    _add(commands, "register", "register two scans, both ways", _REGISTER, _REGISTER_EXAMPLES, _register_arguments, _register)
    _add(commands, "apply", "carry an image, labels or points through a transform", _APPLY, _APPLY_EXAMPLES, _apply_arguments, _apply)
    _add(commands, "evaluate", "score transforms: Dice, landmarks, folding, inverse consistency", _EVALUATE, _EVALUATE_EXAMPLES,
         _evaluate_arguments, _evaluate)
    _add(commands, "methods", "list the methods", "The methods that --method takes.", "", lambda parser: None, _methods)
    if importlib.util.find_spec(".demo", __package__):
        _add(commands, "demo", "see it work on real brain scans", "Register two real brain scans after one of them was turned by "
             "40 to 90 degrees and shifted by 30 to 50 mm.", "example:\n  symreg demo -o demo --seed 3", _demo_arguments, _demo)
    for name in _rooms():
        commands.add_parser(name, help=_ROOMS[name][1])
    return parser


def _add(commands: Any, name: str, summary: str, description: str, examples: str, arguments: Any, run: Any) -> None:
    parser = commands.add_parser(name, help=summary, description=description, epilog=examples,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    group = parser.add_argument_group("what it says")
    group.add_argument("--json", action="store_true", help="one JSON event a line on stdout: progress, result, error")
    group.add_argument("-q", "--quiet", action="store_true", help="only errors")
    group.add_argument("--debug", action="store_true", help="a traceback with an error")
    parser.set_defaults(run=run)


def _register_arguments(parser: argparse.ArgumentParser) -> None:
    options = Options()
    parser.add_argument("fixed", nargs="?", metavar="FIXED", help="the scan that stays: NIfTI, NRRD, MHA, MGZ or a DICOM folder")
    parser.add_argument("moving", nargs="?", metavar="MOVING", help="the scan that is brought onto it")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for the results; made when missing")
    how = parser.add_argument_group("how to register")
    how.add_argument("--method", default=options.method, help="see 'symreg methods' (default: %(default)s)")
    how.add_argument("--preset", choices=PRESETS, default=options.preset, help="how much time it may take (default: %(default)s)")
    how.add_argument("--initial", default=options.initial, metavar="KIND",
                     help=f"initial alignment: {', '.join(INITIALS)}, or a transform file (default: %(default)s)")
    how.add_argument("--metric", choices=METRICS, default=options.metric,
                     help="similarity; auto takes lncc for one contrast and mind for two (default: %(default)s)")
    how.add_argument("--refine", type=int, default=options.refine, metavar="N", help="optimiser levels after a network (default: 0)")
    how.add_argument("--spacing", type=float, metavar="MM", help="working voxel size (default: the method decides)")
    how.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a switch of the method itself; repeatable")
    how.add_argument("--weights", metavar="FILE", help="weights of a network (default: the shipped ones)")
    extra = parser.add_argument_group("more about the scans")
    for kind, text in (("mask", "compare the scans only here"), ("labels", "label map, for Dice"),
                       ("points", "landmarks, for the landmark error (.csv, .fcsv, .mrk.json)")):
        for side in ("fixed", "moving"):
            extra.add_argument(f"--{side}-{kind}", metavar="FILE", help=f"{side} scan: {text}")
    extra.add_argument("--guide-with-points", action="store_true", help="let the landmarks guide the initial alignment")
    out = parser.add_argument_group("results")
    out.add_argument("--transform-format", choices=FORMATS, default="h5", help="of forward and inverse (default: %(default)s)")
    out.add_argument("--composite", action="store_true", help="store affine and grid separately in one .h5")
    out.add_argument("--uncertainty", type=int, default=0, metavar="N", help="also a map of uncertainty from N perturbed runs")
    out.add_argument("--no-report", action="store_true", help="no report.html")
    out.add_argument("--job", metavar="FILE", help="take everything from a job JSON or the metrics.json of an earlier run")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=options.device, help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    machine.add_argument("--memory", type=float, metavar="GB", help="stay below this much memory (default: what is free)")
    machine.add_argument("--seed", type=int, default=options.seed, help="of everything random (default: %(default)s)")


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="image, label map or landmark file")
    parser.add_argument("--transform", required=True, metavar="T", help="transform file, usually forward.h5 of a run")
    parser.add_argument("--reference", metavar="R", help="image whose grid the result gets, usually the fixed scan (not for points)")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="file to write; its ending chooses the format")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--labels", dest="kind", action="store_const", const="labels", default="image", help="INPUT is a label map")
    kind.add_argument("--points", dest="kind", action="store_const", const="points", help="INPUT holds landmarks")
    parser.add_argument("--interpolation", metavar="HOW", help="images: linear (default), nearest, bspline; labels: nearest (default), "
                        "smooth (boundaries between voxels, labels never mixed)")
    parser.add_argument("--from", dest="points_from", choices=("moving", "fixed"), default="moving",
                        help="points: the scan they were placed in; they are carried to the other (default: %(default)s)")
    parser.add_argument("--inverse", metavar="T", help="points: transform file of the other direction (default: found beside T)")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transform", metavar="T", help="forward transform: fixed points -> moving points")
    parser.add_argument("--inverse", metavar="T", help="its inverse, for the inverse consistency error")
    parser.add_argument("--fixed", metavar="FILE", help="fixed scan: where the deformation is measured")
    parser.add_argument("--moving", metavar="FILE", help="moving scan; only for an inverse that has no grid of its own")
    parser.add_argument("--fixed-mask", metavar="FILE", help="measure the deformation only here")
    for kind, text in (("labels", "label map"), ("points", "landmarks")):
        for side in ("fixed", "moving"):
            parser.add_argument(f"--{side}-{kind}", metavar="FILE", help=f"{text} of the {side} scan")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the numbers as JSON")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="symreg-demo", metavar="DIR", help="folder for everything (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random pose (default: %(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="how much time it may take (default: %(default)s)")


# ---------------------------------------------------------------------------------------------- commands

def _register(args: argparse.Namespace, console: Console) -> None:
    job = _job_of(args)
    check_job(job)
    from .outputs import run
    from .report_numbers import summary

    metrics = run(job, console.progress)
    for note in metrics.get("notes", []):
        console.note(note)
    console.result(metrics, summary(metrics, job.output))


def _job_of(args: argparse.Namespace) -> Job:
    if args.job:
        if args.fixed:
            raise InputError("both --job and scans are given.", "Give one of them.")
        text = existing_file(args.job, "job file").read_text(encoding="utf-8", errors="replace")
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise InputError(f"job file '{args.job}' is not JSON ({error}).") from None
        raw = raw["job"] if isinstance(raw, dict) and isinstance(raw.get("job"), dict) else raw
        return Job.from_dict({**raw, "output": args.output} if args.output and isinstance(raw, dict) else raw)
    if not (args.fixed and args.moving and args.output):
        missing = [name for name, value in (("FIXED", args.fixed), ("MOVING", args.moving), ("-o DIR", args.output)) if not value]
        raise InputError(f"missing: {', '.join(missing)}.", "Try 'symreg register --help'.")
    names = {f.name for f in dataclasses.fields(Options)} - {"memory_gb", "method_options"}
    options = Options(**{name: getattr(args, name) for name in names}, memory_gb=args.memory, method_options=_switches(args.option))
    return Job(output=args.output, transform_format=args.transform_format, composite=args.composite, report=not args.no_report,
               guide_with_points=args.guide_with_points, options=options, **{name: getattr(args, name) for name in _INPUTS})


def _switches(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are read as JSON where they are JSON (numbers, true), else as text."""
    switches = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"--option '{pair}' is not NAME=VALUE.")
        try:
            switches[name] = json.loads(value)
        except ValueError:
            switches[name] = value
    return switches


def check_job(job: Job) -> None:
    """Refuse at once, without torch, what is missing; then an unknown method. Outputs and contents are checked by the run.

    Raises:
        InputError: naming the input and the remedy.
    """
    for name in _INPUTS:
        path = getattr(job, name)
        if path is not None:
            existing_file(path, name.replace("_", " "))
    if job.options.initial not in INITIALS:
        existing_file(job.options.initial, "initial transform")
    if job.options.weights:
        existing_file(job.options.weights, "weights file")
    if job.options.method != "syn":
        from .networks import network_class

        network_class(job.options.method)


def _apply(args: argparse.Namespace, console: Console) -> None:
    from .apply import Application, apply_transform

    result = apply_transform(Application(args.input, args.transform, args.output, args.reference, args.kind, args.interpolation,
                                         args.points_from, args.inverse), console.progress)
    for note in result["notes"]:
        console.note(note)
    text = f"wrote {result['output']}"
    if args.kind == "points":
        text += (f"\n{result['count']} points carried from {result['from']} to {result['to']} by: {result['method']}; they return "
                 f"within {number(result['residual_mean_mm'])} mm (mean), {number(result['residual_max_mm'])} mm (largest)")
    console.result(result, text)


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    from .apply import check_writable, replacing
    from .evaluate import Evaluation, evaluate, evaluation_table

    request = Evaluation(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Evaluation)})
    if args.output:
        check_writable(Path(args.output))
    result = evaluate(request, console.progress)
    if args.output:
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(jsonable(result), indent=1), encoding="utf-8")
    console.result(result, evaluation_table(result))


def _methods(args: argparse.Namespace, console: Console) -> None:
    from .catalogue import catalogue, catalogue_table

    methods = catalogue()
    console.result({"methods": methods}, catalogue_table(methods))


def _demo(args: argparse.Namespace, console: Console) -> None:
    from .demo import run_demo

    metrics, text = run_demo(Path(args.output), args.seed, args.preset, console)
    console.result(metrics, text)
