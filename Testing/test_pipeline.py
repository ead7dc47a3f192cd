"""The whole stream on a real head moved by a known affine and a known smooth warp, and its promises."""

import errno
import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pairs
import pytest
import SimpleITK as sitk
import torch
from conftest import moved, movement, turn

from SymRegistrationLib import fields, pipeline
from SymRegistrationLib.geometry import itk_hdf5, transform_files, transforms
from SymRegistrationLib.geometry.grid import Grid, transform_points
from SymRegistrationLib.geometry.lattice import affine_displacement
from SymRegistrationLib.geometry.points import PointSet
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import Volume, write_volume
from SymRegistrationLib.job import InputError, Job, Options, RegistrationError
from SymRegistrationLib.jobs import register
from SymRegistrationLib.quality.schema import problems
from SymRegistrationLib.registration.extras import Extras
from SymRegistrationLib.registration.working_grid import prepare

SEED = 5
POSE = (turn((1, 0.5, -1), 60), (25, -30, 20), 1.07)
FAST = Options(preset="fast")
CENTRED = Options(preset="fast", initial="centre")


@pytest.fixture(scope="module")
def known(head):
    """(fixed, moving, truth): moving = the head; fixed = the head through warp and pose on an
    oblique anisotropic grid."""
    print("seed", SEED)
    pose = movement(head.grid.centre, *POSE)
    matrix = np.eye(4)
    matrix[:3, :3] = (
        np.linalg.inv(pose)[:3, :3] @ turn((0, 1, 0), 25) @ np.array([[0, 0, -3.0], [0, 2.6, 0], [4.2, 0, 0]])
    )
    matrix[:3, :3] *= np.array([4.2, 2.6, 3.0]) / np.linalg.norm(matrix[:3, :3], axis=0)
    shape = np.array((56, 84, 74))
    centre = transform_points(np.linalg.inv(pose), prepare(head).centroid)
    matrix[:3, 3] = centre - matrix[:3, :3] @ ((shape - 1) / 2)
    fixed_grid = Grid(tuple(shape), matrix)
    noise = torch.randn((1, 3, *shape), generator=torch.Generator().manual_seed(SEED))
    u = fields.gaussian(noise, (4.5, 7.0, 6.0))
    warp = (u * 9 / u.abs().max())[0].permute(1, 2, 3, 0).numpy()
    affine = affine_displacement(pose, fixed_grid).permute(1, 2, 3, 0).numpy()
    truth = DenseTransform(fixed_grid, np.ascontiguousarray(warp + affine))
    array = transforms.resample_through(head, truth, fixed_grid)
    noisy = array + np.random.default_rng(SEED).normal(0, 2, array.shape).astype(np.float32)
    return Volume(noisy, fixed_grid, "fixed"), head, truth


@pytest.fixture(scope="module")
def result(known):
    """The result, its progress, and whether the inputs stayed as they were."""
    fixed, moving, _ = known
    before, told = (fixed.array.copy(), moving.array.copy()), []
    done = pipeline.register(fixed, moving, FAST, progress=lambda *step: told.append(step))
    return done, told, np.array_equal(before[0], fixed.array) and np.array_equal(before[1], moving.array)


@pytest.fixture(scope="module")
def measured(known):
    """The same once more, with labels and landmarks to be measured."""
    fixed, moving, truth = known
    points = brain_points(fixed)[::500]
    names = tuple(map(str, range(len(points))))
    labels = Volume((moving.array > 60).astype(np.int32) + (moving.array > 110), moving.grid, "labels")
    extras = Extras(
        fixed_labels=Volume(transforms.resample_through(labels, truth, fixed.grid, "nearest"), fixed.grid, "labels"),
        moving_labels=labels,
        fixed_points=PointSet(points, names),
        moving_points=PointSet(truth.map_points(points), names),
    )
    return pipeline.register(fixed, moving, FAST, extras)


@pytest.fixture(scope="module")
def posed(known, tmp_path_factory):
    """Fast, from the true pose, for what needs no search."""
    pose = movement(known[1].grid.centre, *POSE)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(pose[:3, :3].ravel())
    transform.SetTranslation(pose[:3, 3])
    path = tmp_path_factory.mktemp("pose") / "pose.tfm"
    sitk.WriteTransform(transform, str(path))
    return Options(preset="fast", initial=str(path))


