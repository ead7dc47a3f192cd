"""Pieces, Euler characteristics and their change, against shapes whose topology is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
import SimpleITK as sitk

from SymRegistrationLib.quality.topology import (
    component_count,
    euler_characteristic,
    mean_topology_change,
    topology_change,
)

Z, Y, X = np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij")
R = np.sqrt(Z**2 + Y**2 + X**2)
BALL, SHELL = R < 9, (R < 12) & (R > 7)
TORUS = (np.sqrt(Y**2 + X**2) - 9) ** 2 + Z**2 < 9


def two_balls():
    return (np.sqrt(Z**2 + Y**2 + (X - 9) ** 2) < 5) | (np.sqrt(Z**2 + Y**2 + (X + 9) ** 2) < 5)


@pytest.mark.parametrize(
    "shape, pieces, euler",
    [
        (np.zeros((4, 5, 6)), 0, 0),
        (np.ones((1, 1, 1)), 1, 1),
        (BALL, 1, 1),
        (SHELL, 1, 2),
        (TORUS, 1, 0),
        (two_balls(), 2, 2),
        (np.ones((3, 4, 5)), 1, 1),
    ],
)
def test_known_shapes(shape, pieces, euler):
    assert component_count(shape) == pieces and euler_characteristic(shape) == euler


def test_voxels_that_share_a_corner_are_one_piece():
    mask = np.zeros((4, 4, 4))
    mask[1, 1, 1] = mask[2, 2, 2] = 1
    assert component_count(mask) == 1 and euler_characteristic(mask) == 1
    mask[2, 2, 2], mask[3, 3, 3] = 0, 1
    assert component_count(mask) == 2 and euler_characteristic(mask) == 2


def test_long_thin_snake_is_one_piece_and_quickly_so():
    mask = np.zeros((3, 101, 101), bool)
    mask[1, ::2] = True
    mask[1, 1::4, -1] = mask[1, 3::4, 0] = True
    start = time.process_time()
    assert component_count(mask) == 1 and euler_characteristic(mask) == 1
    assert time.process_time() - start < 2


def test_pieces_agree_with_simpleitk_on_noise():
    seed = 5
    for density in (0.03, 0.1):
        mask = np.random.default_rng(seed).random((20, 30, 25)) < density
        count = sitk.ConnectedComponentImageFilter()
        count.FullyConnectedOn()
        count.Execute(sitk.GetImageFromArray(mask.astype(np.uint8)))
        assert component_count(mask) == count.GetObjectCount(), f"seed {seed}"


def test_change_counts_tears_holes_and_lost_labels():
    before = np.zeros((32, 32, 32), int)
    before[BALL] = 3
    assert topology_change(before, np.roll(before, 4, 0)) == {3: 0}
    torn, pierced, hollow = before.copy(), before.copy(), before.copy()
    torn[15:17] = 0
    pierced[:, 15:17, 15:17] = 0
    hollow[15:17, 15:17, 15:17] = 0
    assert topology_change(before, torn) == {3: 2}  # one piece more, Euler 1 -> 2
    assert topology_change(before, pierced) == {3: 1}  # Euler 1 -> 0
    assert topology_change(before, hollow) == {3: 1}  # Euler 1 -> 2
    assert topology_change(before, 0 * before) == {3: 2}
    hollow[0, 0, 0] = 7  # a label out of nothing: one piece, Euler 1
    assert mean_topology_change(before, hollow) == pytest.approx(1.5)


def test_flat_arrays_are_refused():
    with pytest.raises(ValueError, match="three axes"):
        component_count(np.ones((4, 4)))
