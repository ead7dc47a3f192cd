"""Uncertainty: directions count, perturbations are undone exactly, means stay diffeomorphisms,
predictors follow theory."""

import numpy as np
import pairs
import pytest
import torch

from SymRegistrationLib import fields, networks, pipeline
from SymRegistrationLib.fields import inversion
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import InputError, Options, silent
from SymRegistrationLib.registration import weights
from SymRegistrationLib.registration.inference import dropout_at_work
from SymRegistrationLib.registration.solver import predict_perturbed
from SymRegistrationLib.registration.working_grid import WorkingPair
from SymRegistrationLib.uncertainty import estimate, predictors
from SymRegistrationLib.uncertainty.map import uncertainty_map

SHAPE = (36, 40, 32)


def test_two_opposite_fields_of_equal_length_do_spread():
    u = torch.zeros(3, 2, 2, 2)
    u[1] = 3.0
    spread = predictors.VectorSpread()
    spread.add(u), spread.add(-u)
    assert torch.allclose(spread.length(), torch.full((2, 2, 2), 18**0.5))  # variance 18 of the values +3 and -3
    assert torch.allclose(spread.largest_axis(), torch.full((2, 2, 2), 18**0.5))
    assert torch.allclose(spread.length(2 * np.eye(3)), torch.full((2, 2, 2), 2 * 18**0.5))


def test_running_covariance_is_numpys():
    generator = torch.Generator().manual_seed(1)
    fields_ = torch.randn((7, 3, 2, 3, 4), generator=generator, dtype=torch.float64)
    spread = predictors.VectorSpread()
    for u in fields_:
        spread.add(u)
    expected = np.cov(fields_[:, :, 1, 2, 3].numpy().T)
    np.testing.assert_allclose(spread.covariance()[:, :, 1, 2, 3].numpy(), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        predictors.VectorSpread().covariance()


@pytest.mark.parametrize("index", range(4))
def test_a_perturbed_frame_is_undone(index):
    """A known pair, seen in the perturbed frame and brought back, is itself."""
    moving, fixed, u = pairs.known_pair(SHAPE, size=2.0)
    change = predictors.perturbations(4, seed=3)[index]
    inverse = inversion.invert(u).field
    pair = fields.FieldPair(u, inverse, "fixed_point", 0.0)
    # forth: swap, flip and shift a field by hand with the inverse operations
    flips = [axis + 2 for axis in range(3) if change.flips[axis]]
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in change.flips]).view(1, 3, 1, 1, 1)
    shift = torch.tensor(change.shift).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE).contiguous()
    seen = [signs * fields.warp(x, shift).flip(flips) for x in (u, inverse)]
    there = fields.FieldPair(*(seen[::-1] if change.swap else seen), "fixed_point", 0.0)
    back = change.undone(there)
    inner = (..., *(slice(2, n - 2) for n in SHAPE))
    assert float((back.fixed_to_moving - pair.fixed_to_moving)[inner].abs().max()) < 0.06, "two linear interpolations"
    space = WorkingPair(fixed, moving, None, Grid.centred(SHAPE, 1.0, (0, 0, 0)), np.eye(4), np.eye(4))
    changed = change.geometry(space)
    assert float(fields.warp(changed.moving, there.fixed_to_moving).sub(changed.fixed).abs().mean()) < 0.03


def test_runs_that_agree_on_another_place_are_no_agreement_with_the_result():
    u = torch.zeros(3, 4, 4, 4)
    runs = predictors.Runs(u)
    for _ in range(3):
        moved = u.clone()
        moved[0] = 2.0
        runs.add(moved, "stiff")
    assert torch.allclose(runs.predictors()["stiff"], torch.full((4, 4, 4), 2.0))
    # one vector of 0 and three of 2: mean 1.5, unbiased variance (2.25 + 3 * 0.25) / 3 = 1
    assert torch.allclose(runs.spread.length(), torch.ones(4, 4, 4)) and runs.spread.count == 4


