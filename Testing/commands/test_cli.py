"""The command line as a person and as a program meet it: help, results, refusals, and being stopped."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commandlines
import numpy as np
import pairs
import pytest
import SimpleITK as sitk

from SymRegistrationLib.commands import steering
from SymRegistrationLib.commands.arguments import SUBCOMMANDS, available_subcommands
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.console import Console
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import PointSet, read_points, write_points
from SymRegistrationLib.geometry.volumes import read_volume, write_volume

ROOT = Path(__file__).parents[2]
GRID = Grid.centred((32, 36, 28), 4.0, (10, -20, 30))
MOVED = Grid.centred((32, 36, 28), 4.0, (18, -26, 24))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A small pair with labels and landmarks; the moving one is bent and lies 12 mm away."""
    folder = tmp_path_factory.mktemp("scans")
    moving, fixed, u = (t[0].numpy() for t in pairs.known_pair(GRID.shape, size=2.0))
    for name, image, grid in (("fixed", fixed[0], GRID), ("moving", moving[0], MOVED)):
        write_volume(folder / f"{name}.nii.gz", (1000 * image).astype(np.int16), grid)
        write_volume(folder / f"{name}_labels.nii.gz", np.digitize(image, (0.1, 0.5, 0.7)).astype(np.uint8), grid)
    index = np.random.default_rng(2).uniform(0.35, 0.65, (9, 3)) * GRID.shape
    at = index.round().astype(int)
    names = tuple(f"P{k}" for k in range(9))
    write_points(folder / "fixed.csv", PointSet(GRID.points(at), names))
    write_points(folder / "moving.mrk.json", PointSet(MOVED.points(at + u[:, at[:, 0], at[:, 1], at[:, 2]].T), names))
    return folder


@pytest.fixture(scope="module")
def run(scans, tmp_path_factory):
    """One real run through the command line, with everything."""
    out = tmp_path_factory.mktemp("run") / "out"
    words = [
        "register",
        "fixed.nii.gz",
        "moving.nii.gz",
        "--fixed-labels",
        "fixed_labels.nii.gz",
        "--moving-labels",
        "moving_labels.nii.gz",
        "--fixed-points",
        "fixed.csv",
        "--moving-points",
        "moving.mrk.json",
    ]
    words = [str(scans / word) if "." in word else word for word in words]
    done = _symreg(*words, "-o", str(out), "--preset", "fast", "--initial", "centre", "--json")
    assert done.returncode == 0, done.stderr
    return out, [json.loads(line) for line in done.stdout.splitlines()], words


def _symreg(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "SymRegistrationLib", *words], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_a_run_improves_everything_and_speaks_json(run):
    out, events, _ = run
    assert commandlines.RUN_FILES | {"report.html"} == {p.name for p in out.iterdir()}
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions) and fractions[-1] == 1 and len(fractions) > 5
    assert events[-1]["event"] == "result" and events[-1]["result"] == json.loads((out / "metrics.json").read_text())
    metrics = events[-1]["result"]
    assert metrics["labels"]["mean_after"] > metrics["labels"]["mean_aligned"] > metrics["labels"]["mean_before"]
    assert metrics["landmarks"]["mean_after_mm"] < 2 < metrics["landmarks"]["mean_before_mm"]
    assert metrics["quality"]["folded_voxels"] == 0


def test_scans_that_do_not_belong_together_end_with_code_1_and_their_outputs(tmp_path, capsys):
    """Two ellipsoids of unrelated structure, one pair by hand and the same in a batch."""
    for k in range(2):
        image = pairs.phantom(GRID.shape, seed=pairs.SEED + 5 * k)[0, 0].numpy()
        write_volume(tmp_path / f"{k}.nii.gz", (1000 * image).astype(np.int16), GRID)
    (tmp_path / "pairs.csv").write_text("fixed,moving,id\n0.nii.gz,1.nii.gz,wrong\n0.nii.gz,0.nii.gz,right\n")
    words = ["--preset", "fast", "--initial", "none", "--no-report"]
    assert (
        main(["register", *(str(tmp_path / f"{k}.nii.gz") for k in range(2)), "-o", str(tmp_path / "o"), *words]) == 1
    )
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert metrics["verdict"]["level"] == "FAIL" and not metrics["verdict"]["registered"]
    seen = capsys.readouterr()
    assert (tmp_path / "o/forward.h5").exists() and "NOT REGISTERED" in seen.out and "NOT" not in seen.err
    assert steering.told(metrics, "o", Console(quiet=True)) == 1  # -q: why, and where the outputs are
    seen = capsys.readouterr()
    assert not seen.out and re.fullmatch("symreg: .*NOT REGISTERED: .* The outputs are in o.\n", seen.err)
    assert main(["batch", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "b"), *words, "--workers", "1"]) == 1
    rows = {row["id"]: row for row in csv.DictReader((tmp_path / "b/summary.csv").open(encoding="utf-8"))}
    assert rows["wrong"]["status"] == "failed" and "NOT REGISTERED" in rows["wrong"]["reason"]
    assert rows["right"]["status"] == "done" and (tmp_path / "b/wrong/forward.h5").exists()


