"""Poses between contrasts: the initial alignment on pairs whose truth is known, beside SimpleITK and ANTs.

    python Testing/benchmarks/contrast.py --data DEVELOPMENT_DATA [--tries 40] [--only p19,kirby]
        [--tools symreg,sitk,ants]
    python Testing/benchmarks/contrast.py --data DEVELOPMENT_DATA --warps 6 [--preset default]

The first form scores ``align`` alone; ``--warps`` the whole registration of kirby113, one contrast warped by a known
smooth field of 3 to 6 mm, found from itself and from another contrast. Truths: for p19 the published affine chain
between the two visits and from FLAIR to T1W; for kirby113, whose contrasts were co-registered by others, a random pose
of up to 90 degrees and 50 mm that is written into the moving header. An error is the mean distance in mm between found
and true place over the brightest quarter of the fixed voxels. Seconds are of ``align`` alone, wall clock, two threads.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from SymRegistrationLib import pipeline
from SymRegistrationLib.fields import gaussian, resize
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.transform_files import write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform, resample_through
from SymRegistrationLib.geometry.volumes import Volume, read_volume, to_itk, write_volume
from SymRegistrationLib.job import Options
from SymRegistrationLib.registration import alignment, working_grid
from SymRegistrationLib.registration.alignment import read_linear

CONTRASTS = ("t1", "t2", "flair")
#: Largest random pose of kirby113.
DEGREES, SHIFT = 90.0, 50.0


def bright_points(volume: Volume, count: int = 20_000) -> np.ndarray:
    """(n, 3) LPS mm: an even sample of the brightest quarter of the voxels."""
    where = np.flatnonzero(volume.array > np.percentile(volume.array, 75))
    where = where[:: max(1, len(where) // count)]
    return volume.grid.points(np.stack(np.unravel_index(where, volume.array.shape), 1).astype(float))


def error(found: np.ndarray, true: np.ndarray, fixed: Volume) -> float:
    """Mean distance in mm between the places that two affine maps give the brightest quarter of ``fixed``."""
    points = bright_points(fixed)
    return float(np.linalg.norm(transform_points(found, points) - transform_points(true, points), axis=1).mean())


def random_pose(random: np.random.Generator, centre: np.ndarray, degrees: float, shift: float) -> np.ndarray:
    """(4, 4) LPS mm: a turn of up to ``degrees`` about a random axis through ``centre``, a shift of up to ``shift``."""
    axis, direction = (v / np.linalg.norm(v) for v in random.normal(size=(2, 3)))
    k = np.cross(np.eye(3), axis)
    angle = np.radians(degrees * random.uniform())
    matrix = np.eye(4)
    matrix[:3, :3] += np.sin(angle) * k + (1 - np.cos(angle)) * k @ k
    matrix[:3, 3] = centre + direction * shift * random.uniform() - matrix[:3, :3] @ centre
    return matrix


def carried(volume: Volume, matrix: np.ndarray) -> Volume:
    """The same voxels elsewhere: only the header changes."""
    return Volume(volume.array, Grid(volume.grid.shape, matrix @ volume.grid.matrix), volume.name)


def p19_pairs(folder: Path) -> Iterator[tuple[str, Volume, Volume, np.ndarray]]:
    """(name, fixed, moving, truth fixed -> moving) of the patient with two visits."""
    first, second, t1 = (read_volume(folder / f"p19_{name}.nii.gz") for name in ("s1_FLAIR", "s2_FLAIR", "s2_T1W"))
    to_first, to_second = (read_linear(folder / f"p19_s{k}_FLAIR_to_common_space.txt") for k in (1, 2))
    visits = to_second @ np.linalg.inv(to_first)
    to_t1 = read_linear(folder / "p19_s2_T1W_intrastudy_to_FLAIR.txt")
    yield "p19 FLAIR <- FLAIR, other visit", first, second, visits
    yield "p19 FLAIR <- T1, other visit", first, t1, to_t1 @ visits
    yield "p19 T1 <- FLAIR, other visit", t1, first, np.linalg.inv(to_t1 @ visits)
    yield "p19 FLAIR <- T1, same visit", second, t1, to_t1


def kirby_pairs(folder: Path, tries: int, seed: int) -> Iterator[tuple[str, Volume, Volume, np.ndarray]]:
    """Each ordered pair of contrasts with its header right, then ``tries`` random poses over the pairs in turn."""
    scans = {name: read_volume(folder / f"kirby113_{name}.nii.gz") for name in CONTRASTS}
    pairs = list(itertools.permutations(CONTRASTS, 2))
    for fixed, moving in pairs:
        yield f"kirby113 {fixed} <- {moving}, header right", scans[fixed], scans[moving], np.eye(4)
    random = np.random.default_rng(seed)
    for k in range(tries):
        fixed, moving = pairs[k % len(pairs)]
        pose = random_pose(random, scans[moving].grid.centre, DEGREES, SHIFT)
        yield f"kirby113 {fixed} <- {moving}, try {k}", scans[fixed], carried(scans[moving], pose), pose


def warped(volume: Volume, longest: float, seed: int) -> tuple[Volume, DenseTransform]:
    """``volume`` seen through a known smooth warp whose longest vector is ``longest`` mm, and that warp: point of the
    warped scan -> point of the scan."""
    shape = volume.grid.shape
    noise = torch.randn((1, 3, *(max(4, n // 4) for n in shape)), generator=torch.Generator().manual_seed(seed))
    u = resize(gaussian(noise, 5.0), shape)[0].permute(1, 2, 3, 0)
    u = (u * (longest / u.norm(dim=-1).max())).numpy()
    through = DenseTransform(volume.grid, np.ascontiguousarray(u))
    return Volume(resample_through(volume, through, volume.grid), volume.grid, f"warped {volume.name}"), through


def score_warps(folder: Path, count: int, preset: str, seed: int) -> None:
    """Print the mean error of whole registrations with known warps, one contrast beside two."""
    scans = {name: read_volume(folder / f"kirby113_{name}.nii.gz") for name in CONTRASTS}
    for k, (fixed, moving) in enumerate(itertools.islice(itertools.cycle(itertools.permutations(CONTRASTS, 2)), count)):
        longest = (3.0, 4.5, 6.0)[k % 3]
        seen, truth = warped(scans[fixed], longest, seed + k)
        points = bright_points(seen)
        true = truth.map_points(points)
        print(f"{fixed} warped by up to {longest} mm: mean {np.linalg.norm(true - points, axis=1).mean():.2f} mm")
        for other in (fixed, moving):
            done = pipeline.register(seen, scans[other], Options(preset=preset))
            after, aligned = (
                float(np.linalg.norm(found - true, axis=1).mean())
                for found in (done.forward.map_points(points), transform_points(done.transforms.matrix, points))
            )
            told = done.metrics
            print(
                f"    <- {other:5} {after:.2f} mm, aligned {aligned:.2f}; {told['similarity_measure']}, "
                f"{told['alignment']['kind']}, {told['evidence']['delivered']}, {told['verdict']['level']}, "
                f"{told['seconds']['total']:.0f} s",
                flush=True,
            )


def contrast_rows(data: Path, folder: Path, seed: int = 0) -> list[dict[str, str]]:
    """Pairs for ``compare.py`` whose true transform is known, as files in ``folder``: p19, and each ordered pair of
    kirby113 with the fixed scan warped by up to 3 to 6 mm and the moving header turned by up to 30 degrees and 20 mm;
    after each the same from the same contrast."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, source = [], data / "brain_contrast"

    def voxels(grid: Grid) -> np.ndarray:
        return grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))

    def row(name: str, fixed: str, moving: str, truth: np.ndarray, grid: Grid) -> None:
        path = folder / f"{name.replace(' ', '_').replace('<-', 'from')}_truth.nii.gz"
        if not path.exists():
            write_transform(path, DenseTransform(grid, (truth - voxels(grid)).astype(np.float32)))
        rows.append({"id": name, "fixed": fixed, "moving": moving, "truth": str(path)})

    for name, fixed, moving, truth in p19_pairs(source):
        files = (str(source / volume.name) for volume in (fixed, moving))
        row(name.replace(",", ""), *files, transform_points(truth, voxels(fixed.grid)), fixed.grid)
    scans = {name: read_volume(source / f"kirby113_{name}.nii.gz") for name in CONTRASTS}
    random = np.random.default_rng(seed)
    for k, (fixed, other) in enumerate(itertools.permutations(CONTRASTS, 2)):
        longest, grid = (3.0, 4.5, 6.0)[k % 3], scans[fixed].grid
        pose = random_pose(random, grid.centre, 30.0, 20.0)
        seen, through = warped(scans[fixed], longest, seed + k)
        truth = transform_points(pose, voxels(grid) + through.displacement)
        paths = {"fixed": folder / f"kirby{k}_fixed.nii.gz"}
        write_volume(paths["fixed"], seen.array, grid)
        for moving in (other, fixed):
            paths[moving] = folder / f"kirby{k}_{moving}.nii.gz"
            write_volume(paths[moving], scans[moving].array, carried(scans[moving], pose).grid)
            name = f"kirby113 {fixed} <- {moving} warp {k} of {longest:g} mm"
            row(name, str(paths["fixed"]), str(paths[moving]), truth, grid)
    return rows


