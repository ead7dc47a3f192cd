"""One pair of a batch: registered, pictured, and recorded so that a later run can prove that it is finished.

The record is written last, in one step, when everything it lists lies on the disk; it holds the SHA-256 of
every input, of the job, and of every output. It is what a resumed batch believes, never the mere presence of files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import json_object, sha256, write_whole
from ..job import INITIALS, INPUT_PATHS, InputError, Job, Progress, RegistrationError, silent
from ..quality.schema import problems
from ..registration.catalogue import needs_weights

RECORD = "pair.json"
THUMBNAIL = "thumbnail.png"
#: Parts of the options that say where and how fast, not what; they change a result by rounding at most.
MACHINE = ("device", "threads", "memory_gb")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class PairRequest:
    """What a worker is asked to do for one pair.

    Attributes:
        job: the registration.
        group: also write ``log_jacobian.nii.gz`` and ``coverage.nii.gz`` for what
        :mod:`SymRegistrationLib.cohort.template` makes of many pairs.
    """

    job: Job
    group: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :meth:`from_dict` gives it back."""
        return {"job": dataclasses.asdict(self.job), "group": self.group}

    @classmethod
    def from_dict(cls, raw: Any) -> PairRequest:
        """From plain data, as the worker gets it. Raises InputError."""
        if not isinstance(raw, dict) or set(raw) - {"job", "group"} or not isinstance(raw.get("group", False), bool):
            raise InputError("the pair request must be an object with a job and a true or false 'group'.")
        return cls(Job.from_dict(raw.get("job")), raw.get("group", False))


class Digests:
    """SHA-256 of files, each read once while it stays as it is."""

    def __init__(self) -> None:
        self._known: dict[tuple, str] = {}

    def of(self, path: str | Path) -> str:
        """Of a file with what its header points to, or of a folder's files. Raises InputError when it
        cannot be read."""
        parts = hashlib.sha256()
        files = content_files(Path(path))
        for file in files:
            parts.update(f"{file.name if len(files) > 1 else ''}\0{self._file(file)}\n".encode())
        return parts.hexdigest()

    def _file(self, path: Path) -> str:
        try:
            stat = path.stat()
            key = (str(path), stat.st_size, stat.st_mtime_ns)
            if key not in self._known:
                self._known[key] = sha256(path)
            return self._known[key]
        except OSError as error:
            raise InputError(
                f"'{path}' could not be read ({error.strerror}).", "Check the path and its permissions."
            ) from None


