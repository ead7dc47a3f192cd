"""Many scans on one template: mean, spread, and maps of volume for morphometry.

Works on what the pairs of a batch left in their folders, one scan after the other, so memory does not grow
with their number. Only what a scan really shows counts: voxels beyond its field of view are left out of every mean.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import replacing, write_whole
from ..geometry.grid import Grid
from ..geometry.volumes import read_map, robust_range, write_volume
from ..job import InputError, Progress, RegistrationError, silent
from ..jobs.register import rounded
from .summary import PairState

INTENSITIES = ("scaled", "raw")
#: What :func:`average` writes, for people.
FILES = (
    ("mean.nii.gz", "mean of the registered scans"),
    ("sd.nii.gz", "their standard deviation"),
    ("coverage.nii.gz", "how many scans reach each voxel"),
    ("log_jacobian_mean.nii.gz", "mean logarithm of the local volume, scan against template"),
    ("log_jacobian_sd.nii.gz", "its standard deviation"),
    ("scans.csv", "one line a scan, for statistics"),
)


@dataclass
class Moments:
    """Running mean and variance per voxel, each voxel with its own count (Welford 1962).

    Attributes:
        mean, squares: (D, H, W) float32; ``squares`` is the sum of squared deviations.
        count: (D, H, W) int32.
    """

    mean: np.ndarray
    squares: np.ndarray
    count: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> Moments:
        """Of no scan."""
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.int32))

    def add(self, values: np.ndarray, where: np.ndarray) -> None:
        """Take in one scan, (D, H, W), at the voxels ``where`` (bool)."""
        self.count += where
        step = np.where(where, values - self.mean, 0).astype(np.float32)
        self.mean += step / np.maximum(self.count, 1)
        self.squares += step * np.where(where, values - self.mean, 0)

    def deviation(self) -> np.ndarray:
        """(D, H, W) standard deviation with n - 1; 0 where fewer than two scans reach."""
        return np.sqrt(np.where(self.count > 1, self.squares / np.maximum(self.count - 1, 1), 0)).astype(np.float32)


def average(
    states: Sequence[PairState], output: str | Path, intensities: str = "scaled", progress: Progress = silent
) -> dict:
    """Write the mean, the spread and the volume maps of finished pairs onto one fixed scan.

    Args:
        states: pairs that were run with ``group``; those that failed are left out.
        output: folder.
        intensities: ``scaled`` brings every scan to 0..1 by its robust range on the template, for scans whose grey
            values mean nothing (MR); ``raw`` takes them as they are (CT).

    Returns:
        ``scans`` (how many), ``files``.

    Raises:
        InputError: no pair is finished. RegistrationError: an output of a pair cannot be read, or the disk is full.
    """
    done = [state for state in states if state.status == "done"]
    if not done:
        raise InputError("no scan was registered, so there is nothing to average.", "See summary.csv for the reasons.")
    output = Path(output)
    picture = volume = grid = None
    for k, (warped, log, covered, here) in enumerate(_maps(done)):
        progress("average", k / len(done), f"averaging, {k + 1} of {len(done)}")
        if grid is None:
            grid = here
            picture, volume = Moments.empty(grid.shape), Moments.empty(grid.shape)
        if not covered.any():
            continue
        if intensities == "scaled":
            low, high = robust_range(warped, covered)
            warped = np.clip((warped - low) / max(high - low, 1e-12), 0, 1.5)
        picture.add(warped, covered)
        volume.add(log, covered)
    arrays = (
        picture.mean,
        picture.deviation(),
        picture.count.astype(np.int16),
        rounded(volume.mean),
        rounded(volume.deviation()),
    )
    for (name, _), array in zip(FILES, arrays):
        with replacing(output / name) as temporary:
            write_volume(temporary, array, grid)
    write_whole(output / "scans.csv", _scans(done))
    return {"scans": len(done), "files": [name for name, _ in FILES]}


def _maps(done: Sequence[PairState]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Grid]]:
    """Per pair: registered scan, log-Jacobian, where it is covered, and the grid of all three."""
    first = None
    for state in done:
        folder = Path(state.row.job.output)
        try:
            warped, log, covered = (
                read_map(folder / f"{name}.nii.gz", "result") for name in ("warped_moving", "log_jacobian", "coverage")
            )
        except InputError as error:
            raise RegistrationError(
                f"the result of '{state.row.identity}' cannot be used: {error.message}", error.hint
            ) from None
        first = first or warped.grid
        if not warped.grid.same_as(first):
            raise RegistrationError(
                f"the result of '{state.row.identity}' lies on another grid than the first one.",
                "All rows need the same fixed scan.",
            )
        yield warped.array.astype(np.float32), log.array, covered.array > 0, warped.grid


def _scans(done: Sequence[PairState]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "scan", "warped", "log_jacobian", "log_scale", "similarity", "stands_out"))
    for state in done:
        here = state.row.identity
        scale = state.numbers.get("log_scale")
        writer.writerow(
            (
                here,
                state.row.job.moving,
                f"{here}/warped_moving.nii.gz",
                f"{here}/log_jacobian.nii.gz",
                "" if scale is None else f"{scale:.6f}",
                state.numbers.get("similarity_after"),
                state.stands_out,
            )
        )
    return text.getvalue()
