"""A job from files to files: inputs are checked before anything is computed, outputs appear whole or not at all.

Everything is written into a hidden folder beside its destination and renamed at the end, ``metrics.json``
last, so its presence means that the run is complete. A folder left by a killed run is swept by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from .. import __version__
from ..files import reason
from ..geometry.grid import Grid
from ..geometry.linear import write_linear
from ..geometry.points import PointSet, paired, read_points
from ..geometry.transform_files import write_transform
from ..geometry.transforms import Transform
from ..geometry.volumes import Volume, read_labels, read_mask, read_volume, write_volume
from ..job import InputError, Job, Progress, RegistrationError, silent, usable_path
from ..pipeline import Result, register
from ..quality.outputs import OUTPUTS
from ..quality.schema import SCHEMA, Metrics
from ..registration.catalogue import is_linear
from ..registration.extras import Extras
from ..registration.live import Watch
from ..registration.memory import DENSE_BYTES, room
from ..registration.physical import dense_grid
from ..registration.state import State
from . import history
from .memory import Memory

#: Formats in which a linear transform stays one; the others hold a grid of vectors.
LINEAR_FORMATS = ("h5", "tfm")
PARTIAL = ".symreg-partial-"
Writer = Callable[[Path, Job, Result], "dict[str, str]"]


def run(
    job: Job,
    progress: Progress = silent,
    write: Writer | None = None,
    watch: Watch | None = None,
    shown: history.History | None = None,
    memory: Memory | None = None,
) -> Metrics:
    """Register the files a job names.

    Args:
        job: see :class:`~SymRegistrationLib.job.Job`.
        progress: ``progress(stage, fraction of the whole run, message)``.
        write: ``write(folder, job, result) -> file per name``, instead of :func:`write_result`.
        watch: who looks while the optimiser runs, and may end it.
        shown: only write again what the current step of this history left; nothing is optimised.
        memory: of this process, when it takes more than one job.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: unusable inputs or output folder; nothing was written.
        RegistrationError: the run failed, or the disk is full; nothing is left behind.
    """
    started = time.perf_counter()
    if job.transform_format == "tfm" and not is_linear(job.options.method):
        raise InputError("only a linear transform can be stored as .tfm.", "Use --transform-format h5.")
    check_output(job.output)
    progress("read", 0.0, "reading the scans")
    kept = memory or Memory()
    fixed, moving = kept.scan(job.fixed, "fixed image"), kept.scan(job.moving, "moving image")
    check_dense(job, fixed.grid, moving.grid)
    extras, before = _steered(job, read_extras(job, fixed.grid, moving.grid), watch, shown, memory)
    read = time.perf_counter() - started
    result = register(fixed, moving, job.options, extras, lambda stage, f, text: progress(stage, 0.03 + 0.87 * f, text))
    progress("write", 0.9, "writing")
    metrics = _first_metrics(job, result, read)
    with destination(job.output) as folder:

        def report(files: dict[str, str]) -> None:
            metrics["files"] = dict(files)
            metrics["seconds"]["total"] = round(time.perf_counter() - started, 3)
            if job.report:
                from ..report.page import write_report

                metrics["files"]["report"] = "report.html"
                write_report(folder / "report.html", result, metrics)

        step = history.record(folder, job, before, result.state, shown)
        if write is None:
            write_result(folder, job, result, report, step.save)
        else:
            report(write(folder, job, result))
            step.save()
        metrics["seconds"]["total"] = round(time.perf_counter() - started, 3)
        steps = step.close(metrics)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    history.sweep_states(steps)
    if memory is not None and steps is not None and result.state is not None:
        memory.keep(steps.folder / steps.now["state"], result.state)
    progress("write", 1.0, "done")
    return metrics


def _first_metrics(job: Job, result: Result, read: float) -> Metrics:
    """What metrics.json says before anything is written; ``read``: seconds."""
    metrics: Metrics = {
        "schema": SCHEMA,
        "version": __version__,
        "job": dataclasses.asdict(job),
        **result.metrics,
        "environment": environment(job.options.threads),
    }
    metrics["seconds"] = {"read": round(read, 3), **metrics["seconds"]}
    return metrics


def _steered(
    job: Job, extras: Extras, watch: Watch | None, shown: history.History | None, memory: Memory | None
) -> tuple[Extras, history.History | None]:
    """The extras with where to go on from and who looks, and the history that the start belongs to."""
    load = State.load if memory is None else memory.state
    start, before = (load(shown.state(shown.current)), shown) if shown else history.start_of(job, load)
    if start is None and memory is not None:
        memory.forget()
    # A step that is only shown again writes no state, but it is the one that the next job goes on from.
    keep, region = job.keep_state and (shown is None or memory is not None), history.region_of(job)
    return replace(extras, start=start, restore=bool(shown), region=region, watch=watch, keep_state=keep), before


def read_extras(job: Job, fixed: Grid, moving: Grid) -> Extras:
    """Masks, labels and landmarks of a job. ``fixed`` and ``moving`` are the scans' grids. Raises InputError."""
    points: tuple[PointSet | None, PointSet | None] = (None, None)
    if job.fixed_points and job.moving_points:
        points = paired(
            read_points(job.fixed_points, "fixed landmarks"), read_points(job.moving_points, "moving landmarks")
        )
    return Extras(
        fixed_mask=read_mask(job.fixed_mask, fixed, "fixed mask") if job.fixed_mask else None,
        moving_mask=read_mask(job.moving_mask, moving, "moving mask") if job.moving_mask else None,
        fixed_labels=read_labels(job.fixed_labels, "fixed labels") if job.fixed_labels else None,
        moving_labels=read_labels(job.moving_labels, "moving labels") if job.moving_labels else None,
        sliding=(
            read_labels(job.fixed_sliding_mask, "fixed sliding mask") if job.fixed_sliding_mask else None,
            read_labels(job.moving_sliding_mask, "moving sliding mask") if job.moving_sliding_mask else None,
        ),
        fixed_points=points[0],
        moving_points=points[1],
        guide=job.guide_with_points,
        fixed_contrasts=_contrasts(job.fixed_contrasts, "fixed"),
        moving_contrasts=_contrasts(job.moving_contrasts, "moving"),
    )


