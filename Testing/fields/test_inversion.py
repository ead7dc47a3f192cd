"""Numerical inverses of fields (mathematics.md, 2.3)."""

import numpy as np
import torch
from test_fields import SEED, smooth

from SymRegistrationLib import fields
from SymRegistrationLib.fields import inversion


def test_every_field_of_a_batch_is_inverted_as_if_alone():
    """A hard one in front must not use up the steps of the next."""
    both = torch.cat([smooth(9.0, 3.0), smooth(9.0, 3.0, seed=SEED + 1)])
    alone = inversion.invert(both[1:], tolerance=1e-3, iterations=25)
    together = inversion.invert(both, tolerance=1e-3, iterations=25)
    assert alone.iterations > 8 and torch.equal(together.field[1:], alone.field)


def test_numerical_inverse_of_strong_and_gentle_fields():
    gentle = smooth(2.5)
    found = inversion.invert(gentle)
    assert found.residual < 0.01
    assert float(fields.inverse_consistency(gentle, found.field).max()) < 0.05
    # squeezed to a fifth: |grad u| = 0.8 and more, where the undamped step diverges
    x = fields.identity((40, 8, 8))
    strong = torch.zeros(1, 3, 40, 8, 8)
    strong[:, 0] = 5.5 * torch.sin(2 * np.pi * x[:, 0] / 39)
    assert float(fields.jacobian_determinant(strong).min()) < 0.15
    assert inversion.invert(strong, iterations=100).residual < 0.05
