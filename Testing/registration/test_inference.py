"""Running a network on real grids: any size, bounded memory, any device, clear refusals."""

from __future__ import annotations

import pytest
import torch
from pairs import SEED, end_point_error, known_pair, overfit, phantom

from SymRegistrationLib import fields, networks
from SymRegistrationLib.job import InputError, Options, RegistrationError
from SymRegistrationLib.networks._base import (
    NetworkOutput,
    Recipe,
    Stage,
    SymmetricNetwork,
    crop_to,
    measured_pair,
    pad_to,
)
from SymRegistrationLib.registration import devices, inference, weights


def lively(name: str = "sm-gicnet"):
    """A network that bends smoothly by a few voxels."""
    torch.manual_seed(SEED)
    network = networks.create(name, "small")
    with torch.no_grad():
        for net in network.nets[:2] if name == "sm-gicnet" else network.sn[:1]:
            head = net.head.b if name == "sm-gicnet" else net.heads[0]
            head.weight.normal_(0.0, 0.3)
    return network


@pytest.fixture(scope="module")
def trained():
    """SM-GICNet on one pair of an odd size: (network, moving, fixed, true field)."""
    torch.manual_seed(SEED)
    moving, fixed, true = known_pair((32, 32, 32))
    network = networks.create("sm-gicnet", "small")
    overfit(network, moving, fixed, steps=12, rate=1.5e-3)
    return network, moving, fixed, true


CPU = Options(device="cpu")


def test_padding_is_symmetric_and_undone():
    image = torch.rand(1, 2, 5, 6, 7)
    padded = pad_to(image, (8, 6, 16))
    assert padded.shape == (1, 2, 8, 6, 16) and torch.equal(crop_to(padded, (5, 6, 7)), image)
    assert padded[:, :, 0].abs().max() == 0 == padded[:, :, 6:].abs().max() and padded[:, :, 1, :, 4].abs().max() > 0


def test_odd_sizes_give_fields_of_that_size_that_exchange_exactly():
    network = lively()
    a, b = phantom((33, 45, 38), 1), phantom((33, 45, 38), 2)
    one = inference.run_network(a, b, "sm-gicnet", CPU, network)
    other = inference.run_network(b, a, "sm-gicnet", CPU, network).swapped()
    assert one.fixed_to_moving.shape == (1, 3, 33, 45, 38) and one.fixed_to_moving.abs().max() > 0.5
    assert torch.equal(one.fixed_to_moving, other.fixed_to_moving)
    assert torch.equal(one.moving_to_fixed, other.moving_to_fixed)
    worst = fields.inverse_consistency(one.fixed_to_moving, one.moving_to_fixed).max().item()
    assert one.residual >= worst and one.inverse_method == "svf"


def test_a_trained_network_does_as_well_through_inference(trained):
    network, moving, fixed, true = trained
    pair = inference.run_network(moving, fixed, "sm-gicnet", CPU, network)
    assert end_point_error(pair.fixed_to_moving, true, fixed) < 0.5 * end_point_error(0 * true, true, fixed)


def test_half_precision_moves_no_vector_by_a_tenth_of_a_voxel(trained):
    network, moving, fixed, _ = trained
    with torch.no_grad():
        exact = network(moving, fixed).pair.fixed_to_moving
        with torch.autocast("cpu", torch.bfloat16):
            half = network(moving, fixed).pair.fixed_to_moving
    difference = fields.square_sum(exact - half).sqrt().max()
    assert exact.abs().max() > 2 and half.dtype == torch.float32
    assert difference < 0.1


def test_result_carries_no_gradients_and_the_network_keeps_its_weights(trained):
    network, moving, fixed, _ = trained
    before = [p.clone() for p in network.parameters()]
    pair = inference.run_network(moving, fixed, "sm-gicnet", CPU, network)
    assert not pair.fixed_to_moving.requires_grad
    assert all(torch.equal(old, new) for old, new in zip(before, network.parameters()))


def test_memory_bound_coarsens_the_grid_and_says_so():
    """Less than half of the memory that is needed: a coarser lattice that fits, fields of the size asked
    for, a note."""
    network = lively("hsyn")
    a, b = phantom((64, 64, 64), 1), phantom((64, 64, 64), 2)
    a, b = fields.gaussian(a, 3.0), fields.gaussian(b, 3.0)
    whole = inference.run_network(a, b, "hsyn", CPU, network)
    need = inference.memory_needed(network, (64, 64, 64))
    said = []
    tight = Options(device="cpu", memory_gb=0.45 * need / 1e9)
    coarse = inference.run_network(a, b, "hsyn", tight, network, lambda stage, part, text: said.append((part, text)))
    assert whole.details["notes"] == [] and whole.details["shape"] == (64, 64, 64)
    assert "times coarser" in coarse.details["notes"][0] and any("times coarser" in text for _, text in said)
    assert inference.memory_needed(network, coarse.details["shape"]) <= 0.45 * need
    assert coarse.fixed_to_moving.shape == whole.fixed_to_moving.shape
    assert [part for part, _ in said] == sorted(part for part, _ in said)


def test_a_coarser_grid_finds_nearly_the_same(trained):
    network, moving, fixed, true = trained
    large = [fields.resize(image, (60, 60, 60)) for image in (moving, fixed)]
    wanted = fields.resize_field(true, (60, 60, 60))
    room = inference.memory_needed(network, (32, 32, 32)) / 1e9
    pair = inference.run_network(*large, "sm-gicnet", Options(device="cpu", memory_gb=room), network)
    assert max(pair.details["shape"]) <= 32
    assert end_point_error(pair.fixed_to_moving, wanted, large[1]) < 0.5 * end_point_error(0 * wanted, wanted, large[1])