def _contrasts(paths: Sequence[str], side: str) -> tuple[Volume, ...]:
    return tuple(read_volume(path, f"{side} contrast {k}") for k, path in enumerate(paths, 2))


def write_result(
    folder: Path,
    job: Job,
    result: Result,
    meanwhile: Callable[[dict[str, str]], None] | None = None,
    beside: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Write transforms, images and maps, several files at a time; returns what lies where.

    Args:
        meanwhile: called with the file names while they are being written.
        beside: writes one more file, as one of those that are written at a time.

    Raises:
        OSError, RuntimeError: the disk is full, or the folder went away.
    """
    tasks = _tasks(job, result)
    names = {name: file for name, (file, _) in tasks.items()}
    with ThreadPoolExecutor(max(1, min(4, torch.get_num_threads()))) as pool:
        written = [pool.submit(write, folder / file) for file, write in tasks.values()]
        if beside is not None:
            written.append(pool.submit(beside))
        if meanwhile is not None:
            meanwhile(names)
        for future in written:
            future.result()
    return names


def _tasks(job: Job, result: Result) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Name -> (file name, function that writes it) of every output that there is."""
    tasks: dict[str, tuple[str, Callable[[Path], None]]] = {}
    for output in OUTPUTS:
        delivered = getattr(result, output.field)
        if delivered is None:
            continue
        if output.kind == "transform":
            file = f"{output.name}.{job.transform_format}"
            tasks[output.name] = file, partial(_write_transform, job, result, output.grid, delivered)
        else:
            bits = output.spare_bits if output.kind == "map" else 0
            tasks[output.name] = (
                f"{output.name}.nii.gz",
                partial(_write_map, delivered, result.grids[output.grid], bits),
            )
    for name, array in result.maps.items():
        tasks[name] = f"{name}.nii.gz", partial(_write_map, array, result.fixed.grid, 10)
    return tasks


def _write_transform(job: Job, result: Result, side: str, transform: Transform, path: Path) -> None:
    matrix = result.transforms.matrix if side == "fixed" else np.linalg.inv(result.transforms.matrix)
    if result.linear and job.transform_format in LINEAR_FORMATS:
        write_linear(path, matrix)
        return
    if _is_dense(job):
        transform = transform.resampled(dense_grid(result.grids[side], float(transform.grid.spacing.min())))
    write_transform(path, transform, matrix if job.composite and job.dense else None)


def _write_map(array: np.ndarray, grid: Grid, bits: int, path: Path) -> None:
    write_volume(path, rounded(array, bits) if bits else array, grid)


def _is_dense(job: Job) -> bool:
    """Whether transforms are written voxel by voxel: on request, and in formats that hold nothing but a grid."""
    return job.dense or job.transform_format not in LINEAR_FORMATS


def check_dense(job: Job, *scans: Grid) -> None:
    """Refuse, before any work, dense transforms that would not fit the memory. Raises InputError."""
    if not _is_dense(job):
        return
    need = DENSE_BYTES * max(math.prod(dense_grid(scan, 0.0).shape) for scan in scans)
    available = room("cpu", job.options.memory_gb)
    if need > available:
        raise InputError(
            f"a dense transform on {need / DENSE_BYTES:.3g} voxels needs about {need / 1e9:.3g} GB; "
            f"{available / 1e9:.3g} GB may be used.",
            "Leave --dense out and write .h5: affine and lattice fit, and say the same.",
        )


def rounded(array: np.ndarray, bits: int = 10) -> np.ndarray:
    """float32 with the last ``bits`` of 23 bits cleared (relative error ``2**(bits - 24)``), never across zero: it
    packs better."""
    whole = array.astype(np.float32).view(np.uint32)
    half, mask = np.uint32(1 << (bits - 1)), np.uint32((0xFFFFFFFF << bits) & 0xFFFFFFFF)
    return ((whole + half) & mask).view(np.float32)


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
    """Remove hidden folders of runs whose process no longer exists, or had this one's number
    (containers repeat them)."""
    for path in output.glob(f"{PARTIAL}*"):
        pid = path.name[len(PARTIAL) :].split("-")[0]
        gone = not (pid.isdigit() and psutil.pid_exists(int(pid)))
        if gone or (int(pid) == os.getpid() and path.name not in _live):
            shutil.rmtree(path, ignore_errors=True)
