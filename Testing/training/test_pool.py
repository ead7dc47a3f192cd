"""A pool of training pairs: made once, cut off anywhere, and what is learned from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from SymRegistrationLib.commands import cli
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import write_volume
from SymRegistrationLib.job import InputError
from SymRegistrationLib.networks._passes import HalfFields, no_motion
from SymRegistrationLib.registration import weights
from SymRegistrationLib.training import loop, on_pool, pool, pool_loss, pool_making
from SymRegistrationLib.training.plan import StagePlan, TrainingPlan
from SymRegistrationLib.training.pool_options import PoolOptions, PoolTraining
from SymRegistrationLib.training.synthetic import Draw, Synthesis, random_shapes

SHAPE = (32, 32, 32)
OPTIONS = PoolOptions(spacing=4.0, shape=SHAPE, warp=4.0, rotation=8.0, seed=3)


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Path:
    """Three label maps of blobs, 2 mm."""
    folder = tmp_path_factory.mktemp("maps")
    for number in range(3):
        shapes = random_shapes(Synthesis(shape=(56, 56, 56), spacing=2.0), Draw(number))
        array = shapes.index.numpy().astype(np.int16)
        write_volume(folder / f"map_{number}.nii.gz", array, Grid.centred(array.shape, 2.0, np.zeros(3), np.eye(3)))
    return folder


@pytest.fixture(scope="module")
def made(maps, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    result = pool_making.make(folder, maps, 3, OPTIONS)
    assert result["made"] == result["pairs"] == 3
    return folder


def test_a_pair_holds_what_training_needs(made):
    pair = pool.Pool(made).pair(0)
    assert pair.moving.shape == pair.fixed.shape == pair.moving_labels.shape == (1, 1, *SHAPE)
    assert pair.to_moving.shape == (1, 3, 16, 16, 16)
    assert float(pair.moving.min()) >= 0 and float(pair.moving.max()) <= 1 and pair.moving.std() > 0.05
    assert len(pair.values) > 4 and int(pair.fixed_labels.max()) < len(pair.values)


def test_the_teacher_brings_the_labels_together(made):
    rows = [pool.Pool(made).pair(k).facts for k in range(3)]
    print([(round(r["dice_before"], 3), round(r["dice_teacher"], 3)) for r in rows])
    assert np.mean([r["dice_teacher"] for r in rows]) > np.mean([r["dice_before"] for r in rows])


def test_a_pool_without_a_teacher_holds_the_same_scans(made, maps, tmp_path):
    """Nothing else differs; what needs a teacher refuses it; a pool from before the option counts as one with."""
    plain = replace(OPTIONS, teacher=False)
    result = pool_making.make(tmp_path / "pool", maps, 1, plain)
    one, other = (pool.Pool(folder).pair(0) for folder in (tmp_path / "pool", made))
    assert result["dice_teacher"] is None and torch.equal(one.moving, other.moving)
    assert torch.equal(one.fixed_labels, other.fixed_labels) and float(one.to_moving.abs().max()) == 0
    with pytest.raises(InputError, match="without a teacher"):
        on_pool.train(PoolTraining("hsyn", str(tmp_path / "pool"), str(tmp_path / "run"), steps_teacher=1))
    with pytest.raises(InputError, match="other options"):
        pool_making.make(tmp_path / "pool", maps, 1, OPTIONS)
    manifest = json.loads((made / "pool.json").read_text())
    del manifest["options"]["teacher"]
    (tmp_path / "older").mkdir()
    (tmp_path / "older/pool.json").write_text(json.dumps(manifest))
    pool_making._settle_manifest(tmp_path / "older", {**manifest, "options": pool_making._stored(OPTIONS)})


def test_a_pool_that_was_cut_off_goes_on_and_ends_the_same(made, maps):
    """A missing and a damaged pair are made again, bit for bit; complete ones are left alone."""
    first, second, third = sorted(made.glob("pair_*"))
    before = {path: {name: v.clone() for name, v in load_file(path).items()} for path in (first, second)}
    kept = third.stat().st_mtime_ns
    first.unlink()
    second.write_bytes(second.read_bytes()[:2000])
    with pytest.raises(InputError, match="damaged"):
        pool.Pool(made).pair(0)
    assert pool_making.make(made, maps, 3, OPTIONS)["made"] == 2
    for path, tensors in before.items():
        again = load_file(path)
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
    assert third.stat().st_mtime_ns == kept


def test_a_pool_of_other_settings_or_version_is_refused(made, maps, tmp_path):
    with pytest.raises(InputError, match="other options"):
        pool_making.make(made, maps, 3, PoolOptions(spacing=4.0, shape=SHAPE, seed=4))
    with pytest.raises(InputError, match="other label_maps"):
        pool_making.make(made, maps, 3, OPTIONS, held_out="map_0")
    with pytest.raises(InputError, match="not a pool"):
        pool.Pool(tmp_path)
    (tmp_path / "pool.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(InputError, match="version 99"):
        pool.Pool(tmp_path)


# ---------------------------------------------------------------------------------------------- training


def run(folder: Path, made: Path, **changes) -> PoolTraining:
    values = {
        "steps_coarse": 1,
        "steps_teacher": 3,
        "steps_free": 3,
        "most_passes": 2,
        "block": None,
        "precision": "float32",
    }
    return PoolTraining("hsyn", str(made), str(folder), **{**values, **changes})


def test_a_stopped_run_ends_with_the_same_weights(made, tmp_path, monkeypatch):
    whole = on_pool.train(run(tmp_path / "whole", made))
    assert whole["finished"] and whole["step"] == 7
    cut = run(tmp_path / "cut", made)
    step = on_pool._Run._pair

    def stops(self):
        if self.state.pair == 3 and not getattr(on_pool, "went_on", False):
            raise KeyboardInterrupt
        row = step(self)
        self._save()
        return row

    monkeypatch.setattr(on_pool._Run, "_pair", stops)
    with pytest.raises(KeyboardInterrupt):
        on_pool.train(cut)
    monkeypatch.setattr(on_pool, "went_on", True, raising=False)
    result = on_pool.train(cut)
    one, other = (load_file(Path(r["weights"])) for r in (whole, result))
    assert all(torch.equal(one[name], other[name]) for name in one)
    card = json.loads(Path(f"{whole['weights']}.json").read_text())
    assert card["data"]["pairs"] == 3 and card["plan"]["spacing"] == 4.0
    assert any("prealign=false" in line for line in card["deviations"])
    assert card["begun_from"] == {"taken": "pose and matching", "sha256": weights.load(weights.find("hsyn")).sha256}
    more = on_pool.train(run(tmp_path / "more", made, start=whole["weights"], keep=("",), steps_free=1))
    before = json.loads(Path(f"{more['weights']}.json").read_text())["begun_from"]
    assert before["sha256"] == card["sha256"] and before["training"]["steps"] == 7 and before["begun_from"]
    with pytest.raises(InputError, match="other options: seed"):
        on_pool.train(run(tmp_path / "whole", made, seed=5))


def test_pose_and_matching_stay_as_they_are_and_the_method_learns(made, maps, tmp_path):
    table = tmp_path / "judged.csv"
    pair = [str(maps / f"map_{number}.nii.gz") for number in (0, 1)]
    table.write_text("fixed,moving,fixed_labels,moving_labels\n" + ",".join(pair * 2) + "\n", encoding="utf-8")
    result = on_pool.train(run(tmp_path / "run", made, steps_free=1, judged=str(table)))
    after, before = load_file(Path(result["weights"])), weights.load(weights.find("hsyn")).tensors
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(("pose.", "match.")))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"A", "B", "C"}
    judged = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    print([(row["step"], row["dice_before"], row["dice"], row["residual_voxel"]) for row in judged])
    assert [row["step"] for row in judged] == [0, result["step"]]
    assert all(0 <= row["residual_voxel"] < 2 for row in judged)


def test_the_teacher_costs_nothing_and_standing_still_its_length(made):
    pair = pool.Pool(made).pair(0)
    still = pool_loss.teacher_terms(no_motion(pair.moving), pair, 0.1)["teacher"]
    right = pool_loss.teacher_terms(HalfFields(pair.to_moving, pair.to_fixed), pair, 0.1)["teacher"]
    assert float(right) == 0 and float(still) > 0.01


def test_mirroring_and_exchanging_keep_the_truth(made):
    """What the teacher brings together stays together, whichever way the pair is turned."""
    pair = pool.Pool(made).pair(1)
    base = None
    for mirrored in (False, True):
        for exchanged in (False, True):
            p = pool_loss.turned(pair, mirrored, exchanged)
            terms = pool_loss.free_terms(HalfFields(p.to_moving, p.to_fixed), p, pool_loss.indicators(p), 0.1)
            value = float(terms["dice"]), float(terms["similarity"])
            base = base or value
            assert value == pytest.approx(base, abs=2e-3)


def test_a_block_is_the_same_place_in_everything(made):
    pair = pool.Pool(made).pair(0)
    fields = HalfFields(pair.to_moving, pair.to_fixed)
    small, cut = pool_loss.blocked(pair, fields, (16, 16, 16), Draw(1))
    assert small.moving.shape == (1, 1, 16, 16, 16) and torch.equal(cut.to_moving, small.to_moving)
    assert cut.to_moving.shape == (1, 3, 8, 8, 8)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"steps_coarse": 0, "steps_teacher": 0, "steps_free": 0}, "no step"),
        ({"block": (20, 32, 32)}, "block is"),
        ({"precision": "half"}, "precision is"),
        ({"learning_rate": float("nan")}, "learning-rate is"),
    ],
)
def test_bad_requests_are_refused(changes, told, tmp_path):
    with pytest.raises(InputError, match=told):
        run(tmp_path, tmp_path, **changes)


def test_the_commands_say_what_is_wrong(made, tmp_path, capsys):
    assert cli.main(["train", "--pool", str(tmp_path / "none"), "--method", "hsyn", "-o", str(tmp_path / "r")]) == 2
    assert cli.main(["train", "--pool", str(tmp_path), "--method", "hsyn", "-o", str(tmp_path / "r")]) == 2
    assert (
        cli.main(["train", "--pool", str(made), "--method", "hsyn", "--size", "small", "-o", str(tmp_path / "r")]) == 2
    )
    assert cli.main(["pool", str(tmp_path / "none"), "-o", str(tmp_path / "p")]) == 2
    said = capsys.readouterr().err
    for words in ("does not exist", "not a pool", "no passes", "--pool"):
        assert words in said, words


def test_the_published_rate_is_halved_after_its_first_steps():
    """SM-GICNet: every 50k steps after the first 60k of a level."""
    stage = (StagePlan(1, 200_000, 1e-4, 0),)
    sizes = {"memory_gb": 0.0, "room_gb": 0.0, "data": {}, "held_out": (), "notes": (), "options": {}}
    plan = TrainingPlan(
        *("sm-gicnet", "small", 2.0, SHAPE, 1, "cpu", "float32", stage, "published", 50_000, 1),
        **sizes,
        halve_after=60_000,
    )
    rates = [loop.learning_rate(plan, 0, step) for step in (0, 59_999, 109_999, 110_000, 160_000)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 5e-5, 2.5e-5])
