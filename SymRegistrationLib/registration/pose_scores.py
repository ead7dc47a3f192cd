"""Two scans at one spacing, and how well they agree at given poses.

One contrast is scored by plain correlation, two by normalised mutual information (Studholme et al., Pattern Recognition
32:71-86, 1999) or by where edges run in the same direction, whichever side is the brighter one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..fields import gradient, sample
from ..losses import joint_histograms
from .working_grid import Scan, shrink

#: Grey levels of a joint histogram, per scan.
BINS = 24
#: Overlaps smaller than this share of the smaller scan lose score in proportion.
LEAST_OVERLAP = 0.6
#: Edges weaker than this share of the mean edge are noise.
EDGE_NOISE = 1.0


class Level:
    """Both scans at one spacing, ready to be sampled at mid-space points.

    Args:
        fixed, moving: prepared.
        spacing, radius: mm, of the scans and of the points, and how far these reach.
        thinned: look at every second point only, those of a face-centred lattice.
    """

    def __init__(self, fixed: Scan, moving: Scan, spacing: float, radius: float, thinned: bool = False):
        device = fixed.image.device
        self.spacing, self.density = spacing, (0.5 if thinned else 1.0) / spacing**3
        self.scans = [shrink(fixed, spacing), shrink(moving, spacing)]
        steps = torch.arange(-radius, radius + spacing / 2, spacing, dtype=torch.float32, device=device)
        points = torch.cartesian_prod(steps, steps, steps)
        inside = points.square().sum(1) <= (1.05 * radius) ** 2
        if thinned:
            inside &= torch.cartesian_prod(*(torch.arange(len(steps), device=device),) * 3).sum(1) % 2 == 0
        points = points[inside]
        self.points = points[: len(points) // 2 * 2]
        self.places = _homogeneous(self.points)
        self.to_grid, self.images, self.known = [], [], []
        for scan in self.scans:
            size = torch.tensor(scan.image.shape[2:], dtype=torch.float64)
            inverse = torch.from_numpy(scan.grid.inverse)
            scale = 2 / (size - 1).clamp_min(1)
            matrix = torch.eye(4, dtype=torch.float64)
            matrix[:3] = scale[:, None] * inverse[:3]
            matrix[:3, 3] -= 1
            self.to_grid.append(matrix[[2, 1, 0, 3]].to(device))
            # A coarse voxel half of which is outside the mask shows the other scan what the mask hides.
            valid = torch.ones_like(scan.image) if scan.mask is None else ((scan.mask - 0.5) * 2).clamp_min(0)
            self.known.append(float(valid.sum() * np.prod(scan.grid.spacing)))  # mm^3
            self.images.append(
                torch.cat([scan.image * valid, valid], 1) if scan.cut or scan.mask is not None else scan.image
            )

    def sampled(self, which: int, matrices: Tensor, points: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Intensity and validity (K, n) of scan ``which`` at ``points`` (default: the level's own) mapped by
        (K, 4, 4) mid -> scan mm."""
        places = self.places if points is None else _homogeneous(points)
        matrices = (self.to_grid[which] @ matrices.double()).float()
        grid = (matrices[:, :3] @ places).transpose(1, 2)  # each coordinate by itself: four times faster than in threes
        image = self.images[which]
        grid = grid[:, :, None, None, :]
        values = sample(image.expand(len(grid), -1, -1, -1, -1), grid, padding="zeros")[..., 0, 0]
        return values[:, 0], values[:, 1] if image.shape[1] == 2 else None

    def pair(self, to_fixed: Tensor, to_moving: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Intensities (K, n) of both scans at K poses, and how far each sample is known to both, or ``None``."""
        a, va = self.sampled(0, to_fixed)
        b, vb = self.sampled(1, to_moving)
        weight = va if vb is None else vb if va is None else va * vb
        # Intensities of partly valid samples were multiplied by their validity on the way in.
        a, b = a / va.clamp_min(0.5) if va is not None else a, b / vb.clamp_min(0.5) if vb is not None else b
        return a, b, weight

    def score(self, to_fixed: Tensor, to_moving: Tensor, measure: str) -> Tensor:
        """(K,) similarity of K poses; differentiable."""
        a, b, weight = self.pair(to_fixed, to_moving)
        value = normalised_information(a, b, weight) if measure == "mi" else correlation(a, b, weight)
        if weight is None:
            return value
        possible = self.density * min(self.known)
        # Without gradient: overlap ranks poses, but must not pull them together.
        overlap = weight.detach().sum(1) / (LEAST_OVERLAP * min(possible, len(self.points)))
        return value * overlap.clamp(max=1)


def _homogeneous(points: Tensor) -> Tensor:
    """(n, 3) -> (4, n)."""
    return torch.cat([points.T, points.new_ones(1, len(points))])


def normalised_information(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """(K,) normalised mutual information minus 1, (H(a) + H(b)) / H(a, b) - 1, of samples (K, n): 0 tells nothing of
    each other, 1 is one and the same."""
    joint = joint_histograms(a, b, weight, BINS)
    whole = _entropy(joint.flatten(1))
    return (_entropy(joint.sum(2)) + _entropy(joint.sum(1))) / whole.clamp_min(1e-6) - 1


def _entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-12).log()).sum(1)


def correlation(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """(K,) Pearson correlation along the last axis, weighted."""
    if weight is None:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-6)
    total = weight.sum(1, keepdim=True).clamp_min(1e-3)
    a, b = a - (weight * a).sum(1, keepdim=True) / total, b - (weight * b).sum(1, keepdim=True) / total
    return (weight * a * b).sum(1) / ((weight * a * a).sum(1) * (weight * b * b).sum(1)).sqrt().clamp_min(1e-6)


def edge_directions(image: Tensor) -> Tensor:
    """(K, 1, D, H, W) -> (K, 5, D, H, W): the direction in which edges run, as a symmetric tensor without its trace.

    The inner product of two such tensors is the squared cosine between the edges minus 1/3, times how far each stands
    out of the noise: it does not matter which side of an edge is bright (after Haber and Modersitzki, MICCAI 2006).
    """
    g = torch.cat([gradient(image, axis) for axis in range(3)], 1)
    length = g.square().sum(1, keepdim=True)
    g = g / (length + (EDGE_NOISE * length.sqrt().mean((2, 3, 4), keepdim=True)) ** 2).sqrt().clamp_min(1e-9)
    x, y, z = g[:, 0], g[:, 1], g[:, 2]
    root = 2**0.5
    return torch.stack(
        [(x * x - y * y) / root, (2 * z * z - x * x - y * y) / 6**0.5, root * x * y, root * x * z, root * y * z], 1
    )
