"""Pose and matching in front of a method: closed forms, symmetry, known shifts, and what training makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from SymRegistrationLib import fields, networks
from SymRegistrationLib.networks import _match, _pose, _prealign
from SymRegistrationLib.networks._attention import up_blocks
from SymRegistrationLib.networks._match import CELL, Match, half_shift
from SymRegistrationLib.networks._pose import KeyPoints, Pose, fitted_pose, found_pose
from SymRegistrationLib.training.loss import end_point, step_terms
from SymRegistrationLib.training.options import Weighting
from SymRegistrationLib.training.samples import Sample
from SymRegistrationLib.training.synthetic import Synthesis, make_pair

SEED = 20261121
TURN = math.radians(40)
AFFINE = torch.tensor([[math.cos(TURN), -math.sin(TURN), 0.0], [math.sin(TURN), math.cos(TURN), 0.05], [0.0, 0.0, 1.1]])
SHIFT = torch.tensor([6.0, -14.0, 3.0])


def points() -> torch.Tensor:
    print("seed", SEED)
    return 80 * torch.rand(1, 60, 3, generator=torch.Generator().manual_seed(SEED))


def as_volume(x: torch.Tensor) -> torch.Tensor:
    """(N, K, 3) -> (N, 3, K, 1, 1)."""
    return x.transpose(1, 2)[..., None, None]


def test_an_affine_map_of_key_points_is_recovered():
    fixed = points()
    moving = fixed @ AFFINE.T + SHIFT
    found = fitted_pose(moving, fixed, torch.ones(1, 60)).forward(as_volume(fixed))
    # The ridge pulls the generator towards zero by 0.002 of the points' spread.
    assert (found - as_volume(moving)).abs().max() < 0.6
    assert (found - as_volume(moving)).abs().mean() < 0.15


def test_points_that_nobody_saw_do_not_count():
    fixed = points()
    moving = fixed @ AFFINE.T + SHIFT
    moving[:, :20] = 0
    weight = torch.ones(1, 60)
    weight[:, :20] = 1e-6
    found = fitted_pose(moving, fixed, weight).forward(as_volume(fixed[:, 20:]))
    assert (found - as_volume(moving[:, 20:])).abs().max() < 0.8


def test_exchanging_the_points_exchanges_the_halves_bit_by_bit():
    fixed = points()
    moving = fixed @ AFFINE.T + SHIFT
    weight = torch.rand(1, 60, generator=torch.Generator().manual_seed(SEED)) + 0.1
    there, back = fitted_pose(moving, fixed, weight), fitted_pose(fixed, moving, weight)
    assert torch.equal(there.offset(as_volume(fixed)), -back.offset(as_volume(fixed)))


def test_a_half_turn_and_a_flat_set_of_points_stay_finite():
    fixed = points() * torch.tensor([1.0, 1.0, 0.0])
    for moving in (fixed * torch.tensor([-1.0, -1.0, 1.0]), 4 * fixed, fixed[:, :1].expand(-1, 60, -1)):
        pose = fitted_pose(moving, fixed, torch.ones(1, 60))
        assert torch.isfinite(pose.forward(as_volume(fixed))).all()
        inside = torch.eye(3) - pose.linear[0]
        assert abs(float(torch.linalg.det(inside))) > 0.05


def descriptors(shape=(12, 14, 10), channels=8) -> torch.Tensor:
    print("seed", SEED)
    noise = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(SEED))
    return torch.nn.functional.normalize(fields.gaussian(noise, 0.8))


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_known_shift_of_descriptors_is_found(axis):
    """moving(x) = fixed(x - 1 cell): the halves go half a cell each, to the right side, along the right axis."""
    fixed = descriptors()
    moving = fixed.roll(1, axis)
    v = half_shift(moving, fixed, 2, torch.tensor(200.0))[..., 3:-3, 3:-3, 3:-3]
    wanted = torch.zeros(3)
    wanted[axis - 2] = 0.5
    assert (v.mean((0, 2, 3, 4)) - wanted).abs().max() < 0.03


def test_matching_is_exactly_antisymmetric_and_differentiable():
    a, b = descriptors(), descriptors().flip(2)
    assert torch.equal(half_shift(a, b, 1, torch.tensor(9.0)), -half_shift(b, a, 1, torch.tensor(9.0)))
    small = [
        descriptors((4, 5, 4), 2).double().requires_grad_(),
        descriptors((4, 5, 4), 2).flip(3).double().requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda m, f: half_shift(m, f, 1, torch.tensor(4.0, dtype=torch.float64)), small)


def test_halves_know_their_inverses():
    torch.manual_seed(SEED)
    halves = _match.Halves(*_composed([fields.gaussian(4 * torch.randn(1, 3, 20, 20, 20), 3.0) for _ in range(2)]))
    for side, there in ((1, halves.to_moving), (-1, halves.to_fixed)):
        assert there.abs().max() > 0.3
        error = fields.compose(there, halves.inverse(side))[..., 3:-3, 3:-3, 3:-3]
        assert fields.square_sum(error).sqrt().max() < 0.02


def _composed(velocities):
    steps = [(fields.exponentiate(v), fields.exponentiate(-v)) for v in velocities]
    m, f = (fields.compose(first, second) for first, second in zip(*steps))
    return m, f, tuple(steps)


def test_an_untrained_matching_already_goes_the_right_way():
    """Descriptors of one contrast look alike in alike places before anything is learned: right is better than wrong."""
    pair = make_pair(
        None, Synthesis((48,) * 3, 2.5, rotation=0, shift=0, scale=0, warp=8, one_contrast=1, cut=0, noise=0.02), SEED
    )
    torch.manual_seed(SEED)
    with torch.no_grad():
        halves = Match()(pair.moving, pair.fixed)
    u, w = (up_blocks(x, CELL) for x in (halves.to_moving, halves.to_fixed))
    assert end_point(u, w, pair) < 0.7 * end_point(-u, -w, pair)


def test_inverting_the_contrast_changes_nothing():
    """Key points and descriptors see self-similarity: brighter, darker or inverted is all the same."""
    pair = make_pair(None, Synthesis((48,) * 3, 2.5), SEED)
    torch.manual_seed(SEED)
    match, points = Match().eval(), KeyPoints(16).eval()
    other = 0.9 - 0.7 * pair.fixed
    with torch.no_grad():
        for a, b in zip(match.descriptors(pair.fixed).values(), match.descriptors(other).values()):
            assert (a - b).abs().max() < 5e-3
        assert (points(pair.fixed)[0] - points(other)[0]).abs().max() < 0.05
        assert (points(pair.fixed)[0] - points(pair.moving)[0]).abs().max() > 1.0


@pytest.mark.parametrize("degrees, found", [(20, True), (75, True), (170, False)])
def test_a_pose_is_looked_for_from_many_sides(monkeypatch, degrees, found):
    """Key points that are right only where less than 40 degrees are left; where they never meet, nothing is turned."""
    true = turned(degrees)

    def seen_from(start, *_):
        left = turn_between(true, start if start is not None else turned(0))
        found, spread = (true, 0.5) if left < 40 else (turned(5), 7.0)
        return found, torch.tensor(spread)

    monkeypatch.setattr(_pose, "_seen_from", seen_from)
    pose = found_pose(KeyPoints(4), torch.zeros(1, 1, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16))
    assert turn_between(pose, true if found else turned(0)) < 0.1


def turned(degrees: float) -> Pose:
    """A turn about the second axis of the volume."""
    linear = math.tan(math.radians(degrees) / 2) * torch.tensor([[[0.0, 0, 1], [0, 0, 0], [-1, 0, 0]]])
    return Pose(linear, torch.full((1, 3), 7.5), torch.zeros(1, 3))


def turn_between(one: Pose, other: Pose) -> float:
    """Degrees between the turns of two poses."""
    a, b = (torch.linalg.solve(torch.eye(3) - p.linear[0], torch.eye(3) + p.linear[0]) for p in (one, other))
    return math.degrees(math.acos(min(1.0, max(-1.0, (float((a.T @ b).trace()) - 1) / 2))))


@pytest.mark.parametrize("name", ["hsyn", "caml"])
def test_a_method_behind_the_front_exchanges_exactly_and_inverts(name):
    torch.manual_seed(SEED)
    network = networks.create(name, "small", prealign=True).eval()
    size = 40 if name == "caml" else 32
    pair = make_pair(None, Synthesis((size,) * 3, 2.5, rotation=20, shift=10), SEED)
    with torch.no_grad():
        there, back = network(pair.moving, pair.fixed).pair, network(pair.fixed, pair.moving).pair
    assert torch.equal(there.fixed_to_moving, back.moving_to_fixed)
    assert there.fixed_to_moving.abs().max() > 0.3
    error = fields.inverse_consistency(there.fixed_to_moving, there.moving_to_fixed)[..., 8:-8, 8:-8, 8:-8]
    assert error.mean() < 0.05


def test_a_part_of_a_frame_leads_to_the_same_places():
    """Halves that vanish at the border of a box: within it, and through it from everywhere, the same as on the grid."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    low, size, shape = (4, 2, 6), (20, 20, 16), (32, 28, 24)
    cells = tuple(slice(a // CELL, (a + n) // CELL) for a, n in zip(low, size))
    steps = []
    for _ in range(2):
        v = torch.zeros(1, 3, *(n // CELL for n in shape))
        v[(..., *(slice(s.start + 2, s.stop - 2) for s in cells))] = 1.0
        v = 0.5 * fields.gaussian(v, 0.5) * torch.tensor([1.0, -0.6, 0.3]).view(1, 3, 1, 1, 1)
        steps.append(v)
    m, f, pairs = _composed(steps)
    here = fields.identity(shape, torch.device("cpu"))
    pose = Pose(turned(20).linear, torch.tensor([[14.0, 12.0, 13.0]]), torch.tensor([[1.0, -0.5, 2.0]]))
    whole = _prealign._Frame(pose, _match.Halves(m, f, pairs), here)
    part = whole.part(low, [a + n for a, n in zip(low, size)])
    box = (..., *(slice(a, a + n) for a, n in zip(low, size)))
    assert whole.halves.to_moving.abs().max() > 0.5
    for side in (1, -1):
        shift = torch.tensor(low, dtype=torch.float32).view(1, 3, 1, 1, 1)
        assert (whole.out(None, side)[box] - (part.out(None, side) - shift)).abs().max() < 5e-3
        nothing = torch.zeros(1, 3, *size)
        assert (whole.through(torch.zeros_like(here), side) - part.through(nothing, side)).abs().max() < 5e-3


def test_levels_count_on_from_the_front():
    network = networks.create("sm-gicnet", "small", prealign=True)
    assert network.levels == 6 and [stage.level for stage in network.recipe.stages] == [1, 2, 3, 4, 5, 6]
    groups = [{id(p) for p in network.parameter_groups(level)} for level in range(1, 7)]
    assert not groups[0] & groups[1] and set.union(*groups) == {id(p) for p in network.parameters()}


def test_pose_learns_a_known_shift_in_a_few_steps():
    """One pair, moved by 20 mm: sixty steps bring the pose's end-point error below a third."""
    torch.manual_seed(SEED)
    network = networks.create("hsyn", "small", prealign=True)
    pair = make_pair(None, Synthesis((32,) * 3, 5.0, rotation=25, shift=25, cut=0), SEED)
    optimiser = torch.optim.Adam(network.parameter_groups(1), lr=2e-3)
    errors = []
    for _ in range(60):
        (terms,) = step_terms(network, Sample(pair, False, True), 1, Weighting(), 0)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
        errors.append(terms["pose"].item())
    assert min(errors[-5:]) < errors[0] / 3
