"""Make the weights that the package ships, from label maps alone, in slices that can be stopped and repeated.

    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --recipe cpu
    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --recipe gpu --methods hsyn sm-gicnet
    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --install
    python Testing/benchmarks/train_shipped_weights.py LABELS -o /tmp/dry --dry-run --methods hsyn

LABELS is a folder of whole-head label maps with FreeSurfer numbers; the last four (labels_17 to labels_20) are held
out. What stands in front of every method, pose and matching, is trained first and once: RUNS/pose, then RUNS/front.
Each method then trains behind it, frozen, in RUNS/METHOD. A run that was stopped goes on with the same command;
--slice-minutes ends each after a while. --install copies finished weights and model cards into the package.

The CPU recipe works at 2.5 mm with few steps, the GPU recipe at 1.8 mm with many.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from SymRegistrationLib import networks
from SymRegistrationLib.registration import weights
from SymRegistrationLib.training.logs import last_row, rows

ROOT = Path(__file__).parents[2]
HELD_OUT = "labels_17,labels_18,labels_19,labels_20"
LICENCE = "Apache-2.0"
#: Levels of the front, and the method whose name its runs carry.
FRONT, CARRIER = 2, "hsyn"
#: What all runs of a recipe share.
_SHARED = "--rate cosine --patience 0 --end-point-weight 0.3"
COMMON = {
    "cpu": f"--spacing 2.5 --shape 64,80,64 {_SHARED} --validation-pairs 6 --device cpu".split(),
    "gpu": f"--spacing 1.8 --shape 112,128,112 {_SHARED} --validation-pairs 12 --device cuda".split(),
}
POSE = {
    "cpu": ["--iterations", "3800", "--learning-rate", "1e-3", "--ema", "0.99"],
    "gpu": ["--iterations", "40000", "--learning-rate", "5e-4"],
}
MATCH = {
    "cpu": ["--iterations", "1700", "--learning-rate", "1.5e-3", "--ema", "0.985"],
    "gpu": ["--iterations", "10000", "--learning-rate", "5e-4"],
}
#: Steps and shares of the method's own levels, coarsest first.
METHOD = {
    "cpu": {
        "hsyn": ("1200", "0.05,0.35,0.6"),
        "sm-gicnet": ("800", "0.02,0.28,0.4,0.3"),
        "ad-regnet": ("250", "1"),
        "caml": ("150", "1"),
    },
    "gpu": {
        "hsyn": ("40000", "0.1,0.3,0.6"),
        "sm-gicnet": ("40000", "0.1,0.2,0.3,0.4"),
        "ad-regnet": ("30000", "1"),
        "caml": ("20000", "1"),
    },
}
RATE = {"cpu": {"caml": "5e-4", "ad-regnet": "5e-4"}, "gpu": {}}
MIXED = ["--one-contrast", "0.4", "--t1", "0.4"]
POSE_DATA = [
    "--supervised",
    "1",
    "--two-people",
    "0.4",
    *MIXED,
    "--shapes",
    "0.05",
    "--rotation",
    "80",
    "--shift",
    "60",
    "--scale",
    "0.25",
    "--curriculum",
    "0.2",
]
MATCH_DATA = [
    "--supervised",
    "0.9",
    "--two-people",
    "0.5",
    *MIXED,
    "--shapes",
    "0.12",
    "--rotation",
    "40",
    "--shift",
    "45",
    "--curriculum",
    "0.02",
]
METHOD_DATA = [
    "--supervised",
    "0.6",
    "--two-people",
    "0.6",
    "--one-contrast",
    "0.6",
    "--t1",
    "0.5",
    "--shapes",
    "0.1",
    "--rotation",
    "25",
    "--shift",
    "30",
    "--curriculum",
    "0.02",
]
DRY = [
    "--spacing",
    "5",
    "--shape",
    "48,48,48",
    "--iterations",
    "6",
    "--validation-pairs",
    "2",
    "--validate-every",
    "6",
    "--device",
    "cpu",
]


def train(run: str, method: str, extra: list[str], args: argparse.Namespace) -> Path | None:
    """One run of ``symreg train``; the weights when it is finished. Raises SystemExit when it fails."""
    file = args.output / run / f"{method}-small{weights.SUFFIX}"
    if file.is_file():
        return file
    command = [
        "train",
        "--method",
        method,
        "--labels",
        str(args.labels),
        "-o",
        str(args.output / run),
        "--option",
        "prealign=true",
        "--validation",
        HELD_OUT,
        "--licence",
        LICENCE,
        *extra,
        *(DRY if args.dry_run else COMMON[args.recipe]),
        *(["--stop-after", str(args.slice_minutes)] if args.slice_minutes else []),
        *(["--threads", str(args.threads)] if args.threads else []),
    ]
    code = subprocess.run([sys.executable, "-m", "SymRegistrationLib", *command], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)
    return file if file.is_file() else None


def stages(method: str, shares: str, first: int) -> list[str]:
    """``--stages`` with ``shares`` from level ``first`` on and nothing elsewhere."""
    own = shares.split(",")
    levels = networks.create(method, "small", prealign=True).levels
    return ["--stages", ",".join(["0"] * (first - 1) + own + ["0"] * (levels - first + 1 - len(own)))]


def begun(method: str, front: Path, output: Path) -> Path:
    """Fresh weights of a method behind a trained front."""
    file = output / f"begin-{method}{weights.SUFFIX}"
    if not file.is_file():
        torch.manual_seed(0)
        network = networks.create(method, "small", prealign=True)
        found = weights.load(front).tensors
        own = network.state_dict()
        own.update({name: value.float() for name, value in found.items() if name.startswith(("pose.", "match."))})
        network.load_state_dict(own)
        weights.save(file, network)
    return file


def history(run: Path) -> dict:
    """What a model card says of a run that went before."""
    card = weights.read_card(next(run.glob(f"*{weights.SUFFIX}")))
    return {
        "command": card["command"],
        "steps": card["training"]["steps"],
        "seconds": card["training"]["seconds"],
        "validation": card["validation"]["final"],
    }


def install(output: Path, methods: list[str]) -> None:
    """Copy finished weights into the package; the cards tell of the front's runs, too."""
    weights.FOLDER.mkdir(exist_ok=True)
    for method in methods:
        file = output / method / f"{method}-small{weights.SUFFIX}"
        if not file.is_file():
            continue
        card = weights.read_card(file)
        card["front"] = {name: history(output / name) for name in ("pose", "front") if (output / name).is_dir()}
        shutil.copyfile(file, weights.FOLDER / file.name)
        text = json.dumps(card, indent=1).replace(f"{output}/", "RUNS/")
        weights.card_path(weights.FOLDER / file.name).write_text(text + "\n", encoding="utf-8")
        print(f"installed {file.name}, {file.stat().st_size / 1e6:.2f} MB")


