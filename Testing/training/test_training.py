"""Training: it learns, it is exact after a kill, several processes are one, and it refuses bad plans in time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import commandlines
import pytest
import torch
from safetensors.torch import load_file

from SymRegistrationLib import networks
from SymRegistrationLib.commands import cli
from SymRegistrationLib.job import InputError, Options, RegistrationError
from SymRegistrationLib.registration import inference, weights
from SymRegistrationLib.training import checkpoints, logs, loop, pictures, processes
from SymRegistrationLib.training.loss import end_point, hard_dice, soft_dice_loss, step_terms, supervised_terms
from SymRegistrationLib.training.options import TrainingOptions, Weighting
from SymRegistrationLib.training.plan import StagePlan, TrainingPlan
from SymRegistrationLib.training.samples import Sample
from SymRegistrationLib.training.synthetic import Pair, Synthesis, make_pair

ROOT = Path(__file__).parents[2]
SMALL = {"shape": (32, 32, 32), "spacing": 4.0, "device": "cpu", "validation_pairs": 1}


def options(folder: Path, method: str = "hsyn", **changes) -> TrainingOptions:
    return TrainingOptions(method, str(folder), **{**SMALL, **changes})


def run(arguments: list[str], **environment) -> subprocess.Popen:
    """``symreg`` in a process of its own; without matplotlib, which a training can do without."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; from SymRegistrationLib.commands.cli import main; exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
    )


