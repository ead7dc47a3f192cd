"""Several contrasts a side, from files to files: they drive one transform, on any grid, and are refused when they
cannot."""

import json

import numpy as np
import pairs
import pytest
import torch

from SymRegistrationLib import pipeline
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume, write_volume
from SymRegistrationLib.job import InputError, Job, Options
from SymRegistrationLib.registration import contrasts, solver
from SymRegistrationLib.registration.extras import Extras

GRID = Grid.centred((32, 34, 30), 4.0, (0, 0, 0))
FAST = Options(preset="fast", initial="none")


def known():
    """Fixed and moving contrasts, two a side, each without structure in one half, the true displacement in voxels, and
    the fixed scan."""
    moving, fixed, u = pairs.known_pair(GRID.shape, size=2.5, sigma=5.0)
    half = torch.linspace(0, 1, GRID.shape[2]).gt(0.5).float()
    flat = 0.4 * (fixed > 0.1), 0.4 * (moving > 0.1)
    sides = [
        [torch.where(part > 0, image, blank) for part in (half, 1 - half)]
        for image, blank in zip((fixed, moving), flat)
    ]
    return sides, u, fixed


def volume(image, grid=GRID):
    return Volume((1000 * image[0, 0].numpy()).astype(np.float32), grid, "contrast")


@pytest.mark.parametrize(
    "one, available, taken, told",
    [
        (True, ("lncc", "mind"), "lncc", 0),
        (False, ("lncc", "mind"), "mind", 1),
        (True, ("mse",), "mse", 0),
        (False, ("mse", "lncc"), "mse", 0),
    ],
)
def test_auto_takes_a_similarity_that_the_optimiser_has(monkeypatch, one, available, taken, told):
    monkeypatch.setattr(solver, "shows_one_contrast", lambda *_: one)
    notes = []
    assert solver._similarity("auto", (None, None), None, notes, available) == taken and len(notes) == told


def test_every_contrast_drives_the_transform():
    sides, u, fixed = known()
    index = (fixed[0, 0] > 0.1).nonzero().double().numpy()
    true = GRID.points(index + u[0].permute(1, 2, 3, 0)[tuple(index.astype(int).T)].double().numpy())
    errors = []
    for further in (False, True):
        (first, second), (third, fourth) = ((volume(image) for image in side) for side in sides)
        extras = Extras(fixed_contrasts=(second,), moving_contrasts=(fourth,)) if further else Extras()
        done = pipeline.register(first, third, FAST, extras)
        found = done.forward.map_points(GRID.points(index))
        errors.append(float(np.linalg.norm(found - true, axis=1).mean()))
    print("mean error in mm with one contrast and with two:", errors)
    assert errors[1] < 0.9 * errors[0]


@pytest.fixture
def files(tmp_path):
    sides, _, _ = known()
    for name, side in zip(("fixed", "moving"), sides):
        for k, image in enumerate(side, 1):
            write_volume(tmp_path / f"{name}{k}.nii.gz", volume(image).array, GRID)
    return tmp_path


def words(folder, *more):
    scans = [str(folder / f"{side}1.nii.gz") for side in ("fixed", "moving")]
    return ["register", *scans, "-o", str(folder / "out"), "--preset", "fast", "--initial", "none", *more]


def test_the_command_line_takes_contrasts_and_the_job_can_be_repeated(files, capsys):
    more = [f"--{side}-contrast={files / side}2.nii.gz" for side in ("fixed", "moving")]
    assert main(words(files, *more, "--contrast-weights", "1,3", "--no-report")) == 0
    metrics = json.loads((files / "out/metrics.json").read_text())
    job = Job.from_dict(metrics["job"])
    assert job.fixed_contrasts == [str(files / "fixed2.nii.gz")] and contrasts.shares(job.options, 2) == (0.25, 0.75)
    assert job.inputs["moving_2"] == str(files / "moving2.nii.gz")
    assert Job.from_json(job.to_json()) == job


def test_a_result_is_only_gone_on_from_with_the_contrasts_that_made_it(files, capsys):
    more = [f"--{side}-contrast={files / side}2.nii.gz" for side in ("fixed", "moving")]
    assert main(words(files, *more, "--no-report")) == 0
    changed = volume(known()[0][0][1])
    changed.array[0, 0, 0] += 1
    write_volume(files / "fixed2.nii.gz", changed.array, GRID)
    assert main(["update", str(files / "out")]) == 2
    assert "is not the scan that was registered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--fixed-contrast", "{}/fixed2.nii.gz"], "1 further contrasts of the fixed side and 0"),
        (["--fixed-contrast", "{}/none.nii.gz", "--moving-contrast", "{}/moving2.nii.gz"], "fixed 2 '"),
        (
            ["--fixed-contrast={}/fixed2.nii.gz", "--moving-contrast={}/moving2.nii.gz", "--contrast-weights=1"],
            "2 numb",
        ),
        (["--contrast-weights=1,2"], "Give 1 numbers"),
        (
            ["--fixed-contrast={}/fixed2.nii.gz", "--moving-contrast={}/moving2.nii.gz", "--method=rigid"],
            "one contrast",
        ),
        (["--fixed-contrast={}/fixed2.nii.gz", "--moving-contrast={}/moving2.nii.gz", "--uncertainty=2"], "fast"),
    ],
)
def test_contrasts_that_cannot_be_used_are_refused_before_any_work(files, capsys, more, told):
    assert main(words(files, *(word.format(files) for word in more))) == 2
    assert told in capsys.readouterr().err
    assert not (files / "out").exists()


def test_a_contrast_that_lies_elsewhere_is_refused(files, capsys):
    sides, _, _ = known()
    write_volume(files / "far.nii.gz", volume(sides[0][1]).array, Grid.centred(GRID.shape, 4.0, (900, 0, 0)))
    more = [f"--fixed-contrast={files}/far.nii.gz", f"--moving-contrast={files}/moving2.nii.gz"]
    assert main(words(files, *more)) == 2
    assert "contrast 2 of the fixed side shows nothing" in capsys.readouterr().err


def test_a_job_with_contrasts_of_another_kind_is_refused():
    with pytest.raises(InputError, match="'fixed_contrasts' in the job must be a list of texts"):
        Job.from_dict({"fixed": "a", "moving": "b", "output": "o", "fixed_contrasts": [3]})
