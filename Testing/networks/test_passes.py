"""Repeated passes in the mean frame: the force, the plain step they begin as, their symmetry, and the
gate against harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import SEED, end_point_error, known_pair, phantom

from SymRegistrationLib import networks
from SymRegistrationLib.fields import compose, gaussian, inverse_consistency, jacobian_determinant, warp
from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.losses import lncc
from SymRegistrationLib.networks import _passes
from SymRegistrationLib.networks._passes import (
    HalfFields,
    adapting,
    no_motion,
    of_velocity,
    similarity_force,
)
from SymRegistrationLib.networks._prealign import content_box
from SymRegistrationLib.registration import devices, inference, weights

SHAPE = (32, 48, 32)
NAMES = ["ad-regnet", "caml", "hsyn", "sm-gicnet"]


def shape_of(name: str) -> tuple[int, ...]:
    return (48, 48, 48) if name == "caml" else SHAPE


@pytest.fixture(scope="module")
def images():
    """One blob of structure, and the same moved by two voxels."""
    torch.manual_seed(SEED)
    fixed = phantom(SHAPE, 1)
    shift = torch.zeros(1, 3, *SHAPE)
    shift[:, 1] = 2.0
    return warp(fixed, shift), fixed


def recurrent(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(SEED)
    return networks.create(name, "recurrent", **options).eval()


@pytest.mark.parametrize("kind", ["lncc", "mind"])
def test_the_force_raises_the_similarity_and_turns_round_with_the_scans(images, kind):
    moving, fixed = images
    force = similarity_force(moving, fixed, kind)
    assert torch.equal(force, -similarity_force(fixed, moving, kind))
    assert force.square().sum(1).max().sqrt() <= 4.0 + 1e-5
    before = lncc(moving, fixed, 7)
    after = lncc(*no_motion(moving).advanced(0.1 * force).warped(moving, fixed), 7)
    print(f"{kind}: LNCC {-before:.4f} -> {-after:.4f}")
    assert after < before - 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_is_the_plain_step(name):
    """Before training the field is the force times the gain: what a trained network has to beat."""
    torch.manual_seed(SEED)
    moving, fixed = (gaussian(torch.rand(1, 1, *shape_of(name)), 1.0) for _ in range(2))
    network = recurrent(name)
    force = similarity_force(moving, fixed)
    with torch.no_grad():
        v = network.step(moving, fixed, no_motion(moving, network.stationary), force, True)
    gain = float((v * force).sum() / force.square().sum())
    print(f"{name}: gain {gain:.4f}")
    assert abs(gain - _passes.GAIN) < 0.3 * _passes.GAIN
    assert (v - gain * force).square().mean() < 0.03 * v.square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_exchanging_the_scans_exchanges_the_fields(name):
    moving, fixed = phantom(shape_of(name), 1), phantom(shape_of(name), 2)
    network = recurrent(name)
    with torch.no_grad():
        one, other = network(moving, fixed), network(fixed, moving)
    assert (one.pair.fixed_to_moving - other.pair.moving_to_fixed).abs().max() < 1e-4
    # Two phantoms without a match: the roughest field there is; on average both directions undo each other all
    # the same.
    assert inverse_consistency(one.pair.fixed_to_moving, one.pair.moving_to_fixed).mean() < 0.05


def test_half_fields_of_hsyn_are_opposite():
    """|a + b| < 0.2 |a - b|, lively heads of all levels: the match is in the fields, not a shift that both share."""
    network = recurrent("hsyn")
    with torch.no_grad():
        for unet in network.sn:
            unet.heads[0].weight.add_(0.02 * torch.randn_like(unet.heads[0].weight))
        state, _ = network.train().passed(phantom(SHAPE, 1), phantom(SHAPE, 2))
    a, b = state.to_moving, state.to_fixed
    common, match = (float(u.square().sum(1).mean().sqrt()) for u in (a + b, a - b))
    print(f"|a + b| {common:.3f}, |a - b| {match:.3f} cells")
    assert match > 0.05 and common < 0.2 * match


def test_an_inverse_is_called_dinet_only_where_it_is():
    """A DI-Net that is worse than -u is not kept, and the result says so; one that adds nothing to -u is
    not better either."""
    network = recurrent("hsyn")
    with torch.no_grad():
        network.di.heads[0].weight.normal_(0.0, 1.0)
        output = network(phantom(SHAPE, 1), phantom(SHAPE, 2)).finished()
    facts = output.aux["facts"]
    assert facts["dinet_residual"] > facts["minus_u_residual"]
    assert output.pair.inverse_method == "fixed_point" and any("DI-Net" in note for note in output.aux["notes"])


def test_di_net_learns_the_correction_of_minus_u():
    """Some steps on one field bring its residual below that of -u; both start equal."""
    torch.manual_seed(SEED)
    network = networks.create("hsyn", "recurrent")
    u = gaussian(4 * torch.randn(1, 3, 16, 16, 16), 2.0)
    u = u * (2.0 / u.square().sum(1).sqrt().max())
    plain = float(compose(u, -u).square().sum(1).mean())
    optimiser = torch.optim.Adam(network.di.parameters(), 2e-3)
    for _ in range(40):
        optimiser.zero_grad()
        sum(network.learned_inverse_terms([u]).values()).backward()
        optimiser.step()
    with torch.no_grad():
        learned = float(compose(u, network._di(u)[1]).square().sum(1).mean())
    print(f"mean squared residual {plain:.4f} -> {learned:.4f}")
    assert learned < 0.5 * plain


@pytest.mark.parametrize("name", NAMES)
def test_a_level_that_does_harm_is_dropped_and_said(name):
    class Harmful(type(recurrent(name))):
        def step(self, moving, fixed, state, force, both):
            return -3 * gaussian(similarity_force(moving, fixed), 1.0)

    network = recurrent(name)
    network.__class__ = Harmful
    image = phantom(shape_of(name), 1)
    shift = torch.zeros(1, 3, *image.shape[2:])
    shift[:, 0] = 1.0
    with torch.no_grad():
        output = network(warp(image, shift), image).finished()
    assert any("passes" in note for note in output.aux["notes"])
    assert output.pair.fixed_to_moving.abs().max() < 0.5


def test_half_fields_advance_and_invert():
    torch.manual_seed(SEED)
    h = gaussian(6 * torch.randn(1, 3, 16, 16, 16), 3.0)
    state = of_velocity(h)
    assert (state.advanced(h).velocity - 2 * h).abs().max() < 1e-6
    inner = (..., slice(6, -6), slice(6, -6), slice(6, -6))
    for half in (state, HalfFields(state.to_moving, state.to_fixed)):
        there, back = half.full()
        assert there.shape[2:] == (32, 32, 32) and compose(there, back)[inner].abs().max() < 0.1


def test_half_fields_on_another_lattice_lead_to_the_same_places():
    """A slow wave of 2 cells on 16 cells an axis and on 24: its length in parts of the volume stays."""
    place = [(torch.arange(n) + 0.5) / n for n in (16, 24)]
    coarse, fine = (torch.sin(2 * torch.pi * p)[:, None, None].expand(-1, len(p), len(p)) for p in place)
    wave = torch.zeros(1, 3, 16, 16, 16)
    wave[:, 2] = 2 * coarse
    for half in (of_velocity(wave), HalfFields(wave, -wave)):
        moved = half.on((24, 24, 24))
        assert (moved.to_moving[0, 2] - 3 * fine)[2:-2].abs().max() < 0.1
        assert (moved.velocity is None) == (half.velocity is None) and half.on((16, 16, 16)) is half


def test_at_use_the_first_half_of_the_passes_sees_longer_voxels():
    network = recurrent("sm-gicnet", passes=5)
    moving, fixed = torch.rand(2, 1, 1, 80, 96, 80).unbind()
    looks = network._looks(moving, fixed)
    assert [(tuple(x.shape[2:]), times) for x, _, times in looks] == [((48, 64, 48), 2), ((80, 96, 80), 3)]
    assert looks[0][0].mean() == pytest.approx(float(moving.mean()), abs=2e-3) and looks[1][1] is fixed
    assert [times for *_, times in network.train()._looks(moving, fixed)] == [5]


def test_adaptation_loads_no_optimiser():
    """PyTorch's optimisers load a compiler: four seconds in every new process."""
    assert "torch.optim" not in Path(_passes.__file__).read_text(encoding="utf-8")


