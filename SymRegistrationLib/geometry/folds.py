"""Where a displacement field folds, corner by corner: stricter than central differences, which miss folds
of one voxel."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def corner_determinants(u: Tensor) -> Tensor:
    """The smallest of the eight determinants det(I + grad u) at the corners of every cell; (N, 1, D-1, H-1, W-1).

    Each corner takes the differences along the three edges that meet there: the derivatives of the linearly
    interpolated map itself. Central differences, as in :func:`SymRegistrationLib.fields.jacobian_determinant`, can miss
    a fold of one voxel.

    Args:
        u: (N, 3, D, H, W) voxels, every axis at least 2 long.
    """
    edges = [torch.diff(u, dim=axis + 2) for axis in range(3)]
    least = u.new_full((), math.inf)
    for corner in itertools.product((0, 1), repeat=3):
        columns = []
        for axis, edge in enumerate(edges):
            for other in range(3):
                if other != axis:
                    edge = edge.narrow(other + 2, corner[other], edge.shape[other + 2] - 1)
            columns.append([edge[:, row] + float(row == axis) for row in range(3)])
        (a, d, g), (b, e, h), (c, f, i) = columns
        here = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        least = torch.minimum(least, here)
    return least[:, None]


def folded_cells(u: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """The cells with a corner determinant of at most ``least``, see :func:`corner_determinants`, for an eighth of
    its work.

    A matrix I + G whose entries of G are all below b has a determinant of at least (1 - 3 b)^3 (its diagonal
    dominates), so most cells need no determinant.

    Args:
        u: (N, 3, D, H, W) voxels, every axis at least 2 long.
        least: 0 or more, below 1.

    Returns:
        (n, 4) whole numbers (batch, d, h, w) and (n,) the smallest determinant of each.
    """
    steepest = None
    for axis in range(3):
        edge = torch.diff(u, dim=axis + 2).abs_().amax(1)
        for other in range(3):
            if other != axis:
                n = edge.shape[other + 1] - 1
                edge = torch.maximum(edge.narrow(other + 1, 0, n), edge.narrow(other + 1, 1, n))
        steepest = edge if steepest is None else torch.maximum(steepest, edge)
    cells = (steepest >= (1 - least ** (1 / 3)) / 3).nonzero()
    determinants = corner_determinants_at(u, cells)
    found = determinants <= least
    return cells[found], determinants[found]


def corner_determinants_at(u: Tensor, cells: Tensor) -> Tensor:
    """(n,): the smallest corner determinant of single cells (n, 4), given as (batch, d, h, w)."""
    corners = torch.cartesian_prod(*[torch.arange(2, device=u.device)] * 3)
    batch, places = cells[:, :1], cells[:, None, 1:] + corners
    values = u.permute(0, 2, 3, 4, 1)[batch, places[..., 0], places[..., 1], places[..., 2]]
    return corner_determinants(values.reshape(-1, 2, 2, 2, 3).permute(0, 4, 1, 2, 3)).flatten()
