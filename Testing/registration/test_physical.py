"""From voxels to millimetres: fields fade beyond their grid, stay inverse there, and do not fold at any corner."""

import numpy as np
import pytest
import torch
from conftest import turn

from SymRegistrationLib import fields
from SymRegistrationLib.geometry import folds
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.registration import physical
from SymRegistrationLib.registration.physical import faded, refined, to_physical
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
    found = to_physical(pair, space_of((28, 30, 32)))
    rng = np.random.default_rng(SEED)
    points = found.forward.grid.points(rng.uniform(0, 1, (3000, 3)) * (np.array(found.forward.grid.shape) - 1))
    apart = np.linalg.norm(found.inverse.map_points(found.forward.map_points(points)) - points, axis=1)
    assert apart.mean() < 0.1 and apart.max() < 1.5, (apart.mean(), apart.max())  # mm; the voxel is 2 mm


def test_a_lattice_of_few_nodes_is_refined_along_the_same_curves():
    """Splines through the nodes are exact on quadratics; what comes out is the map in the finer grid's voxels."""
    grid = Grid.centred((16, 18, 20), 2.0, (5, -10, 20), turn((1, 1, 0), 15))
    x, y, z = fields.identity(grid.shape)[0] / 20
    u = torch.stack([x * x - 0.3 * y, 0.5 * y * z, z * z - x])[None].repeat(2, 1, 1, 1, 1)
    fine, over = refined(u, grid)
    assert over.shape == (21, 24, 26)  # a third more steps an axis
    np.testing.assert_allclose(over.corners(), grid.corners(), atol=1e-9)
    steps = [torch.linspace(0, n - 1, m) / 20 for n, m in zip(grid.shape, over.shape)]
    x, y, z = torch.meshgrid(*steps, indexing="ij")
    truth = torch.stack([x * x - 0.3 * y, 0.5 * y * z, z * z - x])
    voxels = truth * torch.tensor([(m - 1) / (n - 1) for n, m in zip(grid.shape, over.shape)]).view(3, 1, 1, 1)
    inner = (..., *[slice(2, -2)] * 3)
    torch.testing.assert_close(fine[0][inner], voxels[inner], atol=1e-5, rtol=0)
    assert refined(torch.zeros(2, 3, 115, 115, 115), Grid.centred((115, 115, 115), 2.0, (0, 0, 0)))[1].shape[0] == 115


def test_a_finer_lattice_keeps_both_directions_closer_together(monkeypatch):
    """Half of what linear interpolation between the nodes of a rough field costs; the nodes themselves stay."""
    pair, space = flow((28, 30, 32), 3.0, 2.0), space_of((28, 30, 32))
    fine = to_physical(pair, space)
    monkeypatch.setattr(physical, "ENOUGH_NODES", 0)
    coarse = to_physical(pair, space)
    assert np.prod(fine.forward.grid.shape) == pytest.approx(
        (4 / 3) ** 3 * np.prod(coarse.forward.grid.shape), rel=0.05
    )
    points = space.grid.points(np.random.default_rng(SEED).uniform(2, 25, (5000, 3)))
    apart = [
        np.linalg.norm(p.inverse.map_points(p.forward.map_points(points)) - points, axis=1).mean()
        for p in (fine, coarse)
    ]
    print("apart, mm", apart)
    assert apart[0] < 0.85 * apart[1]


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


@pytest.mark.parametrize("slab", [200_000, 3 * 25 * 26])
def test_the_search_for_folds_finds_what_all_determinants_find(slab, monkeypatch):
    """All at once and three layers at a time, which is how large fields are looked at."""
    monkeypatch.setattr(folds, "SLAB", slab)
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
    found = to_physical(fields.FieldPair(*pairs, "svf", 0.0), seen)
    inside = points[ball > 0][::50]
    np.testing.assert_allclose(found.forward.map_points(inside), transform_points(turned, inside), atol=0.05)
    np.testing.assert_allclose(found.forward.matrix, turned, atol=0.05)
    assert np.abs(found.forward.displacement).max() < 6  # the field itself: 30 mm at the corners
