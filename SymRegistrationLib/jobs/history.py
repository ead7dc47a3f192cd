"""The steps that led to a result: each is kept with its state, can be undone and done again, and all can be replayed.

In the folder of a result ``history.json`` lists the steps (register, update, repair) with their jobs and numbers, and
``state-N.safetensors`` is what step N left. The step that the folder's files show is ``current``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import number, table
from ..files import json_object
from ..geometry.volumes import read_labels
from ..job import InputError, Job, Options, Progress, existing_file, numbers, silent
from ..registration.catalogue import is_linear
from ..registration.guide import Region
from ..registration.state import State
from .memory import Memory

FILE = "history.json"
SCHEMA = 1
_NO_STATE = "Register with --keep-state; then it can be gone on from."


@dataclass(frozen=True)
class History:
    """The steps of one folder.

    Attributes:
        folder: where the states lie.
        steps: plain data per step: ``number`` from 1, ``step``, ``state`` (file), ``job``, ``numbers``, ``time``.
        current: number of the step that the folder shows.
        inputs: fingerprints of the fixed and the moving scan, then of further contrasts.
    """

    folder: Path
    steps: tuple[dict[str, Any], ...] = ()
    current: int = 0
    inputs: tuple[str, ...] = ()

    @property
    def now(self) -> dict[str, Any]:
        """The current step."""
        return self.steps[self.current - 1]

    def state(self, k: int) -> Path:
        """The file of what step ``k`` left."""
        return self.folder / self.steps[k - 1]["state"]

    def text(self) -> str:
        """``history.json``."""
        return json.dumps(
            {"schema": SCHEMA, "current": self.current, "inputs": list(self.inputs), "steps": list(self.steps)},
            indent=1,
        )


def read(folder: str | Path) -> History:
    """The history of a folder, or of that of a ``history.json``. Raises InputError: none there, or damaged."""
    folder = Path(folder)
    folder = folder.parent if folder.name == FILE else folder
    existing_file(folder, "result folder")
    raw = json_object(folder / FILE)
    if raw is None:
        raise InputError(f"'{folder}' holds no history of a registration.", _NO_STATE)
    steps: Any = raw.get("steps")
    current: Any = raw.get("current")
    inputs: Any = raw.get("inputs")
    sound = (
        raw.get("schema") == SCHEMA
        and isinstance(steps, list)
        and isinstance(current, int)
        and isinstance(inputs, list)
        and 1 <= current <= len(steps)
        and all(isinstance(s, dict) and isinstance(s.get("job"), dict) and _plain_name(s.get("state")) for s in steps)
    )
    if not sound:
        raise InputError(f"'{folder / FILE}' is damaged or of another version.", "Register again.")
    return History(folder, tuple(steps), current, tuple(inputs))


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def start_of(job: Job, load: Callable[[Path], State] = State.load) -> tuple[State | None, History | None]:
    """The state that a job goes on from and the history it belongs to; None where it begins anew. Raises InputError.

    Args:
        load: reads a state.
    """
    if not job.start_from:
        return None, None
    path = existing_file(job.start_from, "start")
    if path.is_file() and path.name != FILE:
        return load(path), None
    history = read(path)
    return load(history.state(history.current)), history


def region_of(job: Job) -> Region | None:
    """Where a job may work. Raises InputError: the mask cannot be read."""
    if job.sphere:
        x, y, z, radius = numbers(job.sphere, "sphere")
        return Region(None, (x, y, z), radius, job.rim_mm)
    if job.region:
        return Region(read_labels(job.region, "region"), rim_mm=job.rim_mm)
    return None


@dataclass(frozen=True)
class Recording:
    """A step that is being written into ``folder``, from where it is published with the other files.

    Attributes:
        kept: the history that the step goes on, or that is shown again.
        state: what the step leaves; None when nothing is kept of it.
    """

    folder: Path
    job: Job
    kept: History
    state: State | None

    @property
    def number(self) -> int:
        """Of the step, from 1."""
        return len(self.kept.steps) + 1

    @property
    def name(self) -> str:
        """The file of the state."""
        return f"state-{self.number}.safetensors"

    def save(self) -> None:
        """Write the state; other files can be written meanwhile."""
        if self.state is not None:
            self.state.save(self.folder / self.name)

    def close(self, metrics: Mapping[str, Any]) -> History | None:
        """Write the history with this step and its numbers. Returns it; None when the job keeps none."""
        history = self.kept
        if self.state is not None:
            entry = {
                "number": self.number,
                "step": self.job.step,
                "state": self.name,
                "job": dataclasses.asdict(self.job),
                "numbers": numbers_of(metrics),
                "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            }
            history = History(Path(self.job.output), (*history.steps, entry), self.number, self.state.inputs)
        if not history.steps:
            return None
        (self.folder / FILE).write_text(history.text(), encoding="utf-8")
        return history


def record(
    folder: Path, job: Job, before: History | None, state: State | None, shown: History | None = None
) -> Recording:
    """A step that begins to be written into ``folder``, with the states of the steps before it.

    Args:
        before: the history of the start, or None; a new registration goes on with that of the output folder when it is
            of the same scans.
        state: what the step leaves, or None.
        shown: the history whose current step was written again; it is kept as it is.
    """
    nothing = History(Path(job.output))
    if shown is not None or state is None:
        return Recording(folder, job, shown or nothing, None)
    if before is None and not job.start_from:
        before = _of_same_scans(Path(job.output), state.inputs)
    kept = before.steps[: before.current] if before else ()
    if before is not None and before.folder.resolve() != Path(job.output).resolve():
        for step in kept:
            shutil.copyfile(before.folder / step["state"], folder / step["state"])
    return Recording(folder, job, dataclasses.replace(nothing, steps=kept), state)


def sweep_states(history: History | None) -> None:
    """Remove the states of steps that a new one has replaced."""
    if history is None:
        return
    for path in history.folder.glob("state-*.safetensors"):
        if path.name not in {step["state"] for step in history.steps}:
            path.unlink(missing_ok=True)


def _of_same_scans(folder: Path, inputs: tuple[str, ...]) -> History | None:
    try:
        history = read(folder)
    except InputError:
        return None
    return history if history.inputs == tuple(inputs) else None


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared between steps."""
    labels, marks, quality = metrics.get("labels"), metrics.get("landmarks"), metrics["quality"]
    return {
        "similarity": metrics["similarity"]["after"],
        "folded_voxels": quality["folded_voxels"],
        "jacobian_min": quality["jacobian_min"],
        "ice_mean_mm": quality["ice_mean_mm"],
        "mean_dice": labels and labels["mean_after"],
        "mean_landmark_error_mm": marks and marks["mean_after_mm"],
        "seconds": metrics["seconds"]["total"],
    }


