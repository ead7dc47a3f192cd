"""Whether a scan is stored mirrored: by how much its mirror image fits the other scan better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..geometry.grid import transform_points
from .pose_search import FINE, MIDDLE, Search, shift
from .working_grid import Scan, nearest_rotation

#: Two headers that agree within so many degrees on where left is are asked once.
SAME_SIDE = 15.0


def mirrored_gain(search: Search, x: Tensor) -> float:
    """By what share the normalised mutual information of a pose grows when the moving scan is mirrored left to right
    where it lies and its pose is refined anew; above 0 the mirror image fits better.

    Which way left to right runs both headers say; where they disagree both are tried, since one may be wrong.

    Args:
        search: of the two scans.
        x: (4, 4) generator of the pose.
    """
    fixed, moving = search.scans
    image, flip = mirrored(moving)
    other = Search(fixed, image, search.seed)
    _, own = search.refine(x[None], "affine", "mi", search.level(FINE), 6, 0.003)
    to_fixed, to_moving = search.matrix(x)
    pose = to_moving @ np.linalg.inv(to_fixed)
    normals = [np.eye(3)[0], nearest_rotation(pose[:3, :3]).T[:, 0]]
    if abs(normals[0] @ normals[1]) > np.cos(np.radians(SAME_SIDE)):
        normals = normals[:1]
    starts = [other.generator(flip @ pose @ reflection(normal, fixed.centroid)) for normal in normals]
    found, scores = other.refine(torch.stack(starts), "affine", "mi", other.level(MIDDLE), 30, 0.03)
    best = found[int(scores.argmax())]
    _, scores = other.refine(best[None], "affine", "mi", other.level(FINE), 10, 0.005)
    return float(scores[0]) / max(float(own[0]), 1e-6) - 1


def mirrored(scan: Scan) -> tuple[Scan, np.ndarray]:
    """The scan flipped along its axis that runs most nearly left to right, same grid, and the (4, 4) mm map from its
    points to where they are then."""
    axis = int(np.abs(scan.grid.axes[0]).argmax())
    last = scan.grid.shape[axis] - 1
    flip = np.eye(4)
    flip[axis, axis], flip[axis, 3] = -1, last
    flip = scan.grid.matrix @ flip @ scan.grid.inverse
    mask = None if scan.mask is None else scan.mask.flip(axis + 2)
    return replace(scan, image=scan.image.flip(axis + 2), mask=mask, inside=transform_points(flip, scan.inside)), flip


def reflection(normal: np.ndarray, through: np.ndarray) -> np.ndarray:
    """(4, 4) of the mirror plane with a unit ``normal`` through a point."""
    turn = np.eye(4)
    turn[:3, :3] -= 2 * np.outer(normal, normal)
    return shift(through) @ turn @ shift(-through)
