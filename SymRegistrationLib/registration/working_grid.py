"""From two scans in their own spaces to two tensors on one working grid, and what is needed to come back.

The working grid lies **half-way** between the scans: the initial alignment is split into two equal parts, one
for each scan, so that exchanging fixed and moving exchanges everything downstream. Both scans are resampled once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import FieldPair, gaussian, sample
from ..geometry.grid import Grid, canonical_axes, index_map, transform_points
from ..geometry.lattice import affine_displacement, affine_grid
from ..geometry.volumes import Volume, foreground, robust_range
from ..job import InputError

#: Content may be cut by the field of view; a face of the volume with more than this share of foreground counts as cut.
CUT_FACE = 0.05
#: Contents of which one is longer by more than this are not of one body: a man is 20 times as long as a prostate.
NO_PAIR = 50


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan made ready for computing: intensities in [0, 1], the place of its content, whether its border cuts it.

    Attributes:
        image: (1, 1, D, H, W) float32, robust range mapped to [0, 1], clipped.
        grid: of ``image``.
        mask: (1, 1, D, H, W) float32 in {0, 1}: where the similarity may look; ``None`` = everywhere.
        inside: (n, 3) LPS mm sample of the content (foreground within the mask).
        cut: True when content touches the border of the field of view: beyond it lies the unknown, not air.
    """

    image: Tensor
    grid: Grid
    mask: Tensor | None
    inside: np.ndarray
    cut: bool

    @property
    def centroid(self) -> np.ndarray:
        """(3,) LPS mm, middle of the content."""
        return self.inside.mean(0)


def prepare(volume: Volume, mask: np.ndarray | None = None, device: torch.device | str = "cpu") -> Scan:
    """Normalise intensities and find the content.

    Args:
        volume: the scan.
        mask: (D, H, W) bool on its grid, restricts the similarity.

    Raises:
        InputError: the mask leaves nothing.
    """
    content = foreground(volume.array)
    low, high = robust_range(volume.array, content)
    low = min(low, robust_range(volume.array)[0])
    if mask is not None:
        content = content & mask
        if not content.any():
            content = mask
    where = _sample_indices(content)
    if len(where) < 8:
        raise InputError(f"'{volume.name}' has almost no content to align.", "Check the image and its mask.")
    cut, array, grid = _is_cut(content), volume.array, volume.grid
    if mask is None and not cut:
        # Air around the content is what every lookup beyond the image gives: a scan in a large box costs no more than
        # its content.
        array, grid = _without_air(array, grid, low)
    image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)[None, None]
    image = ((image - low) / (high - low)).clamp_(0, 1)
    weights = None if mask is None else torch.from_numpy(mask.astype(np.float32)).to(device)[None, None]
    return Scan(image, grid, weights, volume.grid.points(where), cut)


def _without_air(array: np.ndarray, grid: Grid, low: float, rim: int = 6) -> tuple[np.ndarray, Grid]:
    """The box outside of which no voxel is above ``low``, and ``rim`` voxels more on every side, with its grid."""
    bright = array > low
    ends = []
    for axis in range(3):
        where = np.flatnonzero(bright.any(axis=tuple(k for k in range(3) if k != axis)))
        if not len(where):
            return array, grid
        ends.append((max(0, int(where[0]) - rim), min(array.shape[axis], int(where[-1]) + 1 + rim)))
    return array[tuple(slice(*end) for end in ends)], grid.cropped([a for a, _ in ends], [b for _, b in ends])


