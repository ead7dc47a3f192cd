"""SM-GICNet: the Haar pyramid, sizes, both directions, and the paper's ablations."""

from __future__ import annotations

import pytest
import torch
from pairs import SEED, known_pair, overfitted, phantom

from SymRegistrationLib import fields, networks
from SymRegistrationLib.job import InputError
from SymRegistrationLib.networks._base import parameter_count
from SymRegistrationLib.networks._blocks import HAAR, energy_map, haar, space_to_depth
from SymRegistrationLib.networks.sm_gicnet import anti_fold, weigh_difference


def awake(size: str = "small", heads: float = 0.01, **options):
    """A network with lively velocity heads."""
    torch.manual_seed(SEED)
    network = networks.create("sm-gicnet", size, **options)
    with torch.no_grad():
        for net in network.nets:
            net.head.b.weight.normal_(0.0, heads)
    return network


@pytest.fixture(scope="module")
def images():
    return phantom((32, 48, 32), 1), phantom((32, 48, 32), 2)


def test_haar_is_orthonormal_halves_the_size_and_reconstructs():
    image = phantom((16, 24, 20))
    bands = haar(image)
    assert bands.shape == (1, 8, 8, 12, 10)
    assert bands.square().sum().item() == pytest.approx(image.square().sum().item(), rel=1e-5)
    blocks = torch.einsum("ij,nidhw->njdhw", HAAR, bands)
    assert torch.allclose(blocks, space_to_depth(image), atol=1e-6)
    rebuilt = blocks.view(1, 2, 2, 2, 8, 12, 10).permute(0, 4, 1, 5, 2, 6, 3).reshape(1, 1, 16, 24, 20)
    assert torch.allclose(rebuilt, image, atol=1e-6)


def test_haar_low_pass_is_the_block_mean_and_details_know_their_axis():
    image = torch.zeros(1, 1, 4, 4, 4)
    image[:, :, :, :, 1::2] = 1.0  # varies along W only
    bands = haar(image)
    assert torch.allclose(bands[:, 0], torch.full((1, 2, 2, 2), 0.5 * 8**0.5))
    assert [k for k in range(1, 8) if bands[:, k].abs().max() > 1e-6] == [1]


def test_energy_map_is_zero_for_a_constant_and_in_range_otherwise():
    assert energy_map(torch.full((1, 1, 8, 8, 8), 0.7)).max() < 1e-6
    energy = energy_map(phantom((32, 32, 32)))
    assert energy.min() >= 0 and energy.max() == 1.0


def test_published_parameter_counts():
    """Counted from the layers' shapes, with the code's gates."""
    network = networks.create("sm-gicnet", "published", gate="code")
    assert [parameter_count(net) for net in network.nets] == [233_696, 436_720, 602_592, 522_272]
    assert parameter_count(network) == 1_795_280


def test_difference_weighting_lies_between_a_half_and_one():
    a, b = torch.ones(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)
    b[0, 0, 0, 0, 0] = 0.2
    x, y = weigh_difference(a, b)
    assert x[0, 0, 0, 0, 0] == 1.0 and y[0, 0, 0, 0, 0] == pytest.approx(0.2) and x[0, 0, 1, 1, 1] == 0.5
    same, _ = weigh_difference(a, a)
    assert torch.allclose(same, 0.5 * a), "no difference at all must not divide by zero"


def test_anti_fold_counts_only_folds():
    ramp = fields.identity((6, 6, 6))
    assert anti_fold(-0.9 * ramp) == 0
    # u = -3 x: t = 3 - 1 = 2 along the own axis of each of three channels: mean of 8 over a third of the values, 3 axes
    assert anti_fold(-3.0 * ramp).item() == pytest.approx(3 * 8 / 3, rel=1e-5)


@pytest.mark.parametrize("antisymmetric", ["result", "levels"])
@pytest.mark.parametrize("size", ["published", "small"])
def test_antisymmetric_results_exchange_exactly(images, size, antisymmetric):
    network = awake(size, antisymmetric=antisymmetric)
    with torch.no_grad():
        one, other = network(*images), network(*reversed(images))
    assert one.pair.fixed_to_moving.abs().max() > 0.5
    assert torch.equal(one.pair.fixed_to_moving, other.pair.moving_to_fixed)
    assert torch.equal(one.pair.moving_to_fixed, other.pair.fixed_to_moving)
    assert torch.equal(one.velocity, -other.velocity)


def test_inverse_is_exp_of_minus_the_velocity(images):
    """The maps undo each other to 0.05 voxel where nothing leaves the grid."""
    network = awake("published", heads=0.03)
    with torch.no_grad():
        for net in network.nets[1:]:  # untrained fine levels are noise, which no sampling inverts
            net.head.b.weight.zero_()
        output = network(*images)
    assert torch.equal(output.pair.fixed_to_moving, fields.exponentiate(output.velocity))
    assert torch.equal(output.pair.moving_to_fixed, fields.exponentiate(-output.velocity))
    error = fields.inverse_consistency(output.pair.fixed_to_moving, output.pair.moving_to_fixed)
    assert fields.square_sum(output.velocity).max() > 1 and error[..., 6:-6, 6:-6, 6:-6].max() < 0.05


