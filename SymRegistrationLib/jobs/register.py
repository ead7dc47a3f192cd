"""A job from files to files: inputs are checked before anything is computed, outputs appear whole or not at all.

Everything is written into a hidden folder beside its destination and renamed at the end, ``metrics.json``
last, so its presence means that the run is complete. A folder left by a killed run is swept by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

from .. import __version__
from ..files import reason
from ..geometry.points import PointSet, paired, read_points
from ..geometry.transforms import write_transform
from ..geometry.volumes import read_labels, read_mask, read_volume, write_volume
from ..job import InputError, Job, Progress, RegistrationError, silent, usable_path
from ..pipeline import Extras, Result, register
from ..quality.outputs import OUTPUTS
from ..quality.schema import SCHEMA, Metrics

PARTIAL = ".symreg-partial-"
Writer = Callable[[Path, Job, Result], "dict[str, str]"]


def run(job: Job, progress: Progress = silent, write: Writer | None = None) -> Metrics:
    """Register the files a job names.

    Args:
        job: see :class:`~SymRegistrationLib.job.Job`.
        progress: ``progress(stage, fraction of the whole run, message)``.
        write: ``write(folder, job, result) -> file per name``, instead of :func:`write_result`.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: unusable inputs or output folder; nothing was written.
        RegistrationError: the run failed, or the disk is full; nothing is left behind.
    """
    started = time.perf_counter()
    check_output(job.output)
    progress("read", 0.0, "reading the scans")
    fixed = read_volume(job.fixed, "fixed image")
    moving = read_volume(job.moving, "moving image")
    extras = read_extras(job, fixed.grid, moving.grid)
    read = time.perf_counter() - started
    result = register(fixed, moving, job.options, extras, lambda stage, f, text: progress(stage, 0.03 + 0.87 * f, text))
    progress("write", 0.9, "writing")
    metrics: Metrics = {
        "schema": SCHEMA,
        "version": __version__,
        "job": dataclasses.asdict(job),
        **result.metrics,
        "environment": environment(job.options.threads),
    }
    metrics["seconds"] = {"read": round(read, 3), **metrics["seconds"]}
    with destination(job.output) as folder:
        metrics["files"] = (write or write_result)(folder, job, result)
        metrics["seconds"]["total"] = round(time.perf_counter() - started, 3)
        if job.report:
            from ..report.page import write_report

            metrics["files"]["report"] = "report.html"
            write_report(folder / "report.html", result, metrics)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    progress("write", 1.0, "done")
    return metrics


def read_extras(job: Job, fixed, moving) -> Extras:
    """Masks, labels and landmarks of a job. ``fixed`` and ``moving`` are the scans' grids. Raises InputError."""
    points: tuple[PointSet | None, PointSet | None] = (None, None)
    if job.fixed_points:
        points = paired(
            read_points(job.fixed_points, "fixed landmarks"), read_points(job.moving_points, "moving landmarks")
        )
    return Extras(
        fixed_mask=read_mask(job.fixed_mask, fixed, "fixed mask") if job.fixed_mask else None,
        moving_mask=read_mask(job.moving_mask, moving, "moving mask") if job.moving_mask else None,
        fixed_labels=read_labels(job.fixed_labels, "fixed labels") if job.fixed_labels else None,
        moving_labels=read_labels(job.moving_labels, "moving labels") if job.moving_labels else None,
        fixed_points=points[0],
        moving_points=points[1],
        guide=job.guide_with_points,
    )


def write_result(folder: Path, job: Job, result: Result) -> dict[str, str]:
    """Write transforms, images and maps; returns what lies where."""
    files = {}
    grids = {"fixed": result.fixed.grid, "moving": result.moving.grid}
    for output in OUTPUTS:
        delivered = getattr(result, output.field)
        if delivered is None:
            continue
        if output.kind == "transform":
            files[output.name] = f"{output.name}.{job.transform_format}"
            matrix = result.transforms.matrix if output.grid == "fixed" else np.linalg.inv(result.transforms.matrix)
            write_transform(folder / files[output.name], delivered, matrix if job.composite else None)
            continue
        files[output.name] = f"{output.name}.nii.gz"
        array = rounded(delivered) if output.kind == "map" else delivered
        write_volume(folder / files[output.name], array, grids[output.grid])
    for name, array in result.maps.items():
        files[name] = f"{name}.nii.gz"
        write_volume(folder / files[name], rounded(array), result.fixed.grid)
    return files


