"""Calibrated radii: the fit finds known weights, the judges give what theory says, entries are found only
where they fit."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pairs
import pytest
import torch

from SymRegistrationLib import networks
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.registration import weights
from SymRegistrationLib.registration.working_grid import WorkingPair
from SymRegistrationLib.uncertainty import calibration, estimate
from SymRegistrationLib.uncertainty.calibration import Calibration

SEED = 20260101


def _synthetic(count: int, seed: int):
    """Signs, and errors that are lengths of 3-D normal vectors with variance (0.3^2 + (2 a)^2 + 0 b) / 3 an axis."""
    random = np.random.default_rng(seed)
    predictors = {"stiff": random.gamma(2.0, 0.2, count), "bend": random.gamma(2.0, 0.2, count)}
    scale = np.sqrt((0.3**2 + (2 * predictors["stiff"]) ** 2) / 3)
    return predictors, np.linalg.norm(random.normal(size=(count, 3)) * scale[:, None], axis=1)


def test_the_fit_finds_what_made_the_errors_and_covers_new_ones():
    predictors, errors = _synthetic(20_000, SEED)
    floor, weights, radii = calibration.fit(predictors, errors)
    assert abs(floor - 0.3) < 0.04 and abs(weights["stiff"] - 2) < 0.1 and weights["bend"] < 0.25, f"seed {SEED}"
    # quantiles of a length of 3-D normal vectors (Maxwell) over sqrt(3) sigma
    for level, expected in (("50", 1.5382), ("68", 1.8724), ("95", 2.7955)):
        assert abs(radii[level] - expected / 3**0.5) < 0.03, level
    entry = Calibration("syn", "fast", "lncc", "runs", floor, weights, radii, "synthetic errors")
    predictors, errors = _synthetic(20_000, SEED + 1)
    for level in calibration.LEVELS:
        assert abs(calibration.coverage(errors, entry.radius(predictors, level)) - level) < 2, f"seed {SEED + 1}"
    more = {"stiff": predictors["stiff"] + 0.1, "bend": predictors["bend"]}
    assert (entry.radius(more) > entry.radius(predictors)).all(), "more of a sign is never less uncertainty"


def test_the_fit_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="100 points"):
        calibration.fit({"stiff": np.ones(50)}, np.ones(50))
    with pytest.raises(ValueError, match="finite"):
        calibration.fit({"stiff": np.full(200, np.nan)}, np.ones(200))


def test_sparsification_of_known_orders():
    errors = np.arange(1000) / 999  # uniform on [0, 1], mean 1/2
    assert calibration.ause(errors, errors) == 0, "a perfect predictor"
    assert calibration.ause(errors, np.exp(3 * errors)) == 0, "only the order counts"
    # Leaving out the smallest first raises the rest's mean from 1 to 2 (in means) linearly, the best order lowers it to
    # 0: the area between 1 + f and 1 - f over [0, 1) is the mean of 2 f = 0.98 at steps of 0.02.
    assert abs(calibration.ause(errors, -errors) - 0.98) < 0.01
    shuffled = np.random.default_rng(SEED).permutation(1000)
    # An order that knows nothing stays at 1: area = mean of f = 0.49.
    assert (
        abs(
            np.mean([calibration.ause(errors, np.random.default_rng(SEED + k).permutation(1000)) for k in range(20)])
            - 0.49
        )
        < 0.03
    )
    assert abs(calibration.rank_correlation(errors, shuffled)) < 0.1, f"seed {SEED}"


def test_rank_correlation_by_hand():
    assert calibration.rank_correlation([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1)
    assert calibration.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks 1 2 3 4 5 against 1 2.5 2.5 4 5: Pearson 9.5 / sqrt(10 * 9.5)
    assert calibration.rank_correlation([1, 2, 3, 4, 5], [1, 2, 2, 4, 5]) == pytest.approx(9.5 / 95**0.5)
    assert np.isnan(calibration.rank_correlation([1, 1, 1], [1, 2, 3]))


def _beside(folder, **changes):
    """A weights file's name, and an entry that lies beside it."""
    mine = Calibration(
        "hsyn",
        "default",
        "network",
        "runs",
        0.1,
        {"stiff": 1.0},
        {"50": 1.0, "68": 1.2, "95": 2.0},
        "here",
        {"rank": 0.6},
        sha256="ab12",
    )
    mine = replace(mine, **changes)
    file = folder / "net.safetensors"
    calibration.write_calibrations([mine], calibration.beside(file))
    return file, mine


