"""Throughput, memory and kills of ``symreg batch``.

    python Testing/benchmarks/batch_throughput.py throughput --pairs 50     batch against the sum of single warm runs
    python Testing/benchmarks/batch_throughput.py memory --pairs 200        growth of worker and batch, MB a pair
    python Testing/benchmarks/batch_throughput.py kill --pairs 20 --kills 30
        kill -9 at random moments, resume, compare

Everything is made here: small synthetic heads, 48^3 voxels of 4 mm unless --size says otherwise. ``throughput``: the
same pairs are first done by one warm worker with all cores, one after the other, and their times are summed (that of
the first, which loads the libraries, is left out); then by a batch of its own choice of workers. The goal is a ratio of
at most 1.10. ``memory``: one worker does all pairs; the slope of its resident size over the last three quarters is the
leak; goal: below 1 MB a pair. ``kill``: the whole batch, workers included, is hit at random moments within a pair's
time; after the last kill the batch is let finish, and every transform and image is compared with an undisturbed run,
voxel by voxel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "Testing")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import SimpleITK as sitk  # noqa: E402

from SymRegistrationLib.cohort import workers  # noqa: E402
from SymRegistrationLib.cohort.pair import PairRequest  # noqa: E402
from SymRegistrationLib.geometry.grid import Grid  # noqa: E402
from SymRegistrationLib.geometry.volumes import write_volume  # noqa: E402
from SymRegistrationLib.job import Job, Options  # noqa: E402


def head(path: Path, size: int, seed: int) -> None:
    """A body full of structure, bent by ``seed``."""
    draw = np.random.default_rng(seed)
    grid = Grid.centred((size, size + 2, size - 2), 192.0 / size, (3, -5, 8))
    x, y, z = (
        axis / 60
        for axis in np.moveaxis(
            grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)) - grid.centre, -1, 0
        )
    )
    bend = draw.normal(0, 0.06, (3, 3))
    x, y, z = (
        p + b[0] * np.sin(2 * q) + b[1] * np.cos(2 * r) + b[2]
        for p, q, r, b in ((x, y, z, bend[0]), (y, z, x, bend[1]), (z, x, y, bend[2]))
    )
    body = 1 / (1 + np.exp(12 * (np.sqrt(x**2 + (y / 1.2) ** 2 + (z / 1.1) ** 2) - 1)))
    texture = 1 + 0.35 * np.sin(9 * x + 1) * np.cos(8 * y) * np.sin(7 * z) + 0.25 * np.cos(14 * x * y) * np.sin(11 * z)
    write_volume(path, (700 * body * texture).astype(np.int16), grid)


def table(folder: Path, pairs: int, size: int) -> Path:
    """``pairs`` pairs of ten heads."""
    heads = 10
    for k in range(heads):
        head(folder / f"head{k}.nii.gz", size, k)
    lines = ["fixed,moving,id"]
    for n in range(pairs):
        a = n % heads
        b = (a + 1 + n // heads % (heads - 1)) % heads
        lines.append(f"head{a}.nii.gz,head{b}.nii.gz,pair{n:04d}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def command(pairs: Path, out: Path, arguments: argparse.Namespace, *more: str) -> list[str]:
    words = [
        "batch",
        str(pairs),
        "-o",
        str(out),
        "--preset",
        arguments.preset,
        "--initial",
        arguments.initial,
        "--json",
        *more,
    ]
    return [sys.executable, "-m", "SymRegistrationLib", *words]


def jobs(pairs: Path, out: Path, arguments: argparse.Namespace, threads: int) -> list[PairRequest]:
    found = []
    for line in pairs.read_text().splitlines()[1:]:
        fixed, moving, name = line.split(",")
        options = Options(preset=arguments.preset, initial=arguments.initial, threads=threads)
        found.append(
            PairRequest(Job(str(pairs.parent / fixed), str(pairs.parent / moving), str(out / name), options=options))
        )
    return found


def run(words: list[str]) -> dict:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])["result"]


def throughput(folder: Path, arguments: argparse.Namespace) -> dict:
    """Seconds of the batch over the sum of single warm runs."""
    pairs = table(folder, arguments.pairs, arguments.size)
    worker = workers.WorkerProcess()
    worker.ready()
    requests = jobs(pairs, folder / "single", arguments, os.cpu_count() or 1)
    worker.ask("register", {"job": {**requests[0].to_dict()["job"], "output": str(folder / "warm")}}, 3600)
    single = 0.0
    for request in requests:
        started = time.perf_counter()
        worker.ask("register", {"job": request.to_dict()["job"]}, 3600)
        single += time.perf_counter() - started
    worker.close()
    started = time.perf_counter()
    result = run(command(pairs, folder / "batch", arguments))
    seconds = time.perf_counter() - started
    return {
        "pairs": arguments.pairs,
        "sum of single warm runs, s": round(single, 1),
        "batch, s": round(seconds, 1),
        "ratio": round(seconds / single, 3),
        "goal": "at most 1.10",
        "done": result["done"],
        "settings of the batch": json.loads((folder / "batch/batch.json").read_text()),
    }


def memory(folder: Path, arguments: argparse.Namespace) -> dict:
    """Resident size of one worker over many pairs, MB."""
    pairs = table(folder, arguments.pairs, arguments.size)
    worker = workers.WorkerProcess()
    worker.ready()
    sizes = []
    for request in jobs(pairs, folder / "out", arguments, 1):
        worker.ask("pair", {"pair": request.to_dict()}, 3600)
        sizes.append(psutil.Process(worker.pid).memory_info().rss / 1e6)
    worker.close()
    late = np.array(sizes[len(sizes) // 4 :])
    slope = float(np.polyfit(np.arange(len(late)), late, 1)[0]) if len(late) > 2 else float("nan")
    peaks = []
    process = subprocess.Popen(command(pairs, folder / "batch", arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:  # the batch itself, which holds no image
        if json.loads(line)["event"] == "pair":
            peaks.append(psutil.Process(process.pid).memory_info().rss / 1e6)
    process.wait()
    growth = float(np.polyfit(np.arange(len(peaks)), peaks, 1)[0]) if len(peaks) > 2 else float("nan")
    return {
        "pairs": arguments.pairs,
        "worker after pair 1, MB": round(sizes[0]),
        "after a quarter": round(float(late[0])),
        "at the end": round(sizes[-1]),
        "worker, MB a pair": round(slope, 3),
        "batch process, MB a pair": round(growth, 3),
        "goal": "below 1",
    }


def digest(out: Path) -> dict[str, str]:
    """Of every transform and image, by their voxels."""
    found = {}
    for path in sorted(out.glob("*/*")):
        if path.suffix == ".h5":
            field = sitk.DisplacementFieldTransform(sitk.ReadTransform(str(path))).GetDisplacementField()
        elif path.name.endswith(".nii.gz"):
            field = sitk.ReadImage(str(path))
        else:
            continue
        content = (
            sitk.GetArrayFromImage(field).tobytes()
            + repr((field.GetOrigin(), field.GetSpacing(), field.GetDirection())).encode()
        )
        found[f"{path.parent.name}/{path.name}"] = hashlib.sha256(content).hexdigest()
    return found


def kill(folder: Path, arguments: argparse.Namespace) -> dict:
    """Kill at random moments and resume."""
    pairs = table(folder, arguments.pairs, arguments.size)
    threads = ["--threads", "1"]
    started = time.perf_counter()
    run(command(pairs, folder / "whole", arguments, *threads))
    whole = time.perf_counter() - started
    each = max(1.0, whole / arguments.pairs)
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 30)
    draw = random.Random(seed)
    out, finished, kills = folder / "killed", [], 0
    while kills < arguments.kills:
        process = subprocess.Popen(
            command(pairs, out, arguments, *threads),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        line = next((line for line in process.stdout if json.loads(line).get("stage") == "start"), None)
        if line is None:
            break  # everything is finished
        time.sleep(draw.uniform(0, arguments.reach * each))
        victims = (
            [process.pid]
            if draw.random() < 0.5
            else [child.pid for child in psutil.Process(process.pid).children(recursive=True)] + [process.pid]
        )
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()
        kills += 1
        finished.append(len(list(out.glob("*/pair.json"))))
        if finished[-1] >= arguments.pairs - 1:  # nearly through: begin anew in another folder, so that kills hit work
            out = folder / f"killed{kills}"
    results = {}
    for one in sorted(folder.glob("killed*")):
        run(command(pairs, one, arguments, *threads))
        results[one.name] = digest(one)
    wanted = digest(folder / "whole")
    different = {
        name: sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        for name, found in results.items()
    }
    left = [str(path) for one in folder.glob("killed*") for path in one.glob("*/.*")]
    return {
        "pairs": arguments.pairs,
        "kills": kills,
        "seed": seed,
        "pairs finished after each kill": finished,
        "files compared": len(wanted) * len(results),
        "different": {k: v for k, v in different.items() if v},
        "left behind": left,
    }


def main() -> None:
    """Parse, run one of the three, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "memory", "kill"))
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--reach", type=float, default=3.0, help="kill within so many pairs' time (default: 3)")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--initial", default="affine")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--work", help="folder to work in (default: a temporary one, removed afterwards)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(globals()[arguments.what](folder, arguments), indent=1))


if __name__ == "__main__":
    main()