def by_symreg(fixed: Volume, moving: Volume, kind: str) -> tuple[np.ndarray, str]:
    """The pose of ``align`` and what it says about it."""
    found = alignment.align(working_grid.prepare(fixed), working_grid.prepare(moving), kind)
    return found.matrix, f"{found.measure} {found.similarity:.3f} confidence {found.confidence:.2f}"


def by_sitk(fixed: Volume, moving: Volume, kind: str) -> tuple[np.ndarray, str]:
    """Rigid, Mattes mutual information, three levels, the better of the header's start and matched centres."""
    f, m = (sitk.Cast(to_itk(v.array.astype(np.float32), v.grid), sitk.sitkFloat32) for v in (fixed, moving))
    best = None
    for centred in (False, True):
        start = sitk.Euler3DTransform()
        if centred:
            start = sitk.CenteredTransformInitializer(f, m, start, sitk.CenteredTransformInitializerFilter.MOMENTS)
        else:
            start.SetCenter(fixed.grid.centre.tolist())
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.05, 1)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 200)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SetInitialTransform(start, inPlace=True)
        try:
            method.Execute(f, m)
        except RuntimeError:
            continue
        if best is None or method.GetMetricValue() < best[0]:
            best = method.GetMetricValue(), start
    if best is None:
        return np.full((4, 4), np.nan), "failed"
    columns = np.array([best[1].TransformPoint(p) for p in ((0.0, 0, 0), (1.0, 0, 0), (0.0, 1, 0), (0.0, 0, 1))])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (columns[1:] - columns[0]).T, columns[0]
    return matrix, f"mi {best[0]:.3f}"


