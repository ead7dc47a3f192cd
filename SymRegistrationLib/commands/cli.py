"""``symreg``: the command line.

Parsing and checking cost no torch; a command loads what it needs when it runs. Exit codes: 0 done, 1 failed
while running or the scans count as not registered (the outputs are there and say so), 2 bad usage or input, 130 and 143
stopped by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..console import Console, jsonable, number, share_cores
from ..job import INITIALS, INPUT_PATHS, InputError, Job, RegistrationError, existing_file, parsed_json
from ..registration.catalogue import needs_weights
from . import choosing, steering
from .arguments import SUBCOMMANDS, available_subcommands, build_parser, options_of


class _Stopped(BaseException):
    """SIGTERM, raised in the main thread so that everything half-written is cleaned up on the way out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises for what a user can cause."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(events="--json" in arguments, quiet="--quiet" in arguments or "-q" in arguments)
    before = _catch_sigterm()
    if hasattr(
        sys.stdout, "reconfigure"
    ):  # a path in letters that the console does not know must not end a finished run
        sys.stdout.reconfigure(errors="backslashreplace")
    share_cores()
    try:
        if arguments and arguments[0] in available_subcommands():
            return importlib.import_module(f".{SUBCOMMANDS[arguments[0]][0]}", __package__).main(arguments[1:])
        args = build_parser().parse_args(arguments)
        if args.command is None:
            build_parser().print_help()
            return 0
        return _COMMANDS[args.command](args, console) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt, _Stopped) as error:
        told, code = _in_words(error)
        console.error(told, code)
        if "--debug" in arguments:
            traceback.print_exc()
        return code
    finally:
        console.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _in_words(error: BaseException) -> tuple[RegistrationError, int]:
    """What to tell of an error, in one line, and the exit code."""
    if isinstance(error, RegistrationError):
        return error, error.exit_code
    if isinstance(error, (KeyboardInterrupt, _Stopped)):
        stopped = RegistrationError("stopped; nothing half-written is left behind.")
        return stopped, 143 if isinstance(error, _Stopped) else 130
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)):
        return RegistrationError(
            "there is not enough memory.", "Try --preset fast, a larger --spacing, or --device cpu."
        ), 1
    what = RegistrationError(
        f"{type(error).__name__}: {error}.", "Run it again with --debug and report what it prints."
    )
    return what, 1


def _catch_sigterm() -> Any:
    def stop(number: int, frame: Any) -> None:
        raise _Stopped

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        return None


# ---------------------------------------------------------------------------------------------- commands


def _register(args: argparse.Namespace, console: Console) -> int:
    if args.job and _is_history(args.job):
        from ..jobs.history import replay

        if args.fixed or not args.output:
            raise InputError("a history is done again into a folder of its own.", "Give -o DIR, and no scans.")
        return steering.told(replay(args.job, args.output, console.progress), args.output, console)
    job = _job_of(args)
    check_job(job)
    from ..jobs.register import run

    return steering.told(run(job, console.progress), job.output, console)


def _is_history(path: str) -> bool:
    from ..files import json_object

    return "steps" in (json_object(path) or {})


def _job_of(args: argparse.Namespace) -> Job:
    if args.job:
        if args.fixed:
            raise InputError("both --job and scans are given.", "Give one of them.")
        path = existing_file(args.job, "job file")
        if not path.is_file():
            raise InputError(f"job file '{path}' is a folder.", "Give the metrics.json in it.")
        raw = parsed_json(path.read_text(encoding="utf-8", errors="replace"), f"job file '{path}'")
        raw = raw["job"] if isinstance(raw, dict) and isinstance(raw.get("job"), dict) else raw
        return Job.from_dict({**raw, "output": args.output} if args.output and isinstance(raw, dict) else raw)
    if not (args.fixed and args.moving and args.output):
        missing = [
            name
            for name, value in (("FIXED", args.fixed), ("MOVING", args.moving), ("-o DIR", args.output))
            if not value
        ]
        raise InputError(f"missing: {', '.join(missing)}.", "Try 'symreg register --help'.")
    return Job(
        output=args.output,
        transform_format=args.transform_format,
        composite=args.composite,
        dense=args.dense,
        report=not args.no_report,
        guide_with_points=args.guide_with_points,
        sphere=args.sphere,
        rim_mm=args.rim_mm,
        keep_state=args.keep_state,
        options=options_of(args),
        fixed_contrasts=args.fixed_contrast,
        moving_contrasts=args.moving_contrast,
        **{name: getattr(args, name) for name in (*INPUT_PATHS, "start_from", "region")},
    )


def check_job(job: Job) -> None:
    """Refuse at once what is missing, and a method that is unknown or has no weights; the run checks the rest.

    Raises:
        InputError: naming the input and the remedy.
    """
    for name, path in {**job.inputs, "start_from": job.start_from, "region": job.region}.items():
        if path is not None:
            existing_file(path, name.replace("_", " "))
    if job.options.initial not in INITIALS:
        existing_file(job.options.initial, "initial transform")
    if job.options.weights:
        existing_file(job.options.weights, "weights file")
    if needs_weights(job.options.method) or job.options.initial not in INITIALS:
        from ..pipeline import check_options

        check_options(job.options)


def _apply(args: argparse.Namespace, console: Console) -> None:
    from ..jobs.apply import Application, apply_transform

    result = apply_transform(
        Application(
            args.input,
            args.transform,
            args.output,
            args.reference,
            args.kind,
            args.interpolation,
            args.points_from,
            args.inverse,
        ),
        console.progress,
    )
    for note in result["notes"]:
        console.note(note)
    text = f"wrote {result['output']}"
    if args.kind == "points":
        text += f"\n{result['count']} points carried from {result['from']} to {result['to']} by {result['method']}"
        if result["residual_max_mm"] > 0:
            mean, worst = (number(result[f"residual_{name}_mm"]) for name in ("mean", "max"))
            text += f"; they return within {mean} mm (mean), {worst} mm (largest)"
        known = [radius for radius in result["radius_mm"] or () if radius is not None]
        text += (
            f"\nno radius: {result['no_radius']}"
            if not known
            else (
                f"\n68 % of such points lie within {number(min(known), 2)} to {number(max(known), 2)} mm (each "
                f"point's radius is in the file)"
            )
        )
    console.result(result, text)


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    from ..files import replacing
    from ..jobs.apply import check_writable
    from ..jobs.evaluate import Evaluation, evaluate, evaluation_table

    request = Evaluation(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Evaluation)})
    if args.output:
        check_writable(Path(args.output))
    result = evaluate(request, console.progress)
    if args.output:
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(jsonable(result), indent=1), encoding="utf-8")
    console.result(result, evaluation_table(result))


def _methods(args: argparse.Namespace, console: Console) -> None:
    from ..jobs.methods import catalogue, catalogue_table

    methods = catalogue()
    console.result({"methods": methods}, catalogue_table(methods))


def _demo(args: argparse.Namespace, console: Console) -> None:
    from .demo import run_demo

    metrics, text = run_demo(Path(args.output), args.seed, args.preset, console)
    console.result(metrics, text)


#: Each returns its exit code, or None for 0.
_COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int | None]] = {
    "register": _register,
    **steering.COMMANDS,
    **choosing.COMMANDS,
    "apply": _apply,
    "evaluate": _evaluate,
    "methods": _methods,
    "demo": _demo,
}
