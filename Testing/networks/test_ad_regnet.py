"""AD-RegNet: sizes, attention that finds a known shift, regional weights, fusion, losses and the paper's ablations."""

from __future__ import annotations

import pytest
import torch
from pairs import SEED, known_pair, overfitted, phantom, run
from torch import nn

from SymRegistrationLib import fields, losses, networks
from SymRegistrationLib.job import InputError
from SymRegistrationLib.networks import _ad_regnet_attention, ad_regnet
from SymRegistrationLib.networks._base import parameter_count


def awake(size: str = "small", heads: float = 0.05, **options):
    """A network with lively displacement heads."""
    torch.manual_seed(SEED)
    network = networks.create("ad-regnet", size, **options).eval()
    with torch.no_grad():
        for stage in network.stages:
            if stage.head is not None:
                stage.head.weight.normal_(0.0, heads)
    return network


@pytest.fixture(scope="module")
def images():
    return phantom((32, 48, 32), 1), phantom((32, 48, 32), 2)


# ---------------------------------------------------------------------------------------------- sizes


def test_published_parameter_counts():
    """Counted from the layers' shapes: U-Net 23.27 M = encoder 14.83 + decoder 8.44; six C x C projections on five
    levels: 2.10 M."""
    network = networks.create("ad-regnet", "published", attn_levels=("window",) * 3 + ("full",) * 2)
    unet = network.backbone
    assert parameter_count(unet) / 1e6 == pytest.approx(23.27, abs=0.01)
    assert (parameter_count(unet.encode) + parameter_count(unet.down)) / 1e6 == pytest.approx(14.83, abs=0.01)
    assert (parameter_count(unet.decode) + parameter_count(unet.grow)) / 1e6 == pytest.approx(8.44, abs=0.01)
    linear = [m for stage in network.stages for m in stage.attention.modules() if isinstance(m, nn.Linear)]
    assert sum(parameter_count(m) for m in linear) == 6 * sum(c * c for c in (32, 64, 128, 256, 512)) == 2_095_104


# ---------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_reports_the_offset_to_the_match(kind, axis):
    """M(x + 2 e) = F(x): seen from the fixed grid the match lies two cells ahead, along that very axis."""
    torch.manual_seed(SEED)
    attention = ad_regnet.CrossAttention(64, kind)
    shape = (12, 8, 10)
    fixed = torch.randn(1, 64, *shape)
    moving = torch.roll(fixed, 2, dims=axis + 2)
    with torch.no_grad():
        for linear in (*attention.query, *attention.key):
            linear.weight.mul_(3)
        attention.mix.fill_(-30.0)
        offset = attention(moving, fixed)[1].unflatten(1, (-1, 3)).mean(1)
    wanted = torch.zeros(3)
    wanted[axis] = 2.0
    inside = offset[0, :, 3:-3, 3:-3, 3:-3].flatten(1)
    assert torch.allclose(inside.median(1).values, wanted, atol=0.05)
    with torch.no_grad():  # from the moving grid: the same sign, as the displacement's negative is turned
        attention.mix.fill_(30.0)
        offset = attention(moving, fixed)[1].unflatten(1, (-1, 3)).mean(1)
    assert torch.allclose(offset[0, :, 3:-3, 3:-3, 3:-3].flatten(1).median(1).values, wanted, atol=0.05)