def _sample_indices(content: np.ndarray, target: int = 20_000) -> np.ndarray:
    """(n, 3) indices of about ``target`` foreground voxels, evenly thinned."""
    flat = np.flatnonzero(content)
    flat = flat[:: max(1, len(flat) // target)]
    return np.stack(np.unravel_index(flat, content.shape), axis=1).astype(float)


def _is_cut(content: np.ndarray) -> bool:
    """Whether any face of the volume is crossed by much content."""
    faces = [content.take(end, axis=axis) for axis in range(3) for end in (0, -1)]
    return any(face.mean() > CUT_FACE for face in faces)


def shrink(scan: Scan, spacing: float) -> Scan:
    """The scan averaged down to about ``spacing`` mm (never up), same field of view."""
    grid = scan.grid.resampled(np.maximum(scan.grid.spacing, spacing))
    if grid.shape == scan.grid.shape:
        return scan
    image, mask = F.adaptive_avg_pool3d(scan.image, grid.shape), None
    if scan.mask is not None:  # a voxel that the mask touches is the mean of what lies inside
        mask = F.adaptive_avg_pool3d(scan.mask, grid.shape)
        inside = F.adaptive_avg_pool3d(scan.image * scan.mask, grid.shape) / mask.clamp_min(1e-3)
        image = torch.where(mask > 0, inside, image)
    return Scan(image, grid, mask, scan.inside, scan.cut)


@dataclass(frozen=True, eq=False)
class WorkingPair:
    """Both scans on the working grid, half-way between them.

    Attributes:
        fixed, moving: (1, 1, D, H, W) float32 in [0, 1].
        weight: (2, 1, D, H, W) where each (fixed, moving) may be looked at, or ``None`` = everywhere.
        grid: the working grid in mid-space mm.
        mid_to_fixed, mid_to_moving: (4, 4) mm, mid-space point -> point of the scan.
        contrasts: further contrasts of both sides, pair by pair; only optimisers look at them.
        shares: how much each contrast counts, the first pair first; () = all the same.
        regions: (2, R, D, H, W) float32, 0 to 1, fixed first: how much of each voxel belongs to each region of its scan
            along whose surface organs slide; ``None`` = nothing slides.
    """

    fixed: Tensor
    moving: Tensor
    weight: Tensor | None
    grid: Grid
    mid_to_fixed: np.ndarray
    mid_to_moving: np.ndarray
    contrasts: tuple[WorkingPair, ...] = ()
    shares: tuple[float, ...] = ()
    regions: Tensor | None = None

    def channels(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fixed and moving images of all contrasts, (1, C, D, H, W), and where they may be looked at, (2, C, D, H, W)
        or, where all contrasts may everywhere, ``None``."""
        if not self.contrasts:
            return self.fixed, self.moving, self.weight
        pairs = (self, *self.contrasts)
        weight = None
        if any(pair.weight is not None for pair in pairs):
            whole = torch.ones(2, 1, *self.fixed.shape[2:], device=self.fixed.device)
            weight = torch.cat([whole if pair.weight is None else pair.weight for pair in pairs], 1)
        return torch.cat([pair.fixed for pair in pairs], 1), torch.cat([pair.moving for pair in pairs], 1), weight

    def with_contrasts(self, scans: Sequence[tuple[Scan, Scan]], shares: tuple[float, ...] = ()) -> WorkingPair:
        """The same with further contrasts, whose scans lie in space as the first ones do.

        Raises:
            InputError: a contrast shows nothing on the working grid.
        """
        pairs = []
        for number, (fixed, moving) in enumerate(scans, 2):
            for side, scan, to in (("fixed", fixed, self.mid_to_fixed), ("moving", moving, self.mid_to_moving)):
                image, weight = resample(scan, self.grid, to)
                seen = image if weight is None else image[weight > 0.5]
                if not seen.numel() or float(seen.max() - seen.min()) <= 0:
                    raise InputError(
                        f"contrast {number} of the {side} side shows nothing where the first one does.",
                        "All contrasts of a side must lie in space as its scan does; check their headers.",
                    )
            pairs.append(pair_on(self.grid, fixed, moving, self.mid_to_fixed, self.mid_to_moving))
        return replace(self, contrasts=tuple(pairs), shares=shares)


@dataclass(frozen=True)
class Layout:
    """How a working grid is laid over two scans.

    Attributes:
        spacing: voxel size in mm.
        multiple: every axis of the grid is a multiple of this.
        whole: the grid covers all that either scan shows; else what both show.
        margin: around that, as a share of its longest side; two voxels more in any case.
    """

    spacing: float
    multiple: int = 1
    whole: bool = False
    margin: float = 0.06


def working_pair(
    fixed: Scan, moving: Scan, mid_to_fixed: np.ndarray, mid_to_moving: np.ndarray, layout: Layout
) -> WorkingPair:
    """Resample both scans onto a common isotropic grid half-way between them.

    Raises:
        InputError: after alignment the two contents do not overlap, or the masks leave nothing there.
    """
    grid = working_grid(fixed, moving, mid_to_fixed, mid_to_moving, layout)
    return pair_on(grid, fixed, moving, mid_to_fixed, mid_to_moving)


def pair_on(grid: Grid, fixed: Scan, moving: Scan, mid_to_fixed: np.ndarray, mid_to_moving: np.ndarray) -> WorkingPair:
    """Resample both scans onto a given grid between them. Raises InputError when the masks leave nothing there."""
    images, weights = zip(*(resample(scan, grid, to) for scan, to in ((fixed, mid_to_fixed), (moving, mid_to_moving))))
    weight = None
    if any(w is not None for w in weights):
        weight = torch.cat([torch.ones_like(images[0]) if w is None else w for w in weights])
        if float(weight.prod(0).sum()) < 8:
            raise InputError("the masks leave nothing that both scans show.", "Enlarge the masks, or check --initial.")
    return WorkingPair(images[0], images[1], weight, grid, mid_to_fixed, mid_to_moving)


def working_grid(
    fixed: Scan, moving: Scan, mid_to_fixed: np.ndarray, mid_to_moving: np.ndarray, layout: Layout
) -> Grid:
    """Isotropic grid over what both scans show, with a margin; its axes lie half-way between theirs.

    A grid of the whole lies along the patient's axes: two headers far apart have no half-way that is near to both, and
    networks know anatomy upright. Raises InputError when the two contents do not overlap.
    """
    spacing, multiple, whole = layout.spacing, layout.multiple, layout.whole
    mapped, axes = [], np.zeros((3, 3))
    for scan, to in ((fixed, mid_to_fixed), (moving, mid_to_moving)):
        back = np.linalg.inv(to)
        mapped.append(transform_points(back, scan.inside))
        axes = axes + canonical_axes(nearest_rotation(back[:3, :3]) @ scan.grid.axes)
    axes = nearest_rotation(axes) if not whole and np.linalg.svd(axes)[1].min() > 0.3 else np.eye(3)[:, ::-1]
    boxes = [np.percentile(points @ axes, [0.5, 99.5], axis=0) for points in mapped]
    inner, outer = (np.minimum, np.maximum) if whole else (np.maximum, np.minimum)
    low, high = inner(boxes[0][0], boxes[1][0]), outer(boxes[0][1], boxes[1][1])
    across = [float(np.linalg.norm(np.ptp(scan.inside, axis=0))) for scan in (fixed, moving)]
    if max(across) > NO_PAIR * min(across):
        raise InputError(
            f"the fixed scan is {across[0]:.3g} mm across and the moving one {across[1]:.3g} mm.",
            "One of the two headers has a wrong voxel size, most often metres or micrometres for mm.",
        )
    if (high <= low).any():
        raise InputError(
            "the two scans do not overlap in space after the initial alignment.",
            "Use --initial centre, rigid or affine, or check that they show the same part of the body.",
        )
    margin = layout.margin * (high - low).max() + 2 * spacing
    size = (high - low) + 2 * margin
    shape = [max(4, multiple * math.ceil((s / spacing + 1) / multiple)) for s in size]
    return Grid.centred(shape, spacing, axes @ ((low + high) / 2), axes)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal part of a matrix (polar decomposition)."""
    u, _, vt = np.linalg.svd(matrix)
    return u @ vt


def resample(scan: Scan, grid: Grid, to_scan: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """One scan on ``grid``: (1, 1, D, H, W) image, and its weight or ``None`` when all of it counts.

    Smooths first when the grid is coarser, so that nothing aliases. Beyond a border that cuts content the image is
    continued and weighs nothing; otherwise beyond the border is background.
    """
    ratio = grid.spacing[0] / scan.grid.spacing
    sigma = [0.5 * math.sqrt(r * r - 1) if r > 1.2 else 0.0 for r in ratio]
    image = gaussian(scan.image, sigma) if any(sigma) else scan.image
    coordinates = affine_grid(grid.shape, index_map(grid, to_scan, scan.grid), image)
    out = sample(image, coordinates, padding="border" if scan.cut else "zeros")
    weight = None
    if scan.mask is not None:
        weight = sample(scan.mask, coordinates, padding="zeros")
    elif scan.cut:
        weight = ((coordinates.abs() <= 1.0 + 1e-4).all(-1, keepdim=True)).permute(0, 4, 1, 2, 3).to(image)
        if bool(weight.all()):
            weight = None
    return out, weight


def to_working_grid(pair: FieldPair, source: WorkingPair, target: WorkingPair) -> FieldPair:
    """A field pair carried from one working grid to another of the same scans, whatever their mid-spaces;
    voxels of ``target``.

    What is carried is what the target's pose leaves over. Beyond the source's grid only that goes on as it ends at the
    border; a whole turn that went on so would tear space there.
    """
    sides = (source.mid_to_fixed, target.mid_to_fixed), (source.mid_to_moving, target.mid_to_moving)
    to_fixed, to_moving = (np.linalg.inv(old) @ new for old, new in sides)

    def carried(u: Tensor, enter: np.ndarray, leave: np.ndarray) -> Tensor:
        at = affine_grid(target.grid.shape, source.grid.inverse @ enter @ target.grid.matrix, u)
        left = torch.from_numpy(source.grid.matrix[:3, :3].copy()).to(u) @ u[0].reshape(3, -1)
        left -= affine_displacement(leave @ np.linalg.inv(enter), source.grid).to(u).reshape(3, -1)
        moved = sample(left.view(u.shape), at)[0].reshape(3, -1)
        back = torch.from_numpy(target.grid.inverse[:3, :3] @ np.linalg.inv(leave)[:3, :3]).to(u)
        return (back @ moved).view(1, 3, *target.grid.shape)

    return FieldPair(
        carried(pair.fixed_to_moving, to_fixed, to_moving),
        carried(pair.moving_to_fixed, to_moving, to_fixed),
        pair.inverse_method,
        pair.residual,
    )


def fit_affine(pair: FieldPair, space: WorkingPair) -> tuple[np.ndarray, np.ndarray]:
    """The affine map that explains a field pair best where either scan shows content.

    Points p of the fixed side and q of the moving side are fitted by q - p = L (p + q) / 2 + t, so that exchanging the
    scans inverts the map exactly.

    Returns:
        (4, 4) LPS mm, fixed point -> moving point, and the (3,) fixed point in the middle.
    """
    sides = []
    for image, u, sign in ((space.fixed, pair.fixed_to_moving, 1), (space.moving, pair.moving_to_fixed, -1)):
        where = (image[0, 0, ::2, ::2, ::2] > 0.05).nonzero()
        here, vectors = 2 * where.double(), u[0, :, ::2, ::2, ::2].permute(1, 2, 3, 0)[tuple(where.T)].double()
        sides.append((here.cpu().numpy() + vectors.cpu().numpy() / 2, sign * vectors.cpu().numpy()))
    middle, apart = (np.concatenate(x) @ space.grid.matrix[:3, :3].T for x in zip(*sides))
    middle += space.grid.matrix[:3, 3]
    centre, push = middle.mean(0), apart.mean(0)
    half = np.zeros((4, 4))
    half[:3, :3] = np.linalg.lstsq(middle - centre, apart - push, rcond=None)[0].T / 2
    half[:3, 3] = push / 2 - half[:3, :3] @ centre
    matrix = (np.eye(4) + half) @ np.linalg.inv(np.eye(4) - half)
    return space.mid_to_moving @ matrix @ np.linalg.inv(space.mid_to_fixed), transform_points(
        space.mid_to_fixed, centre - push / 2
    )
