"""Make the weights that the package ships, from label maps alone, in slices that can be stopped and repeated.

    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --recipe cpu --slice-minutes 25
    python Testing/benchmarks/train_shipped_weights.py LABELS -o RUNS --recipe gpu --methods hsyn sm-gicnet
    python Testing/benchmarks/train_shipped_weights.py LABELS -o /tmp/dry --dry-run --methods hsyn

LABELS is a folder of whole-head label maps with FreeSurfer numbers; the last four (labels_17 to labels_20) are held out.
Each method trains in RUNS/METHOD; a slice that ends leaves a checkpoint, and the same command goes on with the method that
is least far. When all are finished, --install copies weights and model cards into the package.

The CPU recipe works at 2.5 mm, coarse levels first: they carry the pose and cost little. The GPU recipe works at the spacing
of the method's card with the published order of stages.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from SymRegistrationLib import networks, weights
from SymRegistrationLib.training_plan import Plan
from SymRegistrationLib.training_result import last_row, rows

ROOT = Path(__file__).parents[2]
HELD_OUT = "labels_17,labels_18,labels_19,labels_20"
LICENCE = "Apache-2.0"
#: Longest steps go to the levels that need them; per stage, coarsest first.
CPU = {
    "hsyn": ["--iterations", "6000", "--stages", "0.4,0.35,0.25"],
    "sm-gicnet": ["--iterations", "6000", "--stages", "0.4,0.3,0.2,0.1"],
    "ad-regnet": ["--iterations", "3000"],
    "caml": ["--iterations", "2000"],
}
CPU_COMMON = ["--spacing", "2.5", "--shape", "64,80,64", "--learning-rate", "1e-3", "--rate", "cosine", "--ema", "0.99",
              "--end-point-weight", "0.3", "--patience", "0"]
GPU = {
    "hsyn": ["--iterations", "60000", "--stages", "0.2,0.3,0.5"],
    "sm-gicnet": ["--iterations", "60000", "--stages", "0.2,0.2,0.3,0.3"],
    "ad-regnet": ["--iterations", "40000"],
    "caml": ["--iterations", "30000"],
}
GPU_COMMON = ["--spacing", "1.8", "--shape", "112,128,112", "--learning-rate", "4e-4", "--rate", "cosine",
              "--end-point-weight", "0.3", "--patience", "0", "--validation-pairs", "12"]
DRY = ["--spacing", "5", "--shape", "48,48,48", "--iterations", "6", "--validation-pairs", "2", "--validate-every", "6"]


def arguments(method: str, args: argparse.Namespace, minutes: float | None) -> list[str]:
    """Of ``symreg train``; all but ``--stop-after`` must stay the same from slice to slice."""
    recipe = DRY if args.dry_run else [*GPU_COMMON, *GPU[method]] if args.recipe == "gpu" else [*CPU_COMMON, *CPU[method]]
    device = "cuda" if args.recipe == "gpu" and not args.dry_run else "cpu"
    return ["train", "--method", method, "--labels", str(args.labels), "-o", str(args.output / method), "--validation",
            HELD_OUT, "--licence", LICENCE, "--device", device, *recipe,
            *(["--stop-after", str(minutes)] if minutes else []), *(["--threads", str(args.threads)] if args.threads else [])]


def finished(method: str, output: Path) -> Path | None:
    """The weights of a method that is done."""
    file = output / method / f"{method}-small{weights.SUFFIX}"
    return file if file.is_file() else None


def progress(method: str, output: Path) -> float:
    """Share of a method's plan that is done."""
    plan = output / method / "plan.json"
    if not plan.is_file():
        return 0.0
    log = rows(output / method / "log.jsonl")
    return (log[-1]["step"] if log else 0) / Plan.from_json(plan.read_text()).iterations


def install(output: Path, methods: list[str]) -> None:
    """Copy finished weights into the package."""
    weights.FOLDER.mkdir(exist_ok=True)
    for method in methods:
        file = finished(method, output)
        if file:
            for source in (file, weights.card_path(file)):
                shutil.copyfile(source, weights.FOLDER / source.name)
            print(f"installed {file.name}, {file.stat().st_size / 1e6:.2f} MB")


def main() -> int:
    """Train what is not finished, one slice after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--methods", nargs="+", default=networks.names(), choices=networks.names())
    parser.add_argument("--slice-minutes", type=float, help="stop after this time in all; repeat the command to go on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--install", action="store_true", help="copy finished weights into the package")
    parser.add_argument("--dry-run", action="store_true", help="six small steps of each method")
    args = parser.parse_args()
    waiting = [m for m in args.methods if not finished(m, args.output)]
    waiting.sort(key=lambda m: progress(m, args.output))
    share = args.slice_minutes / len(waiting) if args.slice_minutes and waiting else None
    for method in waiting:
        code = subprocess.run([sys.executable, "-m", "SymRegistrationLib", *arguments(method, args, share)], cwd=ROOT,
                              check=False).returncode
        if code:
            return code
    for method in args.methods:
        judged = last_row(args.output / method / "validation.jsonl", -1)
        if judged:
            print(f"{method:10s} {100 * progress(method, args.output):5.1f} %  Dice {judged['dice_before']:.3f} -> "
                  f"{judged['dice']:.3f}  end point {judged['end_point_before']:.2f} -> {judged['end_point']:.2f} voxels")
    if args.install:
        install(args.output, args.methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
