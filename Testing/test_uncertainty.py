"""The spread of vectors: directions count, perturbations are undone exactly, and the map says that it is relative."""

import numpy as np
import pytest
import torch

import pairs
from SymRegistrationLib import fields, pipeline, uncertainty
from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.preprocess import Workspace
from SymRegistrationLib.geometry import Grid
from SymRegistrationLib.volumes import Volume

SHAPE = (36, 40, 32)


def test_two_opposite_fields_of_equal_length_do_spread():
    u = torch.zeros(3, 2, 2, 2)
    u[1] = 3.0
    spread = uncertainty.VectorSpread()
    spread.add(u), spread.add(-u)
    assert torch.allclose(spread.length(), torch.full((2, 2, 2), 18**0.5))  # variance 18 of the values +3 and -3
    assert torch.allclose(spread.largest_axis(), torch.full((2, 2, 2), 18**0.5))
    assert torch.allclose(spread.length(2 * np.eye(3)), torch.full((2, 2, 2), 2 * 18**0.5))


def test_running_covariance_is_numpys():
    generator = torch.Generator().manual_seed(1)
    fields_ = torch.randn((7, 3, 2, 3, 4), generator=generator, dtype=torch.float64)
    spread = uncertainty.VectorSpread()
    for u in fields_:
        spread.add(u)
    expected = np.cov(fields_[:, :, 1, 2, 3].numpy().T)
    np.testing.assert_allclose(spread.covariance()[:, :, 1, 2, 3].numpy(), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        uncertainty.VectorSpread().covariance()


@pytest.mark.parametrize("index", range(4))
def test_a_perturbed_frame_is_undone(index):
    """A known pair, seen in the perturbed frame and brought back, is itself."""
    moving, fixed, u = pairs.known_pair(SHAPE, size=2.0)
    change = uncertainty.perturbations(4, seed=3)[index]
    inverse = fields.invert(u).field
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
    space = Workspace(fixed, moving, None, Grid.centred(SHAPE, 1.0, (0, 0, 0)), np.eye(4), np.eye(4))
    changed = change.geometry(space)
    assert float(fields.warp(changed.moving, there.fixed_to_moving).sub(changed.fixed).abs().mean()) < 0.03


def test_the_pipeline_gives_the_map_and_says_that_it_is_relative(head):
    small = Volume(head.array, head.grid, "head")
    done = pipeline.register(small, small, Options(preset="fast", uncertainty=2, spacing=8.0, initial="none"))
    assert done.uncertainty.shape == head.array.shape and np.isfinite(done.uncertainty).all()
    assert done.metrics["uncertainty"]["runs"] == 2 and not done.metrics["uncertainty"]["calibrated"]
    assert any("relative" in note for note in done.metrics["notes"])
    with pytest.raises(InputError, match="at least 2"):
        Options(uncertainty=1)