def test_perturbations_take_turns_and_cover_stiffness_evenly():
    found = predictors.perturbations(16, seed=5)
    assert found == predictors.perturbations(16, seed=5) != predictors.perturbations(16, seed=6)
    stiff = [p.stiffness for p in found[::2]]
    low, high = predictors.STIFFEST
    assert all(low <= s <= high for s in stiff) and max(stiff) > 2.2 and min(stiff) < 1.35
    assert all(p.stiffness == 1 and p.noise > 0 for p in found[1::2]) and sum(p.swap for p in found) == 4


def test_the_mean_of_opposite_bends_is_no_bend_and_never_folds():
    generator = torch.Generator().manual_seed(11)
    shape = (24, 28, 20)
    v = fields.gaussian(torch.randn((1, 3, *shape), generator=generator), 4.0)
    for axis, n in enumerate(shape):
        v = v * torch.sin(torch.linspace(0, np.pi, n)).view([-1 if k == axis + 2 else 1 for k in range(5)])
    v = v * (3.0 / v.abs().max())
    ends = [fields.exponentiate(s * v) for s in (1, -1)]
    assert float((fields.logarithm(ends[0]) - v).abs().mean()) < 0.02, "seed 11"
    mean = predictors.LogMean()
    mean.add(fields.FieldPair(ends[0], ends[1], "svf", 0.0))
    mean.add(fields.FieldPair(ends[1], ends[0], "svf", 0.0))
    pair = mean.pair()
    assert float(pair.fixed_to_moving.abs().max()) < 0.2, "a map and its inverse average to the identity"
    plain = (ends[0] + ends[1]) / 2
    assert float(plain.abs().max()) > 0.6, "the plain mean of the two does not"
    assert float(fields.jacobian_determinant(pair.fixed_to_moving).min()) > 0 and pair.residual < 0.05
    with pytest.raises(ValueError, match="at least one"):
        predictors.LogMean().pair()


def test_contrast_follows_the_bound_of_a_shift_estimate():
    """A plain slope g with noise of variance s^2 shows the place along the slope to s / g, and nothing across it."""
    generator = torch.Generator().manual_seed(3)
    shape, slope, noise = (24, 24, 24), 0.04, 0.02
    ramp = slope * fields.identity(shape)[:, :1]
    a, b = (ramp + noise * torch.randn(ramp.shape, generator=generator) for _ in range(2))
    inner = (slice(6, -6),) * 3
    sloped = predictors.contrast_predictor(a, b)[inner]
    flat = predictors.contrast_predictor(0 * a + 0.5, 0 * b + 0.5)[inner]
    assert torch.allclose(flat, torch.full_like(flat, 3**0.5), atol=0.02), "nothing to see in three directions"
    assert 2**0.5 * 0.75 < float(sloped.mean()) < 3**0.5 * 0.97, "seed 3"
    sharp = predictors.contrast_predictor(a, a)[inner]
    assert float(sharp.mean()) < float(sloped.mean()), "less noise, less doubt"
    inverted = predictors.contrast_predictor(a, 1 - 0.5 * b)[inner]
    assert float((inverted - sloped).abs().mean()) < 0.12, "gain and sign of the contrast do not count"


def test_a_plain_turn_is_no_bend():
    here = fields.identity((20, 24, 22))
    turn = torch.einsum(
        "ij,njdhw->nidhw", torch.tensor([[0.0, -0.3, 0.0], [0.3, 0.0, 0.1], [0.0, -0.1, 0.0]]), here - 10
    )
    contrast = 0.2 + torch.rand((20, 24, 22), generator=torch.Generator().manual_seed(0))
    assert float(predictors.bending_predictor(turn, contrast).max()) < 1e-2
    bumped = turn.clone()
    bumped[0, 0, 10, 12, 11] += 3.0
    assert float(predictors.bending_predictor(bumped, contrast)[10, 12, 11]) > 2.0


