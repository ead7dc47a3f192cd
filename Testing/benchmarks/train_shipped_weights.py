"""Make the weights that the package ships, from label maps alone, in slices that can be stopped and repeated.

    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --judge pairs.csv
    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --new-front --recipe gpu
    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --install

LABELS is a folder of whole-head label maps with FreeSurfer numbers; the last four (labels_17 to labels_20) are held
out. Scans are synthesised from them and brought together by pose and matching, in RUNS/pool; each method then learns on
that pool, in RUNS/METHOD. Pose and matching are the shipped ones, or with ``--new-front`` are trained first, in
RUNS/pose and RUNS/front. A run that was stopped goes on with the same command; ``--slice-minutes`` ends each after a
while. ``--judge`` names labelled scans that only judge. ``--install`` puts finished weights, model cards and learning
curves into the package: pose and matching once, the methods beside them.

What the shipped weights were really made with, run after run, stands in their model cards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from SymRegistrationLib import networks
from SymRegistrationLib.registration import weights
from SymRegistrationLib.training.logs import last_row

ROOT = Path(__file__).parents[2]
HELD_OUT = "labels_17,labels_18,labels_19,labels_20"
LICENCE = "Apache-2.0"
#: The method whose name the runs of pose and matching carry, and the share of work of their two levels.
CARRIER = "hsyn"
FRONT_COMMON = {
    "cpu": "--spacing 2.5 --shape 64,80,64 --rate cosine --patience 0 --end-point-weight 0.3 --validation-pairs 6 "
    "--device cpu",
    "gpu": "--spacing 1.8 --shape 112,128,112 --rate cosine --patience 0 --end-point-weight 0.3 --validation-pairs 12 "
    "--device cuda",
}
MIXED = "--one-contrast 0.4 --t1 0.4"
POSE = f"--supervised 1 --two-people 0.4 {MIXED} --shapes 0.05 --rotation 80 --shift 60 --scale 0.25 --curriculum 0.2"
MATCH = f"--supervised 0.9 --two-people 0.5 {MIXED} --shapes 0.12 --rotation 40 --shift 45 --curriculum 0.02"
FRONT_STEPS = {
    "cpu": {
        "pose": "--iterations 3800 --learning-rate 1e-3 --ema 0.99",
        "front": "--iterations 1700 --learning-rate 1.5e-3 --ema 0.985",
    },
    "gpu": {
        "pose": "--iterations 40000 --learning-rate 5e-4",
        "front": "--iterations 10000 --learning-rate 5e-4",
    },
}
POOL = {"cpu": "--pairs 230 --random-contrast 0.1", "gpu": "--pairs 600 --random-contrast 0.1"}
#: Steps of the methods on the pool.
METHODS = {
    "cpu": {
        "sm-gicnet": "--coarse-steps 60 --free-steps 4800 --learning-rate 1e-3 --most-passes 6",
        "hsyn": "--coarse-steps 60 --free-steps 3600 --learning-rate 1e-3 --most-passes 6",
        "caml": "--free-steps 600 --learning-rate 1e-3",
        "ad-regnet": "--free-steps 600 --learning-rate 1e-3",
    },
    "gpu": dict.fromkeys(networks.names(), "--free-steps 20000 --learning-rate 1e-3 --most-passes 6"),
}


def symreg(words: str, *paths: object) -> None:
    """``symreg`` with some words and some paths. Raises SystemExit when it fails."""
    command = [sys.executable, "-m", "SymRegistrationLib", *words.split(), *map(str, paths)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)


def new_front(args: argparse.Namespace) -> Path | None:
    """Weights with a new pose and matching, once both are trained."""
    before: Path | None = None
    levels = networks.create(CARRIER, "small", prealign=True).levels
    for number, (run, data) in enumerate((("pose", POSE), ("front", MATCH))):
        file = args.output / run / f"{CARRIER}-small{weights.SUFFIX}"
        if not file.is_file():
            shares = ",".join("1" if level == number else "0" for level in range(levels))
            symreg(
                f"train --method {CARRIER} --option prealign=true --validation {HELD_OUT} --licence {LICENCE} {data} "
                f"{FRONT_COMMON[args.recipe]} {FRONT_STEPS[args.recipe][run]} --stages {shares} {args.slices}",
                *("--labels", args.labels, "-o", args.output / run),
                *(("--start", before) if before else ()),
            )
        if not file.is_file():
            return None
        before = file
    return before


def methods(args: argparse.Namespace, front: Path | None) -> None:
    """The pool, and each method on it."""
    pool = args.output / "pool"
    begin = ("--prealign", front) if front else ()
    symreg(f"pool --no-teacher --held-out {HELD_OUT} {POOL[args.recipe]}", args.labels, "-o", pool, *begin)
    for method in args.methods:
        symreg(
            f"train --method {method} --teacher-steps 0 --licence {LICENCE} {METHODS[args.recipe][method]} "
            f"--judge-every 300 {args.slices}",
            *("--pool", pool, "-o", args.output / method),
            *(("--judge", args.judge) if args.judge else ()),
            *(("--start", front) if front else ()),
        )
        judged = last_row(args.output / method / "validation.jsonl", -1)
        if judged:
            print(f"{method:10s} step {judged['step']}  Dice {judged['dice_before']:.3f} -> {judged['dice']:.3f}")


def install(args: argparse.Namespace, folder: Path = weights.FOLDER) -> None:
    """Put finished weights, cards and curves into the package, or into another folder."""
    for method in args.methods:
        file = next((args.output / method).glob(f"{method}-*{weights.SUFFIX}"), None)
        if file is None:
            continue
        found = weights.load(file, method)
        options = {**found.options, **({"passes": args.passes} if args.passes else {})}
        network = networks.restore(method, found.size, options)
        weights.fill(network, found)
        facts = {name: value for name, value in found.card.items() if name not in weights.ABOUT}
        target = weights.save(folder / file.name, network, facts, share=True)
        card = weights.card_path(target)
        card.write_text(card.read_text(encoding="utf-8").replace(f"{args.output}/", "RUNS/"), encoding="utf-8")
        if (file.parent / "curves.png").is_file():
            shutil.copyfile(file.parent / "curves.png", target.with_suffix(".png"))
        print(f"installed {target.name}, {target.stat().st_size / 1e6:.2f} MB")
    total = sum(path.stat().st_size for path in folder.glob(f"*{weights.SUFFIX}"))
    print(json.dumps({"weights_mb": round(total / 1e6, 2)}))


def main() -> int:
    """Train what is not finished, one run after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--methods", nargs="+", default=networks.names(), choices=networks.names())
    parser.add_argument("--new-front", action="store_true", help="train pose and matching, too")
    parser.add_argument("--judge", type=Path, help="table of labelled scan pairs that only judge")
    parser.add_argument(
        "--slice-minutes", type=float, help="stop each run after this time; repeat the command to go on"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--passes", type=int, help="with --install: how often a method looks at use")
    parser.add_argument("--install", action="store_true", help="only put finished weights into the package")
    args = parser.parse_args()
    if args.install:
        install(args)
        return 0
    args.slices = " ".join(
        f"--{name} {value}" for name, value in (("stop-after", args.slice_minutes), ("threads", args.threads)) if value
    )
    args.output.mkdir(parents=True, exist_ok=True)
    front = new_front(args) if args.new_front else None
    if front or not args.new_front:
        methods(args, front)
    return 0


if __name__ == "__main__":
    sys.exit(main())
