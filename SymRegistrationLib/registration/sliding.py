"""Smoothing that lets organs slide, what slides in two scans, and the pose of what stays.

A lung slides along the chest wall, so what moves on one side says nothing of how the other moves along the surface
between them; but no gap opens, so across the surface both move together: each region is smoothed by itself along its
surface, and with the others across it (mathematics.md, 7.7). Normalised smoothing within regions follows Pace et al.,
IEEE TMI 2013; that only the component along the surface is freed follows Schmidt-Richberg et al., Med Image Anal 2012,
and Delmon et al., Phys Med Biol 2013.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..fields import FieldPair, gaussian, gradient, sample, square_sum, warp
from ..geometry.grid import Grid, index_map
from ..geometry.lattice import affine_grid
from ..geometry.volumes import Volume
from ..job import InputError, Options
from ..losses import lncc_map
from . import alignment, body, methods
from .alignment import Alignment, split_midway
from .working_grid import Layout, Scan, WorkingPair, working_pair

#: Slope of a smoothed share, per voxel, from which on its direction counts as a normal.
SLOPE = 0.1
#: A smoothed share below this says nothing.
LEAST_SHARE = 1e-3
#: So many regions may slide along each other; each costs two more filters a step.
MOST_REGIONS = 6
#: Where what stays is looked for: voxel in mm, window of the local correlation, brightness that is content, and the
#: power of the squared correlation that leaves only what matches very well.
LOOKED_AT, WINDOW, SHOWN, VERY_WELL = 4.0, 7, 0.05, 6
#: Exponent of the shares where they weigh: voxels that belong to several regions speak for none.
CORE = 4


class SlidingSmoother:
    """Gaussian smoothing of both half-way fields, within regions that slide along each other.

    Args:
        regions: (2, R, D, H, W), 0 to 1, fixed first: how much of each voxel belongs to each region of its scan; what
            belongs to none is one region more. ``None`` = the plain Gaussian.
    """

    def __init__(self, regions: Tensor | None = None):
        self.regions = regions
        self.shares: Tensor | None = None
        self._known: dict[float, tuple[Tensor, Tensor]] = {}
        self._normals: Tensor | None = None
        self._looks = 0

    def look(self, halves: Tensor) -> None:
        """Find the regions in the middle, from (2, 3, D, H, W) half-way fields; in every other step, which moves them
        by less than a voxel."""
        self._looks += 1
        if self.regions is None or self._looks % 2 == 0:
            return
        named = warp(self.regions, halves).mean(0, keepdim=True)
        self.shares = torch.cat([named, (1 - named.sum(1, keepdim=True)).clamp_min(0)], 1)
        soft = gaussian(named, 1.0)
        soft = torch.cat([soft, 1 - soft.sum(1, keepdim=True)], 1)[0][:, None]
        slopes = torch.cat([gradient(soft, axis) for axis in range(3)], 1)
        self._normals = slopes / (square_sum(slopes) + SLOPE**2).sqrt()
        self._known = {}

    def __call__(self, field: Tensor, sigma: float) -> Tensor:
        """(2, 3, D, H, W) smoothed by ``sigma`` voxels."""
        if self.shares is None or self._normals is None:
            return gaussian(field, sigma)
        cores, means = self._cores(self.shares, sigma)
        parts = [gaussian(field * cores[:, k : k + 1], sigma) for k in range(cores.shape[1])]
        # Voxels that belong to several regions hardly speak for the whole either.
        whole = torch.stack(parts).sum(0).div_(means.sum(1, keepdim=True).clamp_min(LEAST_SHARE))
        along = torch.zeros_like(whole)
        for k, part in enumerate(parts):
            mean, normal = means[:, k : k + 1], self._normals[k : k + 1]
            apart = part.div_(mean.clamp_min(LEAST_SHARE)).sub_(whole).mul_(mean > LEAST_SHARE)
            apart -= normal * (normal * apart).sum(1, keepdim=True)
            along += apart.mul_(self.shares[:, k : k + 1])
        return whole.add_(along)

    def _cores(self, shares: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(1, R + 1, D, H, W) how much each voxel speaks for each region, and the same smoothed."""
        if sigma not in self._known:
            cores = shares.pow(CORE)
            self._known[sigma] = cores, gaussian(cores, sigma)
        return self._known[sigma]


@dataclass(frozen=True, eq=False)
class Regions:
    """What slides in one scan: (1, R, D, H, W) float32 shares of its regions, on ``grid``."""

    shares: Tensor
    grid: Grid

    def on(self, grid: Grid, to_scan: np.ndarray) -> Tensor:
        """(1, R, *grid.shape): the same on another grid, whose points ``to_scan`` (4, 4) takes to the scan's."""
        ratio = grid.spacing[0] / self.grid.spacing
        sigma = [0.5 * math.sqrt(r * r - 1) if r > 1.2 else 0.0 for r in ratio]
        shares = gaussian(self.shares, sigma) if any(sigma) else self.shares
        return sample(shares, affine_grid(grid.shape, index_map(grid, to_scan, self.grid), shares))


