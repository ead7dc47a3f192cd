"""Command lines that several tests and benchmarks give, and what a run leaves behind."""

from __future__ import annotations

from pathlib import Path

#: Files of a registration without report and without uncertainty.
RUN_FILES = {
    "forward.h5",
    "inverse.h5",
    "warped_moving.nii.gz",
    "warped_fixed.nii.gz",
    "jacobian.nii.gz",
    "inverse_consistency.nii.gz",
    "metrics.json",
    "history.json",
    "state-1.safetensors",
}
#: A quick registration on one core.
QUICK = ["--preset", "fast", "--initial", "centre", "--threads", "1"]
#: A training that needs no data: random shapes.
_TRAIN = "--method hsyn --shape 32,32,32 --spacing 4 --device cpu --validation-pairs 1 -q"


def register(fixed: str | Path, moving: str | Path, out: str | Path, *more: str) -> list[str]:
    """``symreg register``, quick and silent."""
    return ["register", str(fixed), str(moving), "-o", str(out), *QUICK, "-q", *more]


def train(out: str | Path, *more: str) -> list[str]:
    """``symreg train``, small and silent; ``more`` may be several words in one."""
    return ["train", "-o", str(out), *_TRAIN.split(), *(word for words in more for word in words.split())]
