"""The worker client: requests, and every way in which a process can fail, told in words that a clinician
understands."""

import json
import os
import signal
import sys
import time

import psutil
import pytest
import slicer_harness

slicer_harness.pythonqtStyle(__name__)


@pytest.fixture
def app():
    return slicer_harness.start()


class FakeProcess:
    """What the client needs of a process, played by the test."""

    def __init__(self):
        self.sent, self.killed, self.starts = [], False, True
        self.onOutput = self.onErrorOutput = self.onExit = None

    def start(self, program, arguments, environment):
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

    client = WorkerClient(make, lambda: ("python", [], {}), patience=Patience(start=0.4, silence=0.4, tick=0.02))

    def ask(command="ping"):
        client.request(
            command,
            {},
            lambda result: answers.append(result),
            lambda error: answers.append(error),
            lambda event: answers.append(event["fraction"]),
        )

    return client, processes, answers, ask


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

    client, answers = WorkerClient(command=lambda: ("/nowhere/PythonSlicer", [], {})), []
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


@pytest.mark.parametrize("events, said", [((), "did not get ready"), ((READY,), "has said nothing")])
def test_a_process_that_hangs_is_given_up(app, fake, events, said):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(*events)
    app.wait(lambda: answers, 20, "the end of patience")
    assert said in str(answers[0]) and answers[0].hint and processes[0].killed and not client.busy
    ask()
    processes[1].say(READY)
    assert processes[1].sent, "the next request starts a new process"


def test_every_word_counts_as_life_and_nobody_waits_for_an_idle_process(app, fake):
    client, processes, answers, ask = fake
    ask()
    processes[0].say(READY)
    for step in range(20):  # four times the patience; a pause of this machine counts as two ticks of 0.02 s
        passed = time.monotonic() + 0.08
        app.wait(lambda until=passed: time.monotonic() > until)
        if step % 2:
            processes[0].say({"id": "1", "event": "progress", "stage": "method", "fraction": step / 20, "message": ""})
        else:
            processes[0].onErrorOutput(b"a warning\n")
    processes[0].say({"id": "1", "event": "result", "result": "done"})
    assert answers[-1] == "done" and len(answers) == 11
    passed = time.monotonic() + 1.0
    app.wait(lambda: time.monotonic() > passed)
    assert client.running and not processes[0].killed


# ------------------------------------------------------------------------------------------------ real processes

FAMILY = """import subprocess, sys, os, json, time
os.setsid()
child = [sys.executable, "-c", "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"]
p = subprocess.Popen(child, stdout=subprocess.PIPE, text=True)
grandchild = int(p.stdout.readline())
print(json.dumps({"event": "family", "pids": [os.getpid(), p.pid, grandchild]}), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("withPsutil", [True, False])
def test_kill_ends_children_and_grandchildren(app, monkeypatch, withPsutil):
    from SymRegistrationGui.processes import QtWorkerProcess

    process, lines = QtWorkerProcess(), []
    process.onOutput, process.onErrorOutput, process.onExit = (
        lines.append,
        print,
        lambda *arguments: lines.append(b"EXIT"),
    )
    assert process.start(sys.executable, ["-c", FAMILY], dict(os.environ))
    app.wait(lambda: lines, 20, "the family")
    pids = json.loads(lines[0])["pids"]
    if not withPsutil:
        monkeypatch.setitem(sys.modules, "psutil", None)
    process.kill()
    monkeypatch.undo()
    app.wait(
        lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids),
        10,
        "their end",
    )
    assert len(pids) == 3 and b"EXIT" not in lines


def test_a_real_worker_killed_from_outside(app):
    from SymRegistrationGui.client import WorkerClient

    client, answers = WorkerClient(), []
    client.request("ping", {}, answers.append, answers.append)
    app.wait(lambda: answers, 60, "the worker")
    assert answers == [{}] and client.devices[0]["name"] == "cpu"
    client.request("methods", {}, answers.append, answers.append)
    os.kill(client._process._process.processId(), signal.SIGKILL)
    app.wait(lambda: len(answers) > 1, 20, "the news")
    assert "ended from outside" in str(answers[1]) and not client.running
    client.request("ping", {}, answers.append, answers.append)
    app.wait(lambda: len(answers) > 2, 60, "the new worker")
    assert answers[2] == {}
    client.stop()


def test_the_worker_runs_this_library_wherever_the_user_works(app, tmp_path, monkeypatch):
    from SymRegistrationGui.processes import libraryFolder, workerCommand

    (tmp_path / "SymRegistrationLib").mkdir()
    (tmp_path / "SymRegistrationLib/__init__.py").write_text("raise SystemExit('another library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program, arguments, environment = workerCommand()
    assert environment["PYTHONPATH"].split(os.pathsep) == [libraryFolder(), str(tmp_path)]
    assert program and arguments[:3] == ["-m", "SymRegistrationLib", "worker"]
