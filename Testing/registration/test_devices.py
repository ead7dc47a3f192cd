"""Nothing inside a level of the optimiser or a network's forward waits for the device, or makes a tensor elsewhere.

The ``meta`` device has shapes but no numbers: reading one on the host, or mixing it with a CPU tensor, raises.
"""

import pytest
import torch

from SymRegistrationLib.registration.optimisers import syn

SHAPE = (20, 22, 24)


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc", "mind"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_level_of_the_optimiser_reads_nothing_back(similarity, weighted):
    images = torch.empty(2, 1, *SHAPE, device="meta")
    weight = torch.empty(2, 1, *SHAPE, device="meta") if weighted else None
    level = syn._Level(images, weight, (10, 11, 12), syn.Schedule(), similarity)
    halves = torch.empty(2, 3, 10, 11, 12, device="meta")
    update, value = level.update(halves)
    assert update.device.type == "meta" and update.shape == halves.shape and value.shape == ()
    eased = syn.regularise_folds(halves, 0.3, rounds=1)
    assert eased.device.type == "meta" and eased.shape == halves.shape