def test_full_attention_equals_the_printed_formula():
    torch.manual_seed(SEED)
    attention = ad_regnet.CrossAttention(64, "full")
    moving, fixed = torch.randn(2, 64, 4, 3, 5), torch.randn(2, 64, 4, 3, 5)
    place = _ad_regnet_attention.positions((4, 3, 5), 64, torch.device("cpu"))
    with torch.no_grad():
        found, _ = attention(moving, fixed)
        m, f = (attention.norm(x.permute(0, 2, 3, 4, 1)) for x in (moving, fixed))

        def attend(role, a, b):
            """Queries of ``a`` in its role, keys and values of the other."""
            q = attention.query[role](a + place).flatten(1, 3).unflatten(-1, (2, 32)).transpose(1, 2)
            k = attention.key[1 - role](b + place).flatten(1, 3).unflatten(-1, (2, 32)).transpose(1, 2)
            v = attention.value[1 - role](b).flatten(1, 3).unflatten(-1, (2, 32)).transpose(1, 2)
            return ((q @ k.transpose(-1, -2) / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(-2)

        wanted = 0.5 * attend(0, m, f) + 0.5 * attend(1, f, m)
    assert torch.allclose(found.permute(0, 2, 3, 4, 1).flatten(1, 3), wanted, atol=1e-5)


def test_only_full_attention_sees_the_far_end():
    """A change of the moving features 13 cells away reaches full attention, not a window of 4 with its neighbours."""
    torch.manual_seed(SEED)
    moving, fixed = torch.randn(1, 32, 4, 4, 20), torch.randn(1, 32, 4, 4, 20)
    other = moving.clone()
    other[..., 16:] = torch.randn(1, 32, 4, 4, 4)
    for kind, reach in (("full", True), ("window", False)):
        attention = ad_regnet.CrossAttention(32, kind)
        with torch.no_grad():
            change = (attention(moving, fixed)[0] - attention(other, fixed)[0])[..., :4].abs().max()
        assert (change > 1e-4) == reach


def test_uniform_regional_weights_change_nothing():
    """And the weights have mean 1 over regions whatever they are."""
    torch.manual_seed(SEED)
    block = ad_regnet.RegionalAttention(32, 4)
    x = torch.randn(2, 32, 8, 12, 16)
    with torch.no_grad():
        block.score.weight.normal_(0.0, 3.0)
        lively = block(x)
        block.score.weight.zero_()
        flat = block(x)
    assert torch.allclose(x * flat, x, atol=1e-6)
    assert lively.std() > 0.1 and lively.min() >= 0
    block = ad_regnet.RegionalAttention(32, 1)
    with torch.no_grad():
        assert block(x).mean((2, 3, 4)).allclose(torch.ones(2, 1), atol=1e-4)


def test_region_edges_follow_the_level():
    """Regions are counted in input voxels: 16 -> 16, 8, 4, 2, 1 cells; 24 -> 24, 12, 6, 3 and none at 1/16."""
    for region, wanted in ((16, [16, 8, 4, 2, 1]), (24, [24, 12, 6, 3, None])):
        network = networks.create("ad-regnet", "published", region=region, channels=(8, 8, 8, 8, 8))
        assert [None if s.regions is None else s.regions.cells for s in network.stages] == wanted


# ---------------------------------------------------------------------------------------------- fusion


def test_fusion_at_its_ends():
    """W = 0 leaves the upsampled coarse field, W = 1 the level's own (blend) or their composition."""
    network = awake()
    stage = network.stages[1]
    coarse, own = known_pair((16, 16, 16), 2.0, 3.0)[2], known_pair((16, 16, 16), 1.0, 3.0, seed=4)[2]
    found = {"mixed": torch.randn(1, 32, 16, 16, 16), "regions": None}
    ends = {}
    with torch.no_grad():
        for bias in (-1e4, 1e4):
            stage.gate.bias.fill_(bias)
            ends[bias], gate = stage.fuse(own, coarse, found)
            assert gate.min() == gate.max() == (bias > 0)
    assert torch.allclose(ends[-1e4], coarse, atol=1e-5)
    assert torch.allclose(ends[1e4], fields.compose(coarse, own), atol=1e-5)
    one, zero = torch.ones(1, 1, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16)
    assert torch.equal(ad_regnet.fuse(own, coarse, one, "blend"), own)
    assert torch.equal(ad_regnet.fuse(own, coarse, zero, "blend"), coarse)


def test_coarsest_level_alone_is_the_upsampled_field(images):
    """With closed gates the result is the deepest field, 8 times the cells of a lattice of 1/16."""
    network = awake(inverse="swapped")
    with torch.no_grad():
        for stage in network.stages[:-1]:
            stage.gate.bias.fill_(-1e4)
    output = run(network, *images)
    deepest = output.aux["levels"][3]
    wanted = deepest
    for _ in range(4):
        wanted = 2 * nn.functional.interpolate(wanted, scale_factor=2.0, mode="trilinear", align_corners=False)
    assert deepest.abs().max() > 0.05
    assert torch.allclose(output.pair.fixed_to_moving, wanted, atol=1e-4)


# ---------------------------------------------------------------------------------------------- switches


def test_without_cross_attention_the_moving_image_reaches_no_attended_feature(images):
    with_it, without = awake(), awake(bcam=False)
    assert [s.attention is not None for s in with_it.stages] == [False, True, True, True]
    assert all(s.attention is None for s in without.stages)
    x, y, z = torch.randn(3, 1, 64, 8, 8, 8)
    with torch.no_grad():
        for network, influence in ((with_it, True), (without, False)):
            change = network.stages[2].features(x, z)["mixed"] - network.stages[2].features(y, z)["mixed"]
            assert (change.abs().max() > 1e-3) == influence
    assert run(without, *images).aux["attention"] == {} and set(run(with_it, *images).aux["attention"]) == {1, 2, 3}


def test_no_attention_levels_is_no_cross_attention(images):
    one, two = awake(bcam=False), awake(attn_levels=("none",) * 4)
    two.load_state_dict(one.state_dict())
    assert torch.equal(run(one, *images).pair.fixed_to_moving, run(two, *images).pair.fixed_to_moving)


def test_switches_build_what_they_say(images):
    full = awake()
    assert all(s.regions is None for s in awake(raa=False).stages) and all(s.regions is not None for s in full.stages)
    single = awake(multires=False)
    assert [s.head is not None for s in single.stages] == [True, False, False, False]
    output = run(single, *images)
    assert output.aux["levels"] == {} == output.aux["gate"] and output.pair.fixed_to_moving.abs().max() > 0.05
    assert set(run(full, *images).aux["levels"]) == {0, 1, 2, 3} and set(run(full, *images).aux["gate"]) == {0, 1, 2}
    strict = awake(head_in="A")
    assert strict.stages[3].hidden[0].in_channels == 128 and full.stages[3].hidden[0].in_channels == 3 * 128
    modulated = awake(modulate=True)
    with torch.no_grad():
        for network in (full, modulated):
            for stage in network.stages:
                stage.regions.score.weight.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(SEED))
    gates = [run(network, *images).aux["gate"][1] for network in (full, modulated)]
    assert not torch.allclose(*gates, atol=0.01) and gates[1].min() >= 0 and gates[1].max() <= 1


@pytest.mark.parametrize(
    "options, word",
    [
        ({"fusion": "sum"}, "fusion"),
        ({"head_in": "B"}, "head_in"),
        ({"inverse": "svf"}, "inverse"),
        ({"attn_levels": ("full",)}, "attn_levels"),
        ({"attn_levels": ("some",) * 4}, "attn_levels"),
    ],
)
def test_unknown_switch_values_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        networks.create("ad-regnet", "small", **options)


# ---------------------------------------------------------------------------------------------- inverse and losses


def test_inverse_modes(images):
    """Two independent runs contradict each other; balancing makes them inverse to 0.1 voxel, exactly symmetric."""
    outputs = {
        mode: run(awake(heads=0.02, inverse=mode), *images).pair for mode in ("swapped", "balanced", "fixed_point")
    }
    size = outputs["balanced"].fixed_to_moving.abs().max()
    assert size > 0.5 and outputs["swapped"].residual > 0.5
    assert outputs["balanced"].residual < 0.1
    one = outputs["fixed_point"]  # exact but where the map folds or leaves the grid
    assert fields.inverse_consistency(one.fixed_to_moving, one.moving_to_fixed).median() < 0.01
    assert torch.equal(outputs["fixed_point"].fixed_to_moving, outputs["swapped"].fixed_to_moving)
    other = run(awake(heads=0.02), *reversed(images)).pair
    assert torch.equal(other.moving_to_fixed, outputs["balanced"].fixed_to_moving)


def test_objective_of_a_silent_network_is_that_of_the_images(images):
    """Zero fields: similarity of the untouched pair, no roughness, no folds; landmarks 10 voxels apart cost 0.5."""
    network = awake(heads=0.0, landmark=1.0)
    points = torch.tensor([[[10.0, 20.0, 12.0], [5.0, 9.0, 20.0]]])
    terms = network.objective(*images, points=(points, points + torch.tensor([0.0, 10.0, 0.0])))
    assert terms["ncc"].item() == pytest.approx(losses.ncc(*images).item(), abs=1e-5)
    assert terms["ssim"].item() == pytest.approx(losses.ssim(*images).item(), abs=1e-5)
    assert terms["smooth"].item() == terms["folding"].item() == terms["consistency"].item() == 0
    assert terms["landmark"].item() == pytest.approx(0.5, abs=1e-3)
    assert "landmark" not in awake().objective(*images, points=(points, points))


def test_landmark_term_pulls_back():
    """p_F + u(p_F) = p_M costs nothing, with a field that differs along every axis of an anisotropic grid."""
    u = torch.zeros(1, 3, 8, 12, 16)
    u[:, 0], u[:, 1], u[:, 2] = 1.0, -2.0, 3.0
    fixed = torch.tensor([[[2.5, 6.0, 4.0]]])
    assert ad_regnet.landmark_loss(u, fixed, fixed + torch.tensor([1.0, -2.0, 3.0])) < 1e-6
    ramp = fields.identity((8, 12, 16)) * torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1, 1)
    assert ad_regnet.landmark_loss(ramp, fixed, fixed * torch.tensor([1.1, 1.2, 1.3])) < 1e-6


def test_overfits_a_known_warp():
    """A known warp is learned: 4 voxels at most, 1.9 in the mean."""
    torch.manual_seed(SEED)
    pair = overfitted(networks.create("ad-regnet", "small"), known_pair(), steps=10, rate=1e-3, gain=0.1)
    assert pair.residual < 0.1
