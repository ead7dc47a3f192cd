"""What every learned method promises, for whatever the registry holds."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from pairs import SEED, phantom
from torch import nn

from SymRegistrationLib import fields, networks
from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.networks._base import Card, SymmetricNetwork, parameter_count
from SymRegistrationLib.registration import inference

NAMES = networks.names()


def awake(name: str, **options) -> SymmetricNetwork:
    """A small network whose every weight is away from its start, so that it moves things by voxels."""
    torch.manual_seed(SEED)
    network = networks.create(name, "small", **options)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def images(card: Card, anisotropic: bool = True):
    """Two different volumes of the smallest shape a method takes, one axis longer."""
    shape = (card.minimum_size, card.minimum_size + anisotropic * card.size_multiple, card.minimum_size)
    return phantom(shape, 1), phantom(shape, 2)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(network, moving, fixed, output without gradients), made once per method."""
    network = awake(request.param)
    moving, fixed = images(network.card)
    with torch.no_grad():
        return network, moving, fixed, network(moving, fixed)


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete_and_small_is_small(name):
    card = networks.card(name)
    assert {"published", "small"} <= set(card.sizes) and set(card.bytes_per_voxel) == set(card.sizes)
    assert (
        card.deviations and card.publication and card.licence and card.inverse_method in ("svf", "dinet", "fixed_point")
    )
    assert 2 * parameter_count(networks.create(name, "small")) <= 8e6  # bytes in half precision
    assert card.minimum_size % card.size_multiple == 0
    told = (sys.modules[networks.network_class(name).__module__].__doc__ or "").count("\n* ")
    assert len(card.deviations) == told + 1 and not any("\n" in line or "``" in line for line in card.deviations)


@pytest.mark.parametrize("name", NAMES)
def test_created_network_remembers_what_it_is_and_refuses_what_it_is_not(name):
    network = networks.create(name, "small")
    again = type(network)(**network.options)
    assert network.size == "small" and parameter_count(again) == parameter_count(network)
    with pytest.raises(InputError, match="gigantic"):
        networks.create(name, "gigantic")
    with pytest.raises(InputError, match="wibble"):
        networks.create(name, "small", wibble=3)


def test_fields_are_finite_on_the_input_grid_and_move_something(case):
    _, moving, _, output = case
    for u in (output.pair.fixed_to_moving, output.pair.moving_to_fixed):
        assert u.shape == (1, 3, *moving.shape[2:]) and u.dtype == torch.float32 and torch.isfinite(u).all()
    assert output.pair.fixed_to_moving.abs().max() > 0.01
    assert math.isfinite(output.pair.residual)


def test_inputs_stay_as_they_are(case):
    network, moving, fixed, _ = case
    before = moving.clone(), fixed.clone()
    with torch.no_grad():
        network(moving, fixed)
    assert torch.equal(before[0], moving) and torch.equal(before[1], fixed)


def test_exchanging_the_inputs_exchanges_the_fields(case):
    network, moving, fixed, output = case
    with torch.no_grad():
        other = network(fixed, moving).pair.swapped()
    for name in ("fixed_to_moving", "moving_to_fixed"):
        difference = (getattr(other, name) - getattr(output.pair, name)).abs().max().item()
        assert difference <= network.card.exchange_tolerance, f"{name} differs by {difference} voxels"


def test_residual_is_the_measured_one(case):
    pair = case[3].finished().pair
    worst = max(
        fields.inverse_consistency(pair.fixed_to_moving, pair.moving_to_fixed).max().item(),
        fields.inverse_consistency(pair.moving_to_fixed, pair.fixed_to_moving).max().item(),
    )
    assert pair.residual == pytest.approx(worst, abs=1e-4)


def test_batch_of_two_is_two_batches_of_one(case):
    network, moving, fixed, output = case
    with torch.no_grad():
        both = network(torch.cat([moving, fixed]), torch.cat([fixed, moving])).pair
    difference = (both.fixed_to_moving[:1] - output.pair.fixed_to_moving).abs()
    # A numerical inverse stops for the whole batch, at 0.01 voxel or after its last step.
    assert difference.mean() < 1e-3 and (difference > 0.03).float().mean() < 1e-3


def test_state_survives_saving_and_loading(case):
    network, moving, fixed, output = case
    torch.manual_seed(SEED + 1)
    other = networks.create(network.card.name, "small")
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        again = other(moving, fixed).pair
    assert torch.equal(again.fixed_to_moving, output.pair.fixed_to_moving)


@pytest.mark.parametrize("name", NAMES)
def test_zero_heads_give_the_identity(name):
    network = awake(name)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv3d) and module.out_channels == 3:
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        pair = network(*images(network.card, anisotropic=False)).pair
    assert pair.fixed_to_moving.abs().max() == 0 and pair.moving_to_fixed.abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_in_the_joint_stage(name):
    network = awake(name)
    terms = network.objective(*images(network.card, anisotropic=False))
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    slopes = {key: 0.0 if p.grad is None else float(p.grad.abs().sum()) for key, p in network.named_parameters()}
    # A bias in front of a softmax shifts all its scores alike, which changes nothing: rounding alone is left.
    shifts = {key for key in slopes if key.endswith("regions.score.bias")}
    assert not [key for key, slope in slopes.items() if key not in shifts and not slope > 0]
    assert all(slopes[key] < 1e-6 for key in shifts)


@pytest.mark.parametrize("name", NAMES)
def test_levels_train_their_own_parameters(name):
    """The groups of all levels are all parameters, and a level's objective reaches no finer level."""
    network = awake(name)
    groups = [{id(p) for p in network.parameter_groups(level)} for level in range(1, network.levels + 1)]
    assert set().union(*groups) == {id(p) for p in network.parameters()}
    if network.levels > 1:
        sum(network.objective(*images(network.card, anisotropic=False), level=1).values()).backward()
        for p in network.parameters():
            if id(p) not in groups[0]:
                assert p.grad is None or not p.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused_in_words(name):
    network = networks.create(name, "small")
    least, multiple = network.card.minimum_size, network.card.size_multiple
    good = torch.zeros(1, 1, least, least, least)
    odd = torch.zeros(1, 1, least, least + multiple - 1, least)
    for moving, fixed in ((good, odd), (odd, odd), (good[0], good[0])):
        with pytest.raises(InputError, match=name):
            network(moving, fixed)


@pytest.mark.parametrize("name", NAMES)
def test_any_size_runs_through_inference(name):
    network = awake(name)
    shape = tuple(network.card.minimum_size - k for k in (1, 3, 0))
    pair = inference.run_network(phantom(shape, 1), phantom(shape, 2), name, Options(device="cpu"), network)
    assert pair.fixed_to_moving.shape == pair.moving_to_fixed.shape == (1, 3, *shape)
    assert torch.isfinite(pair.fixed_to_moving).all() and pair.details["notes"] == []