def test_memory_that_cannot_suffice_is_refused_before_running():
    a = phantom((48, 48, 48))
    with pytest.raises(RegistrationError, match="needs .* GB") as caught:
        inference.run_network(a, a, "hsyn", Options(device="cpu", memory_gb=1e-4), lively("hsyn"))
    assert caught.value.exit_code == 1 and "--spacing" in caught.value.hint


def test_estimate_counts_padding_batch_and_size():
    network = networks.create("hsyn", "published")
    per_voxel = network.card.bytes_per_voxel["published"]
    assert inference.memory_needed(network, (33, 32, 32)) == per_voxel * 48 * 32 * 32
    assert inference.memory_needed(network, (33, 32, 32), batch=2) == 2 * per_voxel * 48 * 32 * 32


def test_too_small_and_unlike_volumes_are_refused():
    for a, b in ((torch.rand(1, 1, 8, 40, 40),) * 2, (torch.rand(1, 1, 40, 40, 40), torch.rand(1, 1, 40, 40, 41))):
        with pytest.raises(InputError, match="hsyn"):
            inference.run_network(a, b, "hsyn", CPU, lively("hsyn"))


def test_missing_weights_and_wrong_networks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    a = phantom()
    with pytest.raises(InputError, match="no weights for hsyn") as caught:
        inference.run_network(a, a, "hsyn", CPU)
    assert "--method syn needs none" in str(caught.value)
    with pytest.raises(InputError, match="sm-gicnet was given for hsyn"):
        inference.run_network(a, a, "hsyn", CPU, lively("sm-gicnet"))
    with pytest.raises(InputError, match="no (method|network) 'nosuch'"):
        inference.run_network(a, a, "nosuch", CPU)


def test_weights_file_brings_its_size_and_options_and_switches_override(tmp_path):
    file = weights.save(tmp_path / "w.safetensors", networks.create("hsyn", "small", smooth=0.3))
    options = Options(device="cpu", weights=str(file), method_options={"inverse": "fixed_point"})
    network = inference.load_network("hsyn", options)
    assert (network.size, network.options["smooth"], network.switches.inverse) == ("small", 0.3, "fixed_point")
    assert inference.load_network("hsyn", options) is network, "a worker must not load twice"
    a, b = phantom(seed=1), phantom(seed=2)
    assert inference.run_network(a, b, "hsyn", options).inverse_method == "fixed_point"
    for bad, words in (({"levels": 2}, "does not fit"), ({"wibble": 1}, "wibble"), ({"mag": "x"}, "mag")):
        with pytest.raises(InputError, match=words):
            inference.load_network("hsyn", Options(device="cpu", weights=str(file), method_options=bad))
    with pytest.raises(InputError, match="of hsyn, not of sm-gicnet"):
        inference.load_network("sm-gicnet", Options(device="cpu", weights=str(file)))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "mps"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(InputError, match="device"):
        inference.run_network(phantom(), phantom(), "hsyn", Options(device=device), lively("hsyn"))


class _Stub(SymmetricNetwork):
    """Moves nothing; fails as told."""

    card = networks.card("hsyn")
    recipe = Recipe((Stage(1, 1, 1e-4),))
    failures: list[Exception] = []
    broken = False

    def forward(self, moving, fixed):
        if self.failures:
            raise self.failures.pop(0)
        u = torch.zeros(1, 3, *moving.shape[2:]) * (float("nan") if self.broken else 1.0)
        return NetworkOutput(measured_pair(u, u, "svf"))


def test_running_out_of_gpu_memory_falls_back_to_a_coarser_grid_then_the_cpu():
    stub, said, a = _Stub(), [], phantom((48, 48, 48))
    stub.failures = [torch.cuda.OutOfMemoryError("full")]
    pair = inference.run_network(a, a, "hsyn", CPU, stub, lambda *args: said.append(args[2]))
    assert pair.details["shape"] == (32, 32, 32) and any("coarser" in text for text in said)
    stub.failures = [torch.cuda.OutOfMemoryError("full"), torch.cuda.OutOfMemoryError("full")]
    pair = inference.run_network(a, a, "hsyn", CPU, stub, lambda *args: said.append(args[2]))
    assert pair.details["device"] == "cpu" and pair.details["shape"] == (48, 48, 48)
    assert "CPU" in pair.details["notes"][-1]


def test_fields_that_are_not_finite_are_an_error():
    stub, a = _Stub(), phantom()
    stub.broken = True
    with pytest.raises(RegistrationError, match="not finite"):
        inference.run_network(a, a, "hsyn", CPU, stub)


def test_every_device_here_gives_the_cpus_fields(trained):
    """Half precision on a GPU may move a vector by less than 0.1 voxel."""
    network, moving, fixed, _ = trained
    here = [row["name"] for row in devices.listing()]
    found = {name: inference.run_network(moving, fixed, "sm-gicnet", Options(device=name), network) for name in here}
    for pair in found.values():
        assert fields.square_sum(pair.fixed_to_moving - found["cpu"].fixed_to_moving).sqrt().max() < 0.1
    assert found["cpu"].fixed_to_moving.abs().max() > 2