def test_the_relaxed_field_slips_where_nothing_holds_it():
    """The same waves of a field, once over structure that shows them and once over a flat region."""
    generator = torch.Generator().manual_seed(5)
    shape, inner = (28, 28, 40), (slice(5, -5), slice(5, -5))
    texture = fields.gaussian(torch.randn((1, 1, *shape), generator=generator), 1.5)
    moving = 0.5 + 0.15 * texture / texture.std()
    moving[..., 20:] = 0.5
    u = fields.gaussian(torch.randn((1, 3, *shape), generator=generator), 3.0)
    u = 0.4 * u / u.std()
    fixed = fields.warp(moving, u)
    slipped = predictors.relaxation_predictor(fixed, moving, u)
    held, flat = (float(slipped[(*inner, at)].mean()) for at in (slice(5, 15), slice(25, 35)))
    assert held < 0.7 * flat, f"seed 5: {held} against {flat} voxels"
    blind = predictors.relaxation_predictor(fixed, moving, u, torch.zeros(1, 1, *shape))
    assert float(blind[(*inner, slice(5, 15))].mean()) > 1.4 * held, "what a mask hides holds nothing"
    still = predictors.relaxation_predictor(moving, moving, 0 * u)
    assert float(still.mean()) < 0.03, "two equal scans in place stay there"


def test_dropout_drops_in_evaluation_mode_and_only_then():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Dropout3d(0.5)).eval()
    x = torch.ones(1, 64, 2, 2, 2)
    with dropout_at_work(layer, seed=1) as has:
        assert has
        dropped = layer(x)
        assert set(dropped.unique().tolist()) == {0.0, 2.0}, "whole channels, the others scaled up"
        assert all(len(channel.unique()) == 1 for channel in dropped[0])
    assert torch.equal(layer(x), x)
    with dropout_at_work(torch.nn.Conv3d(1, 1, 1), seed=1) as has:
        assert not has


@pytest.mark.parametrize("kind", [2, "fast"])
def test_the_pipeline_gives_the_map_and_says_what_it_is_worth(head, kind):
    small = Volume(head.array, head.grid, "head")
    done = pipeline.register(
        small, small, Options(preset="fast", similarity="mse", uncertainty=kind, spacing=8.0, initial="none", maps=True)
    )
    told = done.metrics["uncertainty"]
    assert done.uncertainty.shape == head.array.shape and np.isfinite(done.uncertainty).all()
    assert told["runs"] == (2 if kind == 2 else 0) and not told["calibrated"], "nothing was calibrated for mse"
    assert any("relative" in note for note in done.metrics["notes"])
    assert {"appearance_4", "log_jacobian_1"} <= set(done.maps) and ("uncertainty_axis" in done.maps) == (kind == 2)
    assert done.metrics["folding"] == {"count": 0, "regions": []} and done.metrics["seconds"]["uncertainty"] > 0
    if kind == 2:
        assert (done.maps["uncertainty_axis"] <= done.maps["uncertainty_spread"] + 1e-3).all(), (
            "one axis is less than all three"
        )


def test_a_mean_of_runs_is_delivered_and_both_directions_agree(head):
    options = Options(preset="fast", uncertainty=2, average=True, spacing=8.0, initial="none")
    done = pipeline.register(head, Volume(np.roll(head.array, 3, axis=1), head.grid, "moved"), options)
    assert done.metrics["quality"]["folded_voxels"] == 0 and done.metrics["quality"]["ice_p95_mm"] < 0.5
    assert not done.metrics["uncertainty"]["calibrated"], "a mean errs differently from the result that was calibrated"


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"uncertainty": 1}, "at least 2"),
        ({"uncertainty": -3}, "at least 2"),
        ({"uncertainty": "slow"}, "fast"),
        ({"average": True}, "nothing to average"),
        ({"ensemble": "syn"}, "the method itself"),
    ],
)
def test_what_cannot_be_asked_is_said(wrong, words):
    with pytest.raises(InputError, match=words):
        Options(**wrong)


