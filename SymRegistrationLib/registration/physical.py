"""From voxels of the working grid to millimetres of the two scans: the only place where both meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import (
    FieldPair,
    compose,
    resize,
    resize_field,
    sample_at,
    scale_channels,
    square_sum,
)
from ..geometry.folds import corner_determinants_at, folded_cells
from ..geometry.grid import Grid, transform_points
from ..geometry.transforms import CompactTransform, TransformPair
from .alignment import split_midway
from .working_grid import WorkingPair, fit_affine, to_working_grid

#: A field that ends in ``n`` voxels at a face of its grid fades to zero over so many times ``n`` voxels beyond it, but
#: at least over ``LEAST_FADE`` and at most over ``MOST_FADE``: a smooth step is 1.5 times steeper than a straight one,
#: so that the fading squeezes space to a half at most.
FADE, LEAST_FADE, MOST_FADE = 3.0, 3, 40
#: A lattice of fewer nodes than the first is interpolated to about as many, cubically, but to at most the second times
#: as many an axis: linear interpolation between nodes of 2.2 mm is what keeps the two directions of the preset fast
#: apart (inverse consistency 0.058 mm, 0.049 with nodes of 1.7 mm, 0.041 with 1.1 mm).
ENOUGH_NODES, MOST_FINER = 1.5e6, 4 / 3
#: Cells whose smallest corner determinant is below count as folded.
LEAST_CORNER = 0.01
#: Fields that end in more voxels than this at a face hold a pose that no affine carries yet (a network that began from
#: the headers): their affine part is taken out first.
LARGE_END = 12.0
#: Steps of the scan over which dense transforms on request reach beyond it, mm, but not further than this part of its
#: longest side: 6 mm around a scan of 2 mm would be a thousand times its volume.
MARGIN_MM, MARGIN_SHARE = 6.0, 1 / 8


def to_physical(pair: FieldPair, space: WorkingPair) -> TransformPair:
    """Carry a field pair from the working grid to the scans.

    The field stays on the working grid, or on a finer one over it, half-way between the scans, and the two halves of
    the alignment go before and after it. Beyond the working grid it fades to zero, both directions inverse to each
    other there too.
    """
    matrix = space.mid_to_moving @ np.linalg.inv(space.mid_to_fixed)
    if max(_ends(pair)) > LARGE_END:
        pair, space = _without_affine(pair, space)
    fields, before = faded(pair)
    after = [n - before[axis] - space.grid.shape[axis] for axis, n in enumerate(fields.shape[2:])]
    grid = space.grid.cropped([-n for n in before], [n + m for n, m in zip(space.grid.shape, after)])
    fields, grid = refined(fields, grid)
    linear = torch.from_numpy(grid.matrix[:3, :3].copy()).to(fields)
    vectors = _on_binary_steps(fields.permute(0, 2, 3, 4, 1) @ linear.T, float(grid.spacing.min()))
    to_fixed, to_moving = space.mid_to_fixed, space.mid_to_moving
    forward, inverse = vectors.cpu().numpy()
    return TransformPair(
        CompactTransform(grid, forward, np.linalg.inv(to_fixed), to_moving),
        CompactTransform(grid, inverse, np.linalg.inv(to_moving), to_fixed),
        matrix,
    )


def to_physical_again(
    before: TransformPair, pair: FieldPair, space: WorkingPair
) -> tuple[TransformPair, list[tuple[slice, ...]]] | None:
    """:func:`to_physical` for a pair that differs in boxes only from the one that ``before`` was made of.

    Args:
        pair: ``details["changed"]`` are three slices of the working grid for each direction.

    Returns:
        The transforms, and for each direction the box of their lattice outside of which it is as before, to the last
        bit. None when a box comes so near to the border of the working grid that the fading beyond it changes too.
    """
    forward, inverse = before.forward, before.inverse
    if not (isinstance(forward, CompactTransform) and isinstance(inverse, CompactTransform)):
        return None
    start, finer = space.grid.indices(forward.grid.matrix[:3, 3]), forward.grid.spacing / space.grid.spacing
    shift = np.round(start)
    laid = np.allclose(forward.grid.matrix[:3, :3], space.grid.matrix[:3, :3] * finer)
    if not (laid and np.allclose(start, shift, atol=1e-4)) or not np.allclose(
        forward.after, space.mid_to_moving
    ):  # its affine part was taken out
        return None
    boxes, rooms = pair.details["changed"], _inward(pair)
    for box in boxes:
        for part, n, low, high in zip(box, space.grid.shape, rooms[::2], rooms[1::2]):
            if part.start < max(low, 2 * CUBIC) or part.stop > n - max(high, 2 * CUBIC):
                return None
    steps = torch.from_numpy(forward.grid.matrix[:3, :3].copy()).float()
    back, spacing = torch.linalg.inv(steps.double()).float(), float(forward.grid.spacing.min())
    working = torch.from_numpy(space.grid.matrix[:3, :3].copy()).float()
    arrays = [forward.displacement.copy(), inverse.displacement.copy()]
    placed = []
    for array, u, box in zip(arrays, (pair.fixed_to_moving, pair.moving_to_fixed), boxes):
        sees = [slice(part.start - 2 * CUBIC, part.stop + 2 * CUBIC) for part in box]
        here, places = [], []
        for axis, part in enumerate(box):
            # Nodes of the lattice that see the box, and where they lie among the voxels that they see.
            first, last = ((end - shift[axis]) / finer[axis] for end in (part.start - CUBIC, part.stop - 1 + CUBIC))
            nodes = np.arange(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1)
            here.append(slice(int(nodes[0]), int(nodes[-1]) + 1))
            places.append(torch.from_numpy(shift[axis] + nodes * finer[axis] - sees[axis].start))
        at: Any = (slice(None), slice(None), *sees)
        vectors = _cubic(u[at].cpu(), places)[0].permute(1, 2, 3, 0) @ working.T
        array[tuple(here)] = _on_binary_steps(vectors, spacing).numpy()
        placed.append(tuple(here))
    # Cells that fold are smoothed in both directions at once, within a box that holds both.
    reach = 12
    low = np.maximum(np.min([[part.start for part in box] for box in placed], 0) - reach, 0)
    high = np.minimum(np.max([[part.stop for part in box] for box in placed], 0) + reach, forward.grid.shape)
    around = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
    voxels = torch.stack([torch.from_numpy(array[around]) @ back.T for array in arrays]).permute(0, 4, 1, 2, 3)
    if len(folded_cells(voxels, LEAST_CORNER)[0]):
        smooth = _unfolded(voxels.contiguous()).permute(0, 2, 3, 4, 1) @ steps.T
        for array, vectors in zip(arrays, smooth):
            array[around] = _on_binary_steps(vectors, spacing).numpy()
        placed = [around, around]
    transforms = [replace(one, displacement=array) for one, array in zip((forward, inverse), arrays)]
    return TransformPair(transforms[0], transforms[1], before.matrix), placed


def _ends(pair: FieldPair) -> list[float]:
    """The longest vector of either direction, in voxels, at each of the six faces: low and high of each axis."""
    lengths = square_sum(torch.cat([pair.fixed_to_moving, pair.moving_to_fixed])).amax((0, 1))
    return [float(lengths.select(axis, end).max()) ** 0.5 for axis in range(3) for end in (0, -1)]


def _inward(pair: FieldPair) -> list[int]:
    """How many voxels inside each of the six faces, low and high of each axis, the fading beyond them may look at."""
    fields = torch.cat([pair.fixed_to_moving, pair.moving_to_fixed])
    reach = []
    for axis in range(3):
        normal = fields[:, axis]
        reach += [normal.select(axis + 1, 0).max(), -normal.select(axis + 1, -1).min()]
    return [2 + math.ceil(max(0.0, float(most))) for most in reach]


def faded(pair: FieldPair) -> tuple[Tensor, list[int]]:
    """Both fields on a larger grid, unchanged inside and zero at its faces.

    Returns:
        (2, 3, D, H, W) voxels, fixed to moving first, and by how many voxels the grid grew at the low end of each axis.
    """
    fields = torch.cat([pair.fixed_to_moving, pair.moving_to_fixed])
    widths = [min(MOST_FADE, max(LEAST_FADE, math.ceil(FADE * end))) for end in _ends(pair)]
    fields = F.pad(fields, [*widths[4:], *widths[2:4], *widths[:2]], mode="replicate")
    weight = torch.ones_like(fields[:1, :1])
    for axis in range(3):
        low, high = (_smooth_step(width, fields) for width in widths[2 * axis : 2 * axis + 2])
        ramp = torch.ones(fields.shape[axis + 2]).to(fields)
        ramp[: len(low)], ramp[len(ramp) - len(high) :] = low, high.flip(0)
        weight = weight * ramp.view([-1 if k == axis else 1 for k in range(3)])
    return _unfolded(_consistent_beyond(fields * weight, weight)), widths[::2]


def refined(fields: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Fields (2, 3, D, H, W) in voxels of ``grid``, if these are few, on a finer grid over the same corners in its
    voxels; without folds there."""
    ratio = min(MOST_FINER, (ENOUGH_NODES / math.prod(grid.shape)) ** (1 / 3))
    if ratio <= 1:
        return fields, grid
    depth, height, width = (round((n - 1) * ratio) + 1 for n in grid.shape)
    finer = [(n - 1) / (m - 1) for n, m in zip(grid.shape, (depth, height, width))]
    places = [torch.arange(m, dtype=torch.float64) * step for m, step in zip((depth, height, width), finer)]
    matrix = grid.matrix.copy()
    matrix[:3, :3] *= finer
    fine = scale_channels(_cubic(fields, places), [1 / step for step in finer])
    return _unfolded(fine), Grid((depth, height, width), matrix)