def test_one_direction_is_the_papers_result(images):
    """antisymmetric=none: exp(V_AB) itself; the mean of both directions is something else."""
    plain = awake(antisymmetric="none")
    with torch.no_grad():
        ab, ba = plain.run(*images)[-1]
        output = plain(*images)
        mean = awake(antisymmetric="result")(*images)
    # Not to the bit: alone, a direction passes the convolutions as another batch than in company.
    alone = torch.nn.functional.interpolate(ab.velocity, scale_factor=2.0, mode="trilinear", align_corners=False)
    assert torch.allclose(output.velocity, 2 * alone, atol=1e-5)
    half = torch.nn.functional.interpolate((ab.velocity - ba.velocity) / 2, scale_factor=2.0, mode="trilinear")
    assert torch.allclose(mean.velocity, 2 * half, atol=1e-5)
    assert (output.velocity - mean.velocity).abs().max() > 0.01


def test_range_bounds_the_velocity_of_a_level(images):
    network = awake(heads=1000.0, levels=1, ranges=(0.8, 0.4, 0.4, 0.25))
    with torch.no_grad():
        velocity = network(*images).velocity.abs().amax((0, 2, 3, 4))
    bound = 0.25 * torch.tensor(images[0].shape[2:]) / 2
    assert (velocity <= bound).all() and (velocity > 0.9 * bound).all()


def test_displacements_can_be_composed_instead(images):
    network = awake(compose="displacement", antisymmetric="none", heads=0.005)
    with torch.no_grad():
        output = network(*images)
    assert output.velocity is None
    assert fields.inverse_consistency(output.pair.fixed_to_moving, output.pair.moving_to_fixed).mean() < 0.05


def test_ablations_change_what_they_say(images):
    def terms(**options):
        return {k: v.item() for k, v in awake(antisymmetric="none", **options).objective(*images).items()}

    whole = terms()
    assert set(whole) == {
        "similarity",
        "smooth",
        "anti_fold",
        "multi_level",
        "inverse_similarity",
        "inverse_smooth",
        "inverse",
        "symmetric",
    }
    assert set(terms(symmetric=False)) == set(whole) - {"symmetric"}
    assert set(terms(levels=1)) == set(whole) - {"multi_level"}
    assert set(terms(inv="none")) == set(whole) - {"inverse"}
    assert len({terms(inv=kind)["inverse"] for kind in ("gradicon_cross", "icon_cross", "icon_self")}) == 3
    assert terms(inv_weight=0.02)["inverse"] == pytest.approx(2 * whole["inverse"], rel=1e-4)
    assert terms(inv="icon_self")["inverse"] < 0.05 * terms(inv="icon_cross")["inverse"]
    assert terms(smooth=0.5)["smooth"] == pytest.approx(0.5 * whole["smooth"], rel=1e-4)
    joint = awake(antisymmetric="levels").objective(*images)
    assert set(joint) == {"similarity", "smooth", "anti_fold", "multi_level"}


def test_consistency_by_construction_is_not_claimed_as_a_loss(images):
    """Where both directions are exact exponentials of one field no loss asks for it, and the card says so."""
    asked = {"inverse", "symmetric", "inverse_similarity", "inverse_smooth"}
    network = awake("small")
    assert network.switches.antisymmetric == "levels" and not asked & set(network.objective(*images))
    assert asked <= set(awake("small", antisymmetric="result").objective(*images))
    with torch.no_grad():
        (ab, ba), (other, _) = network.run(*images)[-1], network.run(*images[::-1])[-1]
    assert ab.velocity.abs().max() > 0.01 and torch.equal(ab.velocity, -ba.velocity)
    assert torch.equal(ab.inverse, ba.phi) and torch.equal(other.phi, ab.inverse)
    assert any("no loss asks for it" in " ".join(line.split()) for line in networks.card("sm-gicnet").deviations)


def test_gates_differ_and_can_be_left_out(images):
    counts = {gate: parameter_count(awake(gate=gate).nets[-1]) for gate in ("paper", "code", "none")}
    c = 16
    assert counts["paper"] - counts["none"] == 3 * (2 * (c * c + c) + c + 1)
    results = []
    for gate in counts:
        with torch.no_grad():
            results.append(awake(gate=gate)(*images).velocity)
    assert all((results[i] - results[j]).abs().max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_gate_closes_and_opens():
    """A gate pushed far down silences the encoder's skip, far up lets it through (psi's bias)."""
    network = awake(gate="paper")
    gate = network.nets[-1].gates[0]
    x, y = torch.randn(1, 16, 8, 8, 8), torch.randn(1, 16, 4, 4, 4)
    for bias, value in ((-30.0, 0.0), (30.0, 1.0)):
        torch.nn.init.constant_(gate.psi.bias, bias)
        with torch.no_grad():
            assert torch.allclose(gate(x, y), torch.full((1, 1, 4, 4, 4), value), atol=1e-4)


def test_similarity_uses_both_directions(images):
    """Run on (A, B) and (B, A), the joint objective has the same similarity."""
    network = awake(antisymmetric="levels")
    one, other = (network.objective(*pair)["similarity"].item() for pair in (images, images[::-1]))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    "switch",
    [
        {"gate": "x"},
        {"levels": 5},
        {"inv": "x"},
        {"compose": "x"},
        {"ranges": (1, 2)},
        {"antisymmetric": "x"},
        {"symmetric": False},
        {"compose": "displacement"},
    ],
)
def test_switches_that_cannot_be_are_refused(switch):
    with pytest.raises(InputError):
        networks.create("sm-gicnet", "small", **switch)


def test_overfits_one_pair():
    """12 steps on a warp of up to 4 voxels: similarity up, end-point error less than half, no folds."""
    torch.manual_seed(SEED)
    pair = overfitted(networks.create("sm-gicnet", "small"), known_pair(), steps=12, rate=1.5e-3, gain=0.2)
    assert fields.inverse_consistency(pair.fixed_to_moving, pair.moving_to_fixed).mean() < 0.05
