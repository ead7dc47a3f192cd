"""False alarms and misses of whole registrations: good and broken pairs through ``register``, search included.

    python Testing/benchmarks/whole_verdicts.py --data DEVELOPMENT_DATA --store FILE.jsonl
        [--broken 200] [--good 100] [--seed 0]

Scans are averaged to 3 mm and registered on a grid of 4 mm with the preset fast, headers turned at random by up to 90
degrees and 50 mm; each case is one line of ``--store`` and is not run again. A case is drawn from its number and the
seed alone. Verdicts are drawn anew from the stored numbers, so that changed thresholds need no new runs.

Good, in turn: two contrasts or visits of one person; brains and heads of two people, one contrast and with the
brightness of one remapped; livers as breathed. Broken, in turn: another organ; a scan mirrored left to right, of one
person and of two; half of the moving scan empty; the upper part of one scan with the lower part of the other, nothing
in common; two slices; a block with an eighth of the volume. A brain with a whole head, and blocks that were found
within 5 mm, are good data badly suited: they are counted beside both.

For pairs whose truth is known ``error`` is the mean distance in mm over the brightest quarter of the fixed voxels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contrast import DEGREES, SHIFT, bright_points, carried, kirby_pairs, p19_pairs, random_pose
from verdicts import ORGANS, SPACING, small

from SymRegistrationLib import pipeline
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.volumes import Volume, read_volume
from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.quality import checks

BRAINS = tuple(f"brain/{name}_brain" for name in ("sub-01", "sub-02", "sub-03", "sub-04", "bert", "plotatlas"))
HEADS = ("brain/sub-01_head", "brain/sub-02_head")
LIVERS = (("liver/18_exhale", "liver/18_cyc_1_10"), ("liver/19_exhale", "liver/19_cyc_1_9"))
GOOD = ("one person",) * 5 + ("two people", "two people", "two people, two contrasts", "heads", "breathing")
BROKEN = ("other organ", "mirrored", "half empty", "other organ", "mirrored, two people", "nothing in common")
BROKEN += ("other organ", "mirrored, two people", "two slices", "half empty", "block", "brain with head")
#: A block that was found within so many mm is no broken case.
FOUND_MM = 5.0


@dataclass(frozen=True)
class Case:
    """A pair with what is wrong with it; ``truth`` is (4, 4) LPS mm, fixed -> moving, or None."""

    kind: str
    name: str
    fixed: Volume
    moving: Volume
    truth: np.ndarray | None = None


class Cases:
    """All cases by number; scans are read once."""

    def __init__(self, data: Path, seed: int):
        self.data, self.seed = data, seed
        folder = data / "brain_contrast"
        self.persons = [
            (name, small(fixed), small(moving), truth)
            for name, fixed, moving, truth in (*p19_pairs(folder), *kirby_pairs(folder, 0, seed))
        ]
        names = {*BRAINS, *HEADS, *ORGANS, *itertools.chain(*LIVERS)}
        self.scans = {name: small(read_volume(data / f"{name}.nii.gz")) for name in sorted(names)}

    def good(self, number: int) -> Case:
        random = np.random.default_rng((self.seed, 0, number))
        kind, truth = GOOD[number % len(GOOD)], None
        if kind == "one person":
            name, fixed, moving, truth = self.persons[random.integers(len(self.persons))]
        else:
            pair = {"heads": HEADS, "breathing": LIVERS[random.integers(len(LIVERS))]}.get(kind)
            first, second = pair or random.choice(BRAINS, 2, replace=False)
            name, fixed, moving = f"{first} <- {second}", self.scans[first], self.scans[second]
            if kind.endswith("two contrasts"):
                moving = remapped(moving, random)
        return self.turned(Case(kind, name, fixed, moving, truth), random)

    def broken(self, number: int) -> Case:
        random = np.random.default_rng((self.seed, 1, number))
        kind = BROKEN[number % len(BROKEN)]
        name, fixed, moving, truth = self.persons[random.integers(len(self.persons))]
        if kind == "other organ":
            organ = random.choice([one for one in ORGANS if "brain" not in one])
            moving, name, truth = self.scans[organ], f"{name.split(' <-')[0]} with {organ}", None
        elif kind == "mirrored":
            moving, truth = flipped(moving), None
        elif kind == "mirrored, two people":
            first, second = random.choice(BRAINS, 2, replace=False)
            name, fixed, moving, truth = f"{first} <- {second}", self.scans[first], flipped(self.scans[second]), None
        elif kind == "half empty":
            moving = half_empty(moving, random)
        elif kind == "nothing in common":
            fixed, moving, truth = part(fixed, 0.6, 1.0), part(moving, 0.0, 0.4), None
        elif kind == "two slices":
            middle = int(random.integers(moving.grid.shape[0] - 1))
            moving = cropped(moving, (middle, 0, 0), (middle + 2, *moving.grid.shape[1:]))
        elif kind == "block":
            shape = np.array(moving.grid.shape)
            start = (random.uniform(0, 0.5, 3) * shape).astype(int)
            moving = cropped(moving, start, start + shape // 2)
        else:
            pair = HEADS[random.integers(2)], BRAINS[random.integers(len(BRAINS))]
            name, fixed, moving, truth = f"{pair[0]} <- {pair[1]}", *(self.scans[one] for one in pair), None
        return self.turned(Case(kind, name, fixed, moving, truth), random)

    def turned(self, case: Case, random: np.random.Generator) -> Case:
        """The moving scan's header elsewhere."""
        pose = random_pose(random, case.moving.grid.centre, DEGREES, SHIFT)
        truth = None if case.truth is None else pose @ case.truth
        return Case(case.kind, case.name, case.fixed, carried(case.moving, pose), truth)


