"""How far the result moves when what should not matter is changed: a map in mm.

Level 5 of the rooms, between methods and pipeline. The same registration is repeated with perturbed inputs (scans
exchanged, axes flipped, brightness curve and noise changed, the sampling lattice shifted by part of a voxel), every
field is brought back to the original frame, and the **covariance of the displacement vectors** is collected in one
pass. Its trace is a length squared that sees direction, unlike the spread of vector lengths, for which two opposite
fields agree. The map is relative until it is calibrated against known errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from .fields import FieldPair, sample, warp
from .geometry import Grid
from .preprocess import Workspace, affine_grid


@dataclass(frozen=True)
class Perturbation:
    """One change that should not matter.

    Attributes:
        swap: exchange fixed and moving.
        flips: which array axes are mirrored.
        gammas: exponents of the brightness of fixed and moving.
        noise: standard deviation of added noise, intensities in [0, 1].
        shift: of the sampling lattice, voxels along D, H, W, each within half a voxel.
        seed: of the noise.
    """

    swap: bool
    flips: tuple[bool, bool, bool]
    gammas: tuple[float, float]
    noise: float
    shift: tuple[float, float, float]
    seed: int

    def intensities(self, space: Workspace) -> Workspace:
        """The workspace with brightness and noise changed; geometry untouched."""
        generator = torch.Generator().manual_seed(self.seed)

        def changed(image: Tensor, gamma: float) -> Tensor:
            noise = torch.randn(image.shape, generator=generator).to(image)
            return (image.pow(gamma) + self.noise * noise * (image > 0.02)).clamp(0, 1)

        return replace(space, fixed=changed(space.fixed, self.gammas[0]), moving=changed(space.moving, self.gammas[1]))

    def geometry(self, space: Workspace) -> Workspace:
        """The workspace exchanged, mirrored and re-sampled on the shifted lattice."""

        def changed(image: Tensor | None) -> Tensor | None:
            if image is None:
                return None
            return warp(image, self._constant(image, 1.0).expand(len(image), -1, -1, -1, -1)).flip(self._axes())

        fixed, moving, weight = changed(space.fixed), changed(space.moving), changed(space.weight)
        if self.swap:
            fixed, moving, weight = moving, fixed, None if weight is None else weight.flip(0)
        return replace(space, fixed=fixed, moving=moving, weight=weight)

    def undone(self, pair: FieldPair) -> FieldPair:
        """A result of the perturbed geometry, in the original frame."""

        def back(u: Tensor) -> Tensor:
            signs = torch.tensor([-1.0 if flip else 1.0 for flip in self.flips]).to(u).view(1, 3, 1, 1, 1)
            u = u.flip(self._axes()) * signs
            return warp(u, self._constant(u, -1.0))

        pair = pair.swapped() if self.swap else pair
        return replace(pair, fixed_to_moving=back(pair.fixed_to_moving), moving_to_fixed=back(pair.moving_to_fixed))

    def _axes(self) -> list[int]:
        return [axis + 2 for axis in range(3) if self.flips[axis]]

    def _constant(self, like: Tensor, sign: float) -> Tensor:
        shift = sign * torch.tensor(self.shift).to(like)
        return shift.view(1, 3, 1, 1, 1).expand(1, 3, *like.shape[2:]).contiguous()


def perturbations(count: int, seed: int) -> list[Perturbation]:
    """``count`` different ones, the same for the same seed; every other one exchanges the scans."""
    random = np.random.default_rng(seed + 7919)
    return [Perturbation(swap=k % 2 == 1, flips=tuple(bool(b) for b in random.integers(0, 2, 3)),
                         gammas=tuple(np.exp(random.uniform(-0.2, 0.2, 2))), noise=float(random.uniform(0.01, 0.03)),
                         shift=tuple(random.uniform(-0.5, 0.5, 3)), seed=int(random.integers(2**31)))
            for k in range(count)]


class VectorSpread:
    """Running mean and covariance of displacement vectors (Welford), without keeping the fields."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, u: Tensor) -> None:
        """Take in one field (3, D, H, W)."""
        if self.mean is None:
            self.mean, self.products = torch.zeros_like(u), u.new_zeros(3, 3, *u.shape[1:])
        self.count += 1
        before = u - self.mean
        self.mean = self.mean + before / self.count
        self.products = self.products + before[:, None] * (u - self.mean)[None]

    def covariance(self) -> Tensor:
        """(3, 3, D, H, W), unbiased, squared units of the fields. Raises ValueError below two fields."""
        if self.count < 2:
            raise ValueError("a spread needs at least 2 fields")
        return self.products / (self.count - 1)

    def length(self, matrix: np.ndarray | None = None) -> Tensor:
        """(D, H, W): square root of the trace after ``matrix`` (3, 3), which takes field units to mm."""
        metric = np.eye(3) if matrix is None else matrix.T @ matrix
        return torch.einsum("abdhw,ab->dhw", self.covariance(), torch.from_numpy(metric).to(self.mean)).clamp_min(0).sqrt()

    def largest_axis(self) -> Tensor:
        """(D, H, W): standard deviation along the direction in which the vectors differ most, field units."""
        return torch.linalg.eigvalsh(self.covariance().permute(2, 3, 4, 0, 1))[..., -1].clamp_min(0).sqrt()


def spread_mm(solve: Callable[[Perturbation], FieldPair], count: int, seed: int, space: Workspace, grid: Grid) -> np.ndarray:
    """The uncertainty map of a method.

    Args:
        solve: runs the method under a perturbation and returns its pair in the original frame of ``space``.
        count: number of runs, at least 2.
        seed: of the perturbations.
        space: the working grid's place.
        grid: where the map is wanted, the fixed scan's.

    Returns:
        (D, H, W) float32 mm, square root of the trace of the covariance.
    """
    spread = VectorSpread()
    for perturbation in perturbations(count, seed):
        spread.add(solve(perturbation).fixed_to_moving[0])
    length = spread.length((space.mid_to_moving @ space.grid.matrix)[:3, :3])[None, None]
    matrix = space.grid.inverse @ np.linalg.inv(space.mid_to_fixed) @ grid.matrix
    return sample(length, affine_grid(grid.shape, matrix, length))[0, 0].cpu().numpy()
