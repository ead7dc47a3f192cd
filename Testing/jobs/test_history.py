"""Steps of a result on disk: gone on from, undone, done again, replayed; and what is said when that cannot be."""

import json
import shutil

import numpy as np
import pairs
import pytest

from SymRegistrationLib.commands import cli
from SymRegistrationLib.geometry.volumes import write_volume
from SymRegistrationLib.job import InputError, Job, Options
from SymRegistrationLib.jobs import history
from SymRegistrationLib.jobs.memory import Memory
from SymRegistrationLib.jobs.register import run
from SymRegistrationLib.registration.state import State

STEPS = ("register", "update", "repair")


def moved(folder):
    """Where the transform in ``folder`` takes some points, mm."""
    import SimpleITK as sitk

    transform = sitk.ReadTransform(str(folder / "forward.h5"))
    return np.array([transform.TransformPoint(p) for p in ((5.0, -3, 10), (15.0, 5, 0), (-10.0, 10, 25))])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three steps, made by the command line; and what each step's transform did."""
    place = tmp_path_factory.mktemp("steps")
    for name, shift in (("fixed", 0.0), ("moving", 6.0)):
        array, grid = pairs.scan(shift=shift)
        write_volume(place / f"{name}.nii.gz", array, grid)
    (place / "p.csv").write_text("label,x,y,z\na,5,-3,10\nb,20,-3,10\n")
    (place / "q.csv").write_text("label,x,y,z\na,11,2,10\nb,26,-3,6\n")
    out, took = place / "out", []
    quick = ["-q", "--no-report"]
    first = ["register", str(place / "fixed.nii.gz"), str(place / "moving.nii.gz"), "-o", str(out)]
    for arguments in (
        [*first, "--preset", "fast", "--initial", "none"],
        ["update", str(out), "--fixed-points", str(place / "p.csv"), "--moving-points", str(place / "q.csv")],
        ["repair", str(out), "--sphere=5,-3,10,12", "--rim-mm", "14"],
    ):
        assert cli.main([*arguments, *quick]) == 0
        took.append(moved(out))
    return place, out, took


def test_each_step_is_kept_with_its_numbers(made, capsys):
    _, out, _ = made
    steps = history.read(out)
    assert [s["step"] for s in steps.steps] == list(STEPS) and steps.current == 3
    assert all(s["numbers"]["folded_voxels"] == 0 for s in steps.steps)
    assert steps.steps[1]["numbers"]["mean_landmark_error_mm"] < 2
    assert sorted(p.name for p in out.glob("state-*")) == [f"state-{k}.safetensors" for k in (1, 2, 3)]
    assert all(p.stat().st_size < 1e6 for p in out.glob("state-*"))
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1, "whoever may read the result may go on from it"
    assert cli.main(["history", str(out)]) == 0
    table = capsys.readouterr().out
    assert ">3" in table and all(step in table for step in STEPS)


def test_undo_and_redo_bring_each_step_back(made, tmp_path, capsys):
    _, out, took = made
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for command, k in (("undo", 2), ("undo", 1), ("redo", 2), ("redo", 3)):
        assert cli.main([command, str(copy), "-q"]) == 0
        assert history.read(copy).current == k
        assert np.abs(moved(copy) - took[k - 1]).max() < 0.05  # the state keeps fields to 0.002 voxel
    before = sorted(p.name for p in copy.iterdir())
    assert cli.main(["redo", str(copy)]) == 2 and "nothing to redo" in capsys.readouterr().err
    assert sorted(p.name for p in copy.iterdir()) == before


def test_undo_without_a_step_before_and_after_the_scan_changed_is_said(made, tmp_path, capsys):
    place, out, took = made
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    record = json.loads((copy / "history.json").read_text())
    array, grid = pairs.scan(shift=5.0)
    write_volume(tmp_path / "other.nii.gz", array, grid)
    for step in record["steps"]:
        step["job"]["moving"] = str(tmp_path / "other.nii.gz")
    (copy / "history.json").write_text(json.dumps(record))
    assert cli.main(["undo", str(copy)]) == 2
    assert "is not the scan that was registered" in capsys.readouterr().err
    np.testing.assert_array_equal(moved(copy), took[2])  # the last good result stays
    record["current"] = 1
    (copy / "history.json").write_text(json.dumps(record))
    assert cli.main(["undo", str(copy)]) == 2 and "nothing to undo" in capsys.readouterr().err
    assert cli.main(["undo", str(tmp_path)]) == 2 and "holds no history" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["out", "."])
