"""Does the uncertainty map predict the error? Fitted on known warps of some people, judged on others.

    python Testing/benchmarks/calibrate_uncertainty.py --data DEVELOPMENT_DATA --work FOLDER [--preset fast] [--runs 4]
        [--store]
    python Testing/benchmarks/calibrate_uncertainty.py --data DEVELOPMENT_DATA --work FOLDER --judge-only
        --preset default
    python Testing/benchmarks/calibrate_uncertainty.py --data DEVELOPMENT_DATA --work FOLDER --method hsyn
        [--weights FILE] --store

Known warps: a real scan is the fixed scan, the same scan pulled through a random diffeomorphism (3 to 10 mm root mean
square over distances of 16 to 60 mm) the moving one, both then given their own bias field, gamma, blur, white and
correlated noise, so that they are not the same picture twice. The registration starts from the headers. Errors are
lengths of (found - true) on the working grid inside the content of the fixed scan. Landmarks: real breathing states,
aligned and registered as a user would.

``sd of lengths`` is the standard deviation of the lengths of the displacement vectors over the same runs. AUSE: area
between the sparsification curve and the best possible one, in units of the mean error. A case in the work folder is not
computed again. ``--store`` writes the numbers into the package.

A learned method (``--method``, no refinement) starts from the headers too and adapts to each pair as it does unless
told otherwise, with 3 cases to fit and 3 to judge, heads all: 6 registrations and 24 perturbed ones. Its numbers are
stored beside its weights and tied to them by their SHA-256; other weights, another study. Long because a study is read
from its cases to its table in one place.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from SymRegistrationLib import pipeline
from SymRegistrationLib.fields import gaussian, jacobian_determinant, resize, sample, square_sum, warp
from SymRegistrationLib.geometry.lattice import affine_displacement, affine_grid
from SymRegistrationLib.geometry.points import read_points
from SymRegistrationLib.geometry.volumes import Volume, foreground, read_labels, read_volume
from SymRegistrationLib.job import Options
from SymRegistrationLib.quality.volume_change import volume_changes
from SymRegistrationLib.registration import alignment, weights, working_grid
from SymRegistrationLib.registration.solver import Solver
from SymRegistrationLib.registration.working_grid import WorkingPair
from SymRegistrationLib.training import appearance, synthetic
from SymRegistrationLib.uncertainty import calibration, predictors

FIT = [
    "brain/sub-01_brain:1",
    "brain/sub-02_brain:2",
    "brain/bert_brain:3",
    "lung/mr_0004_image:4",
    "brain/sub-01_brain:5",
    "brain/bert_brain:6",
]
JUDGE = [
    "brain/sub-03_brain:11",
    "brain/sub-04_brain:12",
    "brain/plotatlas_brain:13",
    "lung/thorax_ct_2mm:14",
    "lung/thorax_ct_2mm:15",
    "lung/mr_0006_image:16",
    "liver/19_exhale:17",
    "brain/sub-03_brain:18",
]
#: Never looked at while the predictors were chosen; ``--check`` judges on these.
CHECK = [
    "brain/sub-04_brain:21",
    "lung/mr_0007_image:22",
    "liver/18_exhale:23",
    "brain/plotatlas_brain:24",
    "lung/thorax_ct_2mm:25",
]
#: A learned method has fewer, so that all four take no longer than ``syn``, and only heads: its weights know no other
#: organ.
LEARNED_FIT = FIT[:3]
LEARNED_JUDGE = JUDGE[:3]
LANDMARKS = [("18", "cyc_1_10"), ("19", "cyc_1_6"), ("18", "cyc_3_10"), ("19", "cyc_1_9")]
POINTS = 20_000
LEAST_LABEL_ML = 0.5


@dataclass(frozen=True)
class Study:
    """What is calibrated: a method with its preset and similarity, or its weights.

    Attributes:
        method, preset, similarity: of the registrations.
        runs: perturbed runs per case.
        weights: file of a learned method, ``None`` for ``syn``.
        sha256: of that file.
    """

    method: str = "syn"
    preset: str = "fast"
    similarity: str = "lncc"
    runs: int = 4
    weights: Path | None = None
    sha256: str = ""

    @property
    def learned(self) -> bool:
        return self.method != "syn"

    @property
    def options(self) -> Options:
        file = str(self.weights) if self.weights else None
        return Options(method=self.method, preset=self.preset, initial="none", similarity=self.similarity, weights=file)

    @property
    def stem(self) -> str:
        """Names the files of its cases; one of a learned method never serves other weights."""
        special = (
            f"{self.method}-{self.sha256[:12]}_"
            if self.learned
            else ""
            if self.similarity == "lncc"
            else f"{self.similarity}_"
        )
        return f"{special}{self.preset}_{self.runs}"

    def entry(self, kind: str, floor: float, weights_: dict, radii: dict, on: str) -> calibration.Calibration:
        """A calibration of such runs."""
        preset, similarity = (calibration.ANY_PRESET, "network") if self.learned else (self.preset, self.similarity)
        return calibration.Calibration(
            self.method, preset, similarity, kind, floor, weights_, radii, on, sha256=self.sha256
        )

    def store(self, entries: list[calibration.Calibration]) -> Path:
        """Write the entries where :func:`calibration.find` looks; those of other studies in the same file stay."""
        path = calibration.beside(self.weights) if self.learned else calibration.STORE
        ours = {(entry.method, entry.preset, entry.similarity, entry.kind) for entry in entries}
        old = calibration.read_calibrations(path) if path.exists() and not self.learned else []
        calibration.write_calibrations(
            [e for e in old if (e.method, e.preset, e.similarity, e.kind) not in ours] + entries, path
        )
        return path


def known_warp(path: Path, seed: int) -> tuple[Volume, Volume, torch.Tensor]:
    """(fixed, moving, truth): the truth is (1, 3, D, H, W) LPS mm on the fixed grid, fixed point -> moving point."""
    draw = synthetic.Draw(seed)
    volume = read_volume(path)
    grid = volume.grid.resampled(np.maximum(volume.grid.spacing, 2.0))
    image = F.adaptive_avg_pool3d(torch.from_numpy(volume.array.astype(np.float32))[None, None], grid.shape)
    image = appearance.normalised(image)
    settings = synthetic.Synthesis(
        shape=grid.shape, spacing=float(grid.spacing.mean()), warp=draw.uniform(3.0, 10.0), control=(16.0, 60.0)
    )
    to_moving, to_fixed = synthetic.random_warp(settings, draw)

    def seen(x: torch.Tensor) -> torch.Tensor:
        bias = resize(draw.normal(1, 1, *(draw.integer(2, 4) for _ in range(3))), grid.shape)
        x = (x * torch.exp(draw.uniform(0, 0.3) * bias)).clamp_min(1e-4) ** math.exp(draw.uniform(-0.3, 0.3))
        x = gaussian(x, draw.uniform(0.01, 0.6))
        grain = gaussian(draw.normal(1, 1, *grid.shape), 1.5)
        noise = draw.uniform(0.005, 0.06) * draw.normal(1, 1, *grid.shape) + draw.uniform(0, 0.04) * grain / grain.std()
        return (x + noise * (x > 0.02)).clamp(0, 1.5)

    pair = [
        Volume(x[0, 0].numpy(), grid, name)
        for x, name in ((seen(image), "fixed"), (seen(warp(image, to_moving)), "moving"))
    ]
    linear = torch.from_numpy(grid.matrix[:3, :3].copy()).float()
    return pair[0], pair[1], torch.einsum("ij,njdhw->nidhw", linear, to_fixed)


def truth_on(space: WorkingPair, truth_mm: torch.Tensor) -> torch.Tensor:
    """The displacement, voxels, that a true result has on a working grid whose two sides may lie apart by a pose that
    was found.

    Args:
        truth_mm: (1, 3, D, H, W) mm on that grid, fixed point -> moving point.
    """
    back = np.linalg.inv(space.mid_to_moving)
    turned = torch.einsum("ij,njdhw->nidhw", torch.from_numpy(back[:3, :3]).float(), truth_mm)
    apart = turned + affine_displacement(back @ space.mid_to_fixed, space.grid)
    voxels = torch.from_numpy(space.grid.inverse[:3, :3].copy()).float()
    return torch.einsum("ij,njdhw->nidhw", voxels, apart)


def collect(data: Path, case: str, study: Study) -> dict[str, np.ndarray]:
    """Everything of one case on the working grid: error, values, baseline, Jacobians, labels; voxels."""
    name, seed = case.split(":")
    fixed, moving, truth_mm = known_warp(data / f"{name}.nii.gz", int(seed))
    scans = [working_grid.prepare(volume) for volume in (fixed, moving)]
    solver = Solver(scans, alignment.align(*scans, "none", "auto", 0, None), study.options, [])
    start = time.process_time()
    pair = solver.run()
    one = time.process_time() - start
    values = predictors.single_run_predictors(solver.space, pair)
    fast = time.process_time() - start - one
    found, lengths = predictors.Runs(pair.fixed_to_moving[0]), []
    for change in predictors.perturbations(study.runs, 0):
        u = solver.run(perturbation=change).fixed_to_moving[0]
        found.add(u, "stiff" if change.stiffness > 1 else "jitter")
        lengths.append(square_sum(u[None])[0, 0].sqrt())
    many = time.process_time() - start
    values |= found.predictors()
    space = solver.space
    at = affine_grid(space.grid.shape, fixed.grid.inverse @ space.mid_to_fixed @ space.grid.matrix, truth_mm)
    truth = truth_on(space, sample(truth_mm, at))
    content = sample(torch.from_numpy(foreground(fixed.array))[None, None].float(), at)[0, 0] > 0.5
    out = {
        **values,
        "error": square_sum(pair.fixed_to_moving - truth).sqrt()[0, 0],
        "baseline": torch.stack(lengths).std(0),
        "spread": found.spread.length(),
        "jacobian": jacobian_determinant(pair.fixed_to_moving)[0, 0],
        "true_jacobian": jacobian_determinant(truth)[0, 0],
        "content": content,
    }
    out = {key: value.numpy().astype(np.float16 if value.is_floating_point() else bool) for key, value in out.items()}
    aseg = data / f"{name.replace('_brain', '_aseg')}.nii.gz"
    if "brain" in name and aseg.exists():
        labels = read_labels(aseg)
        index = torch.from_numpy(labels.array.astype(np.float32))[None, None]
        there = affine_grid(space.grid.shape, labels.grid.inverse @ space.mid_to_fixed @ space.grid.matrix, index)
        out["labels"] = sample(index, there, "nearest", "zeros")[0, 0].numpy().astype(np.int32)
    return {**out, "matrix": space.grid.matrix, "seconds": np.array([one, fast, many])}


def cached(work: Path, data: Path, case: str, study: Study) -> dict[str, np.ndarray]:
    """:func:`collect`, kept in the work folder."""
    store = work / f"{case.split('/')[1].replace(':', '_')}_{study.stem}.npz"
    if not store.exists():
        np.savez(store, **collect(data, case, study))
        print(case, study.stem, "collected", flush=True)
    case_data = dict(np.load(store))
    values = {
        name: torch.from_numpy(case_data[name].astype(np.float32)) for name in ("contrast", "bend", "relax", "stiff")
    }
    return case_data | {name: value.numpy() for name, value in predictors.with_low_contrast(values).items()}


def points_of(case: dict, names, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Signs, errors and baseline at up to :data:`POINTS` voxels of the content."""
    where = np.flatnonzero(case["content"])
    where = rng.choice(where, min(POINTS, len(where)), replace=False)
    pick = {name: case[name].ravel()[where].astype(float) for name in (*names, "error", "baseline")}
    return {name: pick[name] for name in names}, pick["error"], pick["baseline"]


