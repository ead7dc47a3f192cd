"""What differs between Linux, macOS and Windows, with stand-ins for the systems that these tests do not run on."""

import os
import signal
import subprocess
import sys

import pytest
import slicer
import slicer_harness

slicer_harness.pythonqtStyle(__name__)


@pytest.fixture
def app():
    return slicer_harness.start()


def disk(*files):
    """A stand-in for shutil.which on a disk with these programs; a bare name stands for one on the PATH."""
    return lambda name: {
        file: f"/path/{file}" if os.sep not in file and "\\" not in file else file for file in files
    }.get(name)


@pytest.mark.parametrize(
    "system, home, files, expected",
    [
        (
            "linux",
            "/opt/Slicer-5.10",
            ["/opt/Slicer-5.10/bin/PythonSlicer", "PythonSlicer"],
            "/opt/Slicer-5.10/bin/PythonSlicer",
        ),
        (
            "darwin",
            "/Applications/Slicer.app/Contents",
            ["/Applications/Slicer.app/Contents/bin/PythonSlicer"],
            "/Applications/Slicer.app/Contents/bin/PythonSlicer",
        ),
        (
            "win32",
            "C:/Users/Jürgen Müller/Slicer 5.10",
            ["C:/Users/Jürgen Müller/Slicer 5.10/bin/PythonSlicer.exe", "PythonSlicer"],
            "C:/Users/Jürgen Müller/Slicer 5.10/bin/PythonSlicer.exe",
        ),
        ("linux", "", ["PythonSlicer"], "/path/PythonSlicer"),
        ("win32", "C:/Moved", ["PythonSlicer.exe"], "/path/PythonSlicer.exe"),
        ("linux", "", [], sys.executable),
    ],
)
def test_the_launcher_is_found(app, system, home, files, expected):
    """The one of this Slicer before one on the PATH, which may belong to another Slicer."""
    from SymRegistrationGui.processes import pythonProgram

    found = pythonProgram(
        system, home, disk(*(os.path.join(*file.rsplit("/", 1)) if "/" in file else file for file in files))
    )
    assert found.replace("\\", "/") == expected


def test_the_application_itself_is_never_taken_for_python(app, monkeypatch):
    """Where sys.executable is the application, starting it would open a second Slicer."""
    from SymRegistrationGui.processes import pythonProgram

    for executable in ("C:/Slicer/bin/SlicerApp-real.exe", "/Applications/Slicer.app/Contents/MacOS/Slicer"):
        monkeypatch.setattr(sys, "executable", executable)
        assert pythonProgram("win32", "", disk()) == "PythonSlicer.exe"
    monkeypatch.setattr(sys, "executable", "/opt/Slicer/bin/python-real")
    assert pythonProgram("linux", "", disk()) == "/opt/Slicer/bin/python-real"


def test_slicers_home_comes_from_the_environment_or_the_application(app, monkeypatch):
    from SymRegistrationGui.processes import slicerHome

    monkeypatch.delenv("SLICER_HOME", raising=False)
    assert slicerHome() == ""
    app.slicerHome = "/Applications/Slicer.app/Contents"
    assert slicerHome() == app.slicerHome
    monkeypatch.setenv("SLICER_HOME", "/opt/Slicer")
    assert slicerHome() == "/opt/Slicer"


@pytest.mark.parametrize(
    "before, expected",
    [
        ({}, ["/lib folder"]),
        ({"PYTHONPATH": ""}, ["/lib folder"]),
        ({"PYTHONPATH": os.pathsep.join(["/a", "", "/ü b"])}, ["/lib folder", "/a", "/ü b"]),
    ],
)
def test_the_workers_environment_is_that_before_slicer(app, before, expected):
    from SymRegistrationGui.processes import workerEnvironment

    startup = {**before, "PATH": "/usr/bin", "PYTHONSAFEPATH": "1", "SystemRoot": "C:\\Windows"}
    made = workerEnvironment(startup, "/lib folder")
    assert (
        made["PYTHONPATH"].split(os.pathsep) == expected
        and made["PATH"] == "/usr/bin"
        and made["SystemRoot"] == "C:\\Windows"
    )
    assert made["PYTHONIOENCODING"] == "utf-8" and "PYTHONSAFEPATH" not in made and startup["PYTHONSAFEPATH"] == "1"