def test_the_box_about_the_content():
    image = torch.zeros(1, 1, 64, 64, 48)
    image[..., 20:40, 10:30, 12:40] = 1.0
    low, high = content_box(image, 16)
    assert [b - a for a, b in zip(low, high)] == [32, 32, 48]
    assert all(a % 2 == 0 for a in low) and low[0] <= 18 and high[0] >= 42
    assert content_box(torch.zeros(1, 1, 32, 32, 32), 16) == ([0, 0, 0], [32, 32, 32])


def test_in_front_of_the_method_only_the_content_is_seen():
    torch.manual_seed(SEED)
    network = networks.create("hsyn", "recurrent", prealign=True).eval()
    moving, fixed = (torch.nn.functional.pad(phantom((20, 20, 20), k), (14, 14) * 3) for k in (1, 2))
    with torch.no_grad():
        frame, *met = network._met(moving, fixed)
        found = network.within(*met, frame).pair.fixed_to_moving
        alone = network.inner(*met).pair.fixed_to_moving
        whole = network(moving, fixed).pair.fixed_to_moving
    assert found.shape[1:] == (3, 32, 32, 32) and torch.equal(found, alone)
    assert whole.shape == (1, 3, 48, 48, 48) and torch.isfinite(whole).all()


def test_weights_with_pose_and_matching_serve_the_method_alone(tmp_path):
    torch.manual_seed(SEED)
    whole = networks.create("hsyn", "recurrent", prealign=True)
    weights.save(tmp_path / "w.safetensors", whole)
    found = weights.load(tmp_path / "w.safetensors")
    alone = networks.restore("hsyn", found.size, {**found.options, "prealign": False})
    weights.fill(alone, found)
    assert (alone.sn[0].down[0].weight - whole.inner.sn[0].down[0].weight).abs().max() < 1e-3


