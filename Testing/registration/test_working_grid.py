"""From scans to the working grid: half-way, symmetric, physical."""

import numpy as np
import pytest
import torch
from conftest import moved, movement, turn

from SymRegistrationLib.fields import FieldPair, gaussian, identity
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError
from SymRegistrationLib.registration import alignment, working_grid

HALF = movement((0, 0, 0), turn((0, 0, 1), 20), (4, 2, -6))


def test_a_few_bright_voxels_do_not_darken_the_scan(head):
    spiked = head.array.copy()
    spiked[40, 40, 40] = 1e6
    plain, robust = working_grid.prepare(head), working_grid.prepare(Volume(spiked, head.grid, "spiked"))
    assert float((plain.image - robust.image).abs().mean()) < 1e-3
    assert float(plain.image.min()) == 0 and float(plain.image.max()) == 1


def test_both_scans_meet_half_way(head):
    """A scan and its moved twin, each brought half of the way, are the same image."""
    back = np.linalg.inv(HALF)
    one, other = working_grid.prepare(moved(head, back)), working_grid.prepare(moved(head, HALF))
    space = working_grid.working_pair(one, other, back, HALF, working_grid.Layout(3.0))
    assert float((space.fixed - space.moving).abs().max()) < 1e-3
    assert float(space.fixed.mean()) > 0.1


def test_exchange_exchanges_the_workspace(head):
    one = working_grid.prepare(head)
    other = working_grid.prepare(moved(head, HALF @ HALF))
    eye = np.eye(4)
    there, back = (
        working_grid.working_pair(one, other, eye, HALF, working_grid.Layout(4.0)),
        working_grid.working_pair(other, one, HALF, eye, working_grid.Layout(4.0)),
    )
    assert there.grid.same_as(back.grid, 1e-6)
    assert torch.equal(there.fixed, back.moving) and torch.equal(there.moving, back.fixed)


@pytest.mark.parametrize("multiple", [1, 16])
def test_working_grid_is_isotropic_and_follows_the_scans(head, multiple):
    tilt = movement((0, 0, 0), turn((1, 0, 0), 30))
    scan = working_grid.prepare(moved(head, tilt))
    grid = working_grid.working_grid(scan, scan, np.eye(4), np.eye(4), working_grid.Layout(2.5, multiple))
    np.testing.assert_allclose(grid.spacing, 2.5)
    assert all(n % multiple == 0 for n in grid.shape)
    np.testing.assert_allclose(np.abs(grid.axes.T @ scan.grid.axes).max(1), 1, atol=1e-6)
    inside = grid.indices(scan.inside)
    assert ((inside >= 0) & (inside <= np.array(grid.shape) - 1)).all(1).mean() > 0.98


def test_beyond_a_cut_border_nothing_counts_but_beyond_air_it_does(head):
    cut = Volume(head.array[25:].copy(), head.grid.cropped((25, 0, 0), head.array.shape), "cut")
    scan = working_grid.prepare(cut)
    assert scan.cut
    _, weight = working_grid.resample(scan, head.grid, np.eye(4))
    assert float(weight[:, :, :24].max()) == 0 and float(weight[:, :, 26:].min()) == 1
    grid = Grid.centred((24, 24, 24), 3.0, (0, 0, 0))
    blob = np.zeros(grid.shape, np.float32)
    blob[8:16, 8:16, 8:16] = np.random.default_rng(0).uniform(50, 100, (8, 8, 8))
    free = working_grid.prepare(Volume(blob, grid, "blob"))
    assert not free.cut and working_grid.resample(free, grid.padded(20), np.eye(4))[1] is None


def test_a_mask_becomes_a_weight_and_an_empty_meeting_is_refused(head):
    masks = [np.zeros(head.array.shape, bool) for _ in range(2)]
    masks[0][:, :, :15], masks[1][:, :, 40:] = True, True
    scans = [working_grid.prepare(head, mask) for mask in masks]
    with pytest.raises(InputError, match="do not overlap|leave nothing"):
        working_grid.working_pair(*scans, np.eye(4), np.eye(4), working_grid.Layout(3.0))


def test_scans_that_are_apart_are_refused_with_a_remedy(head):
    far = working_grid.prepare(moved(head, movement((0, 0, 0), shift=(900, 0, 0))))
    with pytest.raises(InputError, match="--initial"):
        working_grid.working_pair(working_grid.prepare(head), far, np.eye(4), np.eye(4), working_grid.Layout(3.0))