def same(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- the loss


def test_the_true_map_costs_nothing_and_standing_still_costs_its_length():
    pair = make_pair(None, Synthesis(shape=(32,) * 3, spacing=4.0, warp=0.0, rotation=0.0, shift=12.0, scale=0.0), 3)
    true, back = pair.fixed_to_moving, pair.moving_to_fixed
    still = torch.zeros_like(true)
    length = float(true[0, :, 16, 16, 16].norm())
    assert float(end_point(true, None, pair)) < 1e-3 and float(end_point(None, back, pair)) < 1e-3
    assert float(end_point(still, None, pair)) == pytest.approx(length, rel=1e-3)
    # Half-way fields: a + b = 0 and each half of a translation.
    assert float(end_point(true / 2, back / 2, pair)) < 1e-3
    assert float(end_point(still, still, pair)) == pytest.approx(length, rel=1e-3)
    assert hard_dice(pair, true) > 0.8 > hard_dice(pair, still)


def test_soft_dice_of_equal_and_of_disjoint_labels():
    a = torch.zeros(1, 2, 4, 4, 4)
    a[:, 0, :2], a[:, 1, 2:] = 1, 1
    assert float(soft_dice_loss(a, a)) == pytest.approx(0, abs=1e-6)
    assert float(soft_dice_loss(a, a.flip(1))) == pytest.approx(1)


def test_landmarks_are_learned_from_when_given():
    u = torch.zeros(1, 3, 16, 16, 16)
    u[:, 0] = 2.0
    points = torch.tensor([[[4.0, 5, 6], [8, 8, 8]]])
    image = torch.rand(1, 1, 16, 16, 16)
    pair = Pair(image, image, points=(points, points + torch.tensor([2.0, 0, 3])))
    terms = supervised_terms([(u, None)], pair, Weighting(landmarks=1.0), 0)
    assert float(terms["landmarks"]) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("method", networks.names())
def test_every_recipe_gives_every_active_parameter_a_gradient_at_every_level(method):
    torch.manual_seed(0)
    network = networks.create(method)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "head" in name:
                parameter.normal_(0, 0.01)
    size = max(32, network.card.minimum_size)
    pair = make_pair(None, Synthesis(shape=(size,) * 3, spacing=4.0), 0)
    for level in {1, network.levels}:
        network.zero_grad()
        published, supervised = step_terms(network, Sample(pair, True, True), level, Weighting(), 0)
        assert {"dice", "end_point", "smooth_field"} <= set(supervised) and published
        sum([*published.values(), *supervised.values()]).backward()
        touched = [p for k in range(1, level + 1) for p in network.parameter_groups(k) if p.grad is not None]
        assert sum(p.grad.abs().sum() > 0 for p in touched) >= 0.8 * len(touched) > 0


def test_gradient_checkpointing_changes_no_gradient():
    pair = make_pair(None, Synthesis(shape=(32,) * 3, spacing=4.0), 0)
    found = []
    for spare in (False, True):
        torch.manual_seed(0)
        network = networks.create("hsyn")
        if spare:
            processes.enable_gradient_checkpointing(network)
        for terms in step_terms(network, Sample(pair, True, True), 3, Weighting(), 0):
            sum(terms.values()).backward()
        found.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


# ---------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps through all stages."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(commandlines.train(folder, "--iterations", "12", "--stages", "1,1,1", "--validate-every", "4")) == 0
    return folder


@pytest.fixture
def no_curves(monkeypatch):
    """Not drawn after each of many checkpoints."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(whole, tmp_path, no_curves):
    """SIGKILL in the middle of steps, several times; nothing is told to the process beforehand."""
    arguments = commandlines.train(
        tmp_path, "--iterations", "12", "--stages", "1,1,1", "--validate-every", "4", "--checkpoint-minutes", "0"
    )
    log = tmp_path / "log.jsonl"
    for target in (3, 7):
        process = run(arguments)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            if log.is_file() and log.read_text().count("\n") >= target:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    steps = [row["step"] for row in logs.rows(log)]
    assert cli.main(arguments) == 0
    assert steps[-1] < 12
    assert [row["step"] for row in logs.rows(log)] == list(range(1, 13))
    assert same(whole / "checkpoint.safetensors", tmp_path / "checkpoint.safetensors")
    assert same(whole / "hsyn-small.safetensors", tmp_path / "hsyn-small.safetensors")


def test_a_run_in_slices_is_the_same_too(whole, tmp_path, no_curves):
    arguments = commandlines.train(
        tmp_path, "--iterations", "12", "--stages", "1,1,1", "--validate-every", "4", "--stop-after", "0.01"
    )
    for _ in range(13):
        assert cli.main(arguments) == 0
        if (tmp_path / "hsyn-small.safetensors").is_file():
            break
    assert same(whole / "hsyn-small.safetensors", tmp_path / "hsyn-small.safetensors")


def test_curves_are_drawn_by_matplotlib_or_their_lack_is_told(tmp_path, monkeypatch):
    log = [{"step": k, "stage": k // 200, "loss": 1 / (k + 1), "terms": {"dice": 0.5}} for k in range(400)]
    judged = [{"step": 200, "dice": 0.4, "end_point": None}, {"step": 399, "dice": float("nan")}]
    picture = pictures.curves(log, judged)
    assert picture.shape == (520, 900, 3) and picture.dtype == "uint8" and 0 < (picture < 128).mean() < 0.2
    assert pictures.curves([], []).shape == picture.shape
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in pictures.missing()
    pictures.draw(tmp_path, None, None)
    assert not list(tmp_path.iterdir())


def test_what_a_run_leaves(whole):
    rows = logs.rows(whole / "log.jsonl")
    assert [row["level"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert any("similarity" in row["terms"] for row in rows) and any("dice" in row["terms"] for row in rows)
    judged = logs.rows(whole / "validation.jsonl")
    assert [row["step"] for row in judged] == [4, 8, 12]
    for name in ("curves.png", "validation.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    card = json.loads((whole / "hsyn-small.safetensors.json").read_text())
    for name in (
        "method",
        "size",
        "sha256",
        "plan",
        "data",
        "curves",
        "validation",
        "limits",
        "licence",
        "command",
        "versions",
    ):
        assert card[name], name
    stored = weights.load(whole / "hsyn-small.safetensors", "hsyn")
    assert all(value.dtype == torch.float16 for value in stored.tensors.values())


def test_register_takes_the_weights(whole):
    pair = make_pair(None, Synthesis(shape=(32,) * 3, spacing=4.0), 0)
    found = inference.run_network(
        pair.moving,
        pair.fixed,
        "hsyn",
        Options(method="hsyn", device="cpu", weights=str(whole / "hsyn-small.safetensors")),
    )
    assert torch.isfinite(found.fixed_to_moving).all()


def test_other_options_do_not_go_on_with_a_run(whole):
    with pytest.raises(InputError, match="other options: seed"):
        loop.train(options(whole, iterations=12, stages=(1.0, 1.0, 1.0), validate_every=4, seed=5))


def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch, no_curves):
    """gloo on loopback; sums of gradients in another order, so equal up to rounding."""
    more = ("--iterations", "2", "--stages", "1,0,0", "--rate", "published", "--learning-rate", "1e-3")
    assert cli.main(commandlines.train(tmp_path / "one", *more, "--batch", "2")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # what it tells each process
    other = run(commandlines.train(tmp_path / "two", *more), RANK="1", **torchrun)
    for name, value in {"RANK": "0", **torchrun}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(commandlines.train(tmp_path / "two", *more)) == 0
    _, told = other.communicate(timeout=600)
    assert other.returncode == 0, told.decode()
    a, b = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    start = loop.training_plan.new_network(options(tmp_path)).state_dict()
    moved = max(float((a[f"model/{name}"] - value).abs().max()) for name, value in start.items())
    apart = max(float((a[f"model/{name}"] - b[f"model/{name}"]).abs().max()) for name in start)
    print(f"weights moved by {moved:.2e}, the two runs are {apart:.2e} apart")
    assert moved > 1e-3 and apart < 0.02 * moved


def test_a_stage_that_gains_nothing_ends_early(tmp_path):
    result = loop.train(
        options(
            tmp_path, iterations=40, stages=(1.0, 0.0, 0.0), validate_every=2, patience=2, learning_rate=1e-9, ema=0.0
        )
    )
    assert result["finished"] and result["step"] < 20


def test_freezing_and_levels():
    network = networks.create("sm-gicnet")
    trainer = object.__new__(loop.Trainer)
    trainer.network, trainer.options = network, TrainingOptions("sm-gicnet", "nowhere")
    first, second = ({id(p) for p in network.parameter_groups(k)} for k in (1, 2))
    for frozen, expected in ((True, second), (False, first | second)):
        assert {id(p) for p in trainer._active(2, frozen)} == expected
        assert {id(p) for p in network.parameters() if p.requires_grad} == expected
    trainer.options = TrainingOptions("sm-gicnet", "nowhere", freeze=1)
    assert {id(p) for p in trainer._active(2, False)} == second and {id(p) for p in trainer._active(1, False)} == first


def test_learning_rates():
    stages = (StagePlan(1, 100, 1e-3, 0), StagePlan(2, 1000, 1e-3, 0))
    plan = TrainingPlan(
        "hsyn", "small", 1, (32,) * 3, 1, "cpu", "float32", stages, "cosine", 100, 10, 1, 1, {}, (), (), {}
    )
    assert loop.learning_rate(plan, 1, 0) == pytest.approx(1e-3 / 50)
    assert loop.learning_rate(plan, 1, 50) == pytest.approx(1e-3)
    assert loop.learning_rate(plan, 1, 999) < 2.1e-5
    published = replace(plan, rate="published")
    assert [loop.learning_rate(published, 1, k) for k in (0, 99, 100, 250)] == [1e-3, 1e-3, 5e-4, 2.5e-4]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--method", "hsyn"], "--output"),
        (["--method", "nobody", "-o", "{}"], "no network 'nobody'"),
        (["--method", "hsyn", "-o", "{}", "--data", "{}/missing"], "does not exist"),
        (["--method", "hsyn", "-o", "{}", "--shape", "30,32,32"], "multiple of 16"),
        (["--method", "hsyn", "-o", "{}", "--shape", "a,b"], "list of numbers"),
        (["--method", "hsyn", "-o", "{}", "--shape", "320,320,320", "--memory", "2"], "GB"),
        (["--method", "hsyn", "-o", "{}", "--stages", "1,2"], "3 stages"),
        (["--method", "hsyn", "-o", "{}", "--supervised", "2"], "share"),
        (["--method", "hsyn", "-o", "{}", "--hours", "1", "--minutes", "1"], "both"),
        (["--method", "hsyn", "-o", "{}", "--size", "huge"], "no size"),
        (["--method", "hsyn", "-o", "{}", "--minutes", "0.01", "--shape", "32,32,32"], "too short"),
        (["--method", "hsyn", "-o", "/proc/nowhere", "--shape", "32,32,32"], "cannot be written"),
    ],
)
def test_bad_requests_say_so_before_anything_is_trained(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop.training_plan, "measure", lambda step, count: 1.0)  # seconds a step, on any machine
    code = cli.main(["train", *(a.format(tmp_path) for a in arguments), "--device", "cpu"])
    error = capsys.readouterr().err
    assert code == 2 and told in error and error.count("\n") <= 2, error


def test_a_gpu_that_is_not_there(tmp_path, capsys):
    assert cli.main(["train", "--method", "hsyn", "-o", str(tmp_path), "--device", "cuda:97"]) == 2
    assert "not available" in capsys.readouterr().err


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    checkpoints.write(path, {"model/x": torch.ones(3)}, {"step": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RegistrationError, match="the disk is full"):
        checkpoints.write(path, {"model/x": torch.zeros(3)}, {"step": 2})
    tensors, facts = checkpoints.read(path)
    assert facts == {"step": 1} and torch.equal(tensors["model/x"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes((whole / "checkpoint.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        loop.train(options(tmp_path, iterations=12))


def test_a_gpu_lost_in_mid_run_is_told_with_the_way_on(tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(loop, "step_terms", lost)
    with pytest.raises(RegistrationError, match="GPU failed in mid-run"):
        loop.train(options(tmp_path, iterations=4))


def test_help_costs_no_torch():
    code = (
        "import sys\nfrom SymRegistrationLib.commands import cli\n"
        "try:\n    cli.main(['train', '--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "--bad-scans" in told and "examples:" in told


# ---------------------------------------------------------------------------------------------- it learns


def test_a_tiny_training_lowers_the_error_on_pairs_it_never_saw(tmp_path):
    """Random shapes of any contrast at 32^3, shifted by up to 8 voxels and warped; seed 0, the coarsest level."""
    result = loop.train(
        options(
            tmp_path,
            iterations=120,
            stages=(1.0, 0.0, 0.0),
            learning_rate=3e-3,
            rate="cosine",
            rotation=0.0,
            shift=32.0,
            scale=0.0,
            ema=0.9,
            validate_every=120,
            validation_pairs=4,
            curriculum=0.3,
            supervised=1.0,
            weights=Weighting(end_point=1.0, smooth=0.05),
        )
    )
    judged = result["validation"]
    print({name: round(judged[name], 3) for name in ("dice_before", "dice", "end_point_before", "end_point")})
    assert judged["end_point"] < 0.8 * judged["end_point_before"]
    assert judged["dice"] > judged["dice_before"] + 0.1
    assert judged["folded"] < 0.001