def rounded(array: np.ndarray) -> np.ndarray:
    """float32 with the last 10 bits cleared (relative error below 1e-4): compresses three times faster and smaller."""
    return ((array.astype(np.float32).view(np.uint32) + 0x200) & np.uint32(0xFFFFFC00)).view(np.float32)


def environment(threads: int | None = None) -> dict[str, str]:
    """Versions and machine, for repeating the run. ``threads``: what the run was told to use, else torch's own."""
    import SimpleITK
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "simpleitk": SimpleITK.Version.VersionString(),
        "system": platform.platform(),
        "threads": str(threads or torch.get_num_threads()),
    }


def check_output(output: str | os.PathLike) -> None:
    """Refuse, before any work, an output folder that cannot be made or written. Raises InputError."""
    existing = path = usable_path(output, "output")
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"output '{path}' is a file.", "Give a folder.")
        while not existing.exists():
            if existing.parent == existing:  # a drive of Windows that is not there
                raise InputError(
                    f"output folder '{path}' lies on a disk that is not there.", "Choose another folder with -o."
                )
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"output folder '{str(path)[:300]}' cannot be written ({error.strerror}).", "Choose another folder with -o."
        ) from None
    if shutil.disk_usage(existing).free < 50e6:
        raise InputError(f"the disk of output folder '{path}' is full.", "Free some space, or choose another folder.")


@contextlib.contextmanager
def destination(output: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder to write into; on success its files move to ``output``, on any failure nothing is left.

    Raises:
        RegistrationError: the disk is full or the folder went away.
    """
    output = Path(output)
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        sweep(output)
        folder = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=output))
        _live.add(folder.name)
    except OSError as error:
        raise InputError(
            f"output folder '{output}' cannot be written ({error.strerror}).", "Choose another with -o."
        ) from None
    try:
        yield folder
        _publish(folder, output)
        made = False
    except (OSError, RuntimeError) as error:
        if isinstance(error, RegistrationError):
            raise
        why = "the disk is full" if shutil.disk_usage(output).free < 1e6 else reason(error)
        hint = "Nothing was left there. Free space, or choose another folder, and give the same command again."
        raise RegistrationError(f"writing to '{output}' failed: {why}.", hint) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _live.discard(folder.name)
        if made:
            with contextlib.suppress(OSError):
                output.rmdir()


def _publish(folder: Path, output: Path) -> None:
    """Move the files of ``folder`` to their final names, ``metrics.json`` last; all of them or none.

    A stop that arrives in these milliseconds is granted after the last file.
    """
    paths = sorted(folder.iterdir(), key=lambda p: p.name == "metrics.json")
    names = [path.name for path in paths]
    for name in names:
        if (output / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "there is a folder of that name", name)
    (output / "metrics.json").unlink(missing_ok=True)  # of an earlier run: from here on its results are being replaced
    stop: BaseException | None = None
    while paths:
        try:
            if paths[0].exists():
                os.replace(paths[0], output / paths[0].name)
            paths.pop(0)
        except OSError:
            for name in names:
                if not (folder / name).exists():
                    (output / name).unlink(missing_ok=True)
            raise
        except BaseException as error:  # Ctrl-C or SIGTERM
            stop = error
    if stop is not None:
        raise stop


#: Hidden folders that this process is writing into now.
_live: set[str] = set()


def sweep(output: Path) -> None:
    """Remove hidden folders of runs whose process no longer exists, or had this one's number (containers repeat
    them)."""
    for path in output.glob(f"{PARTIAL}*"):
        pid = path.name[len(PARTIAL) :].split("-")[0]
        gone = not (pid.isdigit() and psutil.pid_exists(int(pid)))
        if gone or (int(pid) == os.getpid() and path.name not in _live):
            shutil.rmtree(path, ignore_errors=True)
