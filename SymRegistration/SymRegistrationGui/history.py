"""The steps of a run, kept with the scene: what the library writes as ``history.json``, the state that each step left,
and the small files that its job names. The scans themselves are the scene's own nodes.

In the scene, paths of jobs are names behind :data:`HERE`; in a folder they are real paths again, so that the worker and
``symreg register --job FOLDER/history.json`` find everything.
"""

import base64
import hashlib
import itertools
import json
import os
import zlib

from slicer.i18n import tr as _

from SymRegistrationLib.job import INPUT_PATHS, InputError, RegistrationError

from . import exchange, nodes
from .steps import PIECE

HERE = "@"
#: Fields of a job that may name files of its folder.
_FILES = (*INPUT_PATHS, "region")
_SCANS = ("fixed", "moving")
#: Fields of a job that list scans, which are nodes of the scene under names that stay theirs for the whole history.
_LISTS = ("fixed_contrasts", "moving_contrasts")
_PART = "kept."
FILE = "history.json"


class Kept:
    """Steps on their way into the scene.

    Attributes:
        history: what ``history.json`` says, paths behind :data:`HERE`.
        files: name -> base64 text of the new files.
    """

    def __init__(self, history, files):
        self.history, self.files = history, files


def of(run):
    """The history of a run as plain data, None when there is none."""
    text = run.text("history") if run is not None else ""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def steps(run):
    """(the current step's number, list of steps) of a run; (0, []) when none are kept."""
    found = of(run)
    return (found["current"], found["steps"]) if found else (0, [])


# ------------------------------------------------------------------------------------------------ into the scene


def read(folder):
    """Generator: the steps that a finished job left in its folder, as :class:`Kept`; None when it kept none."""
    path = folder.file(f"result/{FILE}")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        history = json.load(file)
    files = {}
    for step in history["steps"]:
        if step["number"] == history["current"]:
            files[step["state"]] = yield from _encoded(folder.file(f"result/{step['state']}"))
        job = step["job"]
        for name in _FILES:
            if job.get(name):
                job[name] = yield from _moved(job[name], name in _SCANS, folder, files)
        for name in _LISTS:
            job[name] = [HERE + os.path.basename(path) for path in job.get(name, ())]
        initial = job["options"].get("initial", "")
        if os.path.isabs(initial):
            job["options"]["initial"] = yield from _moved(initial, False, folder, files)
        job["output"] = f"{HERE}result"
        job["start_from"] = f"{HERE}result" if job.get("start_from") else None
    return Kept(history, files)


def _moved(path, scan, folder, files):
    """Generator: the name of a job's file in the scene; its content goes into ``files`` unless it is there already."""
    name = os.path.basename(path)
    if scan or name.startswith(_PART):
        return HERE + name
    text = yield from _encoded(path)
    stem, ending = os.path.splitext(name)
    name = f"{_PART}{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{ending}"
    files[name] = text
    return HERE + name


