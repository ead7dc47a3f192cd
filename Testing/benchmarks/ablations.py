"""What the parts of each learned method are worth: the ablations of their papers, run again on one footing.

    python Testing/benchmarks/ablations.py train --pool POOL --judge PAIRS.csv --work FOLDER [--steps 60]
    python Testing/benchmarks/ablations.py use --judge PAIRS.csv --work FOLDER
    python Testing/benchmarks/ablations.py whole --judge PAIRS.csv --work FOLDER
    python Testing/benchmarks/ablations.py table --work FOLDER

``train`` trains every form of every method (size ``recurrent``, whole or without one of its parts) for the same small
number of steps, on one pool (``symreg pool``), from one seed, behind the shipped pose and matching. The steps are far
too few for weights that ship: forms are compared with each other, not with shipped networks. ``use`` takes the
shipped weights and changes how they are used: number of passes, one order of the scans only, the force set to zero,
HSyN's inverse. ``whole`` runs ``register`` with the shipped weights with and without pose and matching, from headers
and behind the default alignment. PAIRS.csv has the columns fixed, moving, fixed_labels and moving_labels. What is
finished in FOLDER is not computed again; a training that was stopped goes on.

Dice of 29 labels, in ``train`` and ``use`` at every second voxel of the fixed scan; folded voxels and the spread of the
log-determinant are those of the whole map on the working grid inside the fixed scan's content (``whole``: of the
delivered transform); residuals of both directions are in voxels of the working grid.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from SymRegistrationLib import networks
from SymRegistrationLib.fields import jacobian_determinant, sd_log_jacobian
from SymRegistrationLib.geometry.volumes import read_labels, read_volume
from SymRegistrationLib.job import Options
from SymRegistrationLib.networks._passes import GAIN, no_motion, similarity_force
from SymRegistrationLib.pipeline import register
from SymRegistrationLib.quality import metrics
from SymRegistrationLib.registration import weights
from SymRegistrationLib.training import on_pool
from SymRegistrationLib.training.judging import JudgedPair, judged_pairs
from SymRegistrationLib.training.pool import STRUCTURES
from SymRegistrationLib.training.pool_options import PoolTraining

#: Per method and form: what differs from size ``recurrent``.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "sm-gicnet": {
        "whole": {},
        "one level": {"levels": 1},
        "no attention gates": {"gate": "none"},
        "one pass": {"passes": 1},
        "no force": {"force": False},
    },
    "hsyn": {
        "whole": {},
        "one level": {"levels": 1},
        "one pass": {"passes": 1},
        "no force": {"force": False},
    },
    "caml": {
        "whole": {},
        "no attention to finer layers": {"caml_span": 0},
        "plain skips": {"rbsc": False},
        "no cascade: one pass": {"passes": 1},
        "no force": {"force": False},
    },
    "ad-regnet": {
        "whole": {},
        "no cross-attention": {"bcam": False},
        "no regional attention": {"raa": False},
        "no attention": {"bcam": False, "raa": False},
        "one resolution": {"multires": False},
        "no force": {"force": False},
    },
}
#: Steps of the coarser levels, of the methods that have them.
COARSE = {"sm-gicnet": 15, "hsyn": 15}
PASSES = (1, 2, 4, 6)


def kept(path: Path, make: Callable[[], dict]) -> None:
    """Make and write a result that is not there yet, and print its means."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1), encoding="utf-8")
    print(path.stem, json.loads(path.read_text(encoding="utf-8"))["mean"], flush=True)


