"""Sliding lungs with known motion: how far off is a registration near the pleura, with ``--sliding`` and without?

A chest CT is breathed: the lungs move down by 8 to 20 mm at their base and not at all at their apex, with an own swing
in the other directions. The chest wall, near skin and bones, stays; mediastinum and abdomen, deep inside, go with the
lungs. Across the surface of the lungs everything moves with them, so that no gap opens; along it, it need not. The
motion is made of many small steps, so both the lungs and their surroundings are carried by smooth maps that agree
across the surface. The breathed scan gets noise of its own; it is registered (fixed) with the scan itself (moving), and
the error is the distance of the found from the true position.

    python Testing/benchmarks/sliding.py --scan thorax_ct.nii.gz --first 2 --tries 4 --effort fast

The region in which the truth slides is drawn from a threshold of its own, not by what the library draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from SymRegistrationLib import Options, read_volume, register
from SymRegistrationLib.fields import compose, gaussian, gradient, warp
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.resampling import linear
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.registration.body import lungs

#: Small steps that a breath is made of, and over how many mm the surroundings come to rest.
STEPS, REST = 10, 25.0
#: Voxel of the scans that are made, mm; noise of the breathed one, HU; half-width of the strip at the pleura, mm.
VOXEL, NOISE, NEAR = 2.5, 20.0, 10.0


def distance(mask: np.ndarray, grid: Grid) -> torch.Tensor:
    """(1, 1, D, H, W) signed mm to the surface of a mask, negative inside."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(s) for s in grid.spacing[::-1]])
    found = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    return torch.from_numpy(sitk.GetArrayFromImage(found)).float()[None, None]


def sliding_region(volume: Volume) -> np.ndarray:
    """(D, H, W) bool: what slides in the truth, from a threshold between lung and fat, vessels closed."""
    seed, grid = lungs(volume)
    near = distance(linear(seed, grid, volume.grid) > 0.5, volume.grid)[0, 0].numpy() < 8
    whole = sitk.GetImageFromArray((near & (volume.array < -400)).astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryMorphologicalClosing(whole, [4, 4, 4])) > 0


def depth_of(volume: Volume) -> torch.Tensor:
    """(1, 1, D, H, W): 0 in the chest wall, within 40 mm of the skin or 15 mm of a bone, to 1 REST mm deeper."""
    body = sitk.GetImageFromArray((volume.array > -300).astype(np.uint8))
    body = sitk.BinaryMorphologicalClosing(sitk.BinaryMorphologicalOpening(body, [2, 2, 2]), [3, 3, 3])
    planes = [sitk.GetArrayFromImage(sitk.BinaryFillhole(body[:, :, k])) > 0 for k in range(body.GetDepth())]
    skin = -distance(np.stack(planes), volume.grid)
    bones = distance(volume.array > 200, volume.grid)
    skin, bones = (((d - start) / REST).clamp(0, 1) for d, start in ((skin, 40.0), (bones, 15.0)))
    return gaussian(skin * bones, 2.0)


def breathed(volume: Volume, seed: int) -> tuple[Volume, np.ndarray, np.ndarray, dict]:
    """The scan after a breath.

    Returns:
        The scan; (3, D, H, W) mm from each of its points to where it was before (array-axis order); (D, H, W) signed
        mm to the pleura; and what the breath was.
    """
    random = np.random.default_rng(seed)
    base = float(random.uniform(8, 20))
    swing = [float(x) for x in random.uniform(-3, 3, 2)]
    power = float(random.uniform(0.7, 1.5))
    grid, voxel = volume.grid, float(volume.grid.spacing[0])
    surface = distance(sliding_region(volume), grid)
    where = (surface[0, 0] < 0).nonzero()
    low, high = where[:, 0].min().item(), where[:, 0].max().item()
    depth = ((high - torch.arange(grid.shape[0]).float()) / (high - low)).clamp(0, 1.1).pow(power)
    wave = torch.sin(torch.arange(grid.shape[0]).float() / (high - low) * np.pi)
    inner = torch.zeros(1, 3, *grid.shape)
    # The first array axis runs to the head; the breath goes to the feet.
    inner[:, 0] = -(base * depth).view(-1, 1, 1) / voxel
    inner[:, 1], inner[:, 2] = ((s * wave).view(-1, 1, 1) / voxel for s in swing)
    inner = gaussian(inner, 4.0) / STEPS
    inside, outside = torch.zeros_like(inner), torch.zeros_like(inner)
    level, deep = surface, depth_of(volume)
    for _ in range(STEPS):
        normal = torch.cat([gradient(gaussian(level, 2.0), axis) for axis in range(3)], 1)
        normal = normal / normal.square().sum(1, keepdim=True).sqrt().clamp_min(1e-3)
        along = deep * inner
        across = normal * (normal * (inner - along)).sum(1, keepdim=True) * torch.exp(-((level.abs() / REST) ** 2))
        inside, outside = compose(inside, -inner), compose(outside, -gaussian(along + across, 1.0))
        level = warp(surface, inside)
    scans = [warp(torch.from_numpy(volume.array)[None, None], u) for u in (inside, outside)]
    within = level < 0
    array = torch.where(within, *scans)[0, 0].numpy() + random.normal(0, NOISE, grid.shape)
    truth = torch.where(within, inside, outside)[0].numpy() * voxel
    leak = float((warp(surface, outside)[~within] < -1).float().sum() / within.sum())
    about = {"base_mm": base, "swing_mm": swing, "power": power, "leaks_percent_of_lung": 100 * leak}
    jump = (inside - outside)[0].square().sum(0).sqrt().numpy() * voxel
    about["jump_mm"] = float(jump[(level[0, 0].abs() < 3).numpy()].mean())
    return Volume(array.astype(np.float32), grid, f"breathed {seed}"), truth, level[0, 0].numpy(), about