def test_apply_and_evaluate_agree_with_the_run(run, scans, tmp_path, capsys):
    out, events, _ = run
    metrics = events[-1]["result"]
    transform = ["--transform", str(out / "forward.h5")]
    assert (
        main(
            [
                "apply",
                str(scans / "moving.nii.gz"),
                *transform,
                "--reference",
                str(scans / "fixed.nii.gz"),
                "-o",
                str(tmp_path / "w.nii.gz"),
            ]
        )
        == 0
    )
    difference = (
        read_volume(tmp_path / "w.nii.gz").array.astype(float) - read_volume(out / "warped_moving.nii.gz").array
    )
    inside = difference[3:-3, 3:-3, 3:-3]  # at the rim the two fade into the outside in different ways
    assert np.abs(inside).max() <= 1 and np.abs(difference).mean() < 0.5
    assert (
        main(["apply", str(scans / "moving.mrk.json"), "--points", *transform, "-o", str(tmp_path / "p.csv"), "-q"])
        == 0
    )
    error = np.linalg.norm(read_points(tmp_path / "p.csv").points - read_points(scans / "fixed.csv").points, axis=1)
    assert error.mean() == pytest.approx(metrics["landmarks"]["mean_after_mm"], rel=0.3)
    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                *transform,
                "--inverse",
                str(out / "inverse.h5"),
                "--fixed",
                str(scans / "fixed.nii.gz"),
                "--fixed-labels",
                str(scans / "fixed_labels.nii.gz"),
                "--moving-labels",
                str(scans / "moving_labels.nii.gz"),
                "-o",
                str(tmp_path / "e.json"),
            ]
        )
        == 0
    )
    assert "label 1" in capsys.readouterr().out
    scored = json.loads((tmp_path / "e.json").read_text())
    assert scored["labels"]["mean_after"] == pytest.approx(metrics["labels"]["mean_after"], abs=1e-6)
    assert scored["quality"]["folded_voxels"] == 0 and scored["quality"]["ice_mean_mm"] < 0.5


