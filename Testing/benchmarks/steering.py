"""What landmarks, labels and repairs do to results on real scans, and what they cost.

    python Testing/benchmarks/steering.py DATA [landmarks] [labels] [repair] [cost] [--preset fast]

DATA is a folder with ``liver/`` (scans with ``_landmarks.csv``) and ``brain/`` (scans with ``_aseg`` label maps). Times
are processor seconds of this process, so a busy machine does not change them; shares compare runs of one process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from SymRegistrationLib.commands.answers import write_raw
from SymRegistrationLib.fields import compose
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import PointSet, read_points
from SymRegistrationLib.geometry.transform_files import physical, read_transform
from SymRegistrationLib.geometry.transforms import resample_through
from SymRegistrationLib.geometry.volumes import foreground, read_labels, read_volume, write_volume
from SymRegistrationLib.job import Job, Options
from SymRegistrationLib.jobs.history import continuing_job
from SymRegistrationLib.jobs.memory import Memory
from SymRegistrationLib.jobs.register import run
from SymRegistrationLib.pipeline import register
from SymRegistrationLib.registration.extras import Extras
from SymRegistrationLib.registration.guide import Region
from SymRegistrationLib.registration.live import Watch
from SymRegistrationLib.registration.state import State

LIVER = [
    ("18_exhale", "18_cyc_1_10"),
    ("18_exhale", "18_cyc_3_10"),
    ("19_exhale", "19_cyc_1_6"),
    ("19_exhale", "19_cyc_1_9"),
]
ASEG = (2, 3, 4, 7, 8, *range(10, 19), 26, 28, 41, 42, 43, 46, 47, *range(49, 55), 58, 60)
DRIVEN = (4, 43, 14, 15, 17, 53)


def timed(*arguments, **extras):
    """(result, processor seconds) of one registration."""
    started = time.process_time()
    result = register(*arguments, Extras(keep_state=True, **extras))
    return result, time.process_time() - started


def part(points: PointSet, which: np.ndarray) -> PointSet:
    """Some of the landmarks."""
    return PointSet(points.points[which], tuple(np.array(points.labels)[which]))


def landmarks(data: Path, preset: str) -> None:
    """Every second pair of the liver drives, the others judge; registered anew with them, and updated from the result
    without them."""
    pooled: dict[str, list] = {"without": [], "driven": [], "updated": []}
    for names in LIVER:
        fixed, moving = (read_volume(data / "liver" / f"{name}.nii.gz", name) for name in names)
        points = [read_points(data / "liver" / f"{name}_landmarks.csv", name) for name in names]
        liver = np.flatnonzero([label == "liver" for label in points[0].labels])
        drive, judge = liver[::2], liver[1::2]
        pulling = dict(zip(("fixed_points", "moving_points"), (part(p, drive) for p in points)))
        options = Options(preset=preset, landmark_weight=1.0)
        runs = {"without": timed(fixed, moving, Options(preset=preset))}
        runs["driven"] = timed(fixed, moving, options, **pulling)
        runs["updated"] = timed(fixed, moving, options, start=runs["without"][0].state, **pulling)
        print(names)
        for name, (result, seconds) in runs.items():
            error = np.linalg.norm(result.forward.map_points(points[0].points) - points[1].points, axis=1)
            told = (result.metrics["steering"] or {}).get("landmarks", {})
            pooled[name].append(error[judge])
            quality = result.metrics["quality"]
            print(
                f"  {name:8} judged {error[judge].mean():.2f} mm, driving largest {error[drive].max():.2f} mm, met "
                f"{told.get('met', '-')} of {len(drive)}, unmet {told.get('unmet', '-')}, folded "
                f"{quality['folded_voxels']}, smallest Jacobian {quality['jacobian_min']:.2f}, {seconds:.1f} s",
                flush=True,
            )
    before = np.concatenate(pooled["without"]).mean()
    for name, errors in pooled.items():
        mean = np.concatenate(errors).mean()
        print(f"all judged pairs, {name}: {mean:.2f} mm ({100 * (mean / before - 1):+.0f} %)")


def labels(data: Path, preset: str) -> None:
    """Ventricles and hippocampi drive; Dice of them and of the other labels."""
    for names in (("sub-01", "sub-02"), ("sub-03", "bert")):
        fixed, moving = (read_volume(data / "brain" / f"{name}_brain.nii.gz", name) for name in names)
        maps = [read_labels(data / "brain" / f"{name}_aseg.nii.gz", name) for name in names]
        given = dict(zip(("fixed_labels", "moving_labels"), maps))
        driving = Options(preset=preset, drive_labels=",".join(map(str, DRIVEN)))
        runs = {"without": timed(fixed, moving, Options(preset=preset), **given)}
        runs["driven"] = timed(fixed, moving, driving, **given)
        runs["updated"] = timed(fixed, moving, driving, start=runs["without"][0].state, **given)
        print(names)
        for name, (result, seconds) in runs.items():
            table = {int(n): row["after"] for n, row in result.metrics["labels"]["per_label"].items()}
            own = np.mean([table[n] for n in DRIVEN])
            others = np.mean([table[n] for n in ASEG if n not in DRIVEN and n in table])
            print(
                f"  {name:8} driven {own:.4f}, others {others:.4f}, folded "
                f"{result.metrics['quality']['folded_voxels']}, "
                f"{seconds:.1f} s; " + " ".join(f"{n}:{table[n]:.3f}" for n in DRIVEN),
                flush=True,
            )


def spoilt(state: State, centre: np.ndarray, length: float, sigma: float) -> State:
    """The state with a Gaussian warp of ``length`` mm about a point of mid-space put into it."""
    grid = state.grid
    places = torch.from_numpy(grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)))
    bump = torch.exp(-0.5 * ((places - torch.from_numpy(centre)).norm(dim=-1) / sigma) ** 2).float()
    warp = torch.zeros(1, 3, *grid.shape)
    warp[0, 1] = bump * (length / float(grid.spacing[0]))
    halves = torch.cat([state.halves[:1], compose(warp, state.halves[1:])])
    return State(halves, grid, state.pose, state.similarity, state.inputs)


def repair(data: Path, preset: str) -> None:
    """A result spoilt by a known local warp of 8 mm, repaired; how far it is from the result before, mm."""
    fixed, moving = (read_volume(data / "brain" / f"{name}_brain.nii.gz", name) for name in ("sub-01", "sub-02"))
    good, full = timed(fixed, moving, Options(preset=preset))
    shape = np.asarray(good.state.grid.shape)
    for share in ((0.5, 0.5, 0.35), (0.6, 0.35, 0.6), (0.4, 0.6, 0.5)):
        bad = spoilt(good.state, good.state.grid.points((shape - 1) * share), 8.0, 10.0)
        shown = register(fixed, moving, Options(preset=preset), Extras(start=bad, restore=True))
        wrong = np.linalg.norm(difference(shown, good, "forward"), axis=-1)
        centre = fixed.grid.points(np.unravel_index(wrong.argmax(), wrong.shape))
        region = Region(None, tuple(centre), 22.0, 12.0)
        shown = register(fixed, moving, Options(preset=preset), Extras(start=bad, restore=True, keep_state=True))
        _, cold = timed(fixed, moving, Options(preset=preset), start=bad, region=region)
        mended, seconds = timed(fixed, moving, Options(preset=preset), start=shown.state, region=region)
        left = np.linalg.norm(difference(mended, good, "forward"), axis=-1)
        inside, beyond = wrong > 0.25 * wrong.max(), distances(fixed.grid, centre) > 34.0
        content = foreground(fixed.array)
        changed = np.linalg.norm(difference(mended, shown, "forward"), axis=-1)
        points = mended.moving.grid.points(np.argwhere(np.ones(moving.grid.shape, bool))[::997])
        back = [run.inverse.map_points(points) for run in (mended, shown)]
        far = np.linalg.norm(back[1] - centre, axis=1) > 34.0
        print(
            f"spoilt {wrong[inside & content].mean():.2f} mm mean, {wrong.max():.2f} largest -> mended "
            f"{left[inside & content].mean():.2f} mean, {np.percentile(left[inside & content], 95):.2f} 95 %, "
            f"{left[inside & content].max():.2f} largest; outside changed {changed[beyond].max():.4f} mm forward, "
            f"{np.linalg.norm(back[0] - back[1], axis=1)[far].max():.4f} inverse; folded "
            f"{mended.metrics['quality']['folded_voxels']}; {seconds:.1f} s = "
            f"{100 * seconds / full:.0f} % of a full run ({100 * cold / full:.0f} % when nothing is in memory)",
            flush=True,
        )


def difference(one, other, direction: str) -> np.ndarray:
    """(D, H, W, 3) mm on the fixed grid."""
    grid = one.fixed.grid
    return getattr(one, direction).resampled(grid).displacement - getattr(other, direction).resampled(grid).displacement


def distances(grid: Grid, centre: np.ndarray) -> np.ndarray:
    """(D, H, W) mm of every voxel from a point."""
    return np.linalg.norm(
        grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)) - centre, axis=-1
    )


def cost(data: Path, preset: str) -> None:
    """Update, repair, live view and a whole run at 256^3, from files to files, in a process that stays (as the worker
    behind Slicer does): stages, seconds by the clock and of the processor."""
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        place, names = Path(folder), ("sub-01", "sub-02")
        for name in names:
            scan = read_volume(data / "brain" / f"{name}_brain.nii.gz", name)
            grid = Grid.centred((256, 256, 256), 1.0, scan.grid.centre, scan.grid.axes)
            write_volume(place / f"{name}.nii.gz", resample_through(scan, np.eye(4), grid), grid)
        files = dict(zip(("fixed", "moving"), (str(place / f"{name}.nii.gz") for name in names)))
        looks: list[float] = []

        def went(what: str, job: Job, watch: Watch | None = None) -> tuple[dict, float]:
            """A job with the outputs that Slicer asks for."""
            clock, processor = time.perf_counter(), time.process_time()
            outputs = ("forward", "inverse", "warped_moving", "jacobian", "inverse_consistency")
            metrics = dict(
                run(job, write=lambda at, _, result: write_raw(at, outputs, result), watch=watch, memory=memory)
            )
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            print(
                f"{what}: {clock:.1f} s by the clock, {processor:.1f} s of the processor; {metrics['seconds']}",
                flush=True,
            )
            return metrics, processor

        job = Job(**files, output=str(place / "out"), options=Options(preset=preset), report=False, keep_state=True)
        first = replace(job, output=str(place / "first"), options=Options(preset="fast", spacing=6.0), keep_state=False)
        went("first job of the process, coarse", first)
        _, whole = went("click to nodes", job)
        _, watched = went("the same, looked at", job, Watch(lambda look: looks.append(look.similarity)))
        print(f"a look after each of {len(looks)} levels: {100 * (watched / whole - 1):+.1f} %")
        centre = grid.centre
        points = centre + np.array([[0, 0, 0], [20, 0, 0], [0, 25, 5]])
        there = physical(read_transform(place / "out" / "forward.nrrd"), None).map_points(points)
        for name, at in (("p", points), ("q", there + [[0, 4, 0], [0, 0, 0], [3, 0, 0]])):
            rows = "".join(f"{label},{x},{y},{z}\n" for label, (x, y, z) in zip("abc", at))
            (place / f"{name}.csv").write_text("label,x,y,z\n" + rows)
        given = {"fixed_points": str(place / "p.csv"), "moving_points": str(place / "q.csv")}
        update = continuing_job(job.output, None, given, {"landmark_weight": 1.0})
        metrics, took = went("update", update)
        print(f"  {100 * took / whole:.0f} % of a full run, met {metrics['steering']['landmarks']['met']} of 3")
        sphere = ",".join(f"{v:.1f}" for v in (*centre, 20.0))
        _, took = went("repair", continuing_job(job.output, None, {"sphere": sphere}, {"landmark_weight": 0.0}))
        print(f"  {100 * took / whole:.0f} % of a full run")
        sizes = [path.stat().st_size / 1e6 for path in sorted((place / "out").glob("state-*"))]
        print("states, MB: " + ", ".join(f"{size:.1f}" for size in sizes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("what", nargs="*", default=["landmarks", "labels", "repair", "cost"])
    parser.add_argument("--preset", default="default")
    asked = parser.parse_args()
    for what in asked.what:
        print(f"--- {what}, preset {asked.preset}, {torch.get_num_threads()} threads")
        {"landmarks": landmarks, "labels": labels, "repair": repair, "cost": cost}[what](asked.data, asked.preset)
