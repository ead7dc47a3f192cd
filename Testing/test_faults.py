"""What goes wrong around a run: kills at every moment of writing, full and closed disks, no memory, a jumping clock.

After each: no half-written file under a final name, the message says what happened, the same command finishes with the
same result. ``Testing/benchmarks/kill_resume.py`` does more of it, at random moments.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import bad_inputs
import commandlines
import numpy as np
import pytest
from safetensors.numpy import load_file

from SymRegistrationLib.geometry.transform_files import physical, read_transform
from SymRegistrationLib.geometry.volumes import read_map, read_volume
from SymRegistrationLib.jobs.register import PARTIAL, sweep

ROOT = Path(__file__).parents[1]
FILES = commandlines.RUN_FILES
KILL, TERM, INT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
#: Those of them whose content :func:`content` reads.
COMPARED = {name for name in FILES if name.endswith((".h5", ".nii.gz", "metrics.json"))}


def drive(cases: list[dict], result_of: list[str] | None = None) -> list[dict]:
    """Every case in a child of one process; see fault_driver."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "Testing" / "fault_driver.py")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        input=json.dumps({"result_of": result_of, "cases": cases}),
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    return bad_inputs.make(folder)


def register(scans, out, *more: str) -> list[str]:
    return commandlines.register(scans["fixed"], scans["moving"], out, "--no-report", *more)


def numbered(found) -> set[str]:
    """File names, every step of the history under the name of the first: a rerun of a finished run is one more step."""
    return {re.sub(r"^state-\d+", "state-1", name) for name in found}


def names(folder: Path) -> set[str]:
    return numbered(path.name for path in folder.iterdir())


def content(folder: Path) -> dict:
    """Name -> what a file says, times and machine left out."""
    found = {}
    for path in folder.iterdir():
        if path.name.endswith(".h5"):
            found[path.name] = physical(read_transform(path), None).displacement
        elif path.name.endswith(".nii.gz"):
            found[path.name] = read_map(path, "output").array
        elif path.name == "metrics.json":
            metrics = json.loads(path.read_text())
            found[path.name] = {key: metrics[key] for key in ("quality", "alignment", "similarity", "files", "notes")}
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = np.array_equal(value, other[name]) if isinstance(value, np.ndarray) else value == other[name]
        assert same, name


def one_line(stderr: str) -> str:
    # HDF5 may add words of its own when a process ends whose file could not be closed.
    lines = [line for line in stderr.splitlines() if line.strip() and not line.lstrip().startswith(("HDF5", "L,"))]
    assert len(lines) == 1 and lines[0].startswith("symreg: error: "), stderr
    return lines[0]


# ---------------------------------------------------------------------------------------------- register

HALVES = [{"kind": "signal", "number": KILL, "at": "half", "count": k} for k in (1, 2, 4, 6)]
RENAMES = [{"kind": "signal", "number": KILL, "at": "replace", "count": k} for k in (1, 2, 4, 7)]
#: The first rename is the state's, still in the hidden folder; those of the results follow.
STOPS = [
    {"kind": "signal", "number": number, "at": "replace", "count": k} for number, k in ((TERM, 2), (INT, 3), (TERM, 7))
]
HALF_STOPS = [{"kind": "signal", "number": number, "at": "half", "count": k} for number, k in ((TERM, 1), (INT, 5))]
CLOSED = [{"kind": "errno", "number": errno.EACCES, "at": "replace", "count": k} for k in (1, 4)]
FULL = [{"kind": "fsize", "bytes": n} for n in (500, 4_000, 60_000, 105_000)]
READ_ONLY = [{"kind": "errno", "number": errno.EROFS, "at": "mkdtemp", "count": 1}]
FAULTS = [*HALVES, *RENAMES, *STOPS, *HALF_STOPS, *CLOSED, *FULL, *READ_ONLY]


@pytest.fixture(scope="module")
def struck(scans, tmp_path_factory):
    """Folder, answer and second answer per fault; the second run has none. Beside it the undisturbed result."""
    folder = tmp_path_factory.mktemp("struck")
    cases, again = [], []
    for k, fault in enumerate(FAULTS):
        words = register(scans, folder / str(k))
        cases.append(
            {"words": words, "fault": fault, "cached": True, "keep": [str(folder / str(k)), str(folder / f"{k}.kept")]}
        )
        again.append({"words": words, "cached": True})
    answers = drive([*cases, *again], register(scans, folder / "whole"))
    answers, again = answers[: len(cases)], answers[len(cases) :]
    places = [folder / f"{k}.kept" for k in range(len(cases))]
    states = [sorted(path.name for path in place.iterdir()) if place.exists() else None for place in places]
    kept = [content(place) if state else {} for place, state in zip(places, states)]
    return (
        folder,
        content(folder / "whole"),
        {
            json.dumps(fault): (folder / str(k), answers[k], states[k], kept[k], again[k])
            for k, fault in enumerate(FAULTS)
        },
    )


def after(struck, fault):
    return struck[1], *struck[2][json.dumps(fault)]


