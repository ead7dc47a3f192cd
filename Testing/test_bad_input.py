"""Bad input of every kind through every command: one clear line, exit code 2, nothing computed, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest
from bad_inputs.refusals import CASES, PAIR_OF_POINTS

from SymRegistrationLib.commands.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return bad_inputs.make(tmp_path_factory.mktemp("corpus"))


def _refused(words: list[str], said: str, capfd, folders) -> None:
    """Run one command and hold it to what every refusal must be."""
    before = [sorted(folder.rglob("*")) for folder in folders]
    code = main([*words, "--json"])
    seen = capfd.readouterr()
    assert code == 2, seen.err
    assert seen.err.startswith("symreg: error: ") and seen.err.count("\n") == 1 and seen.err.endswith("\n"), seen.err
    assert said in seen.err and "Traceback" not in seen.err, seen.err
    events = [json.loads(line) for line in seen.out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["error"]
    assert events[-1]["exit_code"] == 2 and events[-1]["hint"], f"says not what to do: {events[-1]}"
    assert [sorted(folder.rglob("*")) for folder in folders] == before, "something was left behind"


@pytest.mark.parametrize("words, said", CASES, ids=[words for words, _ in CASES])
def test_refused(names, tmp_path, capfd, words, said):
    filled = words.format(**names, out=tmp_path / "out", tmp=tmp_path).split()
    _refused(filled, said, capfd, (names["good"].parent, tmp_path))


def test_the_corpus_is_as_large_as_it_claims():
    assert len(CASES) > 250 and len({words for words, _ in CASES}) == len(CASES)


# ---------------------------------------------------------------------------------------------- what is not asked for
# by words


def test_a_huge_size_is_refused_before_anything_is_allocated(names):
    """In a process that may take half a gigabyte more than it has after its imports."""
    files = ["huge.nii", "huge.nii.gz", "huge.nrrd", "huge.mha", "huge.mhd", "huge.mgh", "huge.mgz"]
    runs = [
        ["register", str(names["bad"] / name), str(names["moving"]), "-o", str(names["bad"] / "out")] for name in files
    ]
    runs += [
        [
            "apply",
            str(names["moving"]),
            "--transform",
            str(names["bad"] / name),
            "--reference",
            str(names["fixed"]),
            "-o",
            str(names["bad"] / "x.nii.gz"),
        ]
        for name in ("huge_field.nii", "huge_field.nrrd")
    ]
    runs += [
        [
            "register",
            str(names["fixed"]),
            str(names["moving"]),
            "-o",
            str(names["bad"] / "out"),
            "--method",
            "hsyn",
            "--weights",
            str(names["bad"] / "long_header.safetensors"),
        ]
    ]
    code = (
        "import json, resource, sys\nimport psutil\nfrom SymRegistrationLib.jobs import register, apply\nfrom "
        "SymRegistrationLib import networks\nfrom SymRegistrationLib.registration import inference\n"
        "from SymRegistrationLib.commands.cli import main\nnetworks.names()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**29,) * 2)\n"
        "sys.exit(max(abs(main(words) - 2) for words in json.load(sys.stdin)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(runs),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == len(runs), done.stderr
    assert all(
        "memory" not in line and "declares" in line or "cut off" in line or "not a complete" in line for line in lines
    )


def test_a_file_that_may_not_be_read_is_named(names, tmp_path, capfd, monkeypatch):
    """The administrator may read everything, so the answer of the system is replaced."""
    closed = str(names["good"] / "moving.csv")
    monkeypatch.setattr("SymRegistrationLib.job.checking.os.access", lambda path, mode: str(path) != closed)
    words = (PAIR_OF_POINTS.format(**names, out=tmp_path / "out") + "none.csv").split()
    _refused([*words[:-1], closed], "moving.csv' may not be read", capfd, (tmp_path,))


def test_names_with_spaces_and_letters_of_all_kinds_are_no_bad_input(names, tmp_path, capfd):
    folder = tmp_path / "Scans von Jürgen 数据"
    folder.mkdir()
    scan = folder / "a b'c\"d é.nii.gz"
    scan.write_bytes(names["fixed"].read_bytes())
    words = [
        "apply",
        str(scan),
        "--transform",
        str(names["good"] / "forward.h5"),
        "--reference",
        str(scan),
        "-o",
        str(folder / "é x.nii.gz"),
    ]
    assert main(words) == 0 and (folder / "é x.nii.gz").stat().st_size > 500, capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- the worker

_JOB = {"fixed": "a", "moving": "b", "output": "c"}
LINES = [
    (b"", "not JSON"),
    (b"null", "not a JSON object"),
    (b"3", "not a JSON object"),
    (b'"register"', "not a JSON object"),
    (b"[]", "not a JSON object"),
    (b"{", "not JSON"),
    (b"{}}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"a":' * 50_000, "not JSON"),
    (b"\xff\xfe\x00", "not JSON"),
    (b"\0", "longer than"),
    (b"GET / HTTP/1.1", "not JSON"),
    (b'{"id": 1e999, "command": "nothing"}', "unknown command"),
    (b"{}", "unknown command None"),
    ({"command": None}, "unknown command None"),
    ({"command": "REGISTER"}, "unknown command"),
    ({"command": ["ping"]}, "unknown command"),
    ({"command": "__init__"}, "unknown command"),
    ({"command": "error"}, "unknown command"),
    ({"command": "ping", "job": {}}, "unknown field"),
    ({"command": "methods", "outputs": []}, "unknown field"),
    ({"command": "shutdown", "now": True}, "unknown field"),
    ({"command": "register"}, "must be a JSON object"),
    ({"command": "register", "job": None}, "must be a JSON object"),
    ({"command": "register", "job": [1]}, "must be a JSON object"),
    ({"command": "register", "job": {}}, "has no 'fixed'"),
    ({"command": "register", "job": {**_JOB, "output": 3}}, "must be text"),
    ({"command": "register", "job": {**_JOB, "x": 3}}, "unknown field"),
    ({"command": "register", "job": {**_JOB, "options": {"seed": 1.5}}}, "a whole number"),
    ({"command": "register", "job": {**_JOB, "options": {"memory_gb": "all"}}}, "a number"),
    ({"command": "register", "job": {**_JOB, "fixed": "a\0b"}}, "the path of fixed"),
    ({"command": "register", "job": {**_JOB, "fixed": "x" * 70_000}}, "cannot be opened"),
    ({"command": "register", "job": {**_JOB, "output": "x" * 70_000}}, "cannot be written"),
    ({"command": "register", "job": {**_JOB, "output": " "}}, "the path of output"),
    ({"command": "register", "job": _JOB, "outputs": "forward"}, "'outputs'"),
    ({"command": "register", "job": _JOB, "outputs": [3]}, "'outputs'"),
    ({"command": "register", "job": _JOB, "outputs": [["forward"]]}, "'outputs'"),
    ({"command": "register", "job": _JOB, "outputs": ["../forward"]}, "'outputs'"),
    ({"command": "register", "job": _JOB}, "does not exist"),
    ({"command": "apply"}, "apply request"),
    ({"command": "apply", "arguments": []}, "apply request"),
    ({"command": "apply", "arguments": {"input": "a"}}, "apply request"),
    ({"command": "apply", "arguments": {"input": 1, "transform": "b", "output": "c.csv"}}, "must be text"),
    ({"command": "apply", "arguments": {"input": "a", "transform": "b", "output": "c.csv", "kind": "soup"}}, "kind is"),
    (
        {"command": "apply", "arguments": {"input": "a\0", "transform": "b", "output": "c.csv", "kind": "points"}},
        "the path of points",
    ),
    ({"command": "evaluate"}, "evaluate request"),
    ({"command": "evaluate", "arguments": {}}, "nothing to evaluate"),
    ({"command": "evaluate", "arguments": {"transform": {}}}, "must be text"),
    ({"command": "evaluate", "arguments": {"taste": "good"}}, "evaluate request"),
    ({"command": "report"}, "report request"),
    ({"command": "report", "arguments": {"path": "a", "b": 1}}, "report request"),
    ({"command": "report", "arguments": {"path": "x.html"}}, "no registration to report on"),
]


@pytest.mark.parametrize("line, said", LINES, ids=[f"{k}-{said}" for k, (_, said) in enumerate(LINES)])
def test_the_worker_answers_every_bad_line_with_one_error(line, said, tmp_path, monkeypatch, capfd):
    from SymRegistrationLib.commands.worker import Worker

    monkeypatch.chdir(tmp_path)
    line = line if isinstance(line, bytes) else json.dumps({"id": "x", **line}).encode()
    answers = io.BytesIO()
    assert Worker(io.BytesIO(), answers)._answer(line)
    events = [json.loads(text) for text in answers.getvalue().splitlines()]
    events = [event for event in events if event["event"] != "progress"]
    assert len(events) == 1 and events[0]["event"] == "error" and events[0]["exit_code"] == 2, events
    assert said in events[0]["message"] and events[0]["hint"], events
    assert len(events[0]["message"]) < 1000 and "\n" not in events[0]["message"]
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


def test_a_line_without_end_takes_no_memory_and_the_next_is_served():
    from SymRegistrationLib.commands.worker import LONGEST_LINE, Worker

    class Endless(io.RawIOBase):
        """200 MB of one line, then a ping."""

        def __init__(self):
            self.left, self.most = 200 * 2**20, 0

        def readline(self, size=-1):
            assert 0 < size <= LONGEST_LINE + 1
            if self.left > 0:
                self.left -= size
                return b"x" * size
            if self.left > -10 * LONGEST_LINE:
                self.left = -10 * LONGEST_LINE
                return b"x\n"
            self.left -= 1
            return b'{"id": "p", "command": "ping"}\n' if self.left == -10 * LONGEST_LINE - 1 else b""

    worker = Worker(Endless(), io.BytesIO())
    worker._read()
    lines = [worker._queue.get_nowait() for _ in range(3)]
    assert lines == [b"\0", b'{"id": "p", "command": "ping"}\n', None]
