"""What is said on a terminal, in a pipe and as events, and how numbers read."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np

from SymRegistrationLib import console as console_module
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.console import Console, duration, number, table
from SymRegistrationLib.job import InputError


class _Stream:
    def __init__(self, terminal=False):
        self.text, self.terminal = "", terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


def test_progress_in_plain_lines_names_stages_once_and_time_left(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 30.0, 60.0, 60.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    err = _Stream()
    console = Console(stderr=err)
    for stage, fraction in (("read", 0.0), ("align", 0.05), ("method", 0.25), ("method", 0.5), ("output", 0.75)):
        console.progress(stage, fraction, f"doing {stage}")
    assert err.text.splitlines() == [
        "[  5 %] align: doing align",
        "[ 25 %] method: doing method, about 1 min 30 s left",
        "[ 75 %] output: doing output, about 20 s left",
    ]


class _Bar:
    """Stands for tqdm.tqdm."""

    def __init__(self, total, file, leave, bar_format):
        self.n, self.total, self.file, self.words = 0, total, file, ""

    def set_description_str(self, text, refresh):
        self.words = text

    def refresh(self):
        self.file.write(f"<{self.n}/{self.total} {self.words}>")

    def close(self):
        self.file.write("<closed>")


def test_on_a_terminal_there_is_a_bar_when_tqdm_is_there_and_lines_when_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=_Bar))
    err, out = _Stream(terminal=True), _Stream()
    console = Console(stderr=err, stdout=out)
    console.progress("method", 0.5, "level 2 of 3")
    console.result({}, "done")
    assert err.text == "<50/100 level 2 of 3><closed>" and out.text == "done\n"
    monkeypatch.setitem(sys.modules, "tqdm", None)
    err = _Stream(terminal=True)
    Console(stderr=err).progress("method", 0.5, "level 2 of 3")
    assert err.text == "[ 50 %] method: level 2 of 3\n"


def test_a_path_that_the_console_cannot_spell_does_not_end_a_finished_run(tmp_path, monkeypatch):
    folder = tmp_path / "\u626b\u63cf"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y,z\n1,2,3\n")
    (folder / "t.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: TranslationTransform_double_3_3\n"
        "Parameters: 1 0 0\nFixedParameters:\n"
    )
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # what Python takes for a pipe on Western Windows
    monkeypatch.setattr(sys, "stdout", console)
    words = ["--points", "--from", "fixed", "--transform", str(folder / "t.tfm"), "-o", str(folder / "b.csv")]
    assert main(["apply", str(folder / "a.csv"), *words]) == 0
    assert rb"\u626b" in console.buffer.getvalue() and (folder / "b.csv").exists()


def test_quiet_says_nothing_but_errors():
    out, err = _Stream(), _Stream()
    console = Console(quiet=True, stdout=out, stderr=err)
    console.progress("method", 0.5, "x")
    console.result({"a": 1}, "text")
    assert out.text == err.text == ""
    console.error(InputError("no.", "Yes."))
    assert err.text == "symreg: error: no. Yes.\n"


def test_numbers_and_durations_for_people():
    assert [number(v) for v in (None, float("nan"), 3, 1234567, 0.12345, 0.00004, -0.5, "x", 0.0)] == [
        "-",
        "-",
        "3",
        "1 234 567",
        "0.123",
        "4.0e-05",
        "-0.500",
        "x",
        "0.000",
    ]
    assert [duration(v) for v in (None, 0.42, 9.96, 59.4, 61, 3599.6, 7500)] == [
        "",
        "0.4 s",
        "10 s",
        "59 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
    assert table(("a", "b"), [("long", "1")]) == "a     b\n----  -\nlong  1"


def test_events_are_plain_json_even_for_numpy_and_not_a_number():
    out = _Stream()
    Console(events=True, stdout=out).event(
        "result", value=np.float32("nan"), array=np.arange(2), path={1: (np.int64(3),)}
    )
    assert json.loads(out.text) == {"event": "result", "value": None, "array": [0, 1], "path": {"1": [3]}}
