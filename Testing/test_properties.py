"""Laws that hold for any grid, field and transform; hypothesis looks for a counterexample.

Derandomised: every run tries the same examples; a failure prints the example. Long because all laws draw from the
same grids and fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from SymRegistrationLib import fields
from SymRegistrationLib.fields import FieldPair, inversion
from SymRegistrationLib.geometry import resampling, transform_files, transforms
from SymRegistrationLib.geometry.grid import Grid, canonical_axes, index_map, transform_points
from SymRegistrationLib.geometry.lattice import affine_displacement
from SymRegistrationLib.geometry.points import PointSet, paired, read_points, write_points
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import Volume, grid_of, read_volume, to_itk, write_volume
from SymRegistrationLib.job import Job, Options
from SymRegistrationLib.quality import metrics
from SymRegistrationLib.registration import alignment, working_grid

FAST = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
SLOW = settings(FAST, max_examples=12)
sizes = st.tuples(*[st.integers(3, 11)] * 3)
finite = st.floats(-1, 1, allow_nan=False)
seeds = st.integers(0, 2**31)


def turned(seed: int) -> np.ndarray:
    """(3, 3): any orthogonal matrix, turns and mirrors alike."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]


@st.composite
def grids(draw, least: int = 3, most: int = 11, fine: float = 0.3, coarse: float = 6.0) -> Grid:
    """Oblique, flipped, axes in any order, anisotropic, far from the origin."""
    shape = tuple(draw(st.integers(least, most)) for _ in range(3))
    spacing = np.array([draw(st.floats(fine, coarse)) for _ in range(3)])
    axes = draw(
        st.one_of(st.builds(turned, seeds), st.permutations(range(3)).map(lambda order: np.eye(3)[:, list(order)]))
    )
    signs = np.array([draw(st.sampled_from((-1, 1))) for _ in range(3)])
    matrix = np.eye(4)
    matrix[:3, :3] = axes * signs * spacing
    matrix[:3, 3] = [draw(st.floats(-400, 400)) for _ in range(3)]
    return Grid(shape, matrix)