@pytest.mark.parametrize(
    "fault",
    FAULTS,
    ids=[f"{f['kind']}-{f.get('at', '')}-{f.get('number', f.get('bytes'))}-{f.get('count', '')}" for f in FAULTS],
)
def test_after_any_fault_of_writing_nothing_is_half_and_a_rerun_is_the_undisturbed_run(struck, fault):
    whole, folder, answer, state, kept, again = after(struck, fault)
    for name, value in kept.items():  # what bears a final name is what belongs there
        assert_same({name: value}, {name: whole[name]})
    assert "metrics.json" not in kept or set(kept) == COMPARED
    assert again["code"] == 0, again
    assert_same(content(folder), whole)
    assert names(folder) == FILES  # and no hidden folder of the struck run


def test_a_kill_leaves_hidden_folders_at_most(struck):
    for fault in HALVES:
        _, _, answer, state, _, _ = after(struck, fault)
        assert answer["signal"] == KILL and all(name.startswith(PARTIAL) for name in state)


def test_a_stop_between_the_renames_lets_them_finish_and_before_them_leaves_nothing(struck):
    for fault in STOPS:
        _, _, answer, state, _, _ = after(struck, fault)
        assert answer["code"] == 128 + fault["number"] and numbered(state) == FILES
        assert "stopped" in one_line(answer["stderr"])
    for fault in HALF_STOPS:
        _, _, answer, state, _, _ = after(struck, fault)
        assert answer["code"] == 128 + fault["number"] and state is None
        assert "stopped; nothing half-written is left behind" in one_line(answer["stderr"])


def test_a_full_a_closed_and_a_read_only_disk_are_told_and_leave_nothing(struck):
    for fault in FULL:
        _, _, answer, state, _, _ = after(struck, fault)
        assert answer["code"] == 1 and state is None, answer
        assert "writing to" in one_line(answer["stderr"]) and "Free space" in answer["stderr"]
    for fault in CLOSED:
        _, _, answer, state, _, _ = after(struck, fault)
        assert answer["code"] == 1 and state is None and "Permission denied" in one_line(answer["stderr"])
    _, _, answer, state, _, _ = after(struck, READ_ONLY[0])
    assert answer["code"] == 2 and not state and "Read-only file system" in one_line(answer["stderr"])


def test_faults_while_an_earlier_result_is_replaced(scans, tmp_path):
    """Never a mixture that says that it is whole: metrics.json goes first and comes last."""
    faults = [RENAMES[2], CLOSED[1], FULL[2], HALVES[0]]
    cases = [{"words": register(scans, tmp_path / str(k)), "fault": None, "cached": True} for k in range(4)]
    cases += [
        {"words": register(scans, tmp_path / str(k), "--seed", "5"), "fault": fault, "cached": True}
        for k, fault in enumerate(faults)
    ]
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "mine.txt").write_text("not of symreg")
    answers = drive(cases, register(scans, tmp_path / "whole"))
    assert [answer["code"] for answer in answers[:4]] == [0] * 4
    assert answers[4]["signal"] == KILL and not (tmp_path / "0" / "metrics.json").exists()
    assert answers[5]["code"] == 1 and not (tmp_path / "1" / "metrics.json").exists()
    for k in (2, 3):  # nothing had been moved: the earlier result is untouched
        assert json.loads((tmp_path / str(k) / "metrics.json").read_text())["job"]["options"]["seed"] == 0
    assert (tmp_path / "3" / "mine.txt").read_text() == "not of symreg"


