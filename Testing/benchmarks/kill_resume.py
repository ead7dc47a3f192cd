"""Kill at random moments and go on: every result must be that of an undisturbed run. By hand; half an hour on two
cores.

    python Testing/benchmarks/kill_resume.py [--moments 30] [--seed 1] [--what register,train,batch] [--folder DIR]

``register``: each moment is one run, killed (SIGKILL, or SIGTERM for every third) at a random time of what the
undisturbed run took, and run again. ``train`` and ``batch``: one long run each, killed at a random time after each
start, until all moments are used; then it is let finish. Compared are transforms, images, weights and log, number by
number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import bad_inputs  # noqa: E402
import commandlines  # noqa: E402

from SymRegistrationLib.geometry.transform_files import physical, read_transform  # noqa: E402
from SymRegistrationLib.geometry.volumes import read_volume  # noqa: E402


def start(words: list[str]) -> subprocess.Popen:
    """One command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "SymRegistrationLib", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(words: list[str]) -> float:
    """Run to the end; seconds."""
    begun = time.monotonic()
    process = start(words)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {stderr}")
    return time.monotonic() - begun


def strike(words: list[str], seconds: float, number: int) -> bool:
    """Start, wait, send the signal (SIGKILL to the whole group); True when it met a running process."""
    process = start(words)
    try:
        process.wait(timeout=seconds)
        met = False
    except subprocess.TimeoutExpired:
        met = True
        os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    process.communicate()
    return met


def content(folder: Path) -> dict:
    """Relative name -> numbers, of every result below a folder; "left behind" for what a struck run was writing."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".symreg-partial" in name or path.name.endswith(".part"):
            found[name] = "left behind"
        elif path.name.endswith(".h5"):
            found[name] = physical(read_transform(path), None).displacement
        elif path.name.endswith(".nii.gz"):
            found[name] = read_volume(path).array
        elif path.name.endswith(".safetensors") and "cache" not in name:
            found[name] = load_file(path)
        elif path.name == "metrics.json":
            found[name] = {
                key: json.loads(path.read_text())[key] for key in ("quality", "alignment", "similarity", "notes")
            }
        elif path.name == "log.jsonl":
            found[name] = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    return found


def differences(one: dict, other: dict) -> list[str]:
    """Names of what is not the same."""

    def same(a, b) -> bool:
        if isinstance(a, np.ndarray):
            return np.array_equal(a, b)
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return a == b

    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not same(one[name], other[name])
    )


def half_written(folder: Path, whole: dict) -> list[str]:
    """Names in a struck folder that are not what belongs there."""
    there = {name: value for name, value in content(folder).items() if not isinstance(value, str)}
    return [name for name, value in there.items() if differences({name: value}, {name: whole.get(name)})]


def register(folder: Path, scans: dict, moments: int, random_: random.Random) -> list[str]:
    """One pair, killed and run again ``moments`` times."""

    def words(out: Path) -> list[str]:
        return [
            "register",
            str(scans["fixed"]),
            str(scans["moving"]),
            *f"-o {out} --preset fast --threads 1 -q".split(),
        ]

    seconds = finish(words(folder / "whole"))
    whole, wrong, met = content(folder / "whole"), [], 0
    for k in range(moments):
        out = folder / str(k)
        number = signal.SIGTERM if k % 3 == 2 else signal.SIGKILL
        met += strike(words(out), random_.uniform(0.1, 1.1) * seconds, number)
        if out.exists():
            wrong += [f"register {k}: half-written {name}" for name in half_written(out, whole)]
        finish(words(out))
        wrong += [f"register {k}: {name}" for name in differences(content(out), whole)]
        shutil.rmtree(out)
    print(f"register: {met} of {moments} kills met a running process (one takes {seconds:.1f} s)")
    return wrong


def long_run(what: str, words, folder: Path, moments: int, random_: random.Random) -> list[str]:
    """One run that is killed after every start."""
    seconds = finish(words(folder / "whole"))
    whole, out, met = content(folder / "whole"), folder / "struck", 0
    for k in range(moments):
        met += strike(
            words(out), random_.uniform(0.05, 0.5) * seconds, signal.SIGTERM if k % 3 == 2 else signal.SIGKILL
        )
    finish(words(out))
    print(f"{what}: {met} of {moments} kills met a running process (undisturbed it takes {seconds:.1f} s)")
    return [f"{what}: {name}" for name in differences(content(out), whole)]


def train(folder: Path, scans: dict, moments: int, random_: random.Random) -> list[str]:
    """A small training."""

    def words(out: Path) -> list[str]:
        return commandlines.train(out, "--threads 1 --iterations 60 --validate-every 10 --checkpoint-minutes 0")

    return long_run("train", words, folder, moments, random_)


def batch(folder: Path, scans: dict, moments: int, random_: random.Random) -> list[str]:
    """A table of small pairs on two workers."""
    files = sorted(Path(scans["scans"]).glob("*.nii.gz"))
    rows = [f"{a},{b}" for a in files for b in files if a != b]
    (folder / "pairs.csv").write_text("fixed,moving\n" + "\n".join(rows) + "\n")

    def words(out: Path) -> list[str]:
        return ["batch", str(folder / "pairs.csv"), "-o", str(out), "--workers", "2", "--preset", "fast", "-q"]

    return long_run("batch", words, folder, moments, random_)


def main() -> int:
    """0 when every result was that of the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--what", default="register,train,batch")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kill-resume-", dir=asked.folder))
    (place / "scans").mkdir()
    scans = bad_inputs.make(place / "scans")
    random_, wrong = random.Random(asked.seed), []
    for what in asked.what.split(","):
        (place / what).mkdir()
        wrong += {"register": register, "train": train, "batch": batch}[what](
            place / what, scans, asked.moments, random_
        )
    print("\n".join(wrong) or f"all results are those of undisturbed runs (seed {asked.seed})")
    shutil.rmtree(place)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