def test_a_header_in_metres_is_told_from_scans_that_are_apart(head):
    grid = head.grid.matrix.copy()
    grid[:3] /= 1000
    metres = working_grid.prepare(Volume(head.array, Grid(head.grid.shape, grid), "metres"))
    with pytest.raises(InputError, match=r"fixed scan is 32\d mm across and the moving one 0\.32\d mm"):
        working_grid.working_pair(working_grid.prepare(head), metres, np.eye(4), np.eye(4), working_grid.Layout(3.0))


def test_a_field_carried_to_another_grid_is_the_same_map(head):
    scan = working_grid.prepare(head)
    spaces = [working_grid.working_pair(scan, scan, np.eye(4), np.eye(4), working_grid.Layout(s)) for s in (6.0, 4.0)]
    coarse, fine = (space.grid for space in spaces)
    matrix = torch.from_numpy(coarse.inverse[:3, :3] @ turn((0, 1, 1), 5)).float()
    ramp = torch.einsum("ab,nbdhw->nadhw", 0.05 * matrix, identity(coarse.shape))
    there = working_grid.to_working_grid(FieldPair(ramp, -ramp, "svf", 0.0), *spaces)
    for index in ((10, 12, 9), (20, 15, 22)):
        mm = fine.matrix[:3, :3] @ there.fixed_to_moving[0, :, index[0], index[1], index[2]].numpy()
        at = coarse.indices(fine.points(index))
        np.testing.assert_allclose(mm, coarse.matrix[:3, :3] @ (0.05 * matrix.numpy() @ at), atol=1e-3)


def test_a_field_carried_to_another_mid_space_joins_the_same_points_of_the_scans(head):
    """The pair is an affine map in one mid-space; seen from a mid-space half-way along that map, hardly
    anything is left."""
    scan = working_grid.prepare(head)
    source = working_grid.working_pair(scan, scan, np.eye(4), np.eye(4), working_grid.Layout(5.0, whole=True))
    matrix = turn((1, 1, 1), 20)
    whole = np.eye(4)
    whole[:3, :3] = matrix * 1.05
    whole[:3, 3] = head.grid.centre - whole[:3, :3] @ head.grid.centre + (6, -9, 4)
    inside = source.grid.inverse @ whole @ source.grid.matrix
    here = identity(source.grid.shape)

    def linear(m):
        m = torch.from_numpy(m - np.eye(4)).float()
        return torch.einsum("ab,nbdhw->nadhw", m[:3, :3], here) + m[:3, 3].view(1, 3, 1, 1, 1)

    pair = FieldPair(linear(inside), linear(np.linalg.inv(inside)), "svf", 0.0)
    found, centre = working_grid.fit_affine(pair, source)
    np.testing.assert_allclose(found, whole, atol=2e-3)
    half = alignment.split_midway(found, centre, "network")
    poses = half.mid_to_fixed, half.mid_to_moving
    for layout in (working_grid.Layout(4.0), working_grid.Layout(4.0, whole=True)):
        target = working_grid.working_pair(scan, scan, *poses, layout)
        there = working_grid.to_working_grid(pair, source, target)
        for u in (there.fixed_to_moving, there.moving_to_fixed):  # beyond the source's grid, too
            assert float(u.abs().max()) < 0.02


def test_the_affine_part_of_a_pair_seen_from_the_other_side_is_its_inverse(head):
    scan = working_grid.prepare(head)
    space = working_grid.working_pair(scan, scan, np.eye(4), np.eye(4), working_grid.Layout(5.0))
    draw = torch.Generator().manual_seed(3)
    u, w = (3 * gaussian(torch.randn(1, 3, *space.grid.shape, generator=draw), 4.0) for _ in range(2))
    there, centre = working_grid.fit_affine(FieldPair(u, w, "svf", 0.0), space)
    back, other = working_grid.fit_affine(FieldPair(w, u, "svf", 0.0), space)
    np.testing.assert_allclose(there @ back, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(there @ np.append(centre, 1), np.append(other, 1), atol=1e-6)


def test_a_grid_over_two_headers_far_apart_lies_along_the_patient(head):
    """60 degrees about (1, 1, 1) is as far from one order of the axes as from the next: half-way would be
    turned by 90."""
    one = working_grid.prepare(head)
    other = working_grid.prepare(
        Volume(head.array, Grid(head.grid.shape, movement((0, 0, 0), turn((1, 1, 1), 60)) @ head.grid.matrix), "turned")
    )
    for pair in ((one, other), (other, one)):
        grid = working_grid.working_grid(*pair, np.eye(4), np.eye(4), working_grid.Layout(4.0, whole=True))
        np.testing.assert_allclose(grid.matrix[:3, :3], 4.0 * np.eye(3)[:, ::-1], atol=1e-9)