def content_files(path: Path) -> list[Path]:
    """The files that hold a scan: a folder's, or a file and the data file that its header names."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    ending = path.suffix.lower()
    if ending in (".hdr", ".img"):
        return [
            path,
            *(
                other
                for other in (path.with_suffix(".hdr"), path.with_suffix(".img"))
                if other != path and other.is_file()
            ),
        ]
    if ending not in (".mhd", ".nhdr") or not path.is_file():
        return [path]
    header = path.read_bytes()[:65536].decode("latin-1")
    named = re.search(r"(?im)^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(.+?)\s*$", header)
    data = path.parent / named.group(1) if named else None
    if data is not None and data.is_file():
        return [path, data]
    # A list or a pattern of files: they lie beside the header and share the start of its name.
    return [
        path,
        *sorted(
            file
            for file in path.parent.glob("*")
            if file.is_file() and file != path and file.name.startswith(path.stem)
        ),
    ]


def inputs_of(job: Job) -> dict[str, str]:
    """Every file that the result depends on: scans, masks, labels, landmarks, start transform, weights."""
    files = dict(job.inputs)
    options = job.options
    if options.initial not in INITIALS:
        files["initial"] = options.initial
    if options.weights:
        files["weights"] = options.weights
    elif needs_weights(options.method):
        from ..registration import weights  # which ones are shipped

        files["weights"] = str(weights.find(options.method, None, options.method_options.get("size")))
    return files


def signature(request: PairRequest, digests: Digests) -> dict[str, Any]:
    """``job`` and ``inputs`` (SHA-256 per input): what two runs must share for their results to be the same.

    Paths, the output folder and the machine's settings do not count. Raises InputError when an input cannot be read.
    """
    job = dataclasses.asdict(request.job)
    files = inputs_of(request.job)
    for name in ("output", *INPUT_PATHS, "fixed_contrasts", "moving_contrasts"):
        del job[name]
    for name in MACHINE:
        del job["options"][name]
    if "initial" in files:
        job["options"]["initial"] = "file"
    job["options"]["weights"] = None
    signed = {
        "version": __version__,
        "job": job,
        "group": request.group,
        "inputs": {name: digests.of(path) for name, path in files.items()},
    }
    return json.loads(json.dumps(signed))  # as it will come back from the record


def recorded(request: PairRequest, digests: Digests, verify_outputs: bool = False) -> dict[str, Any] | None:
    """The metrics of a pair that is finished, or None.

    Finished means: a record whose signature is that of the request, and outputs of the recorded sizes (with
    ``verify_outputs``, of the recorded SHA-256). Raises InputError when an input cannot be read.
    """
    folder = Path(request.job.output)
    record = json_object(folder / RECORD)
    if record is None or record.get("signature") != signature(request, digests):
        return None
    try:
        for name, facts in record["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != facts["size"] or (verify_outputs and sha256(path) != facts["sha256"]):
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    metrics = json_object(folder / "metrics.json")
    return None if metrics is None or problems(metrics) else metrics


def run_pair(request: PairRequest, progress: Progress = silent) -> dict[str, Any]:
    """Register one pair into its folder and record it.

    Returns:
        The metrics, as ``symreg register`` writes them.

    Raises:
        InputError: unusable inputs. RegistrationError: the run failed, or an input changed meanwhile.
    """
    from ..jobs import register

    folder = Path(request.job.output)
    progress("read", 0.0, "reading the scans")
    signed, stamps = signature(request, Digests()), _stamps(request.job)
    old = json_object(folder / RECORD) or {}
    with disk_errors_as_pair_errors(folder):
        (folder / RECORD).unlink(missing_ok=True)
        for left in folder.glob(f"{register.PARTIAL}*"):  # of a run that was killed; nobody else works in here
            shutil.rmtree(left, ignore_errors=True)

    def write(inside: Path, job: Job, result: Any) -> dict[str, str]:
        from .thumbnails import thumbnail

        files = register.write_result(inside, job, result)
        (inside / THUMBNAIL).write_bytes(thumbnail(result))
        files["thumbnail"] = THUMBNAIL
        return files if not request.group else {**files, **_group_maps(inside, result)}

    metrics = register.run(request.job, progress, write)
    if _stamps(request.job) != stamps:
        raise RegistrationError("an input file was changed while the pair was registered.", "Run the batch again.")
    with disk_errors_as_pair_errors(folder):
        _record(folder, signed, [*metrics["files"].values(), "metrics.json"], old)
    return dict(metrics)


def _stamps(job: Job) -> list[tuple[str, int, int]]:
    """Size and time of everything that is read; what changes them changes the file."""
    stats = [
        (str(file), os.stat(file))
        for path in inputs_of(job).values()
        for file in content_files(Path(path))
        if file.exists()
    ]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _group_maps(folder: Path, result: Any) -> dict[str, str]:
    """Natural logarithm of the Jacobian determinant, and where the moving scan was seen, both on the fixed grid."""
    import numpy as np

    from ..geometry.resampling import linear
    from ..geometry.transforms import resample_through
    from ..geometry.volumes import Volume, write_volume
    from ..jobs.register import rounded

    grid = result.fixed.grid
    inside = Volume(np.ones(result.moving.grid.shape, np.uint8), result.moving.grid)
    covered = resample_through(inside, result.forward, grid, "nearest")
    # A folded voxel has no logarithm; the floor keeps it the strongest shrinkage there is.
    log = np.log(np.maximum(linear(result.jacobian, result.map_grid, grid), 1e-3)) * (covered > 0)
    write_volume(folder / "log_jacobian.nii.gz", rounded(log), grid)
    write_volume(folder / "coverage.nii.gz", covered, grid)
    return {"log_jacobian": "log_jacobian.nii.gz", "coverage": "coverage.nii.gz"}


class disk_errors_as_pair_errors:
    """Disk errors in words."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            raise RegistrationError(
                f"writing to '{self._folder}' failed ({error.strerror}).", "Check free space and permissions."
            ) from error


def _record(folder: Path, signed: dict[str, Any], files: list[str], old: dict[str, Any]) -> None:
    """Bring the outputs to the disk, then the record, in one step; outputs of an earlier job that this one lacks go."""
    facts = {}
    for name in files:
        path = folder / name
        _to_disk(path)
        facts[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    before = old.get("files")
    for name in set(before if isinstance(before, dict) else ()) - set(facts):
        (folder / Path(name).name).unlink(missing_ok=True)
    text = json.dumps(
        {
            "schema": 1,
            "signature": signed,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": facts,
        },
        indent=1,
    )
    write_whole(folder / RECORD, text, durable=True)
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    """What the system still holds of a file or folder in memory is written, so that a power cut cannot undo it."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
