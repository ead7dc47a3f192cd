"""Several label maps of one scan made into one.

Values of labels are kept whatever they are; inside, labels are numbered 0, 1, 2, ..., because the table of
STAPLE grows with the square of the largest value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from ..job import RegistrationError

FUSIONS = ("majority", "staple")
#: Stands for "this atlas does not reach here".
ABSENT = np.iinfo(np.int32).min


def fuse(maps: Sequence[np.ndarray], fusion: str = "majority") -> tuple[np.ndarray, np.ndarray]:
    """One label map out of several.

    Args:
        maps: (D, H, W) int32 each, the most trusted first; ``ABSENT`` where a map says nothing.
        fusion: ``majority``: most votes, a draw goes to the most trusted atlas among the drawn; ``staple``: each atlas
            is weighted by how it performs, estimated from all (Warfield, Zou, Wells, IEEE TMI 23, 2004; several labels:
            Rohlfing, Russakoff, Maurer, MICCAI 2003), undecided voxels by majority.

    Returns:
        (D, H, W) int32 labels, 0 where no atlas reaches; (D, H, W) float32, the share of the atlases reaching there
        that say the same.
    """
    values = np.unique(np.concatenate([np.unique(one) for one in maps]))
    values = values[values != ABSENT]
    if not len(values):
        return np.zeros(maps[0].shape, np.int32), np.zeros(maps[0].shape, np.float32)
    stack = np.stack([np.where(one == ABSENT, -1, np.searchsorted(values, one)) for one in maps]).astype(np.int32)
    fused = majority(stack)
    if fusion == "staple" and len(maps) > 1:
        background = int(np.searchsorted(values, 0)) if 0 in values else 0
        fused = _staple(stack, fused, background)
    votes = (stack == fused).sum(axis=0)
    reach = (stack >= 0).sum(axis=0)
    agreement = (votes / np.maximum(reach, 1)).astype(np.float32) * (reach > 0)
    return np.where(reach > 0, values[np.maximum(fused, 0)], 0).astype(np.int32), agreement


def majority(stack: np.ndarray) -> np.ndarray:
    """(D, H, W): the number with most votes in (n, D, H, W); negative ones do not vote; -1 where nobody does.

    A draw goes to the number that the first of the drawn has.
    """
    fused = stack[0].copy()
    open_ = ~(stack == stack[0]).all(axis=0)
    votes = stack[:, open_]
    count = len(stack)
    # Earlier maps weigh a little more: never enough to outvote, enough to decide a draw.
    weights = 1 + np.array([2.0 ** -(k + 1) for k in range(count)]) / (2 * count)
    best = np.full(votes.shape[1], -1, np.int32)
    most = np.zeros(votes.shape[1])
    for label in np.unique(votes[votes >= 0]):
        total = (weights[:, None] * (votes == label)).sum(axis=0)
        better = total > most
        best[better], most[better] = label, total[better]
    fused[open_] = best
    return fused


def _staple(stack: np.ndarray, fallback: np.ndarray, background: int) -> np.ndarray:
    """STAPLE within the box where some map holds more than background; ``fallback`` elsewhere and where
    it is undecided."""
    shown = ((stack >= 0) & (stack != background)).any(axis=0)
    if not shown.any():
        return fallback
    box = tuple(slice(max(0, line.min() - 2), line.max() + 3) for line in np.nonzero(shown))
    undecided = int(stack.max()) + 1
    parts = [sitk.GetImageFromArray(np.where(one[box] < 0, background, one[box]).astype(np.uint32)) for one in stack]
    try:
        found = sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(parts, undecided)).astype(np.int32)
    except RuntimeError as error:
        raise RegistrationError(
            f"STAPLE failed ({str(error).strip().splitlines()[-1][:160]}).", "Use --fusion majority."
        ) from None
    fused = fallback.copy()
    fused[box] = np.where((found == undecided) | (fallback[box] < 0), fallback[box], found)
    return fused