def errors(result, truth: np.ndarray, level: np.ndarray, body: np.ndarray) -> dict[str, float]:
    """Mean error in mm in the strip at the pleura (all, its inner and its outer part), in the lungs, and elsewhere."""
    grid = result.fixed.grid
    found = (result.forward.on(grid)).reshape(3, -1)
    steps = grid.axes  # array-axis mm -> LPS mm
    off = np.linalg.norm(np.asarray(found) - steps @ truth.reshape(3, -1), axis=0).reshape(grid.shape)
    near, inside = np.abs(level) < NEAR, level < 0
    parts = {
        "pleura": near & (inside | body),
        "pleura_inner": near & inside,
        "pleura_outer": near & ~inside & body,
        "lung": inside,
        "outside": ~inside & body,
    }
    return {name: float(off[part].mean()) for name, part in parts.items()}


def coarse(path: Path) -> Volume:
    """The scan at :data:`VOXEL` mm, head end last, cropped to the body."""
    volume = read_volume(path)
    grid = volume.grid.resampled(np.maximum(volume.grid.spacing, VOXEL))
    array = linear(gaussian_of(volume.array), volume.grid, grid)
    body = sitk.BinaryMorphologicalOpening(sitk.GetImageFromArray((array > -300).astype(np.uint8)), [3, 3, 3])
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(body), sortByObjectSize=True)
    where = np.argwhere(sitk.GetArrayFromImage(parts) == 1)
    low, high = np.maximum(where.min(0) - 3, 0), np.minimum(where.max(0) + 4, array.shape)
    array = array[tuple(slice(a, b) for a, b in zip(low, high))].copy()
    return Volume(array, grid.cropped(low, high), volume.name)


def gaussian_of(array: np.ndarray) -> np.ndarray:
    return gaussian(torch.from_numpy(array.astype(np.float32))[None, None], 0.5)[0, 0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--ways", default="affine:off,rigid:off,rigid:lung", help="INITIAL:SLIDING, by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    volume, rows = coarse(args.scan), []
    for seed in range(args.first, args.first + args.tries):
        fixed, truth, level, about = breathed(volume, seed)
        body = (fixed.array > -300) & (np.indices(fixed.grid.shape).min(0) > 2)
        print(f"seed {seed}", {k: np.round(v, 2).tolist() for k, v in about.items()}, flush=True)
        still = np.sqrt((truth**2).sum(0))
        print("  before", {"pleura": round(float(still[np.abs(level) < NEAR].mean()), 2)})
        options = Options(preset=args.effort, similarity="lncc", threads=args.threads)
        for way in args.ways.split(","):
            start, (initial, sliding) = time.process_time(), way.split(":")
            result = register(fixed, volume, replace(options, initial=initial, sliding=sliding))
            seconds = time.process_time() - start
            quality = result.metrics["quality"]
            row = {"seed": seed, "way": way, **errors(result, truth, level, body), "cpu": seconds}
            row |= {key: quality[key] for key in ("folded_voxels", "ice_mean_mm", "ice_p95_mm", "ice_max_mm")}
            rows.append(row)
            print("  ", {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    for way in args.ways.split(","):
        mine = [row for row in rows if row["way"] == way]
        print(way, {key: round(float(np.mean([row[key] for row in mine])), 3) for key in mine[0] if key != "way"})
    if args.save:
        args.save.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