def test_an_entry_serves_only_the_runs_it_was_fitted_for(tmp_path):
    file, mine = _beside(tmp_path)
    assert calibration.beside(file) == tmp_path / "net.calibration.json"
    assert calibration.find("hsyn", "default", "network", "runs", 0, file, "ab12") == mine
    for wrong in (
        ("hsyn", "fast", "network", "runs", 0),
        ("caml", "default", "network", "runs", 0),
        ("hsyn", "default", "mind", "runs", 0),
        ("hsyn", "default", "network", "fast", 0),
        ("hsyn", "default", "network", "runs", 1),
    ):
        assert calibration.find(*wrong, file, "ab12") is None, wrong
    assert calibration.find("hsyn", "default", "network", "runs", 0, tmp_path / "other.safetensors", "ab12") is None
    (tmp_path / "net.calibration.json").write_text(json.dumps({"entries": [{"method": "hsyn"}]}))
    with pytest.raises(InputError, match="net.calibration.json"):
        calibration.read_calibrations(tmp_path / "net.calibration.json")


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    entry = Calibration("syn", "fast", "lncc", "runs", 0.1, {"spread": 1.0}, {"68": 1.0}, "a test")
    calibration.write_calibrations([entry], tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    (tmp_path / "c.json").write_text(text.replace('"similarity"', '"metric"'))
    assert calibration.read_calibrations(tmp_path / "c.json") == [entry]


def test_without_refinement_one_entry_serves_every_preset(tmp_path):
    file, mine = _beside(tmp_path, preset=calibration.ANY_PRESET)
    for preset in ("fast", "default", "thorough"):
        assert calibration.find("hsyn", preset, "network", "runs", 0, file, "ab12") == mine
    assert calibration.find("hsyn", "fast", "lncc", "runs", 1, file, "ab12") is None, (
        "what a preset refines, it changes"
    )


def test_a_calibration_is_ignored_beside_other_weights(tmp_path):
    torch.manual_seed(1)
    file = weights.save(tmp_path / "net.safetensors", networks.create("hsyn", "small"))
    _, mine = _beside(tmp_path, preset=calibration.ANY_PRESET, sha256=weights.read_card(file)["sha256"])
    solver = SimpleNamespace(
        options=Options(method="hsyn", weights=str(file), uncertainty=2), learned=True, similarity="network"
    )
    assert estimate._calibration(solver, "runs") == mine
    torch.manual_seed(2)  # trained again: other weights under the same name
    weights.save(file, networks.create("hsyn", "small"))
    assert estimate._calibration(solver, "runs") is None
    weights.card_path(file).unlink()
    assert estimate._calibration(solver, "runs") is None, "weights that nothing vouches for"


def _benchmark():
    file = Path(__file__).parents[1] / "benchmarks" / "calibrate_uncertainty.py"
    spec = importlib.util.spec_from_file_location("calibrate_uncertainty", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_truth_is_told_in_the_frame_of_a_found_pose():
    """Two sides 8 mm apart and a true shift of the same 8 mm: nothing is left to find; without the pose, 4 voxels."""
    grid = Grid((6, 6, 6), np.diag([2.0, 2.0, 2.0, 1.0]))
    image, shift = torch.zeros(1, 1, 6, 6, 6), torch.zeros(1, 3, 6, 6, 6)
    shift[:, 1] = 8.0
    halves = [np.eye(4), np.eye(4)]
    halves[0][1, 3], halves[1][1, 3] = -4.0, 4.0
    there = WorkingPair(image, image, None, grid, *halves)
    assert _benchmark().truth_on(there, shift).abs().max() < 1e-6
    as_scanned = WorkingPair(image, image, None, grid, np.eye(4), np.eye(4))
    left = _benchmark().truth_on(as_scanned, shift)
    assert (left[:, 1] - 4.0).abs().max() < 1e-6 and left[:, ::2].abs().max() < 1e-6


def test_a_learned_method_is_calibrated_beside_its_weights_and_found_again(tmp_path, monkeypatch):
    torch.manual_seed(3)
    file = weights.save(tmp_path / "net.safetensors", networks.create("hsyn", "small", prealign=False))
    study = _benchmark()
    for name, value in (
        ("POINTS", 800),
        ("LEARNED_FIT", ["x/a:1"]),
        ("LEARNED_JUDGE", ["x/b:2"]),
        ("known_warp", _bumped),
    ):
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "calibrate",
            "--data",
            str(tmp_path),
            "--work",
            str(tmp_path / "fresh"),
            "--method",
            "hsyn",
            "--weights",
            str(file),
            "--runs",
            "2",
            "--store",
        ],
    )
    study.main()
    sha256 = weights.read_card(file)["sha256"]
    for kind, preset in (("runs", "thorough"), ("fast", "fast")):
        entry = calibration.find("hsyn", preset, "network", kind, 0, file, sha256)
        assert entry.sha256 == sha256 and entry.judged["cases"] == 1 and "1 people" in entry.on
        # An untrained network finds nothing: its error is the warp itself, and a calibration knows how large that is.
        assert 20 < entry.judged["coverage_68"] <= 100 and entry.judged["error_mm"] > 0.3
    assert len(list((tmp_path / "fresh").glob(f"*hsyn-{sha256[:12]}*.npz"))) == 2, "kept by weights"


def _bumped(path, seed):
    """A phantom seen through a known smooth warp, 32^3 voxels of 2 mm."""
    moving, fixed, u = pairs.known_pair((32, 32, 32), size=2.0, seed=seed)
    grid = Grid.centred((32, 32, 32), 2.0, (0, 0, 0))
    linear = torch.from_numpy(grid.matrix[:3, :3].copy()).float()
    return (
        *(Volume(x[0, 0].numpy(), grid, name) for x, name in ((fixed, "fixed"), (moving, "moving"))),
        torch.einsum("ij,njdhw->nidhw", linear, u),
    )


def test_the_shipped_numbers_are_sound():
    entries = calibration.read_calibrations()
    assert {(e.method, e.preset, e.kind) for e in entries} >= {("syn", "fast", "runs"), ("syn", "fast", "fast")}
    for entry in entries:
        assert entry.floor >= 0 and all(w >= 0 for w in entry.weights.values()) and max(entry.weights.values()) > 0
        assert 0 < entry.radii["50"] < entry.radii["68"] < entry.radii["95"]
        assert entry.on and entry.judged["cases"] >= 1
