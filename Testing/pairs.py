"""A pair of volumes whose true correspondence is known; used by the tests of networks, weights and inference."""

from __future__ import annotations

import numpy as np
import torch

from SymRegistrationLib import fields, losses
from SymRegistrationLib.geometry.grid import Grid

SEED = 20240917


def _radius(shape) -> torch.Tensor:
    """(1, 1, D, H, W): 0 in the middle, 1 on the surface of the phantom's ellipsoid."""
    size = torch.tensor(shape).view(1, 3, 1, 1, 1)
    return ((fields.identity(shape) - (size - 1) / 2) / (0.45 * size)).square().sum(1, keepdim=True).sqrt()


def phantom(shape=(32, 32, 32), seed: int = SEED) -> torch.Tensor:
    """(1, 1, D, H, W) in [0, 1]: an ellipsoid full of smooth structure at two scales, zero outside."""
    generator = torch.Generator().manual_seed(seed)
    noise = [fields.gaussian(torch.randn((1, 1, *shape), generator=generator), sigma) for sigma in (1.2, 3.0)]
    texture = torch.sigmoid(2 * sum(x / x.std() for x in noise))
    return texture * torch.sigmoid((1 - _radius(shape)) * 12)


def known_pair(shape=(32, 32, 32), size: float = 4.0, sigma: float = 6.0, seed: int = SEED):
    """(moving, fixed, u): ``fixed = moving o (id + u)``, u smooth, its largest vector in the phantom
    ``size`` voxels long."""
    generator = torch.Generator().manual_seed(seed + 1)
    u = fields.gaussian(torch.randn((1, 3, *shape), generator=generator), sigma)
    u = u * (size / fields.square_sum(u).sqrt()[_radius(shape) < 1].max())
    moving = phantom(shape, seed)
    return moving, fields.warp(moving, u), u


def end_point_error(found: torch.Tensor, true: torch.Tensor, fixed: torch.Tensor) -> float:
    """Mean length in voxels of ``found - true`` inside the phantom."""
    return float(fields.square_sum(found - true).sqrt()[fixed > 0.1].mean())


def run(network, moving, fixed):
    """The network's output, without gradients."""
    with torch.no_grad():
        return network(moving, fixed)


def overfitted(network, pair, steps: int, rate: float, gain: float) -> fields.FieldPair:
    """Train on one pair with a warp of up to 4 voxels and hold the result to it: the end-point error falls below half,
    lncc by more than ``gain``, hardly a voxel folds. Returns what was found, for what else is to be checked."""
    moving, fixed, true = pair
    found = overfit(network, moving, fixed, steps, rate).pair
    u = found.fixed_to_moving
    before, after = end_point_error(0 * true, true, fixed), end_point_error(u, true, fixed)
    assert before > 1.5 and after < 0.5 * before, (before, after)
    assert losses.lncc(fields.warp(moving, u), fixed) < losses.lncc(moving, fixed) - gain
    assert (fields.jacobian_determinant(u) <= 0).float().mean() < 0.005
    return found


def overfit(network, moving, fixed, steps: int, rate: float):
    """Train on one pair; the output afterwards."""
    optimiser = torch.optim.Adam(network.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(network.objective(moving, fixed).values()).backward()
        optimiser.step()
    return run(network, moving, fixed)


def scan(shape=(32, 36, 30), shift=0.0, spacing=3.0):
    """A bright bent body with structure, and its grid."""
    grid = Grid.centred(shape, spacing, (5.0, -3.0, 10.0))
    x, y, z = np.moveaxis(
        grid.points(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)) - grid.centre, -1, 0
    )
    x = x - shift - 2 * np.sin(y / 15) * (shift > 0)
    radius = np.sqrt((x / 30) ** 2 + (y / 38) ** 2 + (z / 33) ** 2)
    body = 600 / (1 + np.exp(12 * (radius - 1))) * (1 + 0.4 * np.sin(x / 7 + 1) * np.cos(y / 8) * np.sin(z / 9 + 0.5))
    return (body + 300 * np.exp(-((x - 12) ** 2 + (y + 9) ** 2 + z**2) / 60)).astype(np.int16), grid
