"""Training pairs made from label maps: any contrast, any pose, and the truth beside them.

Torch only, on the device of the label map. The principle is SynthSeg's (Billot 2023) and SynthMorph's
(Hoffmann 2022): a network that only ever sees random contrasts must look at shapes. Written from the papers.

One label map L becomes two scans. Each is L seen through its own pose A (affine) and its own smooth warp exp(v)::

    fixed(x) = L(A_f exp(v_f) x)        moving(x) = L(A_m exp(v_m) x)

so the true map is known in closed form, both ways: ``fixed_to_moving = exp(-v_m) A_m^-1 A_f exp(v_f)``. Nothing is kept
between pairs: the same seed gives the same pair, which is what makes training resumable and distributable.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import exponentiate, gaussian, identity, resize, resize_field, warp
from .appearance import random_contrast, render

#: FreeSurfer's number of the fluid around the brain, and the first number of what lies outside of that.
_CSF, _OUTSIDE = 24, 500
#: Largest change of a velocity from voxel to voxel; its flow stretches by at most e^0.35 along an axis, and
#: stays resolved.
_STEEPEST = 0.35


@dataclass(frozen=True)
class Synthesis:
    """How far synthetic pairs vary.

    Attributes:
        shape: (D, H, W) of the pairs.
        spacing: mm of their isotropic voxels.
        rotation: largest relative rotation, degrees, about any axis.
        shift: largest relative shift, mm.
        scale: largest relative change of size (0.2 = 20 %), the same along all axes up to a third of it.
        warp: largest root mean square displacement of a scan's own warp, mm.
        control: shortest and longest distance over which warps vary, mm.
        one_contrast: share of pairs whose two scans have the same contrast.
        t1: share of scans that look T1-weighted when the labels are FreeSurfer's; the others have random contrasts.
        strip: share of pairs without what lies outside the brain (FreeSurfer numbers from 500 on).
        noise: largest standard deviation of noise, of the scan's range.
        bias: largest logarithm of the bias field.
        blur: largest Gaussian blur, voxels.
        thick: largest slice thickness, voxels.
        cut: share of scans whose field of view cuts the content.
    """

    shape: tuple[int, int, int] = (64, 64, 64)
    spacing: float = 2.0
    rotation: float = 90.0
    shift: float = 50.0
    scale: float = 0.2
    warp: float = 6.0
    control: tuple[float, float] = (16.0, 64.0)
    one_contrast: float = 0.5
    t1: float = 0.4
    strip: float = 0.5
    noise: float = 0.08
    bias: float = 0.4
    blur: float = 1.2
    thick: float = 3.0
    cut: float = 0.15

    @classmethod
    def posed(cls, shape: tuple[int, int, int], spacing: float, poses: Any, **more: Any) -> Synthesis:
        """With the ``rotation``, ``shift`` and ``scale`` of the options ``poses``."""
        return cls(shape, spacing, poses.rotation, poses.shift, poses.scale, **more)

    def at(self, progress: float) -> Synthesis:
        """The curriculum: poses and warps of ``progress`` (0..1) times the full range, everything else as it is."""
        p = min(max(progress, 0.0), 1.0)
        return Synthesis(
            **{
                **self.__dict__,
                "rotation": p * self.rotation,
                "shift": p * self.shift,
                "scale": p * self.scale,
                "warp": (0.5 + 0.5 * p) * self.warp,
            }
        )


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A label map ready for synthesis.

    Attributes:
        index: (D, H, W) uint8 or int16: position in ``values``; 0 is background.
        values: the labels, ``values[0] == 0``.
        spacing: mm of its isotropic voxels.
        name: for messages.
    """

    index: Tensor
    values: tuple[int, ...]
    spacing: float
    name: str = "shapes"

    def centre(self, kept: Tensor) -> list[float]:
        """(3,) voxels: middle of the labels that ``kept`` (bool per value) marks."""
        step = max(1, round(min(self.index.shape) / 48))
        where = kept[self.index[::step, ::step, ::step].long()].nonzero()
        return (where.float().mean(0) * step).tolist() if len(where) else [(n - 1) / 2 for n in self.index.shape]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two scans and what is true of them; all tensors (1, C, D, H, W) on one grid.

    Attributes:
        moving, fixed: (1, 1, D, H, W) float32 in [0, 1], as the pipeline presents scans to a network.
        moving_labels, fixed_labels: (1, 1, D, H, W) integer positions in ``values``; ``None`` = unknown.
        values: the labels.
        fixed_to_moving, moving_to_fixed: (1, 3, D, H, W) voxels, the true pull-back maps; ``None`` = unknown.
        one_contrast: the same tissue has the same brightness in both.
        points: (fixed, moving) landmarks, (1, P, 3) voxels; ``None`` = none.
        name: for messages.
    """

    moving: Tensor
    fixed: Tensor
    moving_labels: Tensor | None = None
    fixed_labels: Tensor | None = None
    values: tuple[int, ...] = ()
    fixed_to_moving: Tensor | None = None
    moving_to_fixed: Tensor | None = None
    one_contrast: bool = True
    points: tuple[Tensor, Tensor] | None = None
    name: str = ""


class Draw:
    """All random choices of one pair: numbers from Python's generator, fields from torch's on the device."""

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._numbers = random.Random(seed)
        self._fields = torch.Generator(self.device).manual_seed(seed % 2**63)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return self._numbers.uniform(low, high)

    def chance(self, share: float) -> bool:
        return self._numbers.random() < share

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return self._numbers.randint(low, high)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._fields, device=self.device)

    def axis(self) -> list[float]:
        """A unit vector, all directions alike."""
        v = [self._numbers.gauss(0, 1) for _ in range(3)]
        length = math.sqrt(sum(c * c for c in v)) or 1.0
        return [c / length for c in v]


# ---------------------------------------------------------------------------------------------- poses and warps


def random_poses(synthesis: Synthesis, draw: Draw) -> tuple[Tensor, Tensor]:
    """(4, 4) float64 of fixed and moving: mm about the middle of the content -> mm about the middle of the scan.

    The relative pose is split into halves that point opposite ways, because the pipeline's grid lies half-way too; a
    pose that both scans share comes on top.
    """
    angle, axis = math.radians(draw.uniform(0, synthesis.rotation)), draw.axis()
    push, length = draw.axis(), draw.uniform(0, synthesis.shift)
    size = [draw.uniform(-1, 1) * synthesis.scale * share for share in (1.0, 1 / 3, 1 / 3, 1 / 3)]
    common = _turn(draw.axis(), math.radians(draw.uniform(0, 0.25 * synthesis.rotation)))
    poses = []
    for side in (0.5, -0.5):
        matrix = torch.eye(4, dtype=torch.float64)
        stretch = torch.diag(torch.tensor([math.exp(side * (size[0] + s)) for s in size[1:]], dtype=torch.float64))
        matrix[:3, :3] = common @ _turn(axis, side * angle) @ stretch
        matrix[:3, 3] = matrix[:3, :3] @ torch.tensor([side * length * c for c in push], dtype=torch.float64)
        poses.append(matrix)
    return poses[0], poses[1]


def _turn(axis: Sequence[float], angle: float) -> Tensor:
    """(3, 3) rotation about a unit vector (Rodrigues)."""
    x, y, z = axis
    k = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * k + (1 - math.cos(angle)) * (k @ k)


def random_velocity(shape: Sequence[int], control: float, amplitude: float, draw: Draw) -> Tensor:
    """(1, 3, D, H, W) voxels: smooth, zero at the border so that its flow stays inside.

    Args:
        control: distance over which it varies, voxels.
        amplitude: root mean square length, voxels; less where its slope would pass ``_STEEPEST``.
    """
    nodes = [max(1, round(n / control)) for n in shape]
    v = F.pad(draw.normal(1, 3, *nodes), (1,) * 6)
    v = gaussian(resize(v, shape), [n / (m + 1) / 3 for n, m in zip(shape, nodes)])
    for axis, n in enumerate(shape):
        window = torch.sin(torch.linspace(0, math.pi, n, device=v.device))
        v = v * window.view([-1 if k == axis + 2 else 1 for k in range(5)])
    length = v.square().sum(1).mean().sqrt().clamp_min(1e-6)
    slope = max(v.diff(dim=axis).abs().amax() for axis in (2, 3, 4)).clamp_min(1e-6)
    return v * torch.minimum(amplitude / length, _STEEPEST / slope)


def random_warp(synthesis: Synthesis, draw: Draw) -> tuple[Tensor, Tensor]:
    """A smooth map and its inverse, (1, 3, D, H, W) voxels; integrated at half resolution, where it is still smooth.

    Warps vary over ten voxels at least, so that the two stay inverse to a fraction of a voxel.
    """
    shape = synthesis.shape
    half = [(n + 1) // 2 for n in shape]
    low, high = (c / synthesis.spacing / 2 for c in synthesis.control)
    v = torch.zeros(1, 3, *half, device=draw.device)
    for _ in range(2):
        control = max(5.0, math.exp(draw.uniform(math.log(low), math.log(max(high, low)))))
        v = v + random_velocity(
            half, control, draw.uniform(0, synthesis.warp) / synthesis.spacing / 2 / math.sqrt(2), draw
        )
    return tuple(resize_field(exponentiate(sign * v, 6), shape) for sign in (1, -1))


def _affine(matrix: Tensor, points: Tensor) -> Tensor:
    """(4, 4) on (1, 3, D, H, W) voxel positions."""
    m = matrix.to(points)
    return torch.einsum("ij,njdhw->nidhw", m[:3, :3], points) + m[:3, 3].view(1, 3, 1, 1, 1)


def _centred(matrix: Tensor, scale: tuple[float, float], middle: Sequence[float], target: Sequence[float]) -> Tensor:
    """(4, 4) voxels: a map ``matrix`` in mm about the voxel ``middle`` -> about the voxel ``target``
    of another lattice.

    ``scale``: voxels of the target per voxel of the source, and per mm.
    """
    out = torch.eye(4, dtype=torch.float64)
    middle, target = (torch.tensor(list(p), dtype=torch.float64) for p in (middle, target))
    out[:3, :3] = matrix[:3, :3] * scale[0]
    out[:3, 3] = matrix[:3, 3] * scale[1] + target - out[:3, :3] @ middle
    return out


# ---------------------------------------------------------------------------------------------- labels


def label_map(array: Tensor, spacing: float, name: str = "") -> LabelMap:
    """A (D, H, W) integer tensor as a :class:`LabelMap`; label 0 is background even when it does not occur."""
    values = sorted({0, *torch.unique(array).tolist()})
    kind = torch.uint8 if len(values) <= 256 else torch.int16
    table = torch.tensor(values, device=array.device)
    return LabelMap(
        torch.searchsorted(table, array.long().contiguous()).to(kind), tuple(int(v) for v in values), spacing, name
    )


def random_shapes(synthesis: Synthesis, draw: Draw, classes: int = 12) -> LabelMap:
    """Blobs without anatomy inside a random body: the highest of several smooth random fields wins (SynthMorph)."""
    shape = synthesis.shape
    fields = []
    for _ in range(2):
        nodes = [max(2, round(n / (n * draw.uniform(0.1, 0.25)))) for n in shape]
        fields.append(gaussian(resize(draw.normal(1, classes, *nodes), shape), 1.0))
    index = (fields[0] + 0.6 * fields[1]).argmax(1)[0] + 1
    where = [2 * c / max(n - 1, 1) - 1 for c, n in zip(identity(shape, draw.device)[0], shape)]
    radius = sum((c / draw.uniform(0.55, 0.8)) ** 2 for c in where).sqrt()
    body = radius + 0.15 * resize(draw.normal(1, 1, 4, 4, 4), shape)[0, 0] < 1
    return LabelMap((index * body).to(torch.uint8), tuple(range(classes + 1)), synthesis.spacing)


def look_up(labels: LabelMap, positions: Tensor) -> Tensor:
    """(1, 1, D, H, W) label positions at (1, 3, D, H, W) voxel positions of the map: nearest neighbour, 0 outside."""
    nearest = positions.round().long()
    flat = torch.zeros_like(nearest[:, 0])
    inside = torch.ones_like(flat, dtype=torch.bool)
    for axis, n in enumerate(labels.index.shape):
        at = nearest[:, axis]
        inside &= (at >= 0) & (at < n)
        flat = flat * n + at.clamp(0, n - 1)
    return (labels.index.reshape(-1)[flat] * inside.to(labels.index.dtype))[:, None]


# ---------------------------------------------------------------------------------------------- contrast


# ---------------------------------------------------------------------------------------------- pairs


def make_pair(
    labels: LabelMap | None,
    synthesis: Synthesis,
    seed: int,
    other: LabelMap | None = None,
    device: torch.device | str = "cpu",
) -> Pair:
    """One synthetic pair.

    Args:
        labels: the anatomy; ``None`` = random shapes.
        synthesis: how far pairs vary.
        seed: of everything; the same seed on the same device gives the same pair.
        other: the moving scan's anatomy, for a pair of two people: its labels are known but its true map is not.
        device: for shapes; otherwise the label map's device.
    """
    draw = Draw(seed, labels.index.device if labels is not None else device)
    labels = random_shapes(synthesis, draw) if labels is None else labels
    pose_f, pose_m = random_poses(synthesis, draw)
    (u_f, back_f), (u_m, back_m) = random_warp(synthesis, draw), random_warp(synthesis, draw)
    here = identity(synthesis.shape, draw.device)
    strip, fluid = draw.chance(synthesis.strip), draw.chance(0.5)
    sides = []
    for anatomy, pose, u in ((labels, pose_f, u_f), (other or labels, pose_m, u_m)):
        kept = torch.tensor([not strip or not (v >= _OUTSIDE or (fluid and v == _CSF)) for v in anatomy.values])
        content = kept & torch.tensor([v > 0 for v in anatomy.values])
        inverse = torch.linalg.inv(pose)
        to_map = _into(anatomy, inverse, synthesis, anatomy.centre(content.to(draw.device)))
        index = look_up(anatomy, _affine(to_map, here + u))
        sides.append(index * kept.to(draw.device)[index.long()].to(index.dtype))
    values, (fixed, moving) = _shared_values(sides, labels, other)
    same = draw.chance(synthesis.one_contrast)
    first = random_contrast(values, synthesis, draw)
    second = first if same else random_contrast(values, synthesis, draw)
    images = [render(side, contrast, synthesis, draw) for side, contrast in ((fixed, first), (moving, second))]
    known = (None, None)
    if other is None:
        relative = pose_m @ torch.linalg.inv(pose_f)
        known = tuple(
            _through(here, start, voxel_pose(matrix, synthesis), end)
            for start, matrix, end in ((u_f, relative, back_m), (u_m, torch.linalg.inv(relative), back_f))
        )
    return Pair(images[1], images[0], moving, fixed, values, *known, one_contrast=same, name=labels.name)


def voxel_pose(pose: Tensor, synthesis: Synthesis) -> Tensor:
    """(4, 4) voxels of the pairs' grid, about its middle, of a pose in mm."""
    middle = [(n - 1) / 2 for n in synthesis.shape]
    return _centred(pose, (1.0, 1 / synthesis.spacing), middle, middle)


def _into(anatomy: LabelMap, pose: Tensor, synthesis: Synthesis, centre: Sequence[float]) -> Tensor:
    """(4, 4): voxel of a scan -> voxel of the anatomy it shows."""
    middle = [(n - 1) / 2 for n in synthesis.shape]
    return _centred(pose, (synthesis.spacing / anatomy.spacing, 1 / anatomy.spacing), middle, centre)


def _through(here: Tensor, start: Tensor, matrix: Tensor, end: Tensor) -> Tensor:
    """Displacement of: along ``start``, through ``matrix`` (4, 4 voxels), along ``end``; (1, 3, D, H, W)."""
    moved = _affine(matrix, here + start) - here
    return moved + warp(end, moved)


def _shared_values(
    sides: list[Tensor], labels: LabelMap, other: LabelMap | None
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Both label images as positions in one table."""
    if other is None or other.values == labels.values:
        return labels.values, sides
    values = tuple(sorted({*labels.values, *other.values}))
    out = []
    for side, anatomy in zip(sides, (labels, other)):
        table = torch.tensor([values.index(v) for v in anatomy.values], dtype=torch.int16, device=side.device)
        out.append(table[side.long()])
    return values, out