#: Voxels on either side that a cubic spline sees.
CUBIC = 2


def _cubic(u: Tensor, places: Sequence[Tensor]) -> Tensor:
    """(N, C, D, H, W) at a lattice of positions (voxels, float64, per axis) by cubic splines through the values
    (Catmull and Rom 1974)."""
    bands = []
    for n, x in zip(u.shape[2:], places):
        x = torch.where((x - x.round()).abs() < 1e-6, x.round(), x)
        low = x.floor().clamp(0, n - 2)
        t = x - low
        weights = (
            (-t + 2 * t**2 - t**3) / 2,
            1 - 2.5 * t**2 + 1.5 * t**3,
            (t + 4 * t**2 - 3 * t**3) / 2,
            (t**3 - t**2) / 2,
        )
        band, rows = torch.zeros(len(x), n, dtype=torch.float64), torch.arange(len(x))
        for k, weight in enumerate(weights):
            band.index_put_((rows, (low.long() + k - 1).clamp(0, n - 1)), weight, accumulate=True)
        bands.append(band.to(u))
    out = bands[1] @ (u @ bands[2].T)
    return (bands[0] @ out.flatten(3)).unflatten(3, out.shape[3:])


def _consistent_beyond(fields: Tensor, weight: Tensor) -> Tensor:
    """The faded fields made inverse to each other again where they fade; on half as many voxels an axis, they are
    smooth there."""
    coarse = [max(2, n // 2) for n in fields.shape[2:]]
    where = resize(((weight > 0) & (weight < 1)).to(fields), coarse)
    before = resize_field(fields, coarse)
    after = before
    for _ in range(4):  # each yields half of what is left
        after = after - 0.5 * where * compose(after.flip(0), after)
    change = resize_field(after - before, fields.shape[2:])
    return fields + change * ((weight > 0) & (weight < 1))


def _unfolded(fields: Tensor, rounds: int = 8) -> Tensor:
    """Both fields smoothed around the cells that fold at one of their eight corners, and nowhere else.

    Half-way fields that do not fold can do so in single cells once they are composed and seen on a grid.
    """
    reach = torch.arange(-4, 5, device=fields.device)
    ball = torch.cartesian_prod(reach, reach, reach)
    away = ball.double().norm(dim=1).to(fields)
    ball, away = ball[away < 4.5], away[away < 4.5]
    share = (1.5 - away / 3).clamp(0, 1)
    size = torch.tensor(fields.shape[2:], device=fields.device)
    cells, _ = folded_cells(fields, LEAST_CORNER)
    for _ in range(rounds):
        if not len(cells):
            break
        weight = torch.zeros_like(fields[:, 0])
        for side in (0, 1):
            own = cells[cells[:, 0] == side, 1:] + 0.5
            # The same place in the other field lies where this one leads; smoothed on both sides, they stay inverse.
            other = own + sample_at(fields[side : side + 1], own[None].to(fields))[0]
            for k, centres in ((side, own), (1 - side, other)):
                at = (centres.round().long()[:, None] + ball).clamp(torch.ones_like(size), size - 2)
                flat = ((at[..., 0] * size[1] + at[..., 1]) * size[2] + at[..., 2]).flatten()
                weight[k].view(-1).scatter_reduce_(0, flat, share.repeat(len(centres)), "amax")
        fields = _smoothed_at(fields, weight)
        where = weight.nonzero()
        offsets = torch.cat(
            [torch.zeros_like(ball[:8, :1]), torch.cartesian_prod(*[torch.arange(-1, 1, device=ball.device)] * 3)], 1
        )
        near = torch.unique((where[:, None] + offsets).reshape(-1, 4), dim=0)
        cells = near[corner_determinants_at(fields, near) <= LEAST_CORNER]
    return fields


def _smoothed_at(fields: Tensor, weight: Tensor) -> Tensor:
    """(2, 3, D, H, W) blended with its Gaussian mean (1 voxel) where ``weight`` (2, D, H, W) > 0, both
    directions kept inverse."""
    reach = torch.arange(-2, 3, device=fields.device)
    kernel = torch.cartesian_prod(reach, reach, reach)
    mass = torch.exp(-0.5 * kernel.square().sum(1).to(fields))
    mass = mass / mass.sum()
    size = torch.tensor(fields.shape[2:], device=fields.device)
    places = [side.nonzero() for side in weight]
    shares = [side[tuple(place.T)][:, None] for side, place in zip(weight, places, strict=True)]
    vectors = fields.permute(0, 2, 3, 4, 1).contiguous()
    smooth = []
    for k, place in enumerate(places):
        means = torch.zeros(len(place), 3).to(fields)
        for offset, part in zip(kernel, mass, strict=True):
            means += part * vectors[k][tuple((place + offset).clamp(torch.zeros_like(size), size - 1).T)]
        smooth.append(means)
    for k, place in enumerate(places):
        vectors[k][tuple(place.T)] += shares[k] * (smooth[k] - vectors[k][tuple(place.T)])
    for _ in range(4):  # each yields half of what keeps them from being inverse to each other
        planes = vectors.permute(0, 4, 1, 2, 3)
        left = []
        for k, place in enumerate(places):
            here = vectors[k][tuple(place.T)]
            left.append(here + sample_at(planes[1 - k : 2 - k], (place + here)[None])[0])
        for k, place in enumerate(places):
            vectors[k][tuple(place.T)] -= 0.5 * shares[k] * left[k]
    return vectors.permute(0, 4, 1, 2, 3).contiguous()


def _smooth_step(width: int, like: Tensor) -> Tensor:
    t = torch.arange(width).to(like) / width
    return t * t * (3 - 2 * t)


def _on_binary_steps(vectors: Tensor, spacing: float) -> Tensor:
    """Vectors in mm rounded to whole multiples of about 1/8000 voxel, so that their last bits, which
    mean nothing, pack."""
    step = 2.0 ** math.floor(math.log2(spacing / 4096))
    return vectors.div(step).round_().mul_(step)


def _without_affine(pair: FieldPair, space: WorkingPair) -> tuple[FieldPair, WorkingPair]:
    """The same map with its affine part in the half-way matrices, on a grid over the content of both scans there."""
    found = split_midway(*fit_affine(pair, space), "affine")
    seen = []
    for image, old, new in (
        (space.fixed, space.mid_to_fixed, found.mid_to_fixed),
        (space.moving, space.mid_to_moving, found.mid_to_moving),
    ):
        where = (image[0, 0] > 0.05).nonzero().cpu().numpy()
        seen.append(transform_points(np.linalg.inv(new) @ old @ space.grid.matrix, where))
    index = transform_points(space.grid.inverse, np.concatenate(seen))
    margin = 4
    grid = space.grid.cropped(index.min(0) - margin, index.max(0) + margin + 1)
    target = replace(space, grid=grid, mid_to_fixed=found.mid_to_fixed, mid_to_moving=found.mid_to_moving)
    return to_working_grid(pair, space, target), target


def map_grid(scan: Grid, spacing: float) -> Grid:
    """The axes and field of view of a scan, as fine as the scan or as ``spacing`` mm, whichever is coarser."""
    return scan if (scan.spacing > 0.8 * spacing).all() else scan.resampled(np.maximum(scan.spacing, spacing))


def dense_grid(scan: Grid, spacing: float) -> Grid:
    """Where a dense transform of a scan sits: its axes and field of view, larger on all sides.

    Args:
        spacing: of the lattice it is made from, mm; the grid is as fine as the scan or as 0.6 of this, whichever is
            coarser: finer only repeats the same information (measured on brains: inverse consistency 0.061 mm at 1,
            0.045 at 2/3, 0.041 at 1/2 of the working voxel).
    """
    spacing = 0.6 * spacing
    grown = scan.padded(min(MARGIN_MM, MARGIN_SHARE * float((np.asarray(scan.shape) * scan.spacing).max())))
    return grown if (scan.spacing > 0.8 * spacing).all() else grown.resampled(np.maximum(scan.spacing, spacing))
