"""Register every pair of a table inside Slicer, without a window.

    Slicer --no-main-window --python-script register_table.py pairs.csv results preset=fast initial=rigid

The table is that of ``symreg batch`` (columns fixed, moving, and if you like masks, labels, points, sliding masks,
further contrasts, initial, method, id); whatever Slicer can load can stand in it. Words like preset=fast are the
library's options. For every pair a folder with forward.h5 and inverse.h5 (transforms, moving to fixed and back),
warped_moving.nrrd, jacobian.nrrd and metrics.json; summary.csv lists them all. A pair that fails is listed with its
reason and stops nothing. The same command again goes on where it was ended.

Take it as a start for scripts of your own, where something is done with the nodes while they are in the scene. Where
nothing of Slicer is needed, ``symreg batch`` is faster: several workers, a page of pictures, clusters.
"""

import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import slicer
from SymRegistrationGui.client import WorkerError
from SymRegistrationGui.runs import Run

from SymRegistration import SymRegistrationLogic
from SymRegistrationLib.cohort.table import UNSET, read_table
from SymRegistrationLib.job import INITIALS, InputError, Job, Options, RegistrationError

#: What is saved of a run: the logic's name of the node, and the file.
SAVED = {
    "forward": "forward.h5",
    "inverse": "inverse.h5",
    "warped_moving": "warped_moving.nrrd",
    "jacobian": "jacobian.nrrd",
}


def main(arguments):
    """Do all rows; returns the exit code: 0 all done, 1 some failed, 2 bad table or options."""
    try:
        table, output, *words = arguments
        rows = read_table(table, output, Job(UNSET, UNSET, output, options=readOptions(words)))
    except ValueError:
        print("Give a table and a folder for the results: register_table.py TABLE FOLDER [preset=fast ...]")
        return 2
    except InputError as error:
        print(f"Error: {error}")
        return 2
    logic = SymRegistrationLogic()
    summary = []
    for number, row in enumerate(rows, 1):
        folder = Path(row.job.output)
        try:
            metrics = finished(row, folder) or registerRow(logic, row, folder)
            summary.append(
                (row.identity, "done", "", metrics["similarity"]["after"], metrics["quality"]["folded_voxels"])
            )
        except (RegistrationError, WorkerError, RuntimeError, OSError) as error:
            summary.append((row.identity, "failed", " ".join(str(error).split()), "", ""))
        print(f"{number} of {len(rows)}: {' '.join(map(str, summary[-1]))}", flush=True)
        slicer.mrmlScene.Clear()
    Path(output).mkdir(parents=True, exist_ok=True)
    with open(os.path.join(output, "summary.csv"), "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "status", "reason", "similarity", "folded_voxels"), *summary])
    logic.engine.close()
    return 1 if any(line[1] == "failed" for line in summary) else 0


def readOptions(words):
    """Options from words like ``preset=fast``; values are read as JSON where they are JSON. Raises InputError."""
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return Job.from_dict({"fixed": UNSET, "moving": UNSET, "output": UNSET, "options": values}).options


def registerRow(logic, row, folder):
    """Load, register, save; returns the run's metrics. What is in the scene afterwards is for you to use."""
    job = row.job
    before = stamp(job)
    load = {
        "mask": slicer.util.loadLabelVolume,
        "labels": slicer.util.loadLabelVolume,
        "points": slicer.util.loadMarkups,
        "sliding_mask": slicer.util.loadLabelVolume,
    }
    fixed, moving = slicer.util.loadVolume(job.fixed), slicer.util.loadVolume(job.moving)
    inputs = {}
    for kind, read in load.items():
        for side in ("fixed", "moving"):
            if path := getattr(job, f"{side}_{kind}"):
                inputs[side + "".join(word.capitalize() for word in kind.split("_"))] = read(path)
    for side in ("fixed", "moving"):
        inputs[f"{side}Contrasts"] = tuple(map(slicer.util.loadVolume, getattr(job, f"{side}_contrasts")))
    options = {name: value for name, value in vars(job.options).items() if value != getattr(Options(), name)}
    if job.options.initial not in INITIALS:
        inputs["initialTransform"] = slicer.util.loadTransform(options.pop("initial"))
    nodes = logic.register(fixed, moving, inputs=inputs, **options)
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in SAVED.items():
        if not slicer.util.saveNode(nodes[name], str(folder / file)):
            raise OSError(f"'{folder / file}' could not be written")
    metrics = Run(nodes["table"]).metrics
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    # Written last and in one step: only a pair with this file is taken for finished.
    partial = folder / "done.json.partial"
    partial.write_text(json.dumps(before), encoding="utf-8")
    partial.replace(folder / "done.json")
    return metrics


def stamp(job):
    """What makes two runs the same: the options, and the SHA-256 of every file."""
    files = [
        value
        for name, value in vars(job).items()
        if isinstance(value, str) and name not in ("output", "transform_format")
    ]
    files += [*job.fixed_contrasts, *job.moving_contrasts]
    if job.options.initial not in INITIALS:
        files.append(job.options.initial)
    sums = {}
    for file in files:
        if not os.path.exists(file):
            raise InputError(f"'{file}' does not exist.", "Check the path in the table.")
        if os.path.isfile(file):
            sums[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"options": vars(job.options), "files": sums}


def finished(row, folder):
    """The metrics of a pair that an earlier call has finished with the same files and options, or None."""
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")) if done == stamp(row.job) else None
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    slicer.util.exit(main(sys.argv[1:]))