def fitted(cases: list[dict], names, kind: str, study: Study, on: str) -> calibration.Calibration:
    """A calibration from all cases, each counting the same."""
    rng = np.random.default_rng(0)
    parts = [points_of(case, names, rng) for case in cases]
    values = {name: np.concatenate([part[0][name] for part in parts]) for name in names}
    floor, found, radii = calibration.fit(values, np.concatenate([part[1] for part in parts]))
    return study.entry(kind, floor, found, radii, on)


def judged(entry: calibration.Calibration, case: dict) -> dict[str, float]:
    """How well the radii of one case predict its errors, beside the standard deviation of lengths."""
    values, errors, baseline = points_of(case, list(entry.weights), np.random.default_rng(1))
    radius = entry.radius(values)
    row = {
        f"coverage_{level}": calibration.coverage(errors, entry.radius(values, level)) for level in calibration.LEVELS
    }
    row |= {
        "rank": calibration.rank_correlation(radius, errors),
        "rank_baseline": calibration.rank_correlation(baseline, errors),
        "ause": calibration.ause(errors, radius),
        "ause_baseline": calibration.ause(errors, baseline),
    }
    return row | {"error_mm": float(errors.mean() * _voxel(case)), "voxel_mm": _voxel(case)}


def _voxel(case: dict) -> float:
    return float(abs(np.linalg.det(case["matrix"][:3, :3])) ** (1 / 3))


