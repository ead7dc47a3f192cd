"""CAML: windowed cross-attention against its dense form, layers, skips, the cascade, sizes and a known warp."""

from __future__ import annotations

import pytest
import torch
from pairs import SEED, known_pair, overfitted, phantom, run
from torch import nn

from SymRegistrationLib import fields, losses, networks
from SymRegistrationLib.job import InputError
from SymRegistrationLib.networks import _attention, _caml_blocks
from SymRegistrationLib.networks._base import parameter_count

SHAPE = (40, 44, 40)


def awake(heads: float = 0.05, **options):
    """A network with lively displacement heads; the cascade's pieces as small as they get."""
    torch.manual_seed(SEED)
    network = networks.create("caml", "small", **{"depths": (1, 1, 1, 1), **options}).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv3d) and module.out_channels == 3:
                module.weight.normal_(0.0, heads)
    return network


@pytest.fixture(scope="module")
def images():
    return phantom(SHAPE, 1), phantom(SHAPE, 2)


# ---------------------------------------------------------------------------------------------- windows


def dense(q, k, v, heads, window, bias=None):
    """All queries against all keys; a key counts if its block is the query's or one of its 26 neighbours."""
    shape = q.shape[1:4]
    places = torch.cartesian_prod(*[torch.arange(n) for n in shape])
    blocks = places // window
    near = ((blocks[:, None] - blocks[None]).abs() <= 1).all(-1)
    q, k, v = (x.flatten(1, 3).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        offsets = _attention.key_offsets(window)
        base = ((places % window) * torch.tensor([window**2, window, 1])).sum(-1)
        table = {(b, *offsets[b, j].tolist()): j for b in range(len(offsets)) for j in range(offsets.shape[1])}
        for i in range(len(places)):
            for j in range(len(places)):
                if near[i, j]:
                    at = table[(base[i].item(), *(places[j] - places[i]).tolist())]
                    logits[:, :, i, j] += bias[:, base[i], at]
    out = logits.masked_fill(~near, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).flatten(-2).unflatten(1, shape)


@pytest.mark.parametrize(
    "shape, window, biased", [((4, 6, 8), 2, True), ((5, 3, 7), 2, True), ((9, 4, 6), 4, False), ((1, 1, 2), 2, True)]
)
def test_windowed_attention_is_dense_attention_with_a_block_mask(shape, window, biased):
    """Also where the windows do not fit the volume: no weight falls on tokens outside."""
    torch.manual_seed(SEED)
    q, k, v = torch.randn(2, *shape, 8), torch.randn(2, *shape, 8), torch.randn(2, *shape, 14)
    bias = torch.randn(2, window**3, 27 * window**3) if biased else None
    found = _attention.window_attention(q, k, v, 2, window, bias)
    assert torch.allclose(found, dense(q, k, v, 2, window, bias), atol=1e-5), f"seed {SEED}"


def test_slabs_change_neither_result_nor_gradient(monkeypatch):
    torch.manual_seed(SEED)
    q, k, v = (torch.randn(2, 8, 6, 4, 8, requires_grad=True) for _ in range(3))
    results = []
    for size in (_attention._SLAB_BYTES, 1):
        monkeypatch.setattr(_attention, "_SLAB_BYTES", size)
        out = _attention.window_attention(q, k, v, 2, 2)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


def test_keys_outside_the_search_window_change_nothing():
    torch.manual_seed(SEED)
    block = _caml_blocks.CrossBlock(32)
    base, search = torch.randn(1, 8, 8, 8, 32), torch.randn(1, 8, 8, 8, 32)
    other = search.clone()
    other[:, 4:] = other[:, 4:].flip(1)  # the blocks from 4 on: two and more away from the first
    with torch.no_grad():
        a, b = block.attend(base, search), block.attend(base, other)
    assert torch.equal(a[:, :2], b[:, :2])
    assert (a[:, 2:] - b[:, 2:]).abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_position_bias_points_at_single_offsets():
    """With all weight on one offset every token fetches the value that lies exactly there."""
    torch.manual_seed(SEED)
    for offset in ((0, 0, 1), (-2, 1, 0), (2, 2, 2)):
        hit = (_attention.key_offsets(2) == torch.tensor(offset)).all(-1)
        bias = 100.0 * hit.float()[None]
        zero, v = torch.zeros(1, 8, 8, 8, 1), torch.randn(1, 8, 8, 8, 1)
        out = _attention.window_attention(zero, zero, v, 1, 2, bias)
        wanted = torch.roll(v, [-n for n in offset], (1, 2, 3))
        assert torch.allclose(out[:, 2:6, 2:6, 2:6], wanted[:, 2:6, 2:6, 2:6], atol=1e-5)


# ---------------------------------------------------------------------------------------------- directions


def test_balancing_gives_inverse_maps_of_the_right_one():
    """A map and a wrong inverse (its plain negative): both orders of composition come below 0.05 voxel."""
    u = known_pair((32, 32, 32), 4.0, 6.0)[2]
    taper = torch.sigmoid((11 - (fields.identity((32, 32, 32)) - 15.5).square().sum(1, keepdim=True).sqrt()) / 1.5)
    u = u * taper
    before = fields.inverse_consistency(u, -u).max().item()
    a, b = _attention.balanced_pair(u, -u, tolerance=0.05)
    after = max(fields.inverse_consistency(a, b).max().item(), fields.inverse_consistency(b, a).max().item())
    assert before > 0.5 and after < 0.05
    assert (a - u).abs().max() < 0.6 * before  # neither side gave up its map
    c, d = _attention.balanced_pair(-u, u, tolerance=0.05)
    assert torch.equal(c, b) and torch.equal(d, a)


def test_up_blocks_is_the_same_map_on_the_finer_lattice():
    """A ramp given at block centres, 2 i + 0.5, stays that ramp."""
    coarse = fields.identity((6, 8, 10)) * 0.1
    fine = _attention.up_blocks(coarse, 2)
    wanted = (fields.identity((12, 16, 20)) - 0.5) * 0.1
    assert torch.allclose(fine[..., 1:-1, 1:-1, 1:-1], wanted[..., 1:-1, 1:-1, 1:-1], atol=1e-5)


# ---------------------------------------------------------------------------------------------- sizes


def test_published_parameter_counts():
    """Counted from the layers' shapes: XMorpher's 15.09 M hold one joining layer at 1/32 that its code never calls
    (2 * 384^2 + 384); RBSC adds 2 * 27 C^2 at 1/4 to 1/16 = 2.61 M; the cascade's hand-over as much again."""
    plain = {"caml_span": 0, "rbsc": False, "carsc": 1, "bias": False}
    base = parameter_count(networks.create("caml", "published", **plain))
    assert (base + 2 * 384**2 + 384) / 1e6 == pytest.approx(15.09, abs=0.01)
    rbsc = parameter_count(networks.create("caml", "published", **{**plain, "rbsc": True})) - base
    norms = 4 * (48 + 96 + 192)
    assert rbsc == 54 * (48**2 + 96**2 + 192**2) + norms
    carsc = parameter_count(networks.create("caml", "published", **{**plain, "carsc": 2})) - base
    assert carsc == rbsc + (48 + 1) + (96 + 1) + (192 + 1)
    lift = parameter_count(networks.create("caml", "published", **{**plain, "caml_span": 1})) - base
    assert 0 < lift < 0.25e6


def test_separate_weights_double_the_network():
    shared, own = awake(), awake(share=False)
    extra = parameter_count(own) - parameter_count(shared)
    assert extra == parameter_count(awake(carsc=1))


# ---------------------------------------------------------------------------------------------- switches


def test_finer_layers_start_silent_and_then_count(images):
    """caml_span = 0 is the base; span 1 equals it until its gates open."""
    base, wide = awake(caml_span=0), awake(caml_span=1)
    missing = wide.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert missing and all("gates" in key or "lift" in key for key in missing)
    wanted = run(base, *images).pair.fixed_to_moving
    assert torch.allclose(run(wide, *images).pair.fixed_to_moving, wanted, atol=1e-4)
    with torch.no_grad():
        for key, p in wide.named_parameters():
            if key.endswith("gates"):
                p.fill_(1.0)
    assert (run(wide, *images).pair.fixed_to_moving - wanted).abs().max() > 0.01


def test_two_finer_layers_are_pooled_to_size(images):
    wide = awake(caml_span=2)
    assert [len(stage.lift) for stage in wide.passes[0].encode] == [0, 1, 2, 2]
    assert run(wide, *images).pair.fixed_to_moving.abs().max() > 0.05


def test_silent_second_pass_is_a_single_pass(images):
    """With an empty second pass the cascade is its first pass."""
    one, two = awake(carsc=1, inverse="swapped"), awake(carsc=2, share=False, inverse="swapped")
    two.passes[0].load_state_dict(one.passes[0].state_dict())
    with torch.no_grad():
        for module in two.passes[1].modules():
            if isinstance(module, nn.Conv3d) and module.out_channels == 3:
                module.weight.zero_()
    wanted, found = run(one, *images), run(two, *images)
    assert wanted.pair.fixed_to_moving.abs().max() > 0.1
    assert torch.allclose(found.pair.fixed_to_moving, wanted.pair.fixed_to_moving, atol=1e-5)
    assert torch.equal(found.aux["passes"][0], wanted.aux["passes"][0])


def test_second_pass_composes_and_moves_on(images):
    network = awake(inverse="swapped")
    first, total = run(network, *images).aux["passes"]
    assert (total - first).abs().max() > 0.05
    assert len(run(awake(carsc=3), *images).aux["passes"]) == 3


def test_hand_over_carries_no_gradient_and_follows_the_first_field(images):
    network = awake()
    maps = network.passes[0](*images)
    shift = torch.zeros(1, 3, *(n // 2 for n in SHAPE))
    shift[:, 2] = 4.0  # cells of 1/2: 2 tokens of 1/4, 1 of 1/8
    carried = network._carried(maps, shift)
    for level, tokens in enumerate((2, 1)):
        (m, f), (m2, f2) = maps[level], carried[level]
        assert not m2.requires_grad and m.requires_grad and torch.equal(f, f2)
        assert torch.allclose(m2[:, :, :, :-tokens], m[:, :, :, tokens:], atol=1e-4)


def test_residual_skips_and_bias_are_switches():
    full, bare = awake(), awake(rbsc=False, bias=False)
    assert all(isinstance(s, nn.Identity) for s in bare.passes[0].skip)
    assert not any(isinstance(s, nn.Identity) for s in full.passes[0].skip)
    assert bare.passes[0].encode[0].blocks[0].table is None


@pytest.mark.parametrize("tail, heads", [("smooth", 0.008), ("transposed", 0.05)])
def test_velocities_give_inverses_without_folds(images, tail, heads):
    """exp(v_1) o exp(v_2) and exp(-v_2) o exp(-v_1): what is left is the interpolation of a rough random field."""
    pair = run(awake(svf=True, tail=tail, heads=heads), *images).pair
    size = pair.fixed_to_moving.abs().max()
    inside = (slice(None), slice(None), *[slice(6, -6)] * 3)
    assert pair.inverse_method == "svf" and size > 0.2
    assert fields.inverse_consistency(pair.fixed_to_moving, pair.moving_to_fixed)[inside].mean() < 0.03 * size
    assert min(fields.jacobian_determinant(u).min() for u in (pair.fixed_to_moving, pair.moving_to_fixed)) > 0


def test_inverse_modes(images):
    outputs = {mode: run(awake(inverse=mode), *images).pair for mode in ("swapped", "balanced", "fixed_point")}
    assert outputs["swapped"].residual > 1.0 and outputs["balanced"].residual < 0.1
    assert torch.equal(outputs["fixed_point"].fixed_to_moving, outputs["swapped"].fixed_to_moving)
    other = run(awake(), *reversed(images)).pair
    assert torch.equal(other.moving_to_fixed, outputs["balanced"].fixed_to_moving)


def test_batch_of_two_is_two_runs(images):
    """On what the network itself predicts."""
    network, (moving, fixed) = awake(inverse="swapped"), images
    both = run(network, torch.cat([moving, fixed]), torch.cat([fixed, moving])).pair.fixed_to_moving
    one = torch.cat(
        [run(network, moving, fixed).pair.fixed_to_moving, run(network, fixed, moving).pair.fixed_to_moving]
    )
    assert torch.allclose(both, one, atol=1e-4)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"caml_span": 4}, "caml_span"),
        ({"carsc": 0}, "carsc"),
        ({"tail": "x"}, "tail"),
        ({"inverse": "svf"}, "inverse"),
        ({"depths": (2,)}, "depths"),
    ],
)
def test_unknown_switch_values_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        networks.create("caml", "small", **options)


# ---------------------------------------------------------------------------------------------- training


def test_objective_of_a_silent_network_is_that_of_the_images(images):
    """-LNCC 9 of the last pass and half of that of the first, no roughness."""
    terms = awake(heads=0.0).objective(*images)
    assert terms["similarity"].item() == pytest.approx(1.5 * losses.lncc(*images, 9).item(), abs=1e-4)
    assert terms["smooth"].item() == terms["consistency"].item() == 0


def test_overfits_a_known_warp():
    """A known warp is learned: 4 voxels at most, 1.9 in the mean; one block per stage, both passes."""
    torch.manual_seed(SEED)
    pair = overfitted(
        networks.create("caml", "small", depths=(1, 1, 1, 1)),
        known_pair((40, 40, 40), 4.0, 7.0),
        steps=12,
        rate=5e-4,
        gain=0.1,
    )
    assert pair.residual < 0.1