def by_ants(fixed: Volume, moving: Volume, kind: str) -> tuple[np.ndarray, str]:
    """``ants.registration(type_of_transform="Rigid")`` with its defaults; needs antspyx."""
    import tempfile

    import ants

    with tempfile.TemporaryDirectory() as folder:
        images = []
        for name, volume in (("fixed", fixed), ("moving", moving)):
            path = f"{folder}/{name}.nii.gz"
            sitk.WriteImage(to_itk(volume.array.astype(np.float32), volume.grid), path)
            images.append(ants.image_read(path))
        result = ants.registration(*images, type_of_transform="Rigid", random_seed=1, outprefix=f"{folder}/out")
        return read_linear(result["fwdtransforms"][0]), "rigid"


TOOLS: dict[str, Callable] = {"symreg": by_symreg, "sitk": by_sitk, "ants": by_ants}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds brain_contrast")
    parser.add_argument("--tries", type=int, default=6, help="random poses of kirby113 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="p19,kirby")
    parser.add_argument("--tools", default="symreg", help=f"of {', '.join(TOOLS)} (default: %(default)s)")
    parser.add_argument("--kind", default="affine", help="of align (default: %(default)s)")
    parser.add_argument("--warps", type=int, default=0, help="known warps of kirby113 instead of poses")
    parser.add_argument("--preset", default="default", help="with --warps (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.warps:
        score_warps(args.data / "brain_contrast", args.warps, args.preset, args.seed)
        return 0
    folder, errors = args.data / "brain_contrast", {}
    pairs = itertools.chain(
        p19_pairs(folder) if "p19" in args.only else (),
        kirby_pairs(folder, args.tries, args.seed) if "kirby" in args.only else (),
    )
    for name, fixed, moving, truth in pairs:
        print(f"{name}: before {error(np.eye(4), truth, fixed):.2f} mm")
        for tool in args.tools.split(","):
            start, cpu = time.perf_counter(), time.process_time()
            matrix, told = TOOLS[tool](fixed, moving, args.kind)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            wrong = error(matrix, truth, fixed)
            errors.setdefault((tool, name.split(",")[-1].split()[0]), []).append(wrong)
            print(f"    {tool:8} {wrong:7.2f} mm  {seconds:6.1f} s  cpu {cpu:6.1f} s  {told}", flush=True)
    for (tool, group), values in errors.items():
        if group == "try":
            v = np.array(values)
            print(f"{tool}: {len(v)} tries, median {np.median(v):.2f}, 95 % {np.percentile(v, 95):.2f} mm,", end=" ")
            print(f"{(v < 1).mean():.1%} below 1 mm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