def test_a_folder_in_the_place_of_a_result(scans, tmp_path):
    (tmp_path / "out" / "jacobian.nii.gz").mkdir(parents=True)
    (answer,) = drive(
        [{"words": register(scans, tmp_path / "out"), "cached": True}], register(scans, tmp_path / "whole")
    )
    assert answer["code"] == 1 and "there is a folder of that name" in one_line(answer["stderr"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["jacobian.nii.gz"]


def test_what_killed_runs_left_is_swept_but_not_what_others_write(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid(), os.getpid()):
        (tmp_path / f"{PARTIAL}{pid}-x").mkdir()
    sweep(tmp_path)
    # One of this process's own number is of an earlier one: containers repeat them.
    assert [path.name for path in tmp_path.iterdir()] == [f"{PARTIAL}{os.getppid()}-x"]


def test_no_memory_is_told_and_a_jumping_clock_changes_nothing(scans, tmp_path):
    cases = [
        {
            "words": register(scans, tmp_path / "none", "--spacing", "0.7"),
            "fault": {"kind": "memory", "bytes": 48 << 20},
        },
        {"words": register(scans, tmp_path / "plain")},
        {"words": register(scans, tmp_path / "jumping"), "fault": {"kind": "clock"}},
    ]
    memory, plain, jumping = drive(cases)
    assert (
        memory["code"] == 1 and "not enough memory" in one_line(memory["stderr"]) and not (tmp_path / "none").exists()
    )
    assert plain["code"] == jumping["code"] == 0, jumping
    assert_same(content(tmp_path / "plain"), content(tmp_path / "jumping"))
    seconds = json.loads((tmp_path / "jumping" / "metrics.json").read_text())["seconds"]
    assert all(0 <= value < 1e5 for value in seconds.values())


# ---------------------------------------------------------------------------------------------- apply and evaluate


def test_single_files_are_whole_or_not_there(scans, tmp_path):
    good = scans["good"]
    image = [
        "apply",
        str(scans["bad"] / "halves.nii.gz"),
        "--transform",
        str(good / "forward.h5"),
        "--reference",
        str(scans["fixed"]),
        "-q",
    ]
    points = ["apply", str(good / "moving.csv"), "--points", "--transform", str(good / "forward.h5"), "-q"]
    score = ["evaluate", "--transform", str(good / "forward.h5"), "-q"]
    cases = []
    for name, words, size in (
        ("a.nii.gz", image, 700),
        ("b.nii", image, 9_000),
        ("c.nrrd", image, 700),
        ("d.csv", points, 60),
        ("e.json", score, 60),
    ):
        (tmp_path / name).write_text("what was there")
        cases.append({"words": [*words, "-o", str(tmp_path / name)], "fault": {"kind": "fsize", "bytes": size}})
    cases.append(
        {
            "words": [*image, "-o", str(tmp_path / "f.nii.gz")],
            "fault": {"kind": "signal", "number": KILL, "at": "half", "count": 1},
        }
    )
    cases.append({"words": [*image, "-o", str(tmp_path / "f.nii.gz")]})
    answers = drive(cases)
    for case, answer in zip(cases, answers[:5]):
        assert answer["code"] == 1 and "cannot be written" in one_line(answer["stderr"]), (case, answer)
    assert answers[5]["signal"] == KILL and answers[6]["code"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.nii.gz", "b.nii", "c.nrrd", "d.csv", "e.json", "f.nii.gz"}
    assert all(
        (tmp_path / name).read_text() == "what was there" for name in ("a.nii.gz", "b.nii", "c.nrrd", "d.csv", "e.json")
    )
    assert read_volume(tmp_path / "f.nii.gz").array.max() > 400


# ---------------------------------------------------------------------------------------------- training


def train(out: Path) -> list[str]:
    return commandlines.train(out, "--iterations 6 --stages 1,1,0 --validate-every 6 --patience 0")


def test_training_stopped_killed_or_out_of_disk_ends_as_the_undisturbed_run(tmp_path):
    """Ctrl-C and SIGTERM lose nothing: the state of the step under way is saved, and it is said how to go on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    faults = [
        {"kind": "signal", "number": TERM, "at": "append", "count": 1},
        {"kind": "signal", "number": INT, "at": "append", "count": 2},
        {"kind": "signal", "number": KILL, "at": "checkpoint", "count": 1},
        {"kind": "fsize", "bytes": 300_000},
        None,
    ]
    cases = [{"words": train(whole)}, *({"words": train(stopped), "fault": fault} for fault in faults)]
    # Stopped before the plan is written whole: the rerun plans again.
    cases += [
        {"words": train(tmp_path / "early"), "fault": {"kind": "signal", "number": KILL, "at": "replace", "count": 1}}
    ]
    plain, term, ctrl_c, kill, full, last, early = drive(cases)
    assert plain["code"] == 0, plain
    assert term["code"] == 143 and re.fullmatch(
        r"symreg: error: stopped after step 1; the state is saved\. Give the same command again to go on\.",
        one_line(term["stderr"]),
    )
    assert ctrl_c["code"] == 130 and re.search("stopped after step 3; the state is saved", one_line(ctrl_c["stderr"]))
    assert kill["signal"] == KILL
    assert full["code"] == 1 and "checkpoint.safetensors' cannot be written" in one_line(full["stderr"])
    assert last["code"] == 0, last
    for name in ("checkpoint.safetensors", "hsyn-small.safetensors"):
        one, other = (load_file(folder / name) for folder in (whole, stopped))
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one), name
    steps = [json.loads(line)["step"] for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not [path.name for path in stopped.iterdir() if path.name.endswith(".part")]
    assert early["signal"] == KILL and not (tmp_path / "early" / "plan.json").exists()


# ---------------------------------------------------------------------------------------------- a worker that hangs


def test_a_worker_that_hangs_can_be_ended_and_leaves_nothing_under_a_final_name(scans, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "SymRegistrationLib", "worker", "--own-group"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert json.loads(process.stdout.readline())["event"] == "ready"
        job = {"fixed": str(scans["fixed"]), "moving": str(scans["moving"]), "output": str(tmp_path / "out")}
        process.stdin.write(json.dumps({"id": "1", "command": "register", "job": job}).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["event"] == "progress"
        os.kill(process.pid, signal.SIGSTOP)  # it hangs: no answer, no end
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=600) == -KILL
    finally:
        process.kill()
        process.communicate()
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert all(path.name.startswith(PARTIAL) for path in left)
