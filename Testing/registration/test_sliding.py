"""Regions that slide: the smoother, what finds them, and the pose of what stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from SymRegistrationLib.fields import gaussian, jacobian_determinant, square_sum
from SymRegistrationLib.geometry.folds import folded_cells
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError, Job, Options
from SymRegistrationLib.quality.checks import sliding_statement
from SymRegistrationLib.registration import body, sliding
from SymRegistrationLib.registration.alignment import Alignment, split_midway
from SymRegistrationLib.registration.optimisers import syn
from SymRegistrationLib.registration.schedule import Schedule
from SymRegistrationLib.registration.working_grid import WorkingPair, prepare
from SymRegistrationLib.uncertainty.predictors import Perturbation

#: Two blocks of 40 x 32 x 40 voxels that part at the first axis; the lower one slides by JUMP voxels along the last.
SHAPE, PLANE, JUMP = (40, 32, 40), 20, 3


def texture(shape, seed=0, sigma=1.5):
    print("seed", seed)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, *shape))).float()
    smooth = gaussian(noise, sigma)
    return (0.5 + smooth / (5 * smooth.std())).clamp(0, 1)


@pytest.fixture(scope="module")
def blocks():
    """Fixed and moving image, and the region of both: below the plane."""
    wide = texture((SHAPE[0], SHAPE[1], SHAPE[2] + JUMP))
    fixed, moved = wide[..., JUMP:].contiguous(), wide[..., :-JUMP].contiguous()
    below = (torch.arange(SHAPE[0]) < PLANE).view(1, 1, -1, 1, 1)
    region = below.float().expand(1, 1, *SHAPE)
    # moving(x) = fixed(x - JUMP) below the plane: a fixed point is found JUMP voxels further along the last axis.
    return fixed, torch.where(below, moved, fixed), torch.cat([region, region])


def schedule():
    return Schedule(shrink=(2, 1), iterations=(20, 15)).for_sliding()


@pytest.fixture(scope="module")
def slid(blocks):
    return syn.optimise(blocks[0], blocks[1], schedule(), "lncc", regions=blocks[2])


def errors(pair):
    """Error along the plane (D,), by distance from it, and how far the motion across it jumps there."""
    u = pair.fixed_to_moving[0]
    truth = JUMP * (torch.arange(SHAPE[0]) < PLANE).float().view(-1, 1, 1)
    inner = (slice(None), slice(6, -6), slice(8, -8))
    return (u[2] - truth)[inner].abs().mean((1, 2)), (u[0][PLANE] - u[0][PLANE - 1])[6:-6, 8:-8].abs().mean()


def test_without_regions_it_is_the_plain_gaussian_to_the_last_bit(blocks):
    field = texture((3, 8, 9), 4).expand(2, 3, -1, -1, -1).contiguous()
    smoother = sliding.SlidingSmoother(None)
    smoother.look(torch.zeros_like(field))
    assert torch.equal(smoother(field, 1.3), gaussian(field, 1.3))


def test_one_region_of_everything_changes_nothing():
    field = torch.cat([texture((12, 11, 10), seed).expand(1, 3, -1, -1, -1) for seed in (1, 2)])
    smoother = sliding.SlidingSmoother(torch.ones(2, 1, 12, 11, 10))
    smoother.look(torch.zeros(2, 3, 12, 11, 10))
    assert torch.allclose(smoother(field, 1.2), gaussian(field, 1.2), atol=1e-5)


def test_a_jump_along_the_plane_survives_and_one_across_is_smoothed(blocks):
    smoother = sliding.SlidingSmoother(blocks[2])
    smoother.look(torch.zeros(2, 3, *SHAPE))
    below = blocks[2][:1]
    for axis in range(3):
        field = torch.zeros(2, 3, *SHAPE)
        field[:, axis] = below[0]
        smooth = smoother(field, 1.5)[:, axis]
        jump = float((smooth[:, PLANE - 1] - smooth[:, PLANE]).mean())
        # The plain Gaussian of a step of 1 differs by 0.26 from voxel to voxel.
        assert jump == (pytest.approx(1.0, abs=0.03) if axis else pytest.approx(0.26, abs=0.1)), axis


def test_the_jump_of_two_blocks_is_found(blocks, slid):
    along, across = errors(slid)
    off, _ = errors(syn.optimise(blocks[0], blocks[1], Schedule(shrink=(2, 1), iterations=(20, 15)), "lncc"))
    near = slice(PLANE - 3, PLANE + 3)
    print(along[near], off[near], across)
    assert along[near].mean() < 0.5 * off[near].mean()
    assert along[[PLANE - 3, PLANE + 2]].max() < 0.4
    assert across < 0.25


def test_it_folds_nowhere(slid):
    for u in (slid.fixed_to_moving, slid.moving_to_fixed):
        assert jacobian_determinant(u).min() > 0
        assert len(folded_cells(u)[0]) == 0


def test_shear_is_told_at_the_surface_and_nowhere_else(blocks, slid):
    space = WorkingPair(*blocks[:2], None, Grid.centred(SHAPE, 2.0, np.zeros(3)), np.eye(4), np.eye(4))
    assert sliding.told(space, slid) is None
    space = replace(space, regions=blocks[2])
    shear = sliding.surface_shear(space, slid)
    assert float(shear[PLANE - 1 : PLANE + 1, 6:-6, 8:-8].mean()) == pytest.approx(JUMP / 2, rel=0.35)
    assert float(shear[: PLANE - 8].max()) < 0.01
    told = sliding.told(space, slid)
    assert told["regions"] == 1
    assert "neighbouring voxels" in sliding_statement(told)
    assert sliding_statement({}) == ""


def test_exchanging_the_scans_exchanges_the_results(blocks, slid):
    fixed, moving, regions = blocks
    other = syn.optimise(moving, fixed, schedule(), "lncc", regions=regions.flip(0))
    assert float(square_sum(other.fixed_to_moving - slid.moving_to_fixed).max()) ** 0.5 < 1e-4
    assert float(square_sum(other.moving_to_fixed - slid.fixed_to_moving).max()) ** 0.5 < 1e-4


# ---------------------------------------------------------------------------------------------- regions


@pytest.fixture(scope="module")
def chest():
    """A chest in HU: body, two lungs of 1.13 litres each, a trachea of air above and a table beneath."""
    grid = Grid((60, 70, 90), np.array([[0, 0, 4.0, -180], [0, 4.0, 0, -140], [4.0, 0, 0, -120], [0, 0, 0, 1]]))
    z, y, x = np.meshgrid(*(np.arange(n) * 4.0 - (n - 1) * 2 for n in grid.shape), indexing="ij")
    array = np.full(grid.shape, -1000.0, np.float32)
    array[(x / 150) ** 2 + (y / 100) ** 2 < 1] = 40
    lungs = [((x - side) / 45) ** 2 + (y / 60) ** 2 + (z / 100) ** 2 < 1 for side in (-70, 70)]
    array[lungs[0] | lungs[1]] = -800
    array[(x**2 + (y + 20) ** 2 < 10**2) & (z > -20)] = -1000
    array[(np.abs(y - 125) < 5) & (np.abs(x) < 120)] = 100
    return Volume(array, grid), lungs[0] | lungs[1]


def test_the_lungs_are_found_and_the_trachea_is_not(chest):
    volume, truth = chest
    found, grid = body.lungs(volume)
    assert grid.shape == volume.grid.shape
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.97
    assert not found[40, 30, 43:47].any()


def test_without_lungs_auto_says_so_and_lung_refuses(chest):
    head = Volume(np.where(chest[0].array > -500, 300, 0).astype(np.float32), chest[0].grid, "head")
    notes = []
    assert sliding.find((head, head), (None, None), Options(sliding="auto"), "cpu", notes) is None
    assert "no lungs" in notes[0]
    with pytest.raises(InputError, match="no lungs"):
        sliding.find((chest[0], head), (None, None), Options(sliding="lung"), "cpu", [])


def test_masks_are_the_regions_by_their_numbers(chest):
    volume, truth = chest
    labels = Volume(np.where(truth, np.where(np.arange(90) < 45, 1, 2), 0).astype(np.int32), volume.grid)
    found = sliding.find((volume, volume), (labels, labels), Options(sliding="auto"), "cpu", [])
    assert [one.shares.shape[1] for one in found] == [2, 2]
    assert float(found[0].shares.sum()) == truth.sum()
    one = Volume((labels.array == 1).astype(np.int32), volume.grid)
    with pytest.raises(InputError, match="same regions"):
        sliding.find((volume, volume), (labels, one), Options(sliding="auto"), "cpu", [])


def test_a_region_that_slides_goes_with_a_perturbed_geometry(blocks):
    fixed, moving, regions = blocks
    space = WorkingPair(fixed, moving, None, Grid.centred(SHAPE, 1.0, np.zeros(3)), np.eye(4), np.eye(4))
    space = replace(space, regions=torch.cat([regions[:1], 0 * regions[1:]]))
    turned = Perturbation(True, (True, False, False), (1.0, 1.0), 0.0, (0.0,) * 3, 0).geometry(space)
    assert torch.equal(turned.regions, torch.cat([0 * regions[1:], regions[:1].flip(2)]))


# ---------------------------------------------------------------------------------------------- pose, doors


def test_the_pose_is_that_of_what_stays():
    """A textured wall around a brighter organ that moved by 15 mm: the pose of the whole had followed the organ."""
    print("seed 0")
    shape, side = (40, 44, 48), 4.0
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    ground = texture(shape, 0, 1.0)[0, 0].numpy()

    def scan(shift):
        organ = (x / 11) ** 2 + ((y - shift / side) / 11) ** 2 + (z / 11) ** 2 < 1
        inside = np.maximum(np.abs(x) / 23, np.maximum(np.abs(y) / 21, np.abs(z) / 19)) < 0.9
        return Volume(
            np.where(organ, 2.0, np.where(inside, 0.4 + ground, 0)).astype(np.float32),
            Grid.centred(shape, side, np.zeros(3)),
        )

    scans = [prepare(scan(0)), prepare(scan(15.0))]
    drawn = np.eye(4)
    drawn[1, 3] = 12.0
    whole = split_midway(drawn, scans[0].centroid, "rigid")
    found = sliding.staying_pose(scans, whole, Options(sliding="auto"))
    assert np.linalg.norm(found.matrix[:3, 3]) < 1.0
    assert sliding.staying_pose(scans, whole, Options()) is whole
    none = Alignment(np.eye(4), np.eye(4), "none")
    assert sliding.staying_pose(scans, none, Options(sliding="auto")) is none


def test_jobs_refuse_half_of_what_slides(tmp_path):
    names = {"fixed": "a.nii.gz", "moving": "b.nii.gz", "output": str(tmp_path)}
    with pytest.raises(InputError, match="one scan only") as told:
        Job(**names, fixed_sliding_mask="m.nii.gz", options=Options(sliding="auto"))
    assert "--moving-sliding-mask" in told.value.hint
    with pytest.raises(InputError, match="nothing shall slide"):
        Job(**names, fixed_sliding_mask="m.nii.gz", moving_sliding_mask="n.nii.gz")
    with pytest.raises(InputError, match="sliding"):
        Options(sliding="everywhere")