def test_relative_paths_are_found_from_any_folder(made, tmp_path, monkeypatch, output):
    _, out, _ = made
    record = json.loads((out / "history.json").read_text())
    for step in record["steps"]:
        step["job"].update(
            fixed="fixed.nii.gz",
            moving="scans/moving.nii.gz",
            output=output,
            fixed_labels="gone.nii",
            moving_labels="gone.nii",
        )
    place = tmp_path / "elsewhere"
    (place / "scans").mkdir(parents=True)
    (place / output).mkdir(exist_ok=True)
    for name in ("fixed.nii.gz", "scans/moving.nii.gz"):
        (place / name).write_text("")
    (place / output / "history.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    job = history.continuing_job(f"elsewhere/{output}", None, {}, {})
    assert job.fixed == str(place / "fixed.nii.gz") and job.moving == str(place / "scans/moving.nii.gz")
    assert job.fixed_labels == "gone.nii"  # nowhere: it is named as it was given
    monkeypatch.chdir(place)
    assert history.continuing_job(output, None, {}, {}).fixed == "fixed.nii.gz"


def test_a_new_step_after_undo_replaces_what_was_undone(made, tmp_path):
    _, out, _ = made
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    history.undo(copy)
    history.undo(copy)
    run(history.continuing_job(str(copy), None, {"sphere": "5,-3,10,12", "report": False}, {}))
    steps = history.read(copy)
    assert [s["step"] for s in steps.steps] == ["register", "repair"] and steps.current == 2
    assert sorted(p.name for p in copy.glob("state-*")) == ["state-1.safetensors", "state-2.safetensors"]


def test_an_update_lets_slide_what_did_not_before(made, tmp_path):
    place, out, _ = made
    array, grid = pairs.scan()
    half = np.zeros(array.shape, np.uint8)
    half[: len(half) // 2] = 1
    write_volume(tmp_path / "half.nii.gz", half, grid)
    masks = [f"--{side}-sliding-mask={tmp_path / 'half.nii.gz'}" for side in ("fixed", "moving")]
    again = tmp_path / "again"
    assert cli.main(["update", str(out), "-o", str(again), *masks, "--sliding", "auto", "--no-report", "-q"]) == 0
    told = json.loads((again / "metrics.json").read_text())
    print("sliding:", told["sliding"])
    assert told["sliding"]["regions"] == 1 and 0 < told["sliding"]["surface_percent"] < 50
    assert told["quality"]["folded_voxels"] == 0
    assert json.loads((out / "metrics.json").read_text())["sliding"] is None


def test_a_history_is_replayed_elsewhere(made, tmp_path):
    _, out, took = made
    again = tmp_path / "again"
    assert cli.main(["register", "--job", str(out / "history.json"), "-o", str(again), "-q"]) == 0
    assert [s["step"] for s in history.read(again).steps] == list(STEPS)
    assert np.abs(moved(again) - took[2]).max() < 0.05


def test_alignment_first_then_registration_from_there(made, tmp_path):
    place, _, _ = made
    scans = str(place / "fixed.nii.gz"), str(place / "moving.nii.gz")
    out = str(tmp_path / "out")
    linear = Options(method="rigid", preset="fast", initial="none")
    run(Job(*scans, out, report=False, keep_state=True, transform_format="h5", options=linear))
    metrics = run(history.continuing_job(out, None, {}, {}))
    assert metrics["method"] == "syn" and metrics["similarity"]["after"] > metrics["similarity"]["aligned"]
    assert [s["step"] for s in history.read(out).steps] == ["register", "update"]
    history.undo(out)
    import SimpleITK as sitk

    both = [sitk.ReadTransform(str(tmp_path / "out" / f"{name}.h5")) for name in ("forward", "inverse")]
    assert all(t.IsLinear() for t in both)
    point = (12.0, -7.0, 30.0)
    assert np.abs(np.subtract(both[1].TransformPoint(both[0].TransformPoint(point)), point)).max() < 1e-9


def test_tfm_is_for_linear_methods_only(made, tmp_path):
    place, _, _ = made
    scans = str(place / "fixed.nii.gz"), str(place / "moving.nii.gz")
    with pytest.raises(InputError, match="only a linear transform can be stored as .tfm"):
        run(Job(*scans, str(tmp_path / "out"), transform_format="tfm"))
    options = Options(method="affine", preset="fast", initial="none")
    run(Job(*scans, str(tmp_path / "out"), report=False, transform_format="tfm", options=options))
    assert (tmp_path / "out" / "inverse.tfm").read_text().startswith("#Insight Transform File")


@pytest.mark.parametrize("damage", [b"", b"no state at all", "cut"])
def test_a_damaged_state_is_said(made, tmp_path, damage):
    _, out, _ = made
    path = tmp_path / "state.safetensors"
    content = (out / "state-2.safetensors").read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else damage)
    with pytest.raises(InputError, match="could not be read"):
        State.load(path)


def test_a_state_is_read_as_it_was_written(made, tmp_path):
    _, out, _ = made
    state = State.load(out / "state-3.safetensors")
    state.save(tmp_path / "again.safetensors")
    again = State.load(tmp_path / "again.safetensors")
    assert (
        bool((again.halves == state.halves).all()) and again.grid.same_as(state.grid) and again.inputs == state.inputs
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"region": "m.nii.gz"}, "only a finished registration can be repaired"),
        ({"start_from": "d", "sphere": "1,2,3"}, "sphere is '1,2,3'"),
        ({"start_from": "d", "sphere": "1,2,3,4", "region": "m"}, "a region and a sphere"),
        ({"start_from": "d", "rim_mm": 0.0}, "rim_mm is 0.0"),
        ({"options": {"landmark_weight": 2.0}}, "landmark_weight is 2.0"),
        ({"options": {"landmark_tolerance": "2,x"}}, "landmark_tolerance is '2,x'"),
        ({"options": {"stiffness": 0.0}}, "stiffness is 0.0"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        Job.from_dict({"fixed": "f", "moving": "m", "output": "o", **changes})


def test_a_process_that_stays_goes_on_from_memory_while_the_files_hold(made, tmp_path):
    place, _, _ = made
    scans = {name: str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")}
    for name, path in scans.items():
        shutil.copy(place / f"{name}.nii.gz", path)
    options = Options(preset="fast", initial="none")
    job = Job(**scans, output=str(tmp_path / "out"), options=options, report=False, keep_state=True)
    memory = Memory()
    run(job, memory=memory)
    first = memory.state(history.read(job.output).state(1))
    assert first.finished is not None and memory.scan(scans["fixed"], "scan") is first.finished.volumes[0]
    going_on = history.continuing_job(job.output, None, {"sphere": "5,-3,10,12"}, {"stiffness": 3.0})
    run(going_on, memory=memory)
    second = memory.state(history.read(job.output).state(2))
    assert second.finished is not None and second.finished.space is first.finished.space
    there = moved(tmp_path / "out")
    history.undo(job.output, memory=memory)
    assert memory.state(history.read(job.output).state(1)).finished is not None
    run(history.continuing_job(job.output, str(tmp_path / "anew"), {"sphere": "5,-3,10,12"}, {"stiffness": 3.0}))
    assert np.abs(moved(tmp_path / "anew") - there).max() < 0.1
    # The same voxels written again are the same scan; others are refused, as ever.
    shutil.copy(place / "fixed.nii.gz", tmp_path / "again.nii.gz")
    assert memory.scan(tmp_path / "again.nii.gz", "scan") is first.finished.volumes[0]
    array, grid = pairs.scan(shift=2.0)
    write_volume(scans["moving"], array, grid)
    with pytest.raises(InputError, match="is not the scan that was registered"):
        run(history.continuing_job(job.output, None, {"sphere": "5,-3,10,12"}, {}), memory=memory)