def brain_points(volume):
    """Content within 60 mm of the middle: beyond, muscle and air at the border of the view say little."""
    points = prepare(volume).inside
    return points[np.linalg.norm(points - points.mean(0), axis=1) < 60]


def mapping_error(transform, truth, fixed):
    points = brain_points(fixed)
    return np.linalg.norm(transform.map_points(points) - truth.map_points(points), axis=1)


def test_known_pose_and_warp_are_recovered(known, result):
    fixed, _, truth = known
    done = result[0]
    points = brain_points(fixed)
    aligned = np.linalg.norm(transform_points(done.transforms.matrix, points) - truth.map_points(points), axis=1)
    after = mapping_error(done.forward, truth, fixed)
    print(f"mean error {aligned.mean():.2f} mm after alignment, {after.mean():.2f} mm after syn")
    assert after.mean() < 0.7 and after.mean() < 0.3 * aligned.mean(), "the working grid has 4 mm"
    similarity = done.metrics["similarity"]
    assert similarity["before"] < similarity["aligned"] < similarity["after"]
    assert done.metrics["quality"]["folded_voxels"] == 0
    assert done.metrics["quality"]["ice_mean_mm"] < 0.2, "on a 4 mm working grid"


def test_forward_and_inverse_undo_each_other(known, result):
    fixed, _, _ = known
    points = brain_points(fixed)[::7]
    error = np.linalg.norm(result[0].inverse.map_points(result[0].forward.map_points(points)) - points, axis=1)
    assert error.mean() < 0.2 and np.percentile(error, 99) < 1.0


def test_exchange_exchanges(known, result):
    fixed, moving, _ = known
    back = pipeline.register(moving, fixed, FAST)
    points = prepare(fixed).inside[::5]
    difference = np.linalg.norm(back.inverse.map_points(points) - result[0].forward.map_points(points), axis=1)
    assert difference.mean() < 0.1 and np.percentile(difference, 99) < 0.6


def test_again_is_the_same_bit_by_bit_and_what_is_measured_changes_nothing(measured, result):
    assert np.array_equal(measured.forward.displacement, result[0].forward.displacement)
    assert np.array_equal(measured.inverse.displacement, result[0].inverse.displacement)


def test_inputs_stay_as_they_are(result):
    assert result[2]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_threads_and_random_numbers_as_they_were(fails, monkeypatch):
    inside = []

    def middle(*arguments):
        inside.append((torch.get_num_threads(), torch.initial_seed()))
        torch.rand(3)
        if fails:
            raise RuntimeError("it fails")

    monkeypatch.setattr(pipeline, "_register", middle)
    torch.manual_seed(SEED)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(RuntimeError) if fails else nullcontext():
        pipeline.register(None, None, Options(threads=threads + 1, seed=9))
    assert inside == [(threads + 1, 9)]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_progress_never_goes_back_and_ends_at_one(result):
    fractions = [fraction for _, fraction, _ in result[1]]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(fractions) > 8
    assert {"prepare", "align", "optimise", "output"} <= {stage for stage, _, _ in result[1]}


def test_landmarks_and_labels_are_measured(measured):
    metrics = measured.metrics
    assert metrics["landmarks"]["mean_after_mm"] < 2 < metrics["landmarks"]["mean_before_mm"]
    assert problems({**metrics, "schema": 1}) == []
    assert metrics["labels"]["mean_before"] < metrics["labels"]["mean_aligned"] < metrics["labels"]["mean_after"]
    assert set(metrics["labels"]["per_label"]) == {"1", "2"}


def test_a_mask_keeps_a_lesion_out(known, posed):
    """A bright lesion in one scan pulls the field; masked, it does not."""
    fixed, moving, truth = known
    centre = fixed.grid.indices(prepare(fixed).centroid)
    distance = np.linalg.norm((np.moveaxis(np.indices(fixed.grid.shape), 0, -1) - centre) * fixed.grid.spacing, axis=-1)
    lesion = distance < 16
    ill = Volume(np.where(lesion, 10, fixed.array), fixed.grid, "with lesion")
    inside = fixed.grid.points(np.argwhere(lesion))
    errors = []
    for mask in (None, distance > 20):
        forward = pipeline.register(ill, moving, posed, Extras(fixed_mask=mask)).forward
        errors.append(np.linalg.norm(forward.map_points(inside) - truth.map_points(inside), axis=1).mean())
    print(f"error inside the lesion: {errors[0]:.2f} mm, masked {errors[1]:.2f} mm")
    assert errors[1] < 0.8 * errors[0]


