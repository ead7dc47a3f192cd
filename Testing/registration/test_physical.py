"""From voxels to millimetres: fields fade beyond their grid, stay inverse there, and do not fold at any corner."""

import numpy as np
import torch
from conftest import turn

from SymRegistrationLib import fields
from SymRegistrationLib.geometry import folds
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.registration.physical import faded, to_physical
from SymRegistrationLib.registration.working_grid import WorkingPair

SEED = 4


def flow(shape, largest: float, sigma: float, seed: int = SEED) -> fields.FieldPair:
    """A diffeomorphism and its inverse, as strong at the border as inside."""
    v = fields.gaussian(torch.randn((1, 3, *shape), generator=torch.Generator().manual_seed(seed)), sigma)
    v = v * largest / v.abs().max()
    return fields.FieldPair(fields.exponentiate(v), fields.exponentiate(-v), "svf", 0.0)


def space_of(shape, matrix=None) -> WorkingPair:
    grid = Grid.centred(shape, 2.0, (5, -10, 20), turn((1, 1, 0), 15))
    empty = torch.zeros(1, 1, *shape)
    return WorkingPair(empty, empty, None, grid, np.eye(4), np.eye(4) if matrix is None else matrix)


def test_a_field_is_untouched_inside_and_zero_at_the_faces_of_the_larger_grid():
    pair = flow((28, 30, 32), 4.0, 4.0)
    grown, before = faded(pair)
    inside = grown[:, :, before[0] : before[0] + 28, before[1] : before[1] + 30, before[2] : before[2] + 32]
    truth = torch.cat([pair.fixed_to_moving, pair.moving_to_fixed])
    changed = (inside - truth).abs().amax(1) > 0
    assert float(changed.double().mean()) < 0.01  # only around cells that folded while the field fades
    faces = [grown.select(axis, end) for axis in (2, 3, 4) for end in (0, -1)]
    assert all(float(face.abs().max()) == 0 for face in faces)
    assert len(folds.folded_cells(grown)[0]) == 0


def test_beyond_the_working_grid_both_directions_stay_inverse():
    pair = flow((28, 30, 32), 4.0, 4.0)
    physical = to_physical(pair, space_of((28, 30, 32)))
    rng = np.random.default_rng(SEED)
    points = physical.forward.grid.points(rng.uniform(0, 1, (3000, 3)) * (np.array(physical.forward.grid.shape) - 1))
    apart = np.linalg.norm(physical.inverse.map_points(physical.forward.map_points(points)) - points, axis=1)
    assert apart.mean() < 0.1 and apart.max() < 1.5, (apart.mean(), apart.max())  # mm; the voxel is 2 mm


def test_single_folded_cells_are_smoothed_away_and_only_there():
    pair = flow((30, 30, 30), 2.0, 4.0)
    both = [pair.fixed_to_moving.clone(), pair.moving_to_fixed.clone()]
    both[0][0, 2, 15, 15, 15] += 2.4
    both[1][0, 0, 8, 9, 10] -= 2.4
    assert all(len(folds.folded_cells(u)[0]) for u in both)
    grown, before = faded(fields.FieldPair(*both, "svf", 0.0))
    assert len(folds.folded_cells(grown)[0]) == 0
    assert float(folds.corner_determinants(grown).min()) > 0
    clean, _ = faded(pair)
    changed = ((grown - clean).abs().amax((0, 1)) > 1e-3).nonzero() - torch.tensor(before)
    near = [(changed - torch.tensor(place)).double().norm(dim=1) for place in ((15, 15, 15), (8, 9, 10))]
    assert len(changed) > 0 and float(torch.minimum(*near).max()) < 9


def test_the_search_for_folds_finds_what_all_determinants_find():
    u = fields.gaussian(torch.randn((2, 3, 24, 25, 26), generator=torch.Generator().manual_seed(SEED)), 1.3) * 7
    least = folds.corner_determinants(u)[:, 0]
    for bound in (0.0, 0.05, 0.3):
        cells, values = folds.folded_cells(u, bound)
        assert 10 < len(cells) < least.numel() / 2
        assert torch.equal(cells, (least <= bound).nonzero())
        torch.testing.assert_close(values, least[least <= bound])


def test_a_pose_that_only_the_field_holds_becomes_an_affine():
    """A network that began from the headers: its field turns everything by 25 degrees, up to the border of its grid."""
    shape, turned = (40, 40, 40), np.eye(4)
    turned[:3, :3] = turn((0, 0, 1), 25)
    turned[:3, 3] = (9, -4, 6)
    space = space_of(shape)
    middle = space.grid.centre
    about = np.eye(4)
    about[:3, 3] = middle
    turned = about @ turned @ np.linalg.inv(about)
    points = space.grid.points(np.moveaxis(np.indices(shape), 0, -1))
    pairs = []
    for matrix in (turned, np.linalg.inv(turned)):
        index = space.grid.indices(transform_points(matrix, points)) - np.moveaxis(np.indices(shape), 0, -1)
        pairs.append(torch.from_numpy(np.moveaxis(index, -1, 0)).float()[None])
    ball = (np.linalg.norm(points - middle, axis=-1) < 24).astype(np.float32)
    image = torch.from_numpy(ball)[None, None]
    seen = WorkingPair(image, image, None, space.grid, np.eye(4), np.eye(4))
    physical = to_physical(fields.FieldPair(*pairs, "svf", 0.0), seen)
    inside = points[ball > 0][::50]
    np.testing.assert_allclose(physical.forward.map_points(inside), transform_points(turned, inside), atol=0.05)
    np.testing.assert_allclose(physical.forward.matrix, turned, atol=0.05)
    assert np.abs(physical.forward.displacement).max() < 6  # the field itself: 30 mm at the corners