def volume_errors(entry: calibration.Calibration, cases: list[dict], patch_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """(errors, standard deviations) in ml of the volume changes of all labels, where the true change is known."""
    from SymRegistrationLib.geometry.grid import Grid

    errors, sigmas = [], []
    for case in cases:
        if "labels" not in case:
            continue
        grid = Grid(case["labels"].shape, case["matrix"])
        radius = entry.radius({name: case[name].astype(float) for name in entry.weights}) * _voxel(case)
        found, true = (
            volume_changes(case["labels"], case[name].astype(float), grid, radius, patch_mm)
            for name in ("jacobian", "true_jacobian")
        )
        for n in found:
            if found[n]["fixed_ml"] > LEAST_LABEL_ML:
                errors.append(abs(found[n]["change_ml"] - true[n]["change_ml"]))
                sigmas.append(found[n]["plus_minus_ml"])
    return np.array(errors), np.array(sigmas)


def patch_of(entry: calibration.Calibration, cases: list[dict]) -> float:
    """The patch size in mm for which one standard deviation covers 68 % of the volume errors; 0 = no
    case has labels."""
    if not any("labels" in case for case in cases):
        return 0.0
    sizes = np.geomspace(1, 60, 40)
    covered = [calibration.coverage(*volume_errors(entry, cases, size)) for size in sizes]
    return float(np.round(np.interp(68, covered, sizes), 1))


def landmarks(data: Path, subject: str, state: str, preset: str, runs: int) -> dict[str, float]:
    """Predicted radius at real landmarks beside their measured error."""
    base = data / "liver"
    names = [f"{subject}_exhale", f"{subject}_{state}"]
    fixed, moving = (read_volume(base / f"{name}.nii.gz") for name in names)
    here, there = (read_points(base / f"{name}_landmarks.csv").points for name in names)
    result = pipeline.register(fixed, moving, Options(preset=preset, uncertainty=runs))
    errors = np.linalg.norm(result.forward.map_points(here) - there, axis=1)
    index = np.clip(np.round(fixed.grid.indices(here)).astype(int), 0, np.array(fixed.grid.shape) - 1)
    radius = result.uncertainty[tuple(index.T)]
    return {
        "pair": f"liver {subject} exhale<-{state}",
        "count": len(errors),
        "tre_mm": float(errors.mean()),
        "radius_mm": float(radius.mean()),
        "calibrated": result.metrics["uncertainty"]["calibrated"],
        "coverage_68": calibration.coverage(errors, radius),
        "rank": calibration.rank_correlation(radius, errors),
    }


def table(entry: calibration.Calibration, names: list[str], rows: list[dict]) -> str:
    """Markdown of the judged cases and their mean."""
    lines = [
        "| case | voxel mm | mean error mm | 50 / 68 / 95 % radius covers | rank correlation (sd of lengths) | AUSE "
        "(sd of lengths) | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    for name, row in [*zip(names, rows), (f"**mean, {entry.kind}**", mean)]:
        cover = " / ".join(f"{row[f'coverage_{level}']:.0f}" for level in calibration.LEVELS)
        lines.append(
            f"| {name} | {row['voxel_mm']:.1f} | {row['error_mm']:.2f} | {cover} | {row['rank']:.2f} "
            f"({row['rank_baseline']:.2f}) | {row['ause']:.3f} ({row['ause_baseline']:.3f}) | "
            f"{row['ause'] / row['ause_baseline']:.2f} |"
        )
    return "\n".join(lines)


def one_kind(
    kind: str, study: Study, fits: list[dict], judges: list[dict], on: str
) -> tuple[calibration.Calibration, list[dict], str]:
    """(entry with what it was judged, row of every judged case, sentence on volumes); without ``fits`` the one of
    ``fast`` is judged."""
    names = predictors.PREDICTORS if kind == "runs" else predictors.FAST_PREDICTORS
    if fits:
        entry = fitted(fits, names, kind, study, on)
        entry = replace(entry, patch_mm=patch_of(entry, fits))
    else:
        entry = calibration.find("syn", "fast", "lncc", kind)
        told = [f"the preset {entry.preset}"] * (study.preset != "fast") + [f"the similarity {entry.similarity}"] * (
            study.similarity != "lncc"
        )
        entry = replace(
            entry,
            on=", with ".join((entry.on, " and ".join(told))) if told else entry.on,
            preset=study.preset,
            similarity=study.similarity,
        )
    rows = [judged(entry, case) for case in judges]
    errors, sigmas = volume_errors(entry, judges, entry.patch_mm)
    mean = {key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}
    mean |= {"cases": len(rows), "runs": study.runs if kind == "runs" else 0}
    volumes = ""
    if len(errors):
        mean["volume_coverage_68"] = round(calibration.coverage(errors, sigmas), 1)
        volumes = (
            f"volume changes: {mean['volume_coverage_68']} % of {len(errors)} labels within their +-; mean "
            f"error {errors.mean():.3f} ml"
        )
    return replace(entry, judged=mean), rows, volumes


def run(
    study: Study, data: Path, work: Path, fit: list[str], judge: list[str], store: bool
) -> list[calibration.Calibration]:
    """Collect, fit (``fit`` empty: judge what is stored), judge, print, and store when asked."""
    work.mkdir(parents=True, exist_ok=True)
    fits, judges = ([cached(work, data, case, study) for case in cases] for cases in (fit, judge))
    organs = ", ".join(
        name
        for folder, name in (
            ("brain", "brain MR"),
            ("lung/mr", "lung MR"),
            ("liver", "liver MR"),
            ("lung/thorax", "thorax CT"),
        )
        if any(case.startswith(folder) for case in fit)
    )
    on = f"known warps of {len({case.split(':')[0] for case in fit})} people ({organs})"
    entries = []
    for kind in ("runs", "fast"):
        entry, rows, volumes = one_kind(kind, study, fits, judges, on)
        entries.append(entry)
        print(f"\n### {kind}, {study.stem}\n")
        print(
            json.dumps(
                {"floor": entry.floor, "weights": entry.weights, "radii": entry.radii, "patch_mm": entry.patch_mm}
            )
        )
        print(table(entry, judge, rows) + f"\n\n{volumes}")
    one, fast, many = np.sum([case["seconds"] for case in (*fits, *judges)], 0)
    print(
        f"\nCPU seconds: one run {one:.1f}, fast mode adds {100 * fast / one:.1f} %, {study.runs} runs cost "
        f"{(many - one - fast) / one:.2f} runs more"
    )
    if store:
        print("stored in", study.store(entries))
    return entries


def study_of(arguments: argparse.Namespace) -> Study:
    """What the command line asks for."""
    if arguments.method == "syn":
        return Study(preset=arguments.preset, similarity=arguments.similarity, runs=arguments.runs)
    path = weights.find(arguments.method, arguments.weights, arguments.size)
    return Study(arguments.method, "default", "auto", arguments.runs, path, weights.load(path, arguments.method).sha256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="syn")
    parser.add_argument("--weights", help="file of a learned method; else the shipped one of --size")
    parser.add_argument("--size")
    parser.add_argument("--preset", default="fast", choices=("fast", "default", "thorough"))
    parser.add_argument("--similarity", default="lncc", choices=("lncc", "mse", "ncc", "mind"), help="of syn")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument(
        "--judge-only",
        action="store_true",
        help="judge the weights that the package has for the preset 'fast' and 'lncc'",
    )
    parser.add_argument(
        "--check", action="store_true", help="judge on the cases that had no part in the choice of the predictors"
    )
    parser.add_argument(
        "--only", default="", help="judge only cases that contain one of these comma-separated words; none = no case"
    )
    parser.add_argument(
        "--landmarks", type=int, default=0, help="so many of the landmark pairs too (full registrations)"
    )
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    study = study_of(arguments)
    if study.learned and arguments.judge_only:
        parser.error("a learned method is fitted: no other's numbers serve it")
    words = [word for word in arguments.only.split(",") if word]
    judge = [
        case
        for case in (CHECK if arguments.check else LEARNED_JUDGE if study.learned else JUDGE)
        if not words or any(word in case for word in words)
    ]
    for subject, state in LANDMARKS[: arguments.landmarks]:
        print(json.dumps(landmarks(arguments.data, subject, state, arguments.preset, arguments.runs)), flush=True)
    if arguments.only == "none":
        return
    fit = [] if arguments.judge_only else LEARNED_FIT if study.learned else FIT
    run(study, arguments.data, arguments.work, fit, judge, arguments.store)


if __name__ == "__main__":
    main()