def test_shipped_weights_are_restored_by_their_own_switches():
    """Whatever a size means today, weights bring the network they were made for."""
    for name in NAMES:
        for path in weights.shipped(name).values():
            found = weights.load(path, name)
            network = networks.restore(name, found.size, found.options)
            weights.fill(network, found)


def test_pose_and_matching_are_told_among_the_deviations():
    network = networks.create("hsyn", "recurrent", prealign=True)
    assert any("prealign=false" in line for line in network.card.deviations)
    assert any("prealign=false" in line for line in networks.card("hsyn").deviations)


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("sm-gicnet", {"passes": -1}, "passes is -1"),
        ("hsyn", {"passes": 0}, "needs passes"),
        ("hsyn", {"antisymmetric": False}, "opposite half fields"),
        ("sm-gicnet", {"fine": "full"}, "Haar bands"),
        ("caml", {"carsc": 2}, "carsc"),
    ],
)
def test_switches_that_cannot_be_are_refused(name, options, told):
    with pytest.raises(InputError, match=told):
        recurrent(name, **options)


def test_gradients_are_shortened_part_by_part():
    """HSyN's two networks each on their own, also behind pose and matching."""
    network = networks.create("hsyn", "recurrent", prealign=True)
    groups = network.clip_groups()
    assert len(groups) == 4
    ids = [{id(p) for p in group} for group in groups]
    assert sum(map(len, ids)) == len(set().union(*ids)) == len(list(network.parameters()))
    assert {id(p) for p in network.inner.di.parameters()} in ids


def test_what_labels_cannot_see_is_held_in_every_step():
    """L_smc is in supervised steps, too, in mm^2: the same fields on voxels twice as long weigh four times as much."""
    moving, fixed = phantom((32, 32, 32), 1), phantom((32, 32, 32), 2)
    values = []
    for voxel in (1.0, 2.0):
        torch.manual_seed(SEED)
        network = networks.create("hsyn", "small", prealign=True, voxel=voxel)
        with torch.no_grad():
            for unet in network.inner.sn:
                unet.heads[0].weight.normal_(0.0, 0.01)
        _, terms = network.supervised_mappings(moving, fixed)
        objective = network.inner.objective(moving, fixed)["magnitude"]
        values.append((float(terms["magnitude"]), float(objective)))
    assert values[0][0] > 0 and values[1][0] == pytest.approx(4 * values[0][0], rel=1e-4)
    assert values[1][1] == pytest.approx(4 * values[0][1], rel=1e-4)


def test_half_precision_is_chosen_by_measurement(monkeypatch):
    def pays(half: float, full: float = 1.0) -> tuple:
        devices.fastest_convolutions.cache_clear()
        monkeypatch.setattr(
            devices,
            "_convolution_seconds",
            lambda dtype, layout: (
                (half if dtype is torch.bfloat16 else full) * (1 + (layout is torch.contiguous_format))
            ),
        )
        return devices.fastest_convolutions(1)

    assert pays(0.5) == (torch.bfloat16, torch.channels_last_3d)
    assert pays(0.9) == (torch.float32, torch.channels_last_3d)
    assert pays(float("inf")) == (torch.float32, torch.channels_last_3d)
    devices.fastest_convolutions.cache_clear()
    source = Path(devices.__file__).read_text(encoding="utf-8")
    assert "avx" not in source and "amx" not in source