def _encoded(path):
    """Generator: a file as base64 text; a raw NRRD volume is packed before."""
    with open(path, "rb") as file:
        content = file.read()
    yield
    head, rest = content.split(b"\n\n", 1) if content.startswith(b"NRRD") else (b"", content)
    if b"encoding: raw" in head:
        packer, packed = zlib.compressobj(3, wbits=31), []
        for start in range(0, len(rest), PIECE // 8):
            packed.append(packer.compress(rest[start : start + PIECE // 8]))
            yield
        packed.append(packer.flush())
        content = head.replace(b"encoding: raw", b"encoding: gzip") + b"\n\n" + b"".join(packed)
    texts = []
    for start in range(0, max(1, len(content)), 3 * (PIECE // 3)):
        texts.append(base64.b64encode(content[start : start + 3 * (PIECE // 3)]).decode("ascii"))
        yield
    return "".join(texts)


def keep(run, kept):
    """Put steps into a run, at once; what no step names any more goes. ``kept`` is None when a job kept none."""
    if kept is None:
        run.dropText("history")
        run.dropText("kept")
        return
    files = {**_files(run), **{_role(name): text for name, text in kept.files.items()}}
    run.setText("kept", "\n".join(f"{name} {files[name]}" for name in _names(kept.history) if name in files))
    run.setText("history", json.dumps(kept.history))


def _files(run):
    """Name -> base64 text of what is kept with a run: one node for all, so that a step makes no further node."""
    return dict(line.split(" ", 1) for line in run.text("kept").splitlines())


def _role(name):
    return name if name.startswith(_PART) else _PART + name


def _names(history):
    """Parts of a run that hold the files of a history."""
    found = []
    for step in history["steps"]:
        found.append(_role(step["state"]))
        values = [step["job"].get(name) for name in _FILES] + [step["job"]["options"].get("initial")]
        found += [value[len(HERE) :] for value in values if value and value.startswith(HERE + _PART)]
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------ further scans


def named(run, contrasts):
    """Name -> volume of further contrasts: their names in the files of a run, and the roles of their nodes there.

    A name that a step of the run uses for one scan, even a deleted one, is never given to another.
    """
    found, used = {}, set() if run is None else _scanNames(steps(run)[1])
    for node in contrasts:
        for k in itertools.count(1):
            name = f"scan{k}"
            if name in found or (name in used and run.node(name) is not node):
                continue
            found[name] = node
            break
    return found


def further(run, states):
    """Name -> node, or None where it was deleted, of the further contrasts that some steps (numbers) look at."""
    return {name: run.node(name) for name in sorted(_scanNames(s for s in steps(run)[1] if s["number"] in states))}


def _scanNames(some):
    listed = (path for step in some for name in _LISTS for path in step["job"].get(name, ()))
    return {os.path.splitext(path[len(HERE) :])[0] for path in listed}


# ------------------------------------------------------------------------------------------------ out of the scene


def layScans(run, folder, states=()):
    """Generator: write the scans of a run as they are now, with the further contrasts of some steps, into ``folder``.

    Raises:
        InputError: one of them was deleted.
    """
    found = {**{side: run.node(side) for side in _SCANS}, **further(run, states)}
    for name, node in found.items():
        if node is None:
            raise InputError(
                _("A scan of '{name}' was deleted.").format(name=run.table.GetName()),
                _("Its result stays as it is; load the scan and register again to go on."),
            )
        yield from exchange.writeVolume(folder.file(f"{name}.nrrd"), *nodes.worldVolume(node))


def lay(run, folder, states=()):
    """Generator: write the steps of a run into ``folder`` (an object with ``file(name)``), ready for the library.

    Args:
        states: numbers of the steps whose states are needed there.

    Raises:
        InputError: a part of the history was deleted.
    """
    history = of(run)
    if history is None:
        return
    os.makedirs(folder.file("result"), exist_ok=True)
    files = _files(run)
    for name in _names(history):
        state = name.endswith(".safetensors")
        if not state:
            yield from _write(run, files.get(name), folder.file(name))
    for step in history["steps"]:
        if step["number"] in states:
            yield from _write(run, files.get(_role(step["state"])), folder.file(f"result/{step['state']}"))
        job = step["job"]
        for name in (*_FILES, "output", "start_from"):
            job[name] = _placed(job.get(name), folder)
        for name in _LISTS:
            job[name] = [_placed(path, folder) for path in job.get(name, ())]
        job["options"]["initial"] = _placed(job["options"]["initial"], folder)
    with open(folder.file(f"result/{FILE}"), "w", encoding="utf-8") as file:
        json.dump(history, file, indent=1)
    yield


def _placed(value, folder):
    return folder.file(value[len(HERE) :]) if value and value.startswith(HERE) else value


def _write(run, text, path):
    if not text:
        raise InputError(
            _("A part of the history of '{name}' was deleted from the scene.").format(name=run.table.GetName()),
            _("Register again, which begins a new one. The result is as it was."),
        )
    try:
        with open(path, "wb") as file:
            for start in range(0, len(text), 4 * (PIECE // 4)):
                file.write(base64.b64decode(text[start : start + 4 * (PIECE // 4)]))
                yield
    except OSError as error:
        raise RegistrationError(
            _("The history could not be handed over ({reason}).").format(reason=error.strerror),
            _("Free some space on the disk."),
        ) from None


class _Place:
    """A folder of the user's, as :func:`lay` wants one."""

    def __init__(self, path):
        self.path = path

    def file(self, name):
        return os.path.join(self.path, name)


def exportSteps(run, path):
    """Generator: write the steps with the scans into the folder ``path``; ``symreg register --job
    path/result/history.json -o AGAIN`` does them all again. Returns the path of the history.

    Raises:
        InputError: there are none, or a part or a scan was deleted. RegistrationError: the disk refuses.
    """
    current, known = steps(run)
    if not known:
        raise InputError(_("There are no steps to save."), _("Register first."))
    place = _Place(os.path.abspath(path))
    try:
        os.makedirs(place.path, exist_ok=True)
    except OSError as error:
        raise RegistrationError(
            _("The folder {path} cannot be made ({reason}).").format(path=place.path, reason=error.strerror),
            _("Choose another folder."),
        ) from None
    numbers = range(1, len(known) + 1)
    yield from layScans(run, place, numbers)
    yield from lay(run, place, numbers)
    return place.file(f"result/{FILE}")
