"""Side by side: symreg and its peers on the same pairs, one after the other, each in a fresh process with two threads.

    python Testing/benchmarks/compare.py --data DEVELOPMENT_DATA --work FOLDER
        [--tools symreg,ants-syn,greedy] [--pad 256] [--contrasts]
    python Testing/benchmarks/compare.py --table pairs.csv --work FOLDER

``pairs.csv`` has the columns id, fixed, moving and optionally fixed_labels, moving_labels, labels (space separated
numbers that are scored), fixed_points, moving_points, truth (the true transform, fixed -> moving, any file that symreg
reads: the mean error in mm over the brightest quarter of the fixed voxels is scored). ``--data`` builds that table from
the development data, with ``--contrasts`` that of two contrasts of one person whose truth is known.
``alignment`` scores the affine start of the ``symreg`` run before it. The tool NAME of a learned method is its shipped
network alone, started from the headers; NAME-aligned starts it from the affine alignment; NAME-refined adds one level
of the optimiser, NAME-refined3 three, NAME-fine three on the grid of the preset thorough.
``--variant rotated`` turns the moving scan's header by 60 degrees, ``--variant contrast`` inverts its brightness.
``--pad N`` first puts every image into an N^3 box of air, as many scanners and FreeSurfer deliver them.
Peers need ``pip install .[bench]``; ``--peers-python`` names another Python that has them.

Every tool gets the same number of threads (``--threads``). Beside each time stands the machine's load (processes that
wanted to run, mean of the minute before the start); above 1 the seconds say little and the ratio of CPU seconds more.

Seconds: for symreg the whole process, from start to exit, everything written; for the peers only reading, registering
and writing their transforms, not their imports. Peak memory is of the whole process. Scores come from one scorer for
all: dense transforms, nearest-neighbour labels, determinants and inverse consistency on the fixed voxels inside the
content of the fixed scan. A result that exists in the work folder is not computed again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from contrast import bright_points, contrast_rows

from SymRegistrationLib.geometry import folds, transform_files, transforms
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import read_points
from SymRegistrationLib.geometry.volumes import foreground, read_labels, read_volume, write_volume
from SymRegistrationLib.quality import metrics as quality

HERE = Path(__file__).parent
ASEG = "2 3 4 7 8 10 11 12 13 14 15 16 17 18 26 28 41 42 43 46 47 49 50 51 52 53 54 58 60"
LEARNED = ("hsyn", "sm-gicnet", "ad-regnet", "caml")
#: A network alone, from the headers and from the alignment; with one or three levels of refinement, and with three that
#: end finer.
NETWORKS = {
    f"{method}{suffix}": ["--method", method, *extra]
    for method in LEARNED
    for suffix, extra in (
        ("", ["--initial", "none"]),
        ("-aligned", []),
        ("-refined", ["--initial", "none", "--refine", "1"]),
        ("-refined3", ["--initial", "none", "--refine", "3"]),
        ("-fine", ["--initial", "none", "--refine", "3", "--preset", "thorough"]),
    )
}
SYMREG = {"symreg": [], "symreg-fast": ["--preset", "fast"], "symreg-thorough": ["--preset", "thorough"], **NETWORKS}
TOOLS = [
    "symreg",
    "alignment",
    *list(SYMREG)[1:],
    "ants-syn",
    "ants-quick",
    "greedy",
    "greedy-half",
    "elastix",
    "ants-syncc",
]
#: Header rotation of ``--variant rotated``: degrees, about (1, 1, 1).
TURN = 60.0


def development_pairs(data: Path) -> list[dict]:
    """The pairs of the development data: brains both ways, two sites, whole heads, livers."""
    rows = []

    def brain(one: str, other: str, kind: str = "brain") -> None:
        rows.append(
            {
                "id": f"{one}<-{other}" + ("" if kind == "brain" else f" ({kind})"),
                "fixed": f"{data}/brain/{one}_{kind}.nii.gz",
                "moving": f"{data}/brain/{other}_{kind}.nii.gz",
                "fixed_labels": f"{data}/brain/{one}_aseg.nii.gz",
                "moving_labels": f"{data}/brain/{other}_aseg.nii.gz",
                "labels": ASEG,
            }
        )

    for one, other in (("sub-01", "sub-02"), ("sub-02", "sub-03"), ("sub-03", "sub-04"), ("bert", "plotatlas")):
        brain(one, other), brain(other, one)
    brain("sub-01", "sub-02", "head"), brain("sub-02", "sub-01", "head")
    for subject, states in (("18", ("cyc_1_10", "cyc_3_10")), ("19", ("cyc_1_6", "cyc_1_9"))):
        for state in states:
            name = f"{data}/liver/{subject}"
            rows.append(
                {
                    "id": f"liver {subject} exhale<-{state}",
                    "fixed": f"{name}_exhale.nii.gz",
                    "moving": f"{name}_{state}.nii.gz",
                    "fixed_points": f"{name}_exhale_landmarks.csv",
                    "moving_points": f"{name}_{state}_landmarks.csv",
                }
            )
    return rows


def padded(path: str, size: int, folder: Path) -> str:
    """The image or label map in a box of ``size``^3 voxels of air, content in the middle; axes already larger stay."""
    target = folder / f"{size}_{Path(path).name}"
    if not target.exists():
        volume = read_labels(path) if "aseg" in path else read_volume(path)
        missing = np.maximum(0, size - np.asarray(volume.grid.shape))
        grid = volume.grid.cropped(-(missing // 2), np.asarray(volume.grid.shape) + missing - missing // 2)
        array = np.pad(volume.array, [(m // 2, m - m // 2) for m in missing])
        write_volume(target, array.astype(volume.array.dtype), Grid(array.shape, grid.matrix))
    return str(target)


def varied(path: str, kind: str, folder: Path) -> str:
    """The moving scan or its labels, turned or with inverted brightness inside its content."""
    target, labels = folder / f"{kind}_{Path(path).name}", "aseg" in path
    if kind == "contrast" and labels:
        return path
    if not target.exists():
        volume = read_labels(path) if labels else read_volume(path)
        array, matrix = volume.array, volume.grid.matrix
        if kind == "rotated":
            axis, angle = np.ones(3) / np.sqrt(3), np.radians(TURN)
            k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
            about = matrix @ np.array([*((np.array(array.shape) - 1) / 2), 1.0])
            turn = np.eye(4)
            turn[:3, :3] += np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)
            turn[:3, 3] = about[:3] - turn[:3, :3] @ about[:3]
            matrix = turn @ matrix
        else:
            content = foreground(array)
            array = np.where(content, np.percentile(array[content], 99.5) - array, 0).clip(0).astype(np.float32)
        write_volume(target, array, Grid(array.shape, matrix))
    return str(target)


def run_tool(tool: str, row: dict, out: Path, peers_python: str, threads: int) -> dict:
    """One tool on one pair in its own process; {seconds, process_seconds, cpu_seconds, memory_gb} or {error}."""
    out.mkdir(parents=True, exist_ok=True)
    if tool in SYMREG:
        command = [
            sys.executable,
            "-m",
            "SymRegistrationLib",
            "register",
            row["fixed"],
            row["moving"],
            "-o",
            str(out),
            "--threads",
            str(threads),
            *SYMREG[tool],
        ]
    else:
        command = [peers_python, str(HERE / "peers.py"), tool, row["fixed"], row["moving"], str(out)]
    environment = {
        **os.environ,
        "SYMREG_BENCH_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    load, start = os.getloadavg()[0], time.perf_counter()
    with open(out / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        return {"error": (out / "log.txt").read_text().strip().splitlines()[-1:] or ["?"]}
    own = seconds if tool in SYMREG else json.loads((out / "run.json").read_text())["seconds"]
    return {
        "seconds": own,
        "process_seconds": seconds,
        "load": load,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def score_alignment(row: dict, out: Path) -> dict:
    """Dice of the affine alignment that the symreg run in ``out`` started from."""
    metrics = json.loads((out / "metrics.json").read_text())
    labels = read_labels(row["fixed_labels"]), read_labels(row["moving_labels"])
    warped = transforms.resample_through(labels[1], np.array(metrics["alignment"]["matrix"]), labels[0].grid, "nearest")
    wanted = [int(n) for n in row["labels"].split()] if row.get("labels") else None
    return {
        "dice": quality.mean(quality.dice(labels[0].array, warped, wanted)),
        "folded_voxels": 0,
        "sd_log_jacobian": 0.0,
        "seconds": metrics["seconds"]["read"] + metrics["seconds"]["align"]
        if "read" in metrics["seconds"]
        else metrics["seconds"]["align"],
        "memory_gb": 0.0,
    }


def score(row: dict, out: Path) -> dict:
    """Dice or TRE, folding and inverse consistency of what a tool left in ``out``."""
    fixed, moving = read_volume(row["fixed"]), read_volume(row["moving"])
    suffix = ".h5" if (out / "forward.h5").exists() else ".nii.gz"
    forward = transform_files.physical(transform_files.read_transform(out / f"forward{suffix}"), fixed.grid)
    content = foreground(fixed.array)
    scores = {}
    if row.get("fixed_labels"):
        wanted = [int(n) for n in row["labels"].split()] if row.get("labels") else None
        labels = read_labels(row["fixed_labels"]), read_labels(row["moving_labels"])
        warped = transforms.resample_through(labels[1], forward, labels[0].grid, "nearest")
        scores["dice"] = quality.mean(quality.dice(labels[0].array, warped, wanted))
    if row.get("truth"):
        true = transform_files.physical(transform_files.read_transform(row["truth"]), fixed.grid)
        points = bright_points(fixed)
        scores["error_mm"] = float(np.linalg.norm(forward.map_points(points) - true.map_points(points), axis=1).mean())
    if row.get("fixed_points"):
        points = [read_points(row[f"{side}_points"]) for side in ("fixed", "moving")]
        errors = quality.target_registration_error(forward, points[0].points, points[1].points)
        regions = np.array([line.split(",")[0] for line in Path(row["fixed_points"]).read_text().splitlines()[1:]])
        scores["tre_mm"] = float(errors[regions == "liver"].mean())
        scores["tre_outside_mm"] = float(errors[regions != "liver"].mean())
    scores.update(quality.jacobian_summary(transforms.jacobian_on(forward, fixed.grid), content))
    scores["folded_corners"] = folded_corners(forward, fixed.grid)
    scores["megabytes"] = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    if (out / f"inverse{suffix}").exists():
        inverse = transform_files.physical(transform_files.read_transform(out / f"inverse{suffix}"), moving.grid)
        ice = transforms.inverse_consistency_on(forward, inverse, fixed.grid)
        scores.update(quality.ice_summary(ice, content, float(np.mean(fixed.grid.spacing))))
    return scores


def folded_corners(forward: transforms.Transform, grid: Grid) -> int:
    """Cells of the fixed grid where any of the eight corner determinants is 0 or less."""
    steps, count = torch.from_numpy(np.linalg.inv(grid.matrix[:3, :3])).float(), 0
    for start, stop, _ in transforms.slabs(grid):
        part = grid.cropped((start, 0, 0), (min(stop + 1, grid.shape[0]), *grid.shape[1:]))
        vectors = forward.on(part)
        voxels = (steps @ vectors.reshape(3, -1)).view_as(vectors)
        count += len(folds.folded_cells(voxels[None])[0]) if part.shape[0] > 1 else 0
    return count


#: Public networks with their authors' weights, measured once elsewhere (native-grid Dice of 29 aseg labels, three pairs
#: of other people, one run each, started from this project's affine; share of brain voxels folded): not to be compared
#: pair by pair.
QUOTED = """
| public network (quoted) | Dice, two FreeSurfer pairs | folded % |
|---|---|---|
| LapIRN-disp (Mok and Chung, MICCAI 2020) | .856, .848 | .53, .43 |
| cLapIRN lite, reg 0.1 (Mok and Chung, MICCAI 2021) | .851, .844 | .32, .26 |
| LapIRN-diff (Mok and Chung, MICCAI 2020) | .832, .817 | 0, 0 |
| SYMNet (Mok and Chung, CVPR 2020) | .823, .823 | 0, 0 |
| VoxelMorph-2 cc (Balakrishnan et al., CVPR 2018) | .806 | 1.39 |
| LKU-Net, IXI (Jia et al., 2022) | .782 | 0 |
| for scale: `syn` of commit 73e0496, default | .849, .828 | 0, 0 |
"""


def markdown(rows: list[dict], results: dict, tools: list[str]) -> str:
    """Tables per pair, and ratios to the first tool."""
    lines = [
        "| pair | tool | Dice or TRE mm (outside) | folded (corners) | SDlogJ | ICE mean / 95 % / max mm "
        "| seconds (CPU) | load | GB | MB on disk |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for tool in tools:
            r = results.get(f"{row['id']}|{tool}")
            if r is None:
                continue
            if "error" in r:
                lines.append(f"| {row['id']} | {tool} | failed: {r['error']} | | | | | | | |")
                continue
            quality_text = f"{r['error_mm']:.2f} mm from the truth" if "error_mm" in r else ""
            if "dice" in r or "tre_mm" in r:
                quality_text = f"{r['dice']:.4f}" if "dice" in r else f"{r['tre_mm']:.2f} ({r['tre_outside_mm']:.2f})"
            ice = (
                f"{r['ice_mean_mm']:.3f} / {r['ice_p95_mm']:.3f} / {r['ice_max_mm']:.2f}"
                if "ice_mean_mm" in r
                else "no inverse"
            )
            lines.append(
                f"| {row['id']} | {tool} | {quality_text} | {r['folded_voxels']} ({r.get('folded_corners', '?')}) "
                f"| {r['sd_log_jacobian']:.3f} | {ice} | {r['seconds']:.1f} ({r.get('cpu_seconds', 0):.1f}) "
                f"| {r.get('load', 0):.1f} | {r['memory_gb']:.1f} | {r.get('megabytes', 0):.0f} |"
            )
    lines += [
        "",
        "Over the pairs that both did, against each peer (difference of mean Dice or TRE; time of the tool / time of "
        "the peer):",
        "",
        "| tool | peer | pairs | Dice | TRE mm | time ratio | CPU ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for tool in (t for t in tools if t in SYMREG):
        for peer in (t for t in tools if t == "symreg" or t not in SYMREG and t != "alignment"):
            if tool == peer:
                continue
            both = [
                (results[f"{row['id']}|{tool}"], results[f"{row['id']}|{peer}"])
                for row in rows
                if all("seconds" in results.get(f"{row['id']}|{t}", {}) for t in (tool, peer))
            ]
            if not both:
                continue

            def gain(key: str, both=both) -> str:
                pairs = [(a[key], b[key]) for a, b in both if key in a]
                return f"{np.mean([a - b for a, b in pairs]):+.4f}" if pairs else ""

            ratio = sum(a["seconds"] for a, _ in both) / sum(b["seconds"] for _, b in both)
            work = sum(a.get("cpu_seconds", 0) for a, _ in both) / max(
                sum(b.get("cpu_seconds", 0) for _, b in both), 1e-9
            )
            lines.append(
                f"| {tool} | {peer} | {len(both)} | {gain('dice')} | {gain('tre_mm')} | {ratio:.3f} | {work:.3f} |"
            )
    return "\n".join(lines) + "\n" + QUOTED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).resolve())
    parser.add_argument("--table", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tools", default="symreg,symreg-thorough,ants-syn,greedy,elastix")
    parser.add_argument("--only", default="", help="only pairs whose id contains one of these comma-separated words")
    parser.add_argument("--pad", type=int, default=0)
    parser.add_argument("--contrasts", action="store_true", help="with --data: pairs of two contrasts, truth known")
    parser.add_argument("--variant", choices=("rotated", "contrast"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", default=sys.executable)
    arguments = parser.parse_args()
    if arguments.data:
        rows = development_pairs(arguments.data)
        if arguments.contrasts:
            rows = contrast_rows(arguments.data, arguments.work / "contrasts")
    else:
        with open(arguments.table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    rows = [row for row in rows if not arguments.only or any(word in row["id"] for word in arguments.only.split(","))]
    tools = [tool for tool in TOOLS if tool in arguments.tools.split(",")]
    arguments.work.mkdir(parents=True, exist_ok=True)
    store = arguments.work / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for row in rows:
        if arguments.pad:
            for key in ("fixed", "moving", "fixed_labels", "moving_labels"):
                if row.get(key):
                    row[key] = padded(row[key], arguments.pad, arguments.work)
        if arguments.variant:
            for key in ("moving", "moving_labels"):
                row[key] = varied(row[key], arguments.variant, arguments.work)
        for tool in tools:
            key = f"{row['id']}|{tool}"
            if key in results:
                continue
            out = arguments.work / row["id"].replace(" ", "_").replace("<-", "_from_") / tool
            if tool == "alignment":
                results[key] = score_alignment(row, out.with_name("symreg"))
                continue
            results[key] = run_tool(tool, row, out, arguments.peers_python, arguments.threads)
            if "error" not in results[key]:
                results[key].update(score(row, out))
            store.write_text(json.dumps(results, indent=1))
            print(key, {k: round(v, 4) for k, v in results[key].items() if isinstance(v, float)}, flush=True)
    print(markdown(rows, results, tools))


if __name__ == "__main__":
    main()