def mean_of(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of every number; folded voxels are added."""
    columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
    return {n: sum(v) if n == "folded" else round(float(np.mean(v)), 4) for n, v in columns.items()}


# ------------------------------------------------------------------------------------------ in the mean frame


def of_map(pair: JudgedPair, u: torch.Tensor) -> dict[str, float]:
    """Dice of the mean frame's map ``u``; folds and spread of the whole map where the fixed scan shows something."""
    volume = jacobian_determinant(pair.frame.through(u, 1))
    seen = pair.space.fixed > 0.05
    spread = sd_log_jacobian(volume, seen)
    return {"dice": round(pair.dice(u), 4), "folded": int((volume[seen] <= 0).sum()), "sdlogj": round(spread, 4)}


@torch.no_grad()
def judged(network, pairs: list[JudgedPair]) -> dict:
    """A network behind its front on every pair."""
    rows, facts = {}, {}
    for pair in pairs:
        begun = time.process_time()
        output = network.within(pair.moving, pair.fixed, pair.frame)
        seconds = round(time.process_time() - begun, 2)
        found = of_map(pair, output.pair.fixed_to_moving.float())
        rows[pair.name] = {**found, "residual": round(float(output.pair.residual), 4), "cpu_s": seconds}
        facts[pair.name] = {name: round(float(value), 4) for name, value in output.aux.get("facts", {}).items()}
    return {"mean": mean_of(rows), "pairs": rows, **({"facts": facts} if all(facts.values()) else {})}


@torch.no_grad()
def fixed_gain(pairs: list[JudgedPair], passes: int) -> dict:
    """The force times a fixed gain as every step, without any network; 0 passes: what stands in front."""
    rows = {}
    for pair in pairs:
        state, begun = no_motion(pair.moving), time.process_time()
        for _ in range(passes):
            state = state.advanced(GAIN * similarity_force(*state.warped(pair.moving, pair.fixed)))
        rows[pair.name] = of_map(pair, state.full()[0])
        rows[pair.name]["cpu_s"] = round(time.process_time() - begun, 2)
    return {"mean": mean_of(rows), "pairs": rows}


def trained(method: str, form: str, folder: Path, args: argparse.Namespace, pairs: list[JudgedPair]) -> dict:
    """A form of a method after ``--steps`` steps."""
    change = FORMS[method][form]
    coarse = 0 if change.get("levels") == 1 else COARSE.get(method, 0)
    run = PoolTraining(
        method=method,
        pool=str(args.pool),
        output=str(folder),
        method_options=change,
        steps_coarse=coarse,
        steps_teacher=0,
        steps_free=args.steps - coarse,
        block=(48, 48, 48),
        most_passes=1 if change.get("passes") == 1 else 4,
        threads=1,
        checkpoint_minutes=2.0,
    )
    result = on_pool.train(run)
    network = with_weights(method, Path(result["weights"]), {})
    parameters = sum(p.numel() for p in network.inner.parameters())
    return {**judged(network, pairs), "steps": args.steps, "parameters": parameters, "seconds": result["seconds"]}


def with_weights(method: str, path: Path, change: dict[str, Any]):
    """The network of a weights file, with other values of switches that change no tensor."""
    found = weights.load(path, method)
    network = networks.restore(method, found.size, {**found.options, **change})
    weights.fill(network, found)
    return network.eval()


def stepping(network, change: Callable[..., tuple]):
    """The network with other arguments of its steps."""
    step = network.inner.step
    network.inner.step = lambda *arguments: step(*change(*arguments))
    return network


def uses(method: str) -> dict[str, Callable[[], Any]]:
    """Ways of using the shipped weights of a method."""
    path = weights.find(method)

    def switched(**change):
        return lambda: with_weights(method, path, change)

    ways = {f"passes {n}": switched(passes=n) for n in PASSES}
    ways["one order"] = lambda: stepping(switched()(), lambda m, f, state, force, both: (m, f, state, force, False))
    ways["force zero"] = lambda: stepping(switched()(), lambda m, f, state, force, both: (m, f, state, 0 * force, both))
    if method == "hsyn":
        ways |= {f"inverse {kind}": switched(inverse=kind) for kind in ("dinet", "fixed_point")}
    return ways


# ------------------------------------------------------------------------------------------ whole registrations


def whole(table: Path, method: str, options: dict[str, Any], initial: str) -> dict:
    """``register`` on every pair of the table."""
    rows = {}
    with table.open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            fixed, moving = read_volume(row["fixed"]), read_volume(row["moving"])
            begun = time.process_time()
            found = register(fixed, moving, Options(method=method, initial=initial, threads=1, method_options=options))
            seconds = time.process_time() - begun
            overlap = metrics.label_overlap(
                read_labels(row["fixed_labels"]), read_labels(row["moving_labels"]), found.forward
            )
            measured = found.metrics["quality"]
            rows[Path(row["fixed"]).name.split("_")[0]] = {
                "dice": round(metrics.mean({k: v for k, v in overlap.items() if k in STRUCTURES}), 4),
                "folded": measured["folded_voxels"],
                "sdlogj": round(measured["sd_log_jacobian"], 4),
                "cpu_s": round(seconds, 1),
            }
    return {"mean": mean_of(rows), "pairs": rows}


# ------------------------------------------------------------------------------------------ command line


def show(folder: Path) -> None:
    """One table of everything that FOLDER holds."""
    print("| part | method | form | Dice | folded | SDlogJ | residual | CPU s |\n|---|---|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*/*.json")):
        if len(words := path.stem.split(", ")) == 2:
            mean = json.loads(path.read_text(encoding="utf-8"))["mean"]
            cells = [mean.get(name, "") for name in ("dice", "folded", "sdlogj", "residual", "cpu_s")]
            print(f"| {path.parent.name} | {words[0]} | {words[1]} | {' | '.join(map(str, cells))} |")


def main() -> int:
    """Compute what FOLDER does not hold yet; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", "use", "whole", "table"))
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=list(FORMS), default=list(FORMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.work / args.part
    if args.part == "table":
        show(args.work)
    elif args.part == "whole":
        for method in args.methods:
            for front in (True, False):
                for initial in ("none", "affine"):
                    name = f"{method}, {'with' if front else 'without'} pose and matching, from {initial}"
                    kept(
                        folder / f"{name.replace(', from', ' from')}.json",
                        lambda m=method, f=front, i=initial: whole(args.judge, m, {"prealign": f}, i),
                    )
    else:
        pairs = judged_pairs(str(args.judge), with_weights("sm-gicnet", weights.find("sm-gicnet"), {}), 2.0)
        for n in (0, *PASSES):
            kept(folder / f"fixed gain, passes {n}.json", lambda n=n: fixed_gain(pairs, n))
        for number in range(max(map(len, FORMS.values()))):
            for method in args.methods if args.part == "train" else ():
                for form in list(FORMS[method])[number : number + 1]:
                    run = args.work / "runs" / f"{method} {form}".replace(": ", " ").replace(" ", "-")
                    kept(
                        folder / f"{method}, {form.replace(':', '')}.json",
                        lambda m=method, f=form, r=run: trained(m, f, r, args, pairs),
                    )
        for method in args.methods if args.part == "use" else ():
            for way, network in uses(method).items():
                kept(folder / f"{method}, {way}.json", lambda n=network: judged(n(), pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