def find(
    volumes: Sequence[Volume],
    masks: Sequence[Volume | None],
    options: Options,
    device: torch.device | str,
    notes: list[str],
) -> tuple[Regions, Regions] | None:
    """What slides in the fixed and the moving scan, as the options say; None when nothing does.

    Args:
        masks: label maps of what slides, one of each scan or none.
        notes: gets what was found, in words.

    Raises:
        InputError: lungs are asked for and a scan shows none; the masks name different regions.
    """
    if options.sliding == "off":
        return None
    if methods.is_learned(options.method) and not options.refine:
        notes.append("the network smooths over what slides; with --refine 2 the optimiser lets it slide")
        return None
    if masks[0] is not None and masks[1] is not None:
        return _of_masks(masks[0], masks[1], device)
    found = [body.lungs(volume) for volume in volumes]
    empty = [not mask.any() for mask, _ in found]
    if any(empty):
        if options.sliding == "auto":
            notes.append(
                "no lungs were found and no sliding masks given: nothing slides, but what stays held the alignment"
            )
            return None
        raise InputError(
            f"no lungs were found in '{volumes[empty.index(True)].name}'.",
            "They are found in CT in Hounsfield units; for other scans give --fixed- and --moving-sliding-mask.",
        )
    return _regions(*found[0], device), _regions(*found[1], device)


def _of_masks(fixed: Volume, moving: Volume, device: torch.device | str) -> tuple[Regions, Regions]:
    """The regions of two label maps, by their numbers."""
    numbers = [np.unique(volume.array[volume.array > 0]) for volume in (fixed, moving)]
    if not np.array_equal(numbers[0], numbers[1]) or not 1 <= len(numbers[0]) <= MOST_REGIONS:
        raise InputError(
            "the two sliding masks do not hold the same regions.",
            f"Give the same 1 to {MOST_REGIONS} label numbers in both.",
        )
    one, other = (
        _regions(np.stack([volume.array == n for n in numbers[0]]), volume.grid, device) for volume in (fixed, moving)
    )
    return one, other


def _regions(masks: np.ndarray, grid: Grid, device: torch.device | str) -> Regions:
    return Regions(torch.from_numpy(masks).to(device, torch.float32).view(1, -1, *grid.shape), grid)


def with_regions(space: WorkingPair, regions: tuple[Regions, Regions] | None) -> WorkingPair:
    """The pair with what slides on it."""
    if regions is None:
        return space
    ways = space.mid_to_fixed, space.mid_to_moving
    return replace(space, regions=torch.cat([one.on(space.grid, to) for one, to in zip(regions, ways)]))


def surface_shear(space: WorkingPair, pair: FieldPair) -> Tensor | None:
    """(D, H, W) voxels of the working grid: how far neighbouring voxels part at the surfaces of what slides, 0 away
    from them; None when nothing does. A place there may belong to either side."""
    if space.regions is None:
        return None
    soft = gaussian(space.regions[:1], 1.0)
    near = (4 * soft * (1 - soft)).amax(1, keepdim=True).clamp(0, 1)
    parts = sum(gradient(pair.fixed_to_moving, axis).square().sum(1, keepdim=True) for axis in range(3))
    return (near * torch.as_tensor(parts).sqrt())[0, 0]


def told(space: WorkingPair, pair: FieldPair) -> dict[str, float] | None:
    """What metrics.json says of sliding: regions, which part of the content lies at their surfaces, and by how much
    neighbouring voxels part there."""
    shear = surface_shear(space, pair)
    if shear is None or space.regions is None:
        return None
    content = space.fixed[0, 0] > SHOWN
    surface = ((space.regions[0] > 0.1) & (space.regions[0] < 0.9)).any(0) & content
    at = shear[surface] * float(space.grid.spacing[0])
    return {
        "regions": space.regions.shape[1],
        "surface_percent": 100 * float(surface.sum() / content.sum().clamp_min(1)),
        "shear_mean_mm": float(at.mean()) if at.numel() else 0.0,
    }


def staying_pose(scans: Sequence[Scan], pose: Alignment, options: Options) -> Alignment:
    """The pose of what stays, where organs slide. That of the whole follows the organs: a liver drew it 12 mm away from
    spine and skin.

    What stays matches very well at its pose, organs that change match fairly at theirs. So the pose where most of the
    content matches very well is taken: the headers', that of the whole, or one of both refined where it matches well.

    Args:
        scans: fixed and moving, prepared.
        pose: of the whole.
    """
    if options.sliding == "off" or pose.kind not in ("rigid", "affine"):
        return pose
    best, most = pose, 0.0
    for matrix in (pose.matrix, np.eye(4)):
        start = replace(split_midway(matrix, scans[0].centroid, pose.kind), similarity=pose.similarity)
        share, seen = _matching(scans, start)
        again = alignment.align(seen[0], seen[1], pose.kind, pose.measure, near=matrix)
        for one, value in ((start, share), (again, _matching(scans, again)[0])):
            if value > most:
                best, most = one, value
    told = {name: getattr(pose, name) for name in ("confidence", "measure", "likeness", "mirrored_gain")}
    return replace(best, **told)


def _matching(scans: Sequence[Scan], pose: Alignment) -> tuple[float, list[Scan]]:
    """How much of the content matches very well at a pose, 0..1, and the scans with masks where it does."""
    halves = pose.mid_to_fixed, pose.mid_to_moving
    try:
        space = working_pair(scans[0], scans[1], *halves, Layout(LOOKED_AT))
    except InputError:  # apart from each other
        return 0.0, list(scans)
    match = lncc_map(space.fixed, space.moving, WINDOW).pow(VERY_WELL)
    content = torch.maximum(space.fixed, space.moving) > SHOWN
    if space.weight is not None:
        content &= space.weight.prod(0, keepdim=True) > 0.5
    seen = []
    for scan, to in zip(scans, halves):
        at = affine_grid(scan.grid.shape, index_map(scan.grid, np.linalg.inv(to), space.grid), match)
        mask = sample(match, at, padding="zeros")
        seen.append(replace(scan, mask=mask if scan.mask is None else mask * scan.mask))
    return float(match[content].mean()) if bool(content.any()) else 0.0, seen
