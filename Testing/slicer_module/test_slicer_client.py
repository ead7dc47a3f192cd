"""The worker client: requests, and every way a process can fail, told in words that a clinician understands."""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest
import slicer_harness
import slicer_scenes as scenes

slicer_harness.pythonqtStyle(__name__)


@pytest.fixture
def app():
    return slicer_harness.start()


class FakeProcess:
    """What the client needs of a process, played by the test."""

    def __init__(self):
        self.sent, self.killed, self.starts = [], False, True
        self.onOutput = self.onErrorOutput = self.onExit = None

    def start(self, program, arguments, environment, folder):
        return self.starts

    def write(self, data):
        self.sent.append(json.loads(data))

    def kill(self):
        self.killed = True

    def say(self, *events):
        self.onOutput(b"".join(json.dumps(event).encode() + b"\n" for event in events))


READY = {
    "event": "ready",
    "protocol": 1,
    "version": None,
    "devices": [{"name": "cpu", "title": "CPU", "memory_gb": 8.0}],
}


class Clock:
    """A clock that the test turns."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def fake(app):
    """(client, the processes it started, answers)."""
    from SymRegistrationGui.client import Patience, WorkerClient

    import SymRegistrationLib

    READY["version"] = SymRegistrationLib.__version__
    processes, answers = [], []

    def make():
        processes.append(FakeProcess())
        return processes[-1]

    client = WorkerClient(
        make,
        lambda: ("python", [], {}, "."),
        clock=Clock(),
        patience=Patience(start=300.0, silence=1800.0, tick=1e5, idle=lambda: 600.0),
    )

    def ask(command="ping"):
        client.request(
            command,
            {},
            lambda result: answers.append(result),
            lambda error: answers.append(error),
            lambda event: answers.append(event["fraction"]),
        )

    return client, processes, answers, ask


def pass_by(client, seconds):
    """So much time passes, second by second, and the client looks at its process each time."""
    for _second in range(round(seconds)):
        client._clock.now += 1.0
        client.look()


def test_requests_wait_until_the_worker_is_ready_then_answers_find_their_way(fake):
    client, processes, answers, ask = fake
    ask()
    ask()
    assert len(processes) == 1 and not processes[0].sent and client.busy
    processes[0].say(READY)
    assert [line["id"] for line in processes[0].sent] == ["1", "2"] and client.devices[0]["name"] == "cpu"
    whole = json.dumps({"id": "2", "event": "progress", "stage": "a", "fraction": 0.5, "message": ""}).encode() + b"\n"
    processes[0].onOutput(whole[:20])
    processes[0].onOutput(whole[20:])
    processes[0].say({"id": "2", "event": "result", "result": "two"}, {"id": "1", "event": "result", "result": "one"})
    assert answers == [0.5, "two", "one"] and not client.busy


def test_an_error_event_ends_only_its_request(fake):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(
        READY, {"id": "1", "event": "error", "message": "the scan is empty.", "hint": "Take another.", "exit_code": 2}
    )
    assert str(answers[0]) == "The scan is empty. Take another." and not answers[0].environment and client.running


@pytest.mark.parametrize(
    "ready, said",
    [
        ({**READY, "version": "9.9.9"}, "version 9.9.9, this module is version"),
        ({**READY, "protocol": 2, "version": "0.2"}, "version 0.2"),
    ],
)
def test_another_version_is_told(fake, ready, said):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(ready)
    assert said in str(answers[0]) and "Restart Slicer" in str(answers[0]) and answers[0].environment
    assert processes[0].killed and not client.running


@pytest.mark.parametrize(
    "code, crashed, output, said, environment",
    [
        (9, True, b"", "most often the computer ran out of memory", False),
        (137, False, b"", "most often the computer ran out of memory", False),
        (11, True, b"", "crashed (code 11)", False),
        (1, False, b"terminate called after throwing an instance of 'std::bad_alloc'\n", "ran out of memory", False),
        (1, False, b"RuntimeError: CUDA out of memory. Tried to allocate 20 GiB\n", "ran out of memory", False),
        (
            1,
            False,
            b"[/opt/Slicer/bin/python-real] exit abnormally - Report the problem.\n",
            "crashed or was ended from outside",
            False,
        ),
        (-1073741801, True, b"", "ran out of memory", False),  # Windows: STATUS_NO_MEMORY
        (-1073741819, True, b"", "crashed (code -1073741819)", False),  # Windows: access violation
        (3, False, b"strange\n", "ended unexpectedly (exit code 3)", False),
    ],
)
def test_a_process_that_ends_says_why(fake, code, crashed, output, said, environment):
    _client, processes, answers, ask = fake
    ask()
    processes[0].say(READY)
    processes[0].onErrorOutput(output)
    processes[0].onExit(code, crashed)
    assert said in str(answers[0]) and answers[0].hint and answers[0].environment is environment
    ask()
    assert len(processes) == 2, "the next request starts a new process"


def test_missing_libraries_can_be_repaired(fake):
    _client, processes, answers, ask = fake
    ask()
    processes[0].onErrorOutput(b"Traceback\nModuleNotFoundError: No module named 'torch'\n")
    processes[0].onExit(1, False)
    assert answers[0].environment and "No module named 'torch'" in str(answers[0])
    ask()
    processes[1].say(
        {
            "id": None,
            "event": "error",
            "message": "the libraries could not be loaded.",
            "hint": "Install.",
            "exit_code": 1,
        }
    )
    processes[1].onExit(1, False)
    assert answers[1].environment and str(answers[1]) == "The libraries could not be loaded. Install."


def test_nonsense_from_the_process_is_no_crash(fake):
    _client, processes, answers, ask = fake
    ask()
    processes[0].onOutput(b"Segmentation fault\n")
    assert "not understood" in str(answers[0]) and processes[0].killed


def test_a_program_that_does_not_start(app):
    from SymRegistrationGui.client import WorkerClient

    client, answers = WorkerClient(command=lambda: ("/nowhere/PythonSlicer", [], {}, ".")), []
    client.request("ping", {}, answers.append, answers.append)
    assert "/nowhere/PythonSlicer" in str(answers[0]) and not client.running


def test_cancel_calls_nobody(fake):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(READY)
    client.cancel()
    assert processes[0].killed and not client.busy and not client.running
    processes[0].say({"id": "1", "event": "result", "result": 1})
    assert answers == []


@pytest.mark.parametrize(
    "events, said, seconds", [((), "did not get ready within 5", 300), ((READY,), "has said nothing for 30", 1800)]
)
def test_a_process_that_hangs_is_given_up(fake, events, said, seconds):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(*events)
    pass_by(client, seconds)
    assert answers == [] and not processes[0].killed
    pass_by(client, 1)
    assert said in str(answers[0]) and answers[0].hint and processes[0].killed and not client.busy
    ask()
    processes[1].say(READY)
    assert processes[1].sent, "the next request starts a new process"


def test_every_word_counts_as_life(fake):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(READY)
    for step in range(20):
        pass_by(client, 1700)
        if step % 2:
            processes[0].say({"id": "1", "event": "progress", "stage": "method", "fraction": step / 20, "message": ""})
        else:
            processes[0].onErrorOutput(b"a warning\n")
    processes[0].say({"id": "1", "event": "result", "result": "done"})
    assert answers[-1] == "done" and len(answers) == 11 and not processes[0].killed


def test_a_computer_that_slept_is_no_silence(fake):
    """A long time between two looks counts as two ticks."""
    from SymRegistrationGui.client import Patience

    client, processes, answers, ask = fake
    client._patience = Patience(tick=1.0)
    ask()
    processes[0].say(READY)
    for _night in range(100):
        client._clock.now += 8 * 3600.0
        client.look()
    assert client.busy and answers == []


def test_an_idle_process_ends_and_gives_its_memory_back(fake):
    client, processes, answers, ask = fake
    lines = []
    client.onLog = lines.append
    ask()
    processes[0].say(READY)
    pass_by(client, 700)
    assert not processes[0].killed, "somebody waits for it"
    processes[0].say({"id": "1", "event": "result", "result": "done"})
    pass_by(client, 600)
    ask()
    pass_by(client, 10)
    processes[0].say({"id": "2", "event": "result", "result": "again"})
    pass_by(client, 600)
    assert client.running, "work in between starts the count anew"
    pass_by(client, 1)
    assert processes[0].killed and not client.running and "had nothing to do for 10 minutes" in lines[-1]
    pass_by(client, 2000)
    ask()
    processes[1].say(READY, {"id": "1", "event": "result", "result": "third"})
    assert answers == ["done", "again", "third"], "the next request starts it again"


def test_an_idle_process_may_be_kept(fake, app):
    from SymRegistrationGui import settings
    from SymRegistrationGui.client import Patience

    client, processes, _answers, ask = fake
    assert settings.idleMinutes() == 10 and Patience().idle() == 600
    for value, minutes in (("3", 3), (0, 0), ("soon", 10), (-5, 0)):
        app.userSettings().setValue(settings.IDLE_KEY, value)
        assert settings.idleMinutes() == minutes
    settings.setIdleMinutes(0)
    client._patience = Patience(tick=1e5)
    ask()
    processes[0].say(READY, {"id": "1", "event": "result", "result": "done"})
    pass_by(client, 20000)
    assert client.running and not processes[0].killed


# ------------------------------------------------------------------------------------------------ real processes

FAMILY = """import subprocess, sys, os, json, time
os.setsid()
code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
child = [sys.executable, "-c", code + " print(p.pid, flush=True); time.sleep(60)"]
p = subprocess.Popen(child, stdout=subprocess.PIPE, text=True)
grandchild = int(p.stdout.readline())
print(json.dumps({"event": "family", "pids": [os.getpid(), p.pid, grandchild]}), flush=True)
time.sleep(60)
"""


def ended(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


@pytest.mark.parametrize(
    "finder, byLauncher", [("psutil", True), ("psutil", False), ("ps", True), ("ps", False), ("nothing", False)]
)
def test_kill_ends_children_and_grandchildren(app, monkeypatch, finder, byLauncher):
    """With a launcher in between, whose child leads the group, and without; with psutil, without it, and without
    ps as well.

    What is left, a launcher and no finder, is test_without_any_finder_the_worker_ends_by_itself.
    """
    from SymRegistrationGui import processes

    process, lines = processes.QtWorkerProcess(), []
    process.onOutput, process.onErrorOutput, process.onExit = (
        lines.append,
        print,
        lambda code, crashed: lines.append(b"EXIT"),
    )
    program = processes.pythonProgram() if byLauncher else sys.executable
    assert process.start(program, ["-c", FAMILY], dict(os.environ), ".")
    app.wait(lambda: lines, 20, "the family")
    pids = json.loads(lines[0])["pids"]
    assert (process._process.processId() == pids[0]) is not byLauncher
    if finder != "psutil":
        monkeypatch.setitem(sys.modules, "psutil", None)
    if finder == "nothing":
        monkeypatch.setattr(processes, "_descendantsByPs", lambda pid: [])
    process.kill()
    monkeypatch.undo()
    app.wait(lambda: ended(pids), 10, "their end")
    assert len(pids) == 3 and b"EXIT" not in lines


def test_without_any_finder_the_worker_ends_by_itself(app, monkeypatch):
    from SymRegistrationGui import processes
    from SymRegistrationGui.client import WorkerClient

    client, answers = WorkerClient(), []
    client.request("ping", {}, answers.append, answers.append)
    app.wait(lambda: answers, 60, "the worker")
    pids = [process.pid for process in scenes.workers()]
    monkeypatch.setattr(processes, "descendants", lambda pid: [])
    client.stop()
    app.wait(lambda: ended(pids), 20, "its end")
    assert len(pids) == 1


def test_a_real_worker_killed_from_outside(app):
    """Behind the launcher: exit code 1 and a line on stderr are all that is left of it."""
    from SymRegistrationGui.client import WorkerClient

    client, answers = WorkerClient(), []
    client.request("ping", {}, answers.append, answers.append)
    app.wait(lambda: answers, 60, "the worker")
    assert answers == [{}] and client.devices[0]["name"] == "cpu"
    client.request("methods", {}, answers.append, answers.append)
    scenes.workers()[0].kill()
    app.wait(lambda: len(answers) > 1, 20, "the news")
    assert (
        "crashed or was ended from outside; most often the computer ran out of memory" in str(answers[1])
        and not client.running
    )
    assert not answers[1].environment, "installing again would not help"
    client.request("ping", {}, answers.append, answers.append)
    app.wait(lambda: len(answers) > 2, 60, "the new worker")
    assert answers[2] == {}
    client.stop()


def test_the_worker_runs_this_library_wherever_the_user_works(app, tmp_path, monkeypatch):
    """Whatever lies in the user's PYTHONPATH, or was put by pip where the launcher searches first."""
    from SymRegistrationGui.client import WorkerClient
    from SymRegistrationGui.processes import libraryFolder, workerCommand

    for place in ("user", "pip"):
        (tmp_path / place / "SymRegistrationLib").mkdir(parents=True)
        (tmp_path / place / "SymRegistrationLib/__init__.py").write_text("raise SystemExit('another library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "user"))
    monkeypatch.setenv("HARNESS_PACKAGES", str(tmp_path / "pip"))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.chdir(tmp_path / "user")
    program, arguments, environment, folder = workerCommand()
    assert (
        environment["PYTHONPATH"].split(os.pathsep) == [libraryFolder(), str(tmp_path / "user")]
        and folder == libraryFolder()
    )
    assert Path(program).name == "PythonSlicer" and arguments[:3] == ["-m", "SymRegistrationLib", "worker"]
    client, answers = WorkerClient(), []
    client.request("ping", {}, answers.append, answers.append)
    app.wait(lambda: answers, 60, "the worker")
    client.stop()
    assert answers == [{}], str(answers[0])
