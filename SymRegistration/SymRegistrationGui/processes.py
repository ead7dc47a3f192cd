"""The operating-system side of the worker: starting PythonSlicer, its three streams, and ending everything it started.

:class:`WorkerProcess` is all that the client needs, so that tests can put anything in its place. Where systems differ,
the system is an argument (``sys.platform``), so that each of them can be tested on any other.

PythonSlicer is a launcher on Linux and Windows: Python is its child, a crash of that child becomes exit code 1 of the
launcher with ``exit abnormally`` on stderr, and the launcher's own folders come before those of PYTHONPATH.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import qt
import slicer


class WorkerProcess(Protocol):
    """A child process with call-backs on the main thread; each is set by the client before :meth:`start`."""

    onOutput: Callable[[bytes], None]
    onErrorOutput: Callable[[bytes], None]
    #: exit code, and True when the process did not end by itself.
    onExit: Callable[[int, bool], None]

    def start(self, program: str, arguments: list, environment: dict, folder: str) -> bool:
        """Start in the working folder ``folder``; False when the program cannot be started."""

    def write(self, data: bytes) -> None:
        """To the child's stdin."""

    def kill(self) -> None:
        """End the child and everything it started, at once. ``onExit`` is not called."""


class QtWorkerProcess:
    """:class:`WorkerProcess` with QProcess."""

    def __init__(self):
        self.onOutput = self.onErrorOutput = self.onExit = None
        self._process = qt.QProcess()
        self._process.readyReadStandardOutput.connect(self._outputReady)
        self._process.readyReadStandardError.connect(self._errorReady)
        self._process.finished.connect(self._finished)
        self._silent = False

    def start(self, program, arguments, environment, folder):
        settings = qt.QProcessEnvironment()
        for name, value in environment.items():
            settings.insert(name, value)
        self._process.setProcessEnvironment(settings)
        self._process.setWorkingDirectory(folder)
        self._process.start(program, arguments)
        return self._process.waitForStarted(5000)

    def write(self, data):
        self._process.write(qt.QByteArray(data))

    def kill(self):
        self._silent = True
        pid = self._process.processId()
        if pid and self._process.state() != qt.QProcess.NotRunning:
            killTree(int(pid))
            self._process.kill()
            self._process.waitForFinished(2000)

    def _outputReady(self):
        data = bytes(self._process.readAllStandardOutput().data())
        if data and not self._silent:
            self.onOutput(data)

    def _errorReady(self):
        data = bytes(self._process.readAllStandardError().data())
        if data and not self._silent:
            self.onErrorOutput(data)

    def _finished(self):
        if not self._silent:
            self._outputReady()
            self._errorReady()
            self._silent = True
            self.onExit(self._process.exitCode(), self._process.exitStatus() == qt.QProcess.CrashExit)


# ------------------------------------------------------------------------------------------------ ending


def killTree(pid, system=sys.platform):
    """End process ``pid`` and all its descendants, by what this machine offers.

    Windows does it by ``taskkill``. Elsewhere the descendants are listed before anything ends, because an
    orphan belongs to nobody; the worker, which is a child of the launcher, leads a group of its own, so its
    group goes with it.
    """
    if system == "win32":
        subprocess.run(
            ["taskkill", "/PID", str(pid), "/T", "/F"],
            capture_output=True,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        return
    for one in [*descendants(pid), pid]:  # children first: a launcher that sees its child go ends by itself
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(one) == one != os.getpgid(0):
                os.killpg(one, signal.SIGKILL)
            else:
                os.kill(one, signal.SIGKILL)


def descendants(pid):
    """Process numbers below ``pid``, nearest first; by psutil, or where that is missing or damaged, by
    the system's ``ps``.
    """
    try:
        import psutil

        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except Exception:  # whatever a half-installed package raises; a missing process ends below as well
        return _descendantsByPs(pid)


def _descendantsByPs(pid):
    try:
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, check=False, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    parents = dict(map(int, line.split()) for line in listed.splitlines() if len(line.split()) == 2)
    found = [pid]
    for one in found:  # grows while it is walked
        found.extend(child for child, parent in parents.items() if parent == one and child not in found)
    return found[1:]


# ------------------------------------------------------------------------------------------------ starting


def pythonProgram(system=sys.platform, home=None, exists=shutil.which):
    """Path of the Python that Slicer's launcher starts with Slicer's libraries.

    Args:
        system: as ``sys.platform``.
        home: Slicer's installation folder; None = of the running application.
        exists: gives a program's path, or None.

    The installation's own PythonSlicer comes before one on the PATH, which may belong to another Slicer.
    Without either, the running interpreter does, but only if it is one: elsewhere ``sys.executable`` may be
    the application itself.
    """
    name = "PythonSlicer.exe" if system == "win32" else "PythonSlicer"
    home = slicerHome() if home is None else home
    for candidate in ([os.path.join(home, "bin", name)] if home else []) + [name]:
        found = exists(candidate)
        if found:
            return found
    return sys.executable if "python" in os.path.basename(sys.executable).lower() else name


def slicerHome():
    """Slicer's installation folder, "" when nothing tells."""
    return os.environ.get("SLICER_HOME") or getattr(slicer.app, "slicerHome", "") or ""


def libraryFolder():
    """The folder from which SymRegistrationLib was imported."""
    import SymRegistrationLib

    return str(Path(SymRegistrationLib.__file__).resolve().parent.parent)


def workerEnvironment(startup, folder):
    """Environment of the worker: the one Slicer was started in, and our library.

    Args:
        startup: environment before Slicer's launcher; the launcher that starts the worker adds its own part again.
        folder: :func:`libraryFolder`.
    """
    environment = dict(startup)
    paths = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["PYTHONIOENCODING"] = "utf-8"
    environment.pop("PYTHONSAFEPATH", None)  # it would take the working folder out of the search, see workerCommand
    return environment


def workerCommand():
    """(program, arguments, environment, folder) that start the worker.

    ``python -m`` searches the working folder before everything else, and the launcher puts its own folders before
    those of PYTHONPATH: only the working folder makes sure that the library of this very module runs, and not one
    that pip installed.
    """
    folder = libraryFolder()
    environment = workerEnvironment(slicer.util.startupEnvironment(), folder)
    return pythonProgram(), ["-m", "SymRegistrationLib", "worker", "--own-group"], environment, folder
