"""Topology of label maps: what a warp tears, merges, punches or fills.

Numpy only. The metric is this project's own definition (the paper that reports a "topology change" does not
give one): per label, the change of the number of connected pieces plus the change of the Euler characteristic.

A label is the union of its voxels as closed cubes, so voxels that share a corner are connected (26 neighbours).
"""

from __future__ import annotations

from itertools import product

import numpy as np

#: Half of the 26 neighbours; the other half sees the same pairs from the other side.
_STEPS = [step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]


def _cut_out(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box with one empty voxel around, as bool."""
    mask = np.asarray(mask, bool)
    if mask.ndim != 3:
        raise ValueError(f"a mask must have three axes, got shape {mask.shape}")
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        if len(found) == 0:
            return np.zeros((3, 3, 3), bool)
        mask = np.take(mask, range(found[0], found[-1] + 1), axis)
    return np.pad(mask, 1)


def component_count(mask: np.ndarray) -> int:
    """Number of 26-connected pieces of a (D, H, W) mask.

    Labels hook onto the smallest of their neighbours and jump to their root in turn: a few passes over all pairs.
    """
    mask = _cut_out(mask)
    number = np.full(mask.shape, -1, np.int64)
    number[mask] = np.arange(mask.sum())
    inner = tuple(slice(1, n - 1) for n in mask.shape)
    pairs = []
    for step in _STEPS:
        other = number[tuple(slice(1 + s, n - 1 + s) for s, n in zip(step, mask.shape))]
        both = (number[inner] >= 0) & (other >= 0)
        pairs.append(np.stack([number[inner][both], other[both]]))
    a, b = np.concatenate(pairs, axis=1)
    root = np.arange(mask.sum())
    while len(a):
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        apart = low != high
        if not apart.any():
            break
        a, b, low, high = a[apart], b[apart], low[apart], high[apart]
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]
    return len(np.unique(root))


def euler_characteristic(mask: np.ndarray) -> int:
    """Vertices - edges + faces - cubes of a (D, H, W) mask: pieces - tunnels + cavities."""
    mask = _cut_out(mask)
    total = 0
    # A cell spans one voxel along the axes where it is thick and lies between two along the others.
    for thick in product((False, True), repeat=3):
        cells = mask
        for axis, keep in enumerate(thick):
            if not keep:
                low = [slice(None)] * 3
                high = [slice(None)] * 3
                low[axis], high[axis] = slice(None, -1), slice(1, None)
                cells = cells[tuple(low)] | cells[tuple(high)]
        total += (-1) ** sum(thick) * int(np.count_nonzero(cells))
    return total


def topology_change(before: np.ndarray, after: np.ndarray) -> dict[int, int]:
    """Per label, background 0 apart: |change of pieces| + |change of the Euler characteristic|; 0 = unchanged.

    Args:
        before: (D, H, W) integer labels.
        after: the same labels warped by nearest neighbour, of any shape.
    """
    labels = np.union1d(np.unique(before), np.unique(after))
    change = {}
    for label in labels[labels != 0]:
        one, two = before == label, after == label
        change[int(label)] = abs(component_count(two) - component_count(one)) + abs(
            euler_characteristic(two) - euler_characteristic(one)
        )
    return change


def mean_topology_change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean of :func:`topology_change` over labels; 0 without labels."""
    change = topology_change(before, after)
    return sum(change.values()) / len(change) if change else 0.0