def smooth(shape, size: float, seed: int, sigma: float = 3.0) -> torch.Tensor:
    """(1, 3, *shape) float64: a smooth random field, its longest component ``size`` voxels."""
    noise = torch.randn((1, 3, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = fields.gaussian(noise, sigma)
    return u * (size / u.abs().max())


def lattice(shape) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)


# ---------------------------------------------------------------------------------------------- geometry


@FAST
@given(grids(), seeds)
def test_index_to_point_and_back(grid, seed):
    index = np.random.default_rng(seed).uniform(-20, 30, (20, 3))
    np.testing.assert_allclose(grid.indices(grid.points(index)), index, atol=1e-7)
    again = Grid.from_itk(*grid.itk)
    assert again.same_as(grid, 1e-9) and again.shape == grid.shape
    assert grid.volume == pytest.approx(float(np.prod(grid.spacing) * np.prod(grid.shape)))


@FAST
@given(grids())
def test_voxels_lie_where_simpleitk_says(grid):
    array = np.arange(np.prod(grid.shape), dtype=np.float32).reshape(grid.shape)
    image = to_itk(array, grid)
    assert grid_of(image).same_as(grid, 1e-6)
    for index in ((0, 0, 0), (grid.shape[0] - 1, 0, 1), tuple(n - 1 for n in grid.shape)):
        theirs = [int(n) for n in index[::-1]]
        np.testing.assert_allclose(grid.points(index), image.TransformIndexToPhysicalPoint(theirs), atol=1e-7)
        assert image.GetPixel(theirs) == array[index]


@SLOW
@given(grids(), st.sampled_from((".nii.gz", ".nrrd", ".mha")), seeds)
def test_a_file_gives_back_voxels_and_place(tmp_path_factory, grid, ending, seed):
    path = tmp_path_factory.mktemp("file") / f"x{ending}"
    array = np.random.default_rng(seed).integers(-900, 900, grid.shape).astype(np.int16)
    write_volume(path, array, grid)
    again = read_volume(path)
    assert np.array_equal(again.array, array) and again.grid.same_as(grid, 2e-3)  # NIfTI stores float32 millimetres


@FAST
@given(grids(), st.tuples(*[st.integers(-3, 2)] * 3), st.tuples(*[st.integers(0, 4)] * 3), st.floats(0.1, 9))
def test_cropping_padding_and_resampling_stay_in_place(grid, start, more, millimetres):
    part = grid.cropped(start, np.add(grid.shape, more))
    np.testing.assert_allclose(part.points((0, 0, 0)), grid.points(start), atol=1e-9)
    wide = grid.padded(millimetres)
    inside = grid.indices(wide.corners())
    reach = (np.abs(inside - (np.asarray(grid.shape) - 1) / 2) - (np.asarray(grid.shape) - 1) / 2) * grid.spacing
    assert reach.min() >= millimetres - 1e-6
    np.testing.assert_allclose(
        wide.indices(grid.points((0, 0, 0))), np.round(wide.indices(grid.points((0, 0, 0)))), atol=1e-7
    )
    other = grid.resampled(millimetres)
    assert other.volume == pytest.approx(grid.volume) and np.allclose(other.centre, grid.centre, atol=1e-6)


@FAST
@given(grids(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_canonical_axes_do_not_depend_on_how_a_scan_is_stored(grid, order, flips):
    """Another order and direction of the axes in the file is the same scan."""
    stored = grid.axes[:, list(order)] * np.where(flips, -1, 1)
    here, there = canonical_axes(grid.axes), canonical_axes(stored)
    # At exactly 45 degrees two orders are equally good; either is right.
    if np.sort(np.abs(grid.axes).max(0))[0] > 0.75:
        np.testing.assert_allclose(here, there, atol=1e-12)


@FAST
@given(grids(), grids(), seeds)
def test_index_map_is_the_way_through_space(source, target, seed):
    between = np.eye(4)
    between[:3, :3] = turned(seed) * 1.3
    index = np.random.default_rng(seed).uniform(0, 9, (9, 3))
    np.testing.assert_allclose(
        transform_points(index_map(source, between, target), index),
        target.indices(transform_points(between, source.points(index))),
        atol=1e-6,
    )


# ---------------------------------------------------------------------------------------------- fields


@FAST
@given(sizes, st.tuples(*[st.integers(-2, 2)] * 3), seeds)
def test_a_whole_shift_moves_the_array_along_its_own_axes(shape, shift, seed):
    """All three sizes and shifts may differ, so an exchange or a flip of axes cannot pass."""
    image = torch.rand((1, 2, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = torch.tensor(shift, dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, *shape)
    at = [np.clip(np.arange(n) + s, 0, n - 1) for n, s in zip(shape, shift)]  # the border value goes on
    expected = image[:, :, at[0]][:, :, :, at[1]][:, :, :, :, at[2]]
    torch.testing.assert_close(fields.warp(image, u), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(fields.warp(image, u, mode="nearest"), expected, atol=0, rtol=0)


@FAST
@given(sizes, st.floats(0, 2), st.floats(0, 2), seeds)
def test_composition_is_one_map_after_the_other(shape, size, other, seed):
    """phi_first(phi_then(x)) point by point, where numpy interpolates the first field."""
    first, then = smooth(shape, size, seed), smooth(shape, other, seed + 1)
    points = lattice(shape) + np.moveaxis(then[0].numpy(), 0, -1)
    inside = np.clip(points, 0, np.asarray(shape) - 1)
    low = np.minimum(np.floor(inside).astype(int), np.asarray(shape) - 2)
    expected = np.zeros_like(points)
    for corner in np.ndindex(2, 2, 2):
        share = np.prod(np.where(corner, inside - low, 1 - inside + low), -1, keepdims=True)
        at = low + corner
        expected += share * np.moveaxis(first[0].numpy(), 0, -1)[at[..., 0], at[..., 1], at[..., 2]]
    found = np.moveaxis(fields.compose(first, then)[0].numpy(), 0, -1)
    np.testing.assert_allclose(lattice(shape) + found, points + expected, atol=1e-9)


@SLOW
@given(st.tuples(*[st.integers(14, 20)] * 3), st.floats(0.2, 2.0), seeds)
def test_a_diffeomorphism_and_its_inverse_are_nothing(shape, size, seed):
    v = smooth(shape, size, seed, sigma=4.0)
    u = fields.exponentiate(v)
    inner = (..., *(slice(4, n - 4) for n in shape))
    assert float(fields.jacobian_determinant(u).min()) > 0
    assert float(fields.inverse_consistency(u, fields.exponentiate(-v))[inner].max()) < 0.05
    found = inversion.invert(u)
    assert found.residual < 0.02
    assert float(fields.inverse_consistency(u, found.field)[inner].max()) < 0.05  # from both sides
    assert float(fields.inverse_consistency(found.field, u)[inner].max()) < 0.05


@SLOW
@given(st.tuples(*[st.integers(14, 18)] * 3), st.floats(0.2, 1.5), seeds)
def test_logarithm_undoes_the_exponential(shape, size, seed):
    v = smooth(shape, size, seed, sigma=4.0)
    again = fields.logarithm(fields.exponentiate(v), tolerance=1e-3)
    inner = (..., *(slice(4, n - 4) for n in shape))
    assert float((again - v)[inner].abs().max()) < 0.03


def affine_field(shape, matrix: np.ndarray) -> torch.Tensor:
    """(1, 3, *shape): voxel field of index -> matrix index, about the middle."""
    middle = (np.asarray(shape) - 1) / 2
    u = (lattice(shape) - middle) @ (matrix - np.eye(3)).T
    return torch.from_numpy(np.moveaxis(u, -1, 0)[None].copy())


@FAST
@given(sizes, st.lists(st.floats(-0.4, 0.4), min_size=9, max_size=9))
def test_the_jacobian_of_an_affine_field_is_its_determinant_everywhere(shape, numbers):
    matrix = np.eye(3) + np.reshape(numbers, (3, 3))
    found = fields.jacobian_determinant(affine_field(shape, matrix))
    np.testing.assert_allclose(found.numpy(), np.linalg.det(matrix), atol=1e-9)  # borders too


@FAST
@given(sizes, sizes, st.lists(finite, min_size=12, max_size=12))
def test_resizing_a_linear_field_is_exact(shape, other, numbers):
    """The same physical map on another lattice over the same corners: voxel values scale with the lattice."""
    matrix, shift = np.reshape(numbers[:9], (3, 3)), np.array(numbers[9:])
    step = (np.asarray(shape) - 1) / (np.asarray(other) - 1)
    u = torch.from_numpy(np.moveaxis(lattice(shape) @ matrix.T + shift, -1, 0)[None].copy())
    expected = ((lattice(other) * step) @ matrix.T + shift) / step
    np.testing.assert_allclose(np.moveaxis(fields.resize_field(u, other)[0].numpy(), 0, -1), expected, atol=1e-9)


@FAST
@given(sizes, seeds)
def test_exchange_is_its_own_inverse(shape, seed):
    u, back = smooth(shape, 2, seed), smooth(shape, 2, seed + 1)
    pair = FieldPair(u, back, "svf", 0.1)
    assert pair.swapped().fixed_to_moving is back and pair.swapped().swapped().fixed_to_moving is u


@FAST
@given(sizes, seeds, st.integers(0, 2), st.floats(0.5, 3))
def test_filters_know_no_direction_and_keep_constants(shape, seed, axis, sigma):
    image = torch.rand((1, 1, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        fields.gaussian(image.flip(axis + 2), sigma).flip(axis + 2), fields.gaussian(image, sigma)
    )
    torch.testing.assert_close(fields.gaussian(torch.ones_like(image), sigma), torch.ones_like(image))
    order = (0, 1, *((2, 3, 4)[axis:] + (2, 3, 4)[:axis]))
    torch.testing.assert_close(
        fields.gaussian(image.permute(order), sigma), fields.gaussian(image, sigma).permute(order)
    )


@FAST
@given(sizes, seeds, st.integers(0, 2))
def test_the_gradient_of_a_ramp_is_one_along_its_axis_only(shape, seed, axis):
    ramp = fields.identity(shape, dtype=torch.float64)
    for component in range(3):
        slope = fields.gradient(ramp[:, component : component + 1], axis)
        torch.testing.assert_close(slope, torch.full_like(slope, float(component == axis)))


# ---------------------------------------------------------------------------------------------- transforms


def dense(grid: Grid, seed: int, millimetres: float) -> DenseTransform:
    u = smooth(grid.shape, millimetres, seed, sigma=2.0)[0]
    return DenseTransform(grid, np.moveaxis(u.float().numpy(), 0, -1).copy())


@SLOW
@given(grids(4, 9), seeds, st.floats(0.1, 20), st.sampled_from(("h5", "nrrd", "nii.gz", "composite")))
def test_a_transform_file_maps_points_like_the_transform(tmp_path_factory, grid, seed, size, kind):
    """Written by us, read by ITK, mapped by ITK: the same millimetres."""
    folder = tmp_path_factory.mktemp("transform")
    transform = dense(grid, seed, size)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turned(seed), (3, -5, 7)
    path = folder / ("x.h5" if kind == "composite" else f"x.{kind}")
    transform_files.write_transform(path, transform, matrix if kind == "composite" else None)
    read = transform_files.read_transform(path)
    # Between voxels a composite interpolates what its affine leaves, which is as linear; on the voxels all are equal.
    index = np.random.default_rng(seed).uniform(0.01, np.asarray(grid.shape) - 1.01, (25, 3))
    points = grid.points(index)
    theirs = np.array([read.TransformPoint(p) for p in points.tolist()])
    np.testing.assert_allclose(theirs, transform.map_points(points), atol=2e-3)
    if kind != "composite":
        np.testing.assert_allclose(resampling.map_points(read, points), transform.map_points(points), atol=2e-3)
        again = transform_files.dense(read, grid)
        np.testing.assert_allclose(again.map_points(points), transform.map_points(points), atol=2e-3)


@FAST
@given(grids(4, 9), grids(4, 9), seeds)
def test_a_transform_on_another_grid_is_the_same_map(grid, other, seed):
    transform = dense(grid, seed, 5.0)
    points = other.points(lattice(other.shape))
    found = np.moveaxis(transform.on(other).numpy(), 0, -1)
    expected = transform.map_points(points.reshape(-1, 3)).reshape(points.shape) - points
    np.testing.assert_allclose(found, expected, atol=2e-3)


@FAST
@given(grids(5, 9), st.tuples(*[st.integers(-2, 2)] * 3), seeds)
def test_a_physical_shift_by_whole_voxels_moves_the_array(grid, shift, seed):
    """On an oblique, flipped grid of any axis order; our resampling and ITK's agree voxel by voxel."""
    array = np.random.default_rng(seed).integers(1, 900, grid.shape).astype(np.int16)
    vector = grid.matrix[:3, :3] @ np.asarray(shift, float)
    transform = DenseTransform(grid, np.broadcast_to(vector.astype(np.float32), (*grid.shape, 3)).copy())
    here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, grid.shape))
    there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, grid.shape))
    ours = transforms.resample_through(Volume(array, grid), transform, grid)
    theirs = resampling.resample_image(Volume(array, grid), transform.to_itk(), grid)
    labels = resampling.resample_labels(Volume(array, grid), transform.to_itk(), grid)
    for found in (ours, theirs, labels):
        assert np.array_equal(found[here], array[there])


@FAST
@given(grids(4, 8), st.lists(st.floats(-0.3, 0.3), min_size=9, max_size=9))
def test_the_jacobian_in_millimetres_does_not_see_the_grid(grid, numbers):
    matrix = np.eye(3) + np.reshape(numbers, (3, 3))
    points = grid.points(lattice(grid.shape)) - grid.centre
    transform = DenseTransform(grid, (points @ (matrix - np.eye(3)).T).astype(np.float32))
    np.testing.assert_allclose(transforms.jacobian_on(transform, grid), np.linalg.det(matrix), atol=2e-3)
    whole = np.eye(4)
    whole[:3, :3] = matrix
    np.testing.assert_allclose(
        np.moveaxis(affine_displacement(whole, grid).numpy(), 0, -1),
        grid.points(lattice(grid.shape)) @ (matrix - np.eye(3)).T,
        atol=2e-3,
    )


@SLOW
@given(grids(6, 9), seeds, st.floats(0.2, 1.0))
def test_points_carried_back_arrive_where_they_came_from(grid, seed, share):
    transform = dense(grid, seed, share * float(grid.spacing.min()))
    itk = transform.to_itk()
    index = np.random.default_rng(seed).uniform(1.5, np.asarray(grid.shape) - 2.5, (8, 3))
    points = grid.points(index)
    back, residual = resampling.invert_points(itk, transform.map_points(points))
    assert residual.max() < 2e-3
    if metrics.jacobian_map(transform).min() > 0.2:  # else another point may go to the same place
        np.testing.assert_allclose(back, points, atol=0.05)


@FAST
@given(seeds, st.floats(5, 170), st.tuples(*[st.floats(-80, 80)] * 3))
def test_two_halves_of_an_alignment_make_it_whole_and_exchange(seed, degrees, shift):
    axis = np.random.default_rng(seed).normal(size=3)
    axis /= np.linalg.norm(axis)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = math.radians(degrees)
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    matrix[:3, 3] = shift
    centre = np.array([10.0, -20.0, 30.0])
    half = alignment.split_midway(matrix, centre, "file")
    np.testing.assert_allclose(half.mid_to_moving @ np.linalg.inv(half.mid_to_fixed), matrix, atol=1e-6)
    other = alignment.split_midway(np.linalg.inv(matrix), transform_points(matrix, centre), "file")
    np.testing.assert_allclose(other.mid_to_fixed @ np.linalg.inv(other.mid_to_moving), matrix, atol=1e-6)


@SLOW
@given(grids(12, 16, 1.0, 3.0), grids(12, 16, 1.0, 3.0), seeds)
def test_the_working_grid_does_not_know_which_scan_is_fixed(fixed, moving, seed):
    moving = Grid(
        moving.shape,
        np.block(
            [
                [
                    moving.matrix[:3, :3],
                    (fixed.centre - moving.matrix[:3, :3] @ ((np.asarray(moving.shape) - 1) / 2))[:, None],
                ],
                [np.zeros((1, 3)), 1],
            ]
        ),
    )  # on the same place
    scans = [
        working_grid.prepare(Volume(np.random.default_rng(seed + k).uniform(1, 9, g.shape).astype(np.float32), g))
        for k, g in enumerate((fixed, moving))
    ]
    spacing = 0.7 * float(min(fixed.spacing.min(), moving.spacing.min()))
    one = working_grid.working_pair(*scans, np.eye(4), np.eye(4), working_grid.Layout(spacing))
    two = working_grid.working_pair(*scans[::-1], np.eye(4), np.eye(4), working_grid.Layout(spacing))
    assert one.grid.same_as(two.grid, 1e-6)
    assert torch.equal(one.fixed, two.moving) and torch.equal(one.moving, two.fixed)


# ---------------------------------------------------------------------------------------------- numbers and tables


@FAST
@given(sizes, seeds, st.sampled_from((3, 200, 2_000_000_000)))
def test_dice_is_symmetric_one_with_itself_and_blind_to_names(shape, seed, step):
    """Label numbers may be as large as they like, in no time and memory."""
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 4, shape).astype(np.int32) for _ in range(2))
    table = metrics.dice(a, b)
    assert table == metrics.dice(b, a)
    assert set(metrics.dice(a, a).values()) <= {1.0}
    names = np.array([0, 1, 2, 3], np.int64) * min(step, 700_000_000)
    renamed = metrics.dice(names[a].astype(np.int32), names[b].astype(np.int32))
    assert {int(names[n]): value for n, value in table.items()} == renamed
    for n, value in table.items():
        assert value == pytest.approx(2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()))


names = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), max_size=12).map(str.strip)


@FAST
@given(
    st.lists(st.tuples(names, st.tuples(*[st.floats(-5000, 5000)] * 3)), min_size=1, max_size=8),
    st.sampled_from((".csv", ".fcsv", ".mrk.json")),
)
def test_landmarks_survive_a_file_whatever_they_are_called(tmp_path_factory, rows, ending):
    path = tmp_path_factory.mktemp("points") / f"x{ending}"
    points = PointSet(np.array([p for _, p in rows]), tuple(name for name, _ in rows))
    write_points(path, points)
    again = read_points(path)
    np.testing.assert_allclose(again.points, points.points, atol=1e-6)
    assert again.labels == points.labels


@FAST
@given(st.integers(1, 9), seeds)
def test_named_landmarks_are_paired_in_any_order(count, seed):
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    points = random.normal(size=(count, 3))
    fixed = PointSet(points, tuple(f"P{k}" for k in range(count)))
    moving = PointSet(points[order] + 1, tuple(f"P{k}" for k in order))
    one, other = paired(fixed, moving)
    np.testing.assert_allclose(other.points - one.points, 1)
    assert one.labels == other.labels


paths = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=20).filter(
    str.strip
)


@FAST
@given(paths, paths, paths, st.integers(0, 2**63 - 1), st.one_of(st.none(), st.floats(0.01, 1e6)), st.booleans())
def test_a_job_is_the_same_after_json(fixed, moving, output, seed, spacing, composite):
    job = Job(
        fixed,
        moving,
        output,
        composite=composite,
        options=Options(seed=seed, spacing=spacing, method_options={"a": [1, None]}),
    )
    assert Job.from_json(job.to_json()) == job
    assert Job.from_dict(json.loads(json.dumps(dataclasses.asdict(job)))) == job


def test_the_written_composite_is_affine_then_grid(tmp_path: Path):
    """What ITK reads from a composite is two transforms whose sum is the dense one (not one hidden in the other)."""
    grid = Grid.centred((6, 7, 8), 3.0, (1, 2, 3))
    matrix = np.eye(4)
    matrix[:3, 3] = (5, 6, 7)
    transform_files.write_transform(tmp_path / "c.h5", dense(grid, 3, 2.0), matrix)
    read = sitk.CompositeTransform(transform_files.read_transform(tmp_path / "c.h5"))
    assert [read.GetNthTransform(k).GetName() for k in range(read.GetNumberOfTransforms())] == [
        "AffineTransform",
        "DisplacementFieldTransform",
    ]
