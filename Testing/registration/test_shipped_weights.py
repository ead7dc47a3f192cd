"""The weights that come with the package: whole, small, honest, and of use on a head they have never seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from SymRegistrationLib import fields, networks
from SymRegistrationLib.commands import demo
from SymRegistrationLib.geometry.grid import transform_points
from SymRegistrationLib.geometry.volumes import Volume, foreground, read_volume
from SymRegistrationLib.job import Options
from SymRegistrationLib.networks._base import pad_to
from SymRegistrationLib.networks._passes import GAIN, no_motion, similarity_force
from SymRegistrationLib.pipeline import register
from SymRegistrationLib.registration import inference, weights

SEED = 20261121
NAMES = networks.names()


def turned_head(degrees: float):
    """Colin27 twice, the second turned about an oblique axis and shifted by 20 mm, and where 400 of
    its points belong."""
    print("seed", SEED)
    full = read_volume(demo.find_images() / demo.MOVING)
    grid = full.grid.resampled(3.0)
    array = F.adaptive_avg_pool3d(torch.from_numpy(full.array.astype(np.float32))[None, None], grid.shape)[0, 0]
    volume = Volume(array.numpy(), grid, full.name)
    pose = demo.random_pose(volume, SEED)
    axis = np.array([0.6, -0.48, 0.64])
    matrix = np.eye(4)
    matrix[:3, :3] = demo.rotation(axis, degrees)
    matrix[:3, 3] = pose.centre - matrix[:3, :3] @ pose.centre + 20 * np.array([0.0, 0.6, -0.8])
    pose = replace(pose, matrix=matrix, degrees=degrees, millimetres=20.0)
    inside = np.argwhere(foreground(volume.array))
    chosen = np.random.default_rng(SEED).choice(len(inside), 400, replace=False)
    return volume, demo.posed(volume, pose, SEED), pose, volume.grid.points(inside[chosen])


def errors_mm(name: str, head, spacing: float | None = None) -> tuple[float, float, float]:
    """Mean distance from where the points belong: before, by the forward and by the inverse transform,
    from the headers."""
    fixed, moving, pose, points = head
    result = register(fixed, moving, Options(method=name, initial="none", spacing=spacing))
    true = transform_points(pose.matrix, points)
    before, after, back = (
        float(np.linalg.norm(a - b, axis=1).mean())
        for a, b in (
            (points, true),
            (result.forward.map_points(points), true),
            (result.inverse.map_points(true), points),
        )
    )
    print(f"{name}: {before:.1f} mm -> {after:.2f} mm, back {back:.2f} mm")
    assert result.metrics["quality"]["folded_percent"] < 0.01
    return before, after, back


@pytest.fixture(scope="module")
def head():
    """Turned by 25 degrees."""
    return turned_head(25.0)


def test_every_method_has_weights_and_together_they_are_small():
    files = {weights.find(name) for name in NAMES}
    assert len(files) == len(NAMES)
    assert sum(file.stat().st_size for file in (*files, weights.FOLDER / weights.SHARED)) <= 12e6


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_what_was_done(name):
    found = weights.load(weights.find(name), name)
    card = found.card
    assert card["sha256"] == found.sha256 and card["licence"] == "Apache-2.0"
    assert "16 label maps" in card["trained_on"]
    used = card["data"]["pool"]["label_maps"]
    assert not {f"labels_{number}.nii.gz" for number in (17, 18, 19, 20)} & set(used) and len(used) == 16
    assert card["training"]["steps"] > 0 and card["command"].startswith("symreg train")
    assert card["begun_from"]["sha256"] and found.path.with_suffix(".png").is_file()
    assert card["front"]["pose"]["steps"] > 0 and card["front"]["front"]["steps"] > 0
    judged = card["validation"]["final"]
    assert judged["dice"] > judged["dice_before"] + 0.02 and judged["folded"] == 0
    assert any("published" in line for line in card["limits"])


@pytest.mark.parametrize("inverted", [False, True], ids=["one contrast", "inverted contrast"])
@pytest.mark.parametrize("name", NAMES)
def test_a_turned_head_is_found_from_its_header_alone(name, inverted, head):
    """25 degrees and 20 mm, no pre-alignment: the mean error over the head falls from 32 mm to a few,
    in both contrasts."""
    if inverted:
        array = head[1].array
        inverse = np.where(array > 0.05 * array.max(), array.max() - array, 0).astype(np.float32)
        head = (head[0], replace(head[1], array=inverse), *head[2:])
    before, after, back = errors_mm(name, head, 3.0)  # coarser than the networks work at: a fifth of the time
    assert before > 25 and max(after, back) < 5.0


def test_a_head_turned_by_sixty_degrees_is_found_too():
    """The pose is the same in front of every method; turned so far, it needs the voxel that the networks work at,
    which scans of longer voxels get, too."""
    before, after, back = errors_mm("sm-gicnet", turned_head(60.0))
    assert before > 50 and max(after, back) < 6.0


@pytest.fixture(scope="module")
def warped_heads():
    """Colin27 at 3 mm bent in two ways: (moving, fixed, true map of the fixed scan's voxels, where the fixed scan shows
    something)."""
    print("seed", SEED)
    full = read_volume(demo.find_images() / demo.MOVING)
    image = F.adaptive_avg_pool3d(torch.from_numpy(full.array.astype(np.float32))[None, None], (60, 72, 60))
    image = pad_to(image / image.max(), (64, 80, 64))
    random = torch.Generator().manual_seed(SEED)
    bends = []
    for _ in range(2):
        v = fields.gaussian(torch.randn(1, 3, *image.shape[2:], generator=random), 8.0)
        bends.append(v * (3.0 / fields.square_sum(v).mean().sqrt()))
    to_moving, to_fixed = (fields.exponentiate(v) for v in bends)
    moving, fixed = (
        (fields.warp(image, u, padding="zeros") + 0.02 * torch.randn(image.shape, generator=random)).clamp(0, 1)
        for u in (to_moving, to_fixed)
    )
    return moving, fixed, fields.compose(fields.exponentiate(-bends[0]), to_fixed), fixed > 0.15


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_methods_own_levels_beat_the_plain_step_at_equal_passes(name, warped_heads):
    """Of the error of pose and matching, 2.1 voxels, the levels leave 1.5 to 1.73, the force times a fixed gain 1.77
    (1.83 in CAML's four passes)."""
    moving, fixed, true, seen = warped_heads
    network = inference.load_network(name, Options(method=name), torch.device("cpu"))
    frame, *met = network._met(moving, fixed)

    def error(u: torch.Tensor) -> float:
        return float(fields.square_sum(frame.through(u, 1) - true).sqrt()[seen].mean())

    state = no_motion(met[0])
    front = error(state.full()[0])
    for _ in range(network.inner.switches.passes):
        state = state.advanced(GAIN * similarity_force(*state.warped(*met)))
    gain, own = error(state.full()[0]), error(network.within(*met, frame).pair.fixed_to_moving)
    print(f"{name}: front {front:.3f}, fixed gain {gain:.3f}, own levels {own:.3f} voxels")
    assert own < 0.87 * front and own < 0.985 * gain < front