def test_windows_ends_a_tree_by_taskkill(app, monkeypatch):
    from SymRegistrationGui import processes

    ran = []

    def run(command, capture_output, check, creationflags):
        ran.append((command, creationflags))

    monkeypatch.setattr(processes.subprocess, "run", run)
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: ran.append("kill"))
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    processes.killTree(4711, "win32")
    assert ran == [(["taskkill", "/PID", "4711", "/T", "/F"], 0x08000000)], "the whole tree, without a console window"


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_elsewhere_every_process_and_every_group_of_its_own_is_ended(app, monkeypatch, system):
    """The launcher 10 is in the application's group 1; its child, the worker 11, leads a group; 12 and 13 are in it, 14
    left it.
    """
    from SymRegistrationGui import processes

    groups, ended = {0: 1, 10: 1, 11: 11, 12: 11, 13: 11, 14: 14}, []
    monkeypatch.setattr(processes, "descendants", lambda pid: [11, 12, 13, 14, 15])

    def group(pid):
        if pid not in groups:
            raise ProcessLookupError
        return groups[pid]

    monkeypatch.setattr(processes.os, "getpgid", group)
    monkeypatch.setattr(processes.os, "killpg", lambda pid, number: ended.append(("group", pid, number)))
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: ended.append(("process", pid, number)))
    processes.killTree(10, system)
    assert {entry[:2] for entry in ended} == {
        ("group", 11),
        ("process", 12),
        ("process", 13),
        ("group", 14),
        ("process", 10),
    }
    assert {entry[2] for entry in ended} == {signal.SIGKILL} and ended[-1][:2] == ("process", 10)
    assert ("group", 1, signal.SIGKILL) not in ended, "never the application's own group"


@pytest.mark.parametrize(
    "listing, expected",
    [
        (
            "    1     0\n   10     1\n   11    10\n   12    11\n   13    12\n   20     1\n",
            [11, 12, 13],
        ),  # Linux' ps pads
        ("1 0\n10 1\n11 10\n14 10\n12 11\n", [11, 14, 12]),  # as macOS prints
        ("", []),
        ("nonsense line here\n10 1\n", []),
    ],
)
def test_descendants_from_ps(app, monkeypatch, listing, expected):
    from SymRegistrationGui import processes

    def run(command, capture_output, check, text, timeout):
        assert command == ["ps", "-A", "-o", "pid=,ppid="], "options that Linux and macOS share"
        return subprocess.CompletedProcess(command, 0, listing, "")

    monkeypatch.setattr(processes.subprocess, "run", run)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert processes.descendants(10) == expected


def test_a_damaged_psutil_does_not_keep_the_worker_alive(app, monkeypatch):
    import types

    from SymRegistrationGui import processes

    broken = types.ModuleType("psutil")  # half an installation: it imports, and has nothing
    monkeypatch.setitem(sys.modules, "psutil", broken)
    monkeypatch.setattr(processes, "_descendantsByPs", lambda pid: [pid + 1])
    assert processes.descendants(10) == [11]

    def missing(command, capture_output, check, text, timeout):
        raise FileNotFoundError("ps")

    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(processes.subprocess, "run", missing)
    assert processes.descendants(10) == []


def test_leftover_folders_are_swept_on_every_system(app, monkeypatch):
    import psutil
    from SymRegistrationGui import exchange

    gone = next(pid for pid in range(400_000, 500_000) if not psutil.pid_exists(pid))
    for system in ("linux", "darwin", "win32"):
        assert exchange._running(os.getpid(), system) is True and exchange._running(gone, system) is False
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert exchange._running(gone, "win32") is True, "when nobody can tell, a folder stays"


def test_paths_with_spaces_umlauts_and_other_scripts_reach_the_worker(app, tmp_path, monkeypatch):
    from SymRegistrationGui import exchange

    strange = tmp_path / "Jürgen Müller 佐藤"
    strange.mkdir()
    monkeypatch.setattr(exchange.tempfile, "tempdir", str(strange))
    import slicer_scenes as scenes

    fixed, moving = scenes.pair(app.scene)
    _parent, module = slicer_harness.loadModule(app)
    logic = module.SymRegistrationLogic()
    made = logic.register(fixed, moving, preset="fast", initial="centre")
    assert made["forward"].GetScene() is slicer.mrmlScene
    app.wait(lambda: not logic.engine.client.busy, 60, "the report")
    logic.engine.close()
    assert list(strange.iterdir()) == []


def test_windows_has_no_way_to_lead_a_group_and_the_worker_needs_none(monkeypatch):
    import psutil

    from SymRegistrationLib.commands import worker

    class Process:
        def nice(self, value):
            levels.append(value)

    levels = []
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", 16384, raising=False)
    monkeypatch.setattr(worker.sys, "platform", "win32")
    monkeypatch.delattr(worker.os, "setsid")
    worker._own_group()
    assert levels == [16384]