def test_methods_that_disagree_wildly_are_told(head):
    grid = Grid.centred((12, 12, 12), 2.0, (0, 0, 0))
    space = WorkingPair(torch.rand(1, 1, 12, 12, 12), torch.rand(1, 1, 12, 12, 12), None, grid, np.eye(4), np.eye(4))
    u = torch.zeros(3, 12, 12, 12)
    runs = predictors.Runs(u)
    runs.add(u + 4.0, "methods")
    values = {"contrast": torch.ones(12, 12, 12), "bend": torch.ones(12, 12, 12), **runs.predictors()}
    found = uncertainty_map(values, runs, space, grid, np.ones((12, 12, 12), bool), None)
    assert (
        "methods of the ensemble disagree wildly" in found.summary["disagreement"]
        and found.summary["disagreement"] in found.notes
    )
    nothing = uncertainty_map(values, None, space, grid, np.zeros((12, 12, 12), bool), None)
    assert np.isfinite(nothing.summary["mean_mm"]), "a scan without content still has a map"


class _Still:
    """A solver without a method: jitter finds the delivered result again, stiffer runs stand still."""

    learned, similarity, smooth, pose, scans = False, "mse", False, None, ()

    def __init__(self, options):
        grid = Grid.centred((16, 18, 20), 2.0, (0, 0, 0))
        image = torch.rand((1, 1, 16, 18, 20), generator=torch.Generator().manual_seed(4))
        self.options, self.notes = options, []
        self.space = WorkingPair(image, image, None, grid, np.eye(4), np.eye(4))
        u = torch.zeros(1, 3, 16, 18, 20)
        u[:, 0, 8, 9, 10] = 2.0
        self.pair = fields.FieldPair(u, -u, "fixed_point", 0.0)

    def run(self, perturbation=None):
        still = fields.FieldPair(0 * self.pair.fixed_to_moving, 0 * self.pair.moving_to_fixed, "fixed_point", 0.0)
        return still if perturbation.stiffness > 1 else self.pair


def test_further_methods_join_in_and_the_runs_are_counted(monkeypatch):
    solver = _Still(Options(uncertainty=4, ensemble="hsyn, caml", similarity="mse", spacing=2.0))
    assert solver.options.others == ("hsyn", "caml") and solver.options.extra_runs == 6
    asked = []
    monkeypatch.setattr(estimate, "_other_method", lambda s, name: asked.append(name) or solver.pair)
    told = []
    grid = solver.space.grid
    doubt = estimate.estimate_uncertainty(
        solver, solver.pair, Volume(solver.space.fixed[0, 0].numpy(), grid, "f"), lambda *event: told.append(event)
    )
    assert asked == ["hsyn", "caml"] and len(told) == 6 and doubt.map.summary["runs"] == 6
    # of 7 fields two stand still: at the one voxel of 2 voxels of 2 mm the variance is 4^2 (2 * 5 / 7) / 6
    assert doubt.map.mm[8, 9, 10] == pytest.approx((16 * 10 / 7 / 6) ** 0.5, rel=1e-4)
    assert doubt.map.mm[2, 2, 2] == pytest.approx(0, abs=1e-6) and doubt.pair is solver.pair


def test_a_method_of_the_ensemble_that_is_not_there_is_refused_before_any_work(head):
    with pytest.raises(InputError, match="nonsense"):
        pipeline.register(head, head, Options(ensemble="nonsense"))


def test_a_network_under_perturbation_comes_back_on_its_grid(tmp_path):
    file = weights.save(tmp_path / "w.safetensors", networks.create("hsyn", "small"))
    options = Options(method="hsyn", device="cpu", weights=str(file))
    image = pairs.phantom((36, 40, 32))
    space = WorkingPair(image, image, None, Grid.centred((36, 40, 32), 2.0, (0, 0, 0)), np.eye(4), np.eye(4))
    for change in predictors.perturbations(2, seed=1):
        pair = change.undone(predict_perturbed(change.geometry(change.intensities(space)), options, change, silent))
        assert pair.fixed_to_moving.shape == (1, 3, 36, 40, 32) and torch.isfinite(pair.fixed_to_moving).all()
        assert float(pair.fixed_to_moving.abs().max()) < 0.5, "an untrained network finds next to nothing"