def test_identical_scans_give_the_identity_and_a_note():
    image = Volume(*pairs.scan(), "scan")
    done = pipeline.register(image, image, FAST)
    points = prepare(image).inside[::9]
    assert np.linalg.norm(done.forward.map_points(points) - points, axis=1).max() < 0.3
    assert any("same image" in note for note in done.metrics["notes"])


def test_a_memory_limit_coarsens_and_says_so(known, posed):
    fixed, moving, _ = known
    done = pipeline.register(fixed, moving, replace(posed, memory_gb=0.05))
    assert any("coarsened" in note for note in done.metrics["notes"])


def test_two_slices_are_registered(head):
    slab = Volume(head.array[30:32].copy(), head.grid.cropped((30, 0, 0), (32, *head.array.shape[1:])), "two slices")
    shift = movement((0, 0, 0), shift=(4, -6, 0))
    done = pipeline.register(slab, moved(slab, shift), Options(preset="fast", initial="rigid"))
    points = prepare(slab).inside
    error = np.linalg.norm(done.forward.map_points(points) - transform_points(shift, points), axis=1)
    assert np.median(error) < 2.0


@pytest.fixture(scope="module")
def small():
    """A small pair that lies askew in space."""
    askew = movement((0, 0, 0), turn((1, 2, 3), 33))
    return [moved(Volume(*pairs.scan(shift=shift), name), askew) for name, shift in (("fixed", 0.0), ("moving", 4.0))]


