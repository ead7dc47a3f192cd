"""Synthetic pairs: the true map is true, it is invertible, and everything follows from the seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from SymRegistrationLib.fields import identity, inverse_consistency, jacobian_determinant, warp
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.registration import working_grid
from SymRegistrationLib.training.appearance import normalised, random_contrast
from SymRegistrationLib.training.synthetic import (
    Draw,
    LabelMap,
    Synthesis,
    label_map,
    make_pair,
    random_poses,
    random_shapes,
    voxel_pose,
)

SIZE = 48


def inside(u: torch.Tensor) -> torch.Tensor:
    """(1, 1, D, H, W) bool: where a map ends inside the grid."""
    y = identity(u.shape[2:]) + u
    return ((y >= 0) & (y <= u.shape[2] - 1)).all(1, keepdim=True)


def nested(size: int = 64) -> LabelMap:
    """Thick nested shells and a bar that breaks their symmetry, FreeSurfer-like numbers: 507 outside, brain within."""
    z, y, x = (identity((size,) * 3)[0] - (size - 1) / 2) / size
    radius = (z**2 + (1.3 * y) ** 2 + (1.6 * x) ** 2).sqrt()
    labels = torch.zeros(size, size, size, dtype=torch.int32)
    for value, limit in ((507, 0.46), (3, 0.36), (2, 0.22)):
        labels[radius < limit] = value
    labels[(radius < 0.36) & (x > 0.04)] += 39  # 41, 42: the other side
    labels[(y > 0.05) & (z > 0.1) & (radius < 0.34)] = 16
    return label_map(labels, 2.0, "nested")


def dice(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    """Mean over labels that both show."""
    scores = [
        2 * ((a == k) & (b == k) & where).sum() / (((a == k) & where).sum() + ((b == k) & where).sum())
        for k in torch.unique(a).tolist()
        if k and (b == k).any()
    ]
    return float(torch.stack(scores).mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_true_map_carries_labels_onto_labels_both_ways(seed):
    """Two nearest-neighbour looks at thick labels: what is missing to 1 are boundary voxels."""
    pair = make_pair(nested(), Synthesis(shape=(SIZE,) * 3, spacing=3.0, shift=20.0), seed)
    for moved, kept, u in (
        (pair.moving_labels, pair.fixed_labels, pair.fixed_to_moving),
        (pair.fixed_labels, pair.moving_labels, pair.moving_to_fixed),
    ):
        there = warp(moved.float(), u, "nearest", "zeros")
        after, before = (dice(kept, x, inside(u)) for x in (there, moved))
        print(f"seed {seed}: Dice {before:.3f} -> {after:.3f}")
        assert after > 0.85 and after > before + 0.2


def test_without_warp_the_true_map_is_the_pose():
    """Closed form: an affine about the middle of the grid."""
    s = Synthesis(shape=(SIZE,) * 3, spacing=3.0, warp=0.0)
    pair = make_pair(nested(), s, 5)
    pose_f, pose_m = random_poses(s, Draw(5))
    matrix = voxel_pose(pose_m @ torch.linalg.inv(pose_f), s).float()
    x = identity(s.shape)
    expected = torch.einsum("ij,njdhw->nidhw", matrix[:3, :3], x) + matrix[:3, 3].view(1, 3, 1, 1, 1) - x
    assert torch.allclose(pair.fixed_to_moving, expected, atol=1e-3)


def test_poses_span_what_was_asked_for():
    s = Synthesis(rotation=120.0, shift=50.0, scale=0.2)
    angles, lengths, sizes = [], [], []
    for seed in range(200):
        f, m = random_poses(s, Draw(seed))
        relative = (m @ torch.linalg.inv(f)).numpy()
        u, stretch, vt = np.linalg.svd(relative[:3, :3])
        angles.append(np.degrees(np.arccos(np.clip((np.trace(u @ vt) - 1) / 2, -1, 1))))
        sizes.append(np.log(stretch.prod()) / 3)
        lengths.append(np.linalg.norm(relative[:3, 3]))
    assert 110 < max(angles) < 125 and min(angles) < 10
    assert 40 < max(lengths) < 60
    assert 0.15 < max(np.abs(sizes)) < 0.27


@pytest.mark.parametrize("seed", range(4))
def test_maps_are_inverse_and_do_not_fold(seed):
    pair = make_pair(None, Synthesis(shape=(SIZE,) * 3, spacing=3.0, warp=9.0, shift=20.0), seed)
    error = inverse_consistency(pair.moving_to_fixed, pair.fixed_to_moving)[inside(pair.fixed_to_moving)]
    print(f"seed {seed}: inverse consistency mean {error.mean():.3f}, largest {error.max():.3f} voxels")
    assert error.mean() < 0.15
    assert jacobian_determinant(pair.fixed_to_moving).min() > 0


def test_a_seed_is_a_pair_and_another_seed_another():
    s = Synthesis(shape=(32,) * 3, spacing=4.0)
    one, same, other = (make_pair(nested(), s, seed) for seed in (7, 7, 8))
    for name in ("moving", "fixed", "moving_labels", "fixed_labels", "fixed_to_moving", "moving_to_fixed"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_skulls_are_kept_or_stripped():
    for share, expected in ((0.0, True), (1.0, False)):
        s = Synthesis(shape=(32,) * 3, spacing=4.0, strip=share, shift=0.0)
        pair = make_pair(nested(), s, 1)
        outside = pair.values.index(507)
        assert bool((pair.fixed_labels == outside).any()) is expected
        assert bool((pair.moving_labels == outside).any()) is expected


def test_contrasts_differ_or_agree_as_asked_and_sides_are_alike():
    s = Synthesis()
    values = (0, 2, 3, 16, 41, 42, 507)
    means, _ = random_contrast(values, s, Draw(3))
    assert means[1] == means[4] and means[2] == means[5]
    pairs = [
        make_pair(nested(), dataclasses.replace(s, shape=(32,) * 3, spacing=4.0, one_contrast=0.5), k)
        for k in range(12)
    ]
    assert 2 <= sum(pair.one_contrast for pair in pairs) <= 10


def test_two_people_have_labels_but_no_true_map():
    first, second = nested(), nested(56)
    extra = second.index.clone()
    extra[20:24, 20:24, 20:24] = len(second.values)
    second = LabelMap(extra, (*second.values, 900), 2.0, "other")
    pair = make_pair(first, Synthesis(shape=(32,) * 3, spacing=4.0, strip=0.0), 2, second)
    assert pair.fixed_to_moving is None and pair.moving_to_fixed is None
    assert pair.values == (0, 2, 3, 16, 41, 42, 507, 900)
    assert set(torch.unique(pair.fixed_labels).tolist()) <= set(range(7))


def test_scans_look_as_the_pipeline_presents_them():
    """The torch normalisation against working_grid.prepare on the same voxels."""
    pair = make_pair(nested(), Synthesis(shape=(SIZE,) * 3, spacing=3.0), 11)
    raw = 3000 * pair.fixed**1.3 + 17
    ours = normalised(raw)
    grid = Grid.centred((SIZE,) * 3, 3.0, (0, 0, 0))
    theirs = working_grid.prepare(Volume(raw[0, 0].numpy(), grid)).image
    assert (ours - theirs).abs().max() < 0.03
    assert float(ours.min()) == 0 and float(ours.max()) == 1


def test_shapes_have_classes_and_background_at_the_border():
    shapes = random_shapes(Synthesis(shape=(40, 48, 32)), Draw(1))
    assert shapes.index.shape == (40, 48, 32)
    assert len(torch.unique(shapes.index)) > 6
    assert float((shapes.index[0] == 0).float().mean()) > 0.9


def test_curriculum_shrinks_poses():
    full = Synthesis()
    assert full.at(0.0).rotation == 0 and full.at(1.0) == full and full.at(0.5).shift == 25.0


class Counted(TorchDispatchMode):
    """Counts torch's operations and the numbers that they write."""

    calls = written = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        self.calls += 1
        self.written += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


def test_making_a_pair_takes_a_bounded_work_per_voxel():
    """Guards against an accident: neither the operations nor the numbers written per voxel grow with the grid."""
    anatomy, per_voxel, calls = nested(), [], []
    for size in (32, 64):
        with Counted() as counted:
            make_pair(anatomy, Synthesis(shape=(size,) * 3, spacing=120 / size), 1)
        calls.append(counted.calls)
        per_voxel.append(counted.written / size**3)
    print("calls", calls, "numbers per voxel", per_voxel)
    assert per_voxel[1] < 1.2 * per_voxel[0] and calls[1] < 1.2 * calls[0]