def cropped(volume: Volume, start, stop) -> Volume:
    """A box of a scan, where it lies in space."""
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop))
    return Volume(np.ascontiguousarray(volume.array[box]), volume.grid.cropped(start, stop), volume.name)


def along_body(volume: Volume, axis: int) -> int:
    """The array axis that runs most nearly along a body axis (0 left, 1 back, 2 head)."""
    return int(np.abs(volume.grid.axes[axis]).argmax())


def part(volume: Volume, low: float, high: float) -> Volume:
    """The slab between two shares of the way from the feet to the head."""
    axis = along_body(volume, 2)
    if volume.grid.axes[2, axis] < 0:
        low, high = 1 - high, 1 - low
    start, stop = [0, 0, 0], list(volume.grid.shape)
    start[axis], stop[axis] = int(low * stop[axis]), max(int(low * stop[axis]) + 4, int(high * stop[axis]))
    return cropped(volume, start, stop)


def flipped(volume: Volume) -> Volume:
    """The scan mirrored left to right on its grid."""
    return Volume(np.ascontiguousarray(np.flip(volume.array, along_body(volume, 0))), volume.grid, volume.name)


def half_empty(volume: Volume, random: np.random.Generator) -> Volume:
    """One half along a random axis without content."""
    array, axis = volume.array.copy(), int(random.integers(3))
    middle = array.shape[axis] // 2
    half = [slice(None)] * 3
    half[axis] = slice(middle, None) if random.random() < 0.5 else slice(middle)
    array[tuple(half)] = array.min()
    return Volume(array, volume.grid, volume.name)


def remapped(volume: Volume, random: np.random.Generator) -> Volume:
    """Another contrast: a random curve with one turn over the brightness, air stays dark."""
    top = np.percentile(volume.array, 99.5)
    share = np.clip(volume.array / top, 0, 1)
    turn = random.uniform(0.55, 0.8)
    array = np.where(share > 0.05, 0.25 + 0.75 * np.abs(share - turn) ** random.uniform(0.5, 0.9), 0)
    return Volume((800 * array).astype(np.float32), Grid(volume.grid.shape, volume.grid.matrix), volume.name)


def judged(case: Case) -> dict:
    """One registration: verdict, what it rests on, error where it is known, CPU seconds."""
    start = time.process_time()
    try:
        done = pipeline.register(case.fixed, case.moving, Options(preset="fast", spacing=SPACING))
    except InputError as error:
        return {"refused": error.message, "cpu": time.process_time() - start}
    told, error = done.metrics, None
    if case.truth is not None:
        points = bright_points(case.fixed)
        true = transform_points(case.truth, points)
        error = float(np.linalg.norm(done.forward.map_points(points) - true, axis=1).mean())
    kept = {key: told[key] for key in ("alignment", "similarity", "evidence", "quality", "notes")}
    return {"metrics": kept, "error": error, "cpu": time.process_time() - start}


def lines(store: Path) -> Iterator[dict]:
    """What was run before."""
    if store.exists():
        for line in store.read_text().splitlines():
            yield json.loads(line)


def summary(results: list[dict]) -> None:
    """Counts per kind, and every case that is called wrongly."""
    table: dict[tuple[str, str], Counter] = {}
    for r in results:
        group, kind = r["group"], r["kind"]
        level, reasons = "refused", [r.get("refused", "")]
        if "metrics" in r:
            told = checks.conclusion(r["metrics"])
            level, reasons = told["level"], told["reasons"]
        if kind == "block" and (r.get("error") or np.inf) <= FOUND_MM:
            kind = "block, found"
        if kind in ("brain with head", "block, found"):
            group = "beside"
        table.setdefault((group, kind), Counter())[level] += 1
        if (group, level) in (("good", "FAIL"), ("good", "refused"), ("broken", "PASS")):
            error = "" if r.get("error") is None else f", error {r['error']:.1f} mm"
            print(f"{level} {group} {r['number']} {kind}: {r['name']}{error}: {'; '.join(reasons)}")
    print("| cases | number | PASS | WARN | FAIL | refused |\n|---|---|---|---|---|---|")
    for (group, kind), counts in sorted(table.items()):
        cells = " | ".join(str(counts[level] or "") for level in ("PASS", "WARN", "FAIL", "refused"))
        print(f"| {group}: {kind} | {counts.total()} | {cells} |")
    errors = np.array([r["error"] for r in results if r["group"] == "good" and r.get("error") is not None])
    if len(errors):
        print(f"{len(errors)} good cases with a truth: median {np.median(errors):.2f} mm, below 2 mm", end=" ")
        print(f"{(errors < 2).mean():.1%}; mean CPU seconds {np.mean([r['cpu'] for r in results]):.1f}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the development data")
    parser.add_argument("--store", type=Path, required=True, help="one JSON line a case; those in it are not run again")
    parser.add_argument("--broken", type=int, default=200)
    parser.add_argument("--good", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    results = [r for r in lines(args.store) if r["seed"] == args.seed]
    known = {(r["group"], r["number"]) for r in results}
    cases = Cases(args.data, args.seed)
    wanted = [("good", k, k / args.good) for k in range(args.good)]
    wanted += [("broken", k, k / args.broken) for k in range(args.broken)]
    for group, number, _ in sorted(wanted, key=lambda one: one[2]):
        if (group, number) in known:
            continue
        case = getattr(cases, group)(number)
        found = judged(case)
        results.append(
            {"group": group, "number": number, "seed": args.seed, "kind": case.kind, "name": case.name, **found}
        )
        with open(args.store, "a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    summary(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