def main() -> int:
    """Train what is not finished, one run after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--methods", nargs="+", default=networks.names(), choices=networks.names())
    parser.add_argument(
        "--slice-minutes", type=float, help="stop each run after this time; repeat the command to go on"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--install", action="store_true", help="only copy finished weights into the package")
    parser.add_argument("--dry-run", action="store_true", help="six small steps of each run")
    args = parser.parse_args()
    if args.install:
        install(args.output, args.methods)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    pose = train("pose", CARRIER, [*POSE_DATA, *POSE[args.recipe], *stages(CARRIER, "1", 1)], args)
    front = pose and train(
        "front", CARRIER, [*MATCH_DATA, *MATCH[args.recipe], *stages(CARRIER, "1", FRONT), "--start", str(pose)], args
    )
    for method in args.methods if front else ():
        steps, shares = METHOD[args.recipe][method]
        train(
            method,
            method,
            [
                *METHOD_DATA,
                "--iterations",
                steps,
                "--learning-rate",
                RATE[args.recipe].get(method, "1e-3"),
                "--ema",
                "0.99",
                *stages(method, shares, FRONT + 1),
                "--freeze",
                str(FRONT),
                "--start",
                str(begun(method, front, args.output)),
            ],
            args,
        )
    for run in ("pose", "front", *args.methods):
        judged = last_row(args.output / run / "validation.jsonl", -1)
        if judged:
            print(
                f"{run:10s} {len(rows(args.output / run / 'log.jsonl'))} steps  Dice {judged['dice_before']:.3f} -> "
                f"{judged['dice']:.3f}  end point {judged['end_point_before']:.2f} -> {judged['end_point']:.2f} voxels"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
