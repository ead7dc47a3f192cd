"""HSyN: sizes, levels, half fields, the learned inverse and the paper's ablations."""

from __future__ import annotations

import pytest
import torch
from pairs import SEED, known_pair, overfitted, phantom

from SymRegistrationLib import fields, networks
from SymRegistrationLib.job import InputError
from SymRegistrationLib.networks._base import parameter_count


def awake(size: str = "small", heads: float = 0.1, **options):
    """A network with lively displacement heads."""
    torch.manual_seed(SEED)
    network = networks.create("hsyn", size, **options)
    with torch.no_grad():
        for unet in (*network.sn, network.di):
            for head in unet.heads:
                # Normalised features are several times larger; the fields shall not be.
                head.weight.normal_(0.0, heads / 8 if unet.norm else heads)
    return network


@pytest.fixture(scope="module")
def images():
    return phantom((32, 48, 32), 1), phantom((32, 48, 32), 2)


def test_published_parameter_counts():
    """Counted from the layers' shapes; two_head is what the code uses, without its dead tails."""
    network = networks.create("hsyn", "published")
    assert parameter_count(network.sn[0]) == 327_331
    assert parameter_count(network.sn) == 981_993
    assert parameter_count(network.di) == 327_763
    assert parameter_count(networks.create("hsyn", "published", sn_mode="two_head").sn) == 985_890


@pytest.mark.parametrize("size", ["published", "small"])
def test_exchange_exchanges_the_half_fields_exactly(images, size):
    moving, fixed = images
    network = awake(size)
    with torch.no_grad():
        one, other = network(moving, fixed), network(fixed, moving)
    (a, b), (b2, a2) = one.aux["half_fields"], other.aux["half_fields"]
    assert a.abs().max() > 0.1
    assert torch.equal(a, a2) and torch.equal(b, b2)
    assert torch.equal(one.pair.fixed_to_moving, other.pair.moving_to_fixed)


def test_two_heads_are_not_symmetric(images):
    network = awake(sn_mode="two_head")
    with torch.no_grad():
        a, _ = network(*images).aux["half_fields"]
        _, b = network(*reversed(images)).aux["half_fields"]
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("size, factor", [("published", 4), ("small", 8)])
def test_silent_fine_levels_leave_the_upsampled_coarse_field(images, size, factor):
    """With the heads of levels 2 and 3 at zero the half field is level 1's, values times the scale."""
    network = awake(size)
    with torch.no_grad():
        for unet in network.sn[1:]:
            torch.nn.init.zeros_(unet.heads[0].weight)
            torch.nn.init.zeros_(unet.heads[0].bias)
        increments = network.half_fields(*images)
        a, b = network.combined(increments, 1)
    for total, first in ((a, increments[0][0]), (b, increments[0][1])):
        expected = factor * fields.resize(first, images[0].shape[2:])
        assert total.abs().max() > 0.1
        assert torch.allclose(total, expected, atol=1e-5)


def test_levels_compose_from_coarse_to_fine():
    """phi = phi_1 o phi_2: shifts of 1 voxel at 1/8 and 2 at 1/4 add up to 16 voxels."""
    network = awake()
    one, two = torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 3, 8, 8, 8)
    one[:, 1], two[:, 1] = 1.0, 2.0
    total, other = network.combined([(one, -one), (two, -two)], 1)
    assert torch.allclose(total[:, 1], torch.full((1, 32, 32, 32), 16.0)) and total[:, [0, 2]].abs().max() == 0
    assert torch.equal(other, -total)


@pytest.mark.parametrize(
    "inverse, method", [("dinet", "dinet"), ("dinet+refine", "dinet"), ("fixed_point", "fixed_point")]
)
def test_full_maps_are_one_half_and_the_other_inverted(images, inverse, method):
    network = awake(inverse=inverse)
    with torch.no_grad():
        output = network(*images)
    a, b = output.aux["half_fields"]
    inverse_a, inverse_b = output.aux["half_inverses"]
    assert output.pair.inverse_method == method
    assert torch.equal(output.pair.fixed_to_moving, fields.compose(a, inverse_b))
    assert torch.equal(output.pair.moving_to_fixed, fields.compose(b, inverse_a))
    error = fields.inverse_consistency(b, inverse_b).mean()
    start = fields.square_sum(b).sqrt().mean()
    assert start > 0.1
    if inverse == "dinet":
        assert error > 0.5 * start, "an untrained DI-Net cannot invert; something else did"
    else:
        assert error < 0.01


def test_ablations_change_what_they_say(images):
    moving, fixed = images
    whole = {k: v.item() for k, v in awake().objective(moving, fixed).items()}
    assert set(whole) == {"similarity", "smooth", "magnitude", "inverse", "inverse_smooth"}
    assert set(awake(mag="none").objective(moving, fixed)) == set(whole) - {"magnitude"}
    network = awake(mag="mc")
    a, b = network.combined(network.half_fields(moving, fixed), 2)
    difference = (fields.square_sum(a) - fields.square_sum(b)).mean().abs().item()
    assert network.objective(moving, fixed)["magnitude"].item() == pytest.approx(
        0.4 * difference, rel=1e-4
    )  # mm^2 of cells of 2
    assert whole["magnitude"] == pytest.approx(0.4 * (a + b).square().mean().item(), rel=1e-4)
    one_way = awake(symmetric=False)
    assert "magnitude" not in one_way.objective(moving, fixed)
    with torch.no_grad():
        a, b = one_way(moving, fixed).aux["half_fields"]
    assert b.abs().max() == 0 < a.abs().max()
    assert [len(awake(levels=n).sn) for n in (1, 2, 3)] == [awake(levels=n).levels for n in (1, 2, 3)] == [1, 2, 3]
    assert awake(smooth=2.0).objective(moving, fixed)["smooth"].item() == pytest.approx(2 * whole["smooth"], rel=1e-4)


def test_di_net_learns_from_detached_fields(images):
    """Its terms move DI-Net and nothing else, and the other terms do not move DI-Net (mathematics.md, 10)."""
    network = awake()
    terms = network.objective(*images)
    (terms["inverse"] + terms["inverse_smooth"]).backward(retain_graph=True)
    assert all(p.grad is None for p in network.sn.parameters())
    before = [p.grad.clone() for p in network.di.parameters()]
    (terms["similarity"] + terms["smooth"] + terms["magnitude"]).backward()
    assert all(torch.equal(old, p.grad) for old, p in zip(before, network.di.parameters()))


@pytest.mark.parametrize("switch", [{"mag": "big"}, {"levels": 4}, {"sn_mode": "x"}, {"inverse": "svf"}, {"finest": 3}])
def test_unknown_switch_values_are_refused(switch):
    with pytest.raises(InputError, match=next(iter(switch))):
        networks.create("hsyn", "small", **switch)


def test_overfits_one_pair():
    """14 steps on a warp of up to 4 voxels: similarity up, end-point error less than half, no folds. Half fields are
    opposite by construction; the magnitude constraint alone lets them find each other slowly."""
    torch.manual_seed(SEED)
    pair = overfitted(networks.create("hsyn", "small", antisymmetric=True), known_pair(), steps=14, rate=5e-3, gain=0.2)
    assert fields.inverse_consistency(pair.fixed_to_moving, pair.moving_to_fixed).mean() < 0.05