# ---------------------------------------------------------------------------------------------- undo, redo, replay


def undo(
    folder: str | Path, progress: Progress = silent, write: Callable | None = None, memory: Memory | None = None
) -> dict[str, Any]:
    """Show the step before in ``folder``; see :func:`show`. Raises InputError: there is none, or the scans changed."""
    history = read(folder)
    if history.current == 1:
        raise InputError("there is nothing to undo: this is the first step.", "See 'symreg history' for all steps.")
    return show(history, history.current - 1, progress, write, memory)


def redo(
    folder: str | Path, progress: Progress = silent, write: Callable | None = None, memory: Memory | None = None
) -> dict[str, Any]:
    """Show the step after in ``folder`` again. Raises InputError: there is none, or the scans changed."""
    history = read(folder)
    if history.current == len(history.steps):
        raise InputError("there is nothing to redo: this is the last step.", "See 'symreg history' for all steps.")
    return show(history, history.current + 1, progress, write, memory)


def show(
    history: History,
    k: int,
    progress: Progress = silent,
    write: Callable | None = None,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Make the files of a folder those of step ``k`` again, from its state; nothing is optimised.

    Returns:
        The content of ``metrics.json``.
    """
    from .register import run

    job = Job.from_dict(history.steps[k - 1]["job"])
    job = dataclasses.replace(job, output=str(history.folder), start_from=None, region=None, sphere=None)
    options = dataclasses.replace(job.options, uncertainty=0, ensemble="", average=False)
    shown = dataclasses.replace(history, current=k)
    return dict(run(dataclasses.replace(job, options=options), progress, write, shown=shown, memory=memory))


def replay(path: str | Path, output: str, progress: Progress = silent) -> dict[str, Any]:
    """Do all steps up to the current one again, into another folder. Returns the last one's ``metrics.json``."""
    from .register import run

    history = read(path)
    metrics: dict[str, Any] = {}
    steps = history.steps[: history.current]
    for k, step in enumerate(steps):
        job = Job.from_dict({**step["job"], "output": output})
        if job.start_from:
            job = dataclasses.replace(job, start_from=output)

        def told(stage: str, f: float, text: str, k: int = k) -> None:
            progress(stage, (k + f) / len(steps), f"step {k + 1}: {text}")

        metrics = dict(run(job, told))
    return metrics


def continuing_job(folder: str, output: str | None, changes: dict[str, Any], options: dict[str, Any]) -> Job:
    """The job that goes on from the result in ``folder``.

    Args:
        output: folder for the new result; None = the same folder.
        changes: fields of :class:`Job` that differ from the last step's.
        options: fields of :class:`Options` that differ.

    Raises:
        InputError: no history there, or values that are not allowed.
    """
    last = Job.from_dict(read(folder).now["job"])
    method = Options().method if is_linear(last.options.method) else last.options.method
    keep = {"method": method, "uncertainty": 0, "ensemble": "", "average": False, "spacing": None}
    return dataclasses.replace(
        last,
        **{
            "output": output or folder,
            "start_from": folder,
            "region": None,
            "sphere": None,
            "guide_with_points": False,
            "keep_state": True,
            **changes,
        },
        options=dataclasses.replace(last.options, **{**keep, **options}),
    )


def history_table(history: History) -> str:
    """The steps and their numbers side by side, the current one marked."""
    heads = ("", "step", "similarity", "Dice", "landmarks, mm", "folded", "smallest Jacobian", "ICE, mm", "seconds")
    rows = []
    for step in history.steps:
        told = step.get("numbers") or {}
        keys = (
            ("similarity", 4),
            ("mean_dice", 4),
            ("mean_landmark_error_mm", 2),
            ("folded_voxels", 0),
            ("jacobian_min", 2),
            ("ice_mean_mm", 3),
            ("seconds", 1),
        )
        cells = ["-" if told.get(key) is None else number(told[key], digits) for key, digits in keys]
        mark = ">" if step["number"] == history.current else ""
        rows.append((f"{mark}{step['number']}", step["step"], *cells))
    return table(heads, rows)