def test_a_job_is_repeated_from_its_metrics(run, tmp_path):
    out, events, _ = run
    again = tmp_path / "again"
    assert main(["register", "--job", str(out / "metrics.json"), "-o", str(again), "--quiet"]) == 0
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(p / "warped_moving.nii.gz"))) for p in (out, again))
    assert np.abs(first.astype(int) - second).max() <= 1


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "words", [["--help"], ["register", "--help"], ["apply", "--help"], ["evaluate", "--help"], ["demo", "-h"], []]
)
def test_help_teaches_without_torch(words):
    code = (
        f"import sys\nfrom SymRegistrationLib.commands.cli import main\ntry:\n    main({words!r})\n"
        "finally:\n    assert not {'torch', 'SimpleITK', 'numpy'} & set(sys.modules)\n"
        "    assert len(sys.modules) < 250, len(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: symreg" in done.stdout and ("example" in done.stdout)


def test_only_commands_that_exist_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert (f"\n    {name} " in text) == (name in available_subcommands())


def test_methods_lists_the_registry(capsys):
    from SymRegistrationLib import networks

    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name in ["syn", "affine", "rigid", "similarity", *networks.names()]:
        assert f"{name}: " in text
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["result"]["methods"]
    assert [m["name"] for m in methods] == ["syn", "affine", "rigid", "similarity", *networks.names()] and all(
        m["publication"] and m["licence"] for m in methods
    )


# ---------------------------------------------------------------------------------------------- refusals


def _bad_files(folder, scans):
    """Name -> a file that is no usable scan."""
    good = sitk.ReadImage(str(scans / "fixed.nii.gz"))
    array = sitk.GetArrayFromImage(good)
    (folder / "text.nii.gz").write_text("this is no image")
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "cut.nii.gz").write_bytes((scans / "fixed.nii.gz").read_bytes()[:4000])
    sitk.WriteImage(good, str(folder / "cut.nii"))
    os.truncate(folder / "cut.nii", 4000)
    (folder / "nodicom").mkdir()
    sitk.WriteImage(good[:, :, 5], str(folder / "flat.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([good, good]), str(folder / "series.nii.gz"))
    sitk.WriteImage(sitk.Compose([good, good, good]), str(folder / "vector.nrrd"))
    sitk.WriteImage(good * 0 + 7, str(folder / "constant.nii.gz"))
    nan = np.full(array.shape, np.nan, np.float32)
    write_volume(folder / "nan.nrrd", nan, GRID)
    header = (
        b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 8 8 8\n"
        b"encoding: raw\nendian: little\n"
        b"space directions: (1,0,0) (0,1,0) (0,1,0)\nspace origin: (0,0,0)\n\n"
    )
    (folder / "singular.nrrd").write_bytes(header + bytes(range(256)) * 4)
    write_volume(folder / "nomask.nii.gz", np.zeros(GRID.shape, np.uint8), GRID)
    write_volume(folder / "farmask.nii.gz", np.ones(GRID.shape, np.uint8), Grid.centred(GRID.shape, 4.0, (5000, 0, 0)))
    write_volume(folder / "nolabels.nii.gz", array.astype(np.float32) + 0.5, GRID)
    (folder / "short.csv").write_text("x,y,z\n1,2,3\n")
    (folder / "nan.csv").write_text("x,y,z\n" + "1,2,nan\n" * 9)
    (folder / "columns.csv").write_text("a,b,c\n1,2,3\n")
    (folder / "job.json").write_text("{oops")
    (folder / "job2.json").write_text('{"fixed": "f", "moving": "m", "output": "o", "speed": 3}')


BAD = [
    ("{bad}/none.nii.gz {moving}", "none.nii.gz' does not exist"),
    ("{fixed} {bad}/none.nii.gz", "moving '"),
    ("{bad}/text.nii.gz {moving}", "text.nii.gz' could not be read"),
    ("{bad}/empty.nii.gz {moving}", "empty.nii.gz'"),
    ("{bad}/cut.nii.gz {moving}", "cut.nii.gz' is cut off"),
    ("{fixed} {bad}/cut.nii", "cut.nii' is cut off"),
    ("{bad}/nodicom {moving}", "no DICOM series"),
    ("{bad}/flat.nii.gz {moving}", "flat.nii.gz' is 2-D"),
    ("{fixed} {bad}/series.nii.gz", "series.nii.gz' is 4-D"),
    ("{bad}/vector.nrrd {moving}", "vector.nrrd' is 3-D with 3 values"),
    ("{bad}/constant.nii.gz {moving}", "constant (7"),
    ("{bad}/nan.nrrd {moving}", "no finite voxel"),
    ("{bad}/singular.nrrd {moving}", "singular.nrrd'"),
    ("{fixed} {moving} --fixed-mask {bad}/nomask.nii.gz", "nomask.nii.gz' is empty"),
    ("{fixed} {moving} --moving-mask {bad}/farmask.nii.gz", "wholly outside"),
    ("{fixed} {moving} --fixed-mask {bad}/none.nii.gz", "fixed mask '"),
    ("{fixed} {moving} --fixed-labels {fixed}", "Add --moving-labels"),
    ("{fixed} {moving} --fixed-labels {bad}/nolabels.nii.gz --moving-labels {fixed}", "not whole numbers"),
    ("{fixed} {moving} --fixed-points {points}", "Add --moving-points"),
    ("{fixed} {moving} --fixed-points {points} --moving-points {bad}/short.csv", "has 9 landmarks"),
    ("{fixed} {moving} --fixed-points {points} --moving-points {bad}/nan.csv", "not finite"),
    ("{fixed} {moving} --fixed-points {points} --moving-points {bad}/columns.csv", "no coordinate columns"),
    ("{fixed} {moving} --guide-with-points", "needs landmarks"),
    ("{fixed} {moving} --method magic", "no method 'magic'. Known: syn"),
    ("{fixed} {moving} --method hsyn --weights {bad}/none.safetensors", "none.safetensors' does not exist"),
    ("{fixed} {moving} --initial {moving}", "initial transform '"),
    ("{fixed} {moving} --initial {bad}/text.nii.gz", "text.nii.gz'"),
    ("{fixed} {moving} --initial sideways", "initial transform 'sideways' does not exist"),
    ("{fixed} {moving} --device toaster", "device 'toaster'"),
    ("{fixed} {moving} --device cuda:77", "cuda:77"),
    ("{fixed} {moving} --spacing -2", "spacing is -2"),
    ("{fixed} {moving} --threads 0", "threads is 0"),
    ("{fixed} {moving} --uncertainty 1", "at least 2 runs"),
    ("{fixed} {moving} --effort slow", "invalid choice: 'slow'"),
    ("{fixed} {moving} --composite --transform-format nrrd", "composite"),
    ("{fixed} {moving} --option speed", "not NAME=VALUE"),
    ("{fixed}", "missing: MOVING"),
    ("{fixed} {moving} extra", "unrecognized arguments: extra"),
    ("--job {bad}/job.json", "is not JSON"),
    ("--job {bad}/job2.json", "unknown field 'speed'"),
    ("{fixed} {moving} --job {bad}/job.json", "Give one of them"),
]


@pytest.fixture(scope="module")
def bad(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    _bad_files(folder, scans)
    return folder


@pytest.mark.parametrize("words, part", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(bad, scans, tmp_path, capfd, words, part):
    names = {
        "bad": bad,
        "fixed": scans / "fixed.nii.gz",
        "moving": scans / "moving.nii.gz",
        "points": scans / "fixed.csv",
    }
    out = tmp_path / "out"
    assert main(["register", *words.format(**names).split(), "-o", str(out), "--preset", "fast"]) == 2
    seen = capfd.readouterr()
    assert seen.out == "" and seen.err.startswith("symreg: error: ") and seen.err.count("\n") == 1, seen.err
    assert part in seen.err and "Traceback" not in seen.err
    assert not out.exists() and list(tmp_path.iterdir()) == []


def test_scans_that_do_not_meet_in_space(scans, tmp_path, capfd):
    image = sitk.ReadImage(str(scans / "moving.nii.gz"))
    image.SetOrigin((5000.0, 0, 0))
    sitk.WriteImage(image, str(tmp_path / "far.nii.gz"))
    words = ["register", str(scans / "fixed.nii.gz"), str(tmp_path / "far.nii.gz"), "-o", str(tmp_path / "out")]
    assert main([*words, "--preset", "fast", "--initial", "none"]) == 2
    assert "overlap" in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["{file}", "{file}/below", "/proc/nothing"])
def test_an_output_that_cannot_be_a_folder(scans, tmp_path, capfd, output):
    (tmp_path / "file").write_text("x")
    output = output.format(file=tmp_path / "file")
    assert main(["register", str(scans / "fixed.nii.gz"), str(scans / "moving.nii.gz"), "-o", output]) == 2
    seen = capfd.readouterr().err
    assert seen.count("\n") == 1 and output.split("/below")[0] in seen


def test_a_full_disk_is_said_before_the_work(scans, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert (
        main(["register", str(scans / "fixed.nii.gz"), str(scans / "moving.nii.gz"), "-o", str(tmp_path / "out")]) == 2
    )
    assert "full" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_errors_are_events_too(capsys):
    assert main(["register", "nowhere.nii", "x", "-o", "y", "--json"]) == 2
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {
        "event": "error",
        "message": "fixed 'nowhere.nii' does not exist.",
        "hint": "Check the path.",
        "exit_code": 2,
    }
    assert seen.err == "symreg: error: fixed 'nowhere.nii' does not exist. Check the path.\n"


def test_a_bug_is_one_line_and_a_traceback_only_when_asked(monkeypatch, capsys):
    from SymRegistrationLib.jobs import methods as catalogue

    monkeypatch.setattr(catalogue, "catalogue", lambda: 1 / 0)
    assert main(["methods"]) == 1
    assert (
        capsys.readouterr().err
        == "symreg: error: ZeroDivisionError: division by zero. Run it again with --debug and report what it prints.\n"
    )
    assert main(["methods", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_is_said_in_words(monkeypatch, capsys):
    from SymRegistrationLib.jobs import methods as catalogue

    def greedy():
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"
        )

    monkeypatch.setattr(catalogue, "catalogue", greedy)
    assert main(["methods"]) == 1
    assert "not enough memory" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- being stopped


def _started(scans, out, until):
    """A run in its own process, and the moment its stage ``until`` begins; the optimisation would take long."""
    settings = ["--preset", "thorough", "--spacing", "2"] if until == "optimise" else ["--preset", "fast"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "SymRegistrationLib",
            "register",
            str(scans / "fixed.nii.gz"),
            str(scans / "moving.nii.gz"),
            "-o",
            str(out),
            *settings,
            "--initial",
            "centre",
            "--json",
        ],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if json.loads(line).get("stage") == until:
            return process
    raise AssertionError(f"the run ended before '{until}': {process.communicate()[1]}")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_and_leaves_nothing(scans, tmp_path, number, code):
    process = _started(scans, tmp_path / "out", "optimise")
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code
    assert err == "symreg: error: stopped; nothing half-written is left behind.\n"
    assert json.loads(out.splitlines()[-1])["exit_code"] == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["optimise", "write"])
def test_a_killed_run_leaves_no_result_and_the_next_run_sweeps(scans, tmp_path, stage):
    out = tmp_path / "out"
    process = _started(scans, out, stage)
    time.sleep(0.05 if stage == "write" else 0)
    process.kill()
    process.communicate(timeout=600)
    left = [p.name for p in out.iterdir()] if out.exists() else []
    assert all(name.startswith(".") for name in left) or "metrics.json" in left
    again = commandlines.register(scans / "fixed.nii.gz", scans / "moving.nii.gz", out, "--no-report")
    assert main(again) == 0
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


# ---------------------------------------------------------------------------------------------- the shell


def test_exit_codes_reach_the_shell():
    assert os.name != "posix" or _symreg("nonsense").returncode == 2