@pytest.mark.parametrize("name", ["hsyn", "sm-gicnet"])
def test_the_loss_itself_finds_the_map(name):
    """The ceiling of what training can reach: minimised on the fields of one pair, the loss halves the error."""
    moving, fixed, true = known_pair()
    network = recurrent(name)
    with torch.no_grad():
        state = network.adapted(moving, fixed, no_motion(moving, network.stationary), 60)
        found = state.full()[0]
    before, after = (end_point_error(u, true, fixed) for u in (0 * true, found))
    print(f"{name}: end-point error {before:.2f} -> {after:.2f} voxels")
    assert after < 0.5 * before
    assert (jacobian_determinant(found) <= 0).sum() == 0


@pytest.mark.parametrize(
    "name, inverted",
    [("hsyn", False), ("hsyn", True), ("sm-gicnet", False), ("sm-gicnet", True), ("ad-regnet", False), ("caml", False)],
)
def test_adaptation_exchanges_with_the_scans(name, inverted):
    shape = shape_of(name)
    moving, fixed = phantom(shape, 1), phantom(shape, 2)
    moving = 1 - moving if inverted else moving
    network = recurrent(name)
    with torch.no_grad(), adapting(network, 2):
        there, back = network(moving, fixed).pair, network(fixed, moving).pair
    assert torch.equal(there.fixed_to_moving, back.moving_to_fixed)
    assert torch.equal(there.moving_to_fixed, back.fixed_to_moving)


def test_adaptation_ends_with_the_call_and_needs_passes(images):
    network = recurrent("hsyn")
    with torch.no_grad():
        plain = network(*images)
        with adapting(network, 3) as can:
            assert can and network.adapt == 3
            fitted = network(*images)
        assert network.adapt == 0 and torch.equal(network(*images).pair.fixed_to_moving, plain.pair.fixed_to_moving)
    assert (fitted.pair.fixed_to_moving - plain.pair.fixed_to_moving).abs().max() > 0.01
    # Without a word a run adapts in two steps, and as little as nothing where that is asked for.
    runs = {}
    for asked in (None, 2, 0):
        options = Options(method="hsyn", device="cpu", adapt=asked)
        runs[asked] = inference.run_network(*images, "hsyn", options, network).fixed_to_moving
    assert torch.equal(runs[None], runs[2]) and (runs[0] - runs[2]).abs().max() > 0.01
    inference.run_network(*images, "hsyn", Options(method="hsyn", device="cpu"), networks.create("hsyn", "small"))
    options = Options(method="hsyn", device="cpu", adapt=3)
    with pytest.raises(InputError, match="cannot adapt"):
        inference.run_network(*images, "hsyn", options, networks.create("hsyn", "small"))
    with pytest.raises(InputError, match="adapt is"):
        Options(adapt=-1)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_changes_little_where_fields_are_eased_too(name, monkeypatch):
    """All of what comes behind the network stays in full precision; every voxel is eased here."""
    monkeypatch.setattr(_passes, "_LEAST_DETERMINANT", 2.0)
    torch.manual_seed(SEED)
    network = networks.create(name, "recurrent", prealign=True).eval()
    shape = (40, 40, 40) if name == "caml" else (32, 32, 32)  # the smallest that they take
    moving, fixed = phantom(shape, 1), phantom(shape, 2)
    with torch.no_grad():
        whole = network(moving, fixed).pair.fixed_to_moving
        with torch.autocast("cpu", torch.bfloat16):
            half = network(moving, fixed).pair.fixed_to_moving
    apart = (whole - half).abs().mean()
    print(f"{name}: {apart:.4f} voxels apart, {whole.abs().mean():.2f} long")
    assert half.dtype is torch.float32 and apart < 0.05


def test_filters_stay_in_full_precision_under_autocast():
    """On a volume long enough for the banded product, and on a short one."""
    for shape in ((96, 32, 32), (16, 16, 16)):
        image = torch.rand(1, 2, *shape)
        with torch.autocast("cpu", torch.bfloat16):
            half = gaussian(image, 1.5)
        assert half.dtype is torch.float32 and torch.equal(half, gaussian(image, 1.5))
