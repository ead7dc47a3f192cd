"""False alarms and misses of the verdict: many good and broken cases, cheaply, at known poses on a 4 mm grid.

    python Testing/benchmarks/verdicts.py --data DEVELOPMENT_DATA [--broken 200] [--good 100] [--seed 0]

Nothing is searched or bent: a case is a pair of scans and a pose, and the verdict follows from its evidence alone
(``evidence.weigh`` and ``checks.conclusion``), so labels, the doubt of the alignment and the check for a mirrored scan
do not help. Headers are moved far away first, so that falling back to them is no way out. Good: two contrasts or visits
of one person at the true pose, give or take 1 mm and 1 degree. Broken, in turn: the same pairs 15 to 180 degrees or 12
to 60 mm off; another organ, centre on centre, turned at random; half of the moving scan empty, at the true pose.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from contrast import carried, kirby_pairs, p19_pairs, random_pose

from SymRegistrationLib.fields import FieldPair
from SymRegistrationLib.geometry.volumes import Volume, read_volume
from SymRegistrationLib.quality import checks
from SymRegistrationLib.registration import evidence, working_grid
from SymRegistrationLib.registration.alignment import split_midway

SPACING = 4.0
ORGANS = ("liver/18_exhale", "liver/19_exhale", "lung/mr_0004_image", "lung/thorax_ct_2mm", "brain/sub-01_head")


def judged(fixed: Volume, moving: Volume, pose: np.ndarray, random: np.random.Generator) -> tuple[str, float, float]:
    """Verdict, structure and shared content of a pair whose alignment found ``pose``, fixed -> moving; headers far
    away."""
    away = random_pose(random, moving.grid.centre, 180.0, 0.0)
    scans = [working_grid.shrink(working_grid.prepare(v), SPACING) for v in (fixed, carried(moving, away))]
    halves = split_midway(away @ pose, scans[0].centroid, "file")
    try:
        space = working_grid.working_pair(
            *scans, halves.mid_to_fixed, halves.mid_to_moving, working_grid.Layout(SPACING)
        )
    except working_grid.InputError:
        return "refused", float("nan"), float("nan")
    nothing = torch.zeros(1, 3, *space.grid.shape)
    weighed = evidence.weigh(scans, space, FieldPair(nothing, nothing, "symmetric", 0.0))
    told = {**vars(weighed), "delivered": "as scanned" if weighed.best == "as scanned" else "registered"}
    return checks.conclusion({"evidence": told})["level"], weighed.structure or float("nan"), weighed.shared


def jitter(random: np.random.Generator, volume: Volume, degrees: float, shift: float) -> np.ndarray:
    """(4, 4) LPS mm: a random movement of at most so much about the middle of a scan."""
    return random_pose(random, volume.grid.centre, degrees, shift)


def good_cases(pairs: list, random: np.random.Generator) -> Iterator[tuple]:
    for name, fixed, moving, truth in itertools.cycle(pairs):
        yield "good", name, fixed, moving, truth @ jitter(random, fixed, 1.0, 1.0)


def broken_cases(pairs: list, organs: list[Volume], random: np.random.Generator) -> Iterator[tuple]:
    for k, (name, fixed, moving, truth) in enumerate(itertools.cycle(pairs)):
        kind = ("wrong pose", "other organ", "half empty")[k % 3]
        if kind == "wrong pose":
            axis = jitter(random, fixed, 0.0, 0.0)
            wrong = axis @ random_pose(random, fixed.grid.centre, 180.0, 60.0)
            angle = np.degrees(np.arccos(np.clip((np.trace(wrong[:3, :3]) - 1) / 2, -1, 1)))
            shift = np.linalg.norm((wrong @ [*fixed.grid.centre, 1])[:3] - fixed.grid.centre)
            if angle < 15 and shift < 12:
                continue
            yield kind, name, fixed, moving, truth @ wrong
        elif kind == "other organ":
            other = organs[random.integers(len(organs))]
            pose = np.eye(4)
            pose[:3, 3] = other.grid.centre - fixed.grid.centre
            yield kind, f"{name} with {other.name}", fixed, other, pose @ jitter(random, fixed, 180.0, 20.0)
        else:
            array = moving.array.copy()
            axis = int(random.integers(3))
            half = [slice(None)] * 3
            half[axis] = slice(array.shape[axis] // 2, None) if random.random() < 0.5 else slice(array.shape[axis] // 2)
            array[tuple(half)] = array.min()
            yield kind, name, fixed, Volume(array, moving.grid, moving.name), truth


def small(volume: Volume) -> Volume:
    """A scan averaged to the spacing that is looked at, once, so that a case costs little."""
    grid = volume.grid.resampled(np.maximum(volume.grid.spacing, 0.75 * SPACING))
    image = torch.from_numpy(volume.array.astype(np.float32))[None, None]
    return Volume(torch.nn.functional.adaptive_avg_pool3d(image, grid.shape)[0, 0].numpy(), grid, volume.name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the development data")
    parser.add_argument("--broken", type=int, default=200)
    parser.add_argument("--good", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    folder, random = args.data / "brain_contrast", np.random.default_rng(args.seed)
    pairs = [
        (name, small(fixed), small(moving), truth)
        for name, fixed, moving, truth in (*p19_pairs(folder), *kirby_pairs(folder, 0, args.seed))
    ]
    organs = [small(read_volume(args.data / f"{name}.nii.gz")) for name in ORGANS]
    cases = (
        *itertools.islice(good_cases(pairs, random), args.good),
        *itertools.islice(broken_cases(pairs, organs, random), args.broken),
    )
    counts: dict[str, Counter] = {}
    shares: dict[str, list[float]] = {}
    for kind, name, fixed, moving, pose in cases:
        level, structure, shared = judged(fixed, moving, pose, random)
        counts.setdefault(kind, Counter())[level] += 1
        shares.setdefault(kind, []).append(shared)
        if (level == "FAIL") == (kind == "good") or (level == "PASS") != (kind == "good"):
            print(f"{kind}: {name}: {level}, structure {structure:.1f}, shared {shared:.2f}", flush=True)
    for kind, found in counts.items():
        low, high = np.nanpercentile(shares[kind], (0, 100))
        told = ", ".join(f"{n} {level}" for level, n in found.items())
        print(f"{kind}: {sum(found.values())} cases, {told}; shared content {low:.2f} to {high:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