@pytest.fixture(scope="module")
def files(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for volume in small:
        write_volume(folder / f"{volume.name}.nii.gz", volume.array, volume.grid)
    return folder


@pytest.fixture(scope="module")
def done(small):
    """The result of the small pair, for what only writes."""
    return pipeline.register(*small, CENTRED)


@pytest.fixture
def nothing_computed(done, monkeypatch):
    """A job comes to its writing at once, with the result that is there."""
    monkeypatch.setattr(register, "register", lambda *_: done)


def job(files, out, **more):
    return Job(str(files / "fixed.nii.gz"), str(files / "moving.nii.gz"), str(out), options=CENTRED, **more)


def test_files_hold_what_memory_held(files, small, done, tmp_path):
    metrics = register.run(job(files, tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(metrics["files"].values()) | {"metrics.json"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert problems(metrics) == []
    forward = done.forward
    read = transform_files.physical(transform_files.read_transform(tmp_path / "out" / "forward.h5"), None)
    points = prepare(small[0]).inside
    assert np.linalg.norm(forward.map_points(points) - points, axis=1).mean() > 2
    # the files went through NIfTI's float32 header, so the working grid may lie a hair elsewhere
    np.testing.assert_allclose(read.map_points(points), forward.map_points(points), atol=0.2)
    assert Job.from_dict(metrics["job"]) == job(files, tmp_path / "out")


def test_a_label_map_in_the_place_of_a_scan_is_noted_and_the_other_way_round(files, small, nothing_computed, tmp_path):
    classes = (small[0].array > 200).astype(np.uint8)
    write_volume(tmp_path / "classes.nii.gz", classes, small[0].grid)
    labels, scans = str(tmp_path / "classes.nii.gz"), [str(files / f"{name}.nii.gz") for name in ("fixed", "moving")]
    swapped = replace(job(files, tmp_path / "o"), fixed=labels, fixed_labels=scans[0], moving_labels=scans[1])
    notes = register.run(swapped)["notes"]
    assert [note.split(" '")[0] for note in notes[:3]] == ["fixed image", "fixed labels", "moving labels"]
    assert "looks like a label map" in notes[0] and "look like a scan" in notes[1] and "look like a scan" in notes[2]
    right = replace(job(files, tmp_path / "o"), fixed_labels=labels, moving_labels=labels)
    assert not [note for note in register.run(right)["notes"] if "look" in note]


def test_a_killed_run_leaves_nothing_that_looks_finished(files, tmp_path):
    out = tmp_path / "out"
    text = job(files, out).to_json()
    code = (
        "import sys; from SymRegistrationLib.jobs import register as outputs; from SymRegistrationLib.job import Job;"
        "old = outputs.write_volume\n"
        "def slow(*a):\n    old(*a); print('writing', flush=True); import time; time.sleep(60)\n"
        "outputs.write_volume = slow; outputs.run(Job.from_json(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, text], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout.readline().strip() == b"writing"
    process.kill()
    process.wait()
    assert [p.name for p in out.iterdir() if not p.name.startswith(register.PARTIAL)] == []
    register.run(job(files, out, report=False))
    assert not list(out.glob(f"{register.PARTIAL}*")) and (out / "metrics.json").exists()


def test_a_failure_while_writing_removes_the_new_folder(files, nothing_computed, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(register, "write_volume", full)
    with pytest.raises(Exception, match="the disk is full"):
        register.run(job(files, tmp_path / "deep" / "out"))
    assert not (tmp_path / "deep" / "out").exists()


@pytest.mark.parametrize("written", [0, 3_000, 30_000])
def test_a_disk_that_fills_in_the_middle_of_a_transform_leaves_what_was_there(
    files, nothing_computed, tmp_path, monkeypatch, written
):
    """The writer of transforms gets so many bytes through; the result of before stays whole, a new folder goes."""

    class Full(io.FileIO):
        def write(self, block):
            if self.tell() + len(block) > written:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(block)

    old = tmp_path / "old"
    old.mkdir()
    for name in ("forward.h5", "metrics.json"):
        (old / name).write_text("of before")
    monkeypatch.setattr(itk_hdf5, "open", Full, raising=False)
    for out in (old, tmp_path / "new"):
        with pytest.raises(RegistrationError, match="the disk is full") as error:
            register.run(job(files, out, report=False))
        assert str(out) in error.value.message and "Free space" in error.value.hint
    assert sorted(path.name for path in old.iterdir()) == ["forward.h5", "metrics.json"]
    assert {path.read_text() for path in old.iterdir()} == {"of before"}
    assert not (tmp_path / "new").exists()


def test_a_dense_transform_that_would_not_fit_is_refused_before_any_work(files, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "register", None)
    small = replace(CENTRED, memory_gb=1e-3)
    for more in ({"dense": True}, {"transform_format": "nrrd"}):
        with pytest.raises(InputError, match="a dense transform on .* voxels needs about .* GB") as error:
            register.run(replace(job(files, tmp_path / "out", **more), options=small))
        assert "Leave --dense out" in error.value.hint
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


def test_unusable_output_folders_are_refused_before_any_work(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(register, "read_volume", None)
    with pytest.raises(InputError, match="is a file"):
        register.run(job(files, tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        register.check_output("/proc/nowhere/out")
    monkeypatch.setattr(Path, "exists", lambda path: False)  # a drive of Windows that is not there is its own parent
    with pytest.raises(InputError, match="not there"):
        register.check_output("Q:/out")
    monkeypatch.undo()
    assert os.path.exists(tmp_path / "file")


def test_scans_that_do_not_belong_together_are_not_called_registered(head):
    """An ellipsoid of smooth noise as large as a head: it can be laid onto the head, its inside does not fit."""
    print("seed", SEED)
    shape = np.array(head.array.shape)
    radius = np.linalg.norm((np.indices(shape).T - (shape - 1) / 2) / (0.45 * shape), axis=-1).T
    noise = torch.randn((1, 1, *shape), generator=torch.Generator().manual_seed(SEED))
    noise = fields.gaussian(noise, 2.0)[0, 0].numpy()
    body = (300 + 100 * noise / noise.std()).clip(60) * (radius < 1)
    done = pipeline.register(head, Volume(body.astype(np.float32), head.grid, "noise"), replace(FAST, spacing=6.0))
    verdict = done.metrics["verdict"]
    assert verdict["level"] == "FAIL" and not verdict["registered"]
    assert "NOT REGISTERED" in " ".join(verdict["reasons"])
