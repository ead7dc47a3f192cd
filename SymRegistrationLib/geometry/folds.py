"""Where a displacement field folds, corner by corner: stricter than central differences, which miss folds
of one voxel."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..fields import determinant

#: Voxels looked at at once.
SLAB = 200_000


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
        least = torch.minimum(least, determinant(columns))  # a matrix has the determinant of its transpose
    return least[:, None]


def folded_cells(u: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """The cells with a corner determinant of at most ``least``, see :func:`corner_determinants`, for an eighth of
    its work.

    Where every row of G sums up to less than 1 in absolute values, det(I + G) is at least the product of (1 - row sum)
    over the rows (Price, Proc Am Math Soc 2:497-502, 1951), so most cells need no determinant. Looked at in slabs, so
    that little memory is needed.

    Args:
        u: (N, 3, D, H, W) voxels, every axis at least 2 long.
        least: 0 or more, below 1.

    Returns:
        (n, 4) whole numbers (batch, d, h, w) and (n,) the smallest determinant of each.
    """
    depth = u.shape[2] - 1
    step = max(1, SLAB // (u.shape[3] * u.shape[4]))
    cells, determinants = [], []
    for batch in range(len(u)):
        for start in range(0, depth, step):
            slab = u[batch : batch + 1, :, start : start + step + 1].contiguous()
            near = _not_surely_whole(slab, least)
            here = corner_determinants_at(slab, near)
            found = here <= least
            cells.append(near[found] + near.new_tensor([batch, start, 0, 0]))
            determinants.append(here[found])
    return torch.cat(cells), torch.cat(determinants)


def _steepest(u: Tensor, axis: int) -> Tensor:
    """(N, 3, cells): the largest change of each component along the four edges of a cell that follow ``axis``."""
    edge = torch.diff(u, dim=axis + 2).abs_()
    for other in range(3):
        if other != axis:
            n = edge.shape[other + 2] - 1
            edge = torch.maximum(edge.narrow(other + 2, 0, n), edge.narrow(other + 2, 1, n))
    return edge


def _not_surely_whole(u: Tensor, least: float) -> Tensor:
    """(n, 4): the cells whose corner determinants can be ``least`` or less."""
    rows = _steepest(u, 0)
    for axis in (1, 2):
        rows.add_(_steepest(u, axis))
    left = rows.neg_().add_(1).clamp_(min=0)
    return (left[:, 0] * left[:, 1] * left[:, 2] <= least).nonzero()


def corner_determinants_at(u: Tensor, cells: Tensor) -> Tensor:
    """(n,): the smallest corner determinant of single cells (n, 4), given as (batch, d, h, w)."""
    corners = torch.cartesian_prod(*[torch.arange(2, device=u.device)] * 3)
    batch, places = cells[:, :1], cells[:, None, 1:] + corners
    values = u.permute(0, 2, 3, 4, 1)[batch, places[..., 0], places[..., 1], places[..., 2]]
    return corner_determinants(values.reshape(-1, 2, 2, 2, 3).permute(0, 4, 1, 2, 3)).flatten()
