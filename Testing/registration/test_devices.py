"""Nothing inside a level of the optimiser or a network's forward waits for the device, or makes a tensor elsewhere.

The ``meta`` device has shapes but no numbers: reading one on the host, or mixing it with a CPU tensor, raises.
"""

import subprocess
import sys

import pytest
import torch
from pairs import SEED, phantom

from SymRegistrationLib import fields, networks
from SymRegistrationLib.fields import inversion
from SymRegistrationLib.networks import _attention, _passes, _pose, _prealign
from SymRegistrationLib.registration.optimisers import syn
from SymRegistrationLib.registration.schedule import Schedule

SHAPE = (20, 22, 24)


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc", "mind"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_level_of_the_optimiser_reads_nothing_back(similarity, weighted):
    images = torch.empty(2, 1, *SHAPE, device="meta")
    weight = torch.empty(2, 1, *SHAPE, device="meta") if weighted else None
    level = syn._Level(images, weight, (10, 11, 12), Schedule(), similarity)
    halves = torch.empty(2, 3, 10, 11, 12, device="meta")
    update, value = level.update(halves)
    assert update.device.type == "meta" and update.shape == halves.shape and value.shape == ()
    eased = syn.regularise_folds(halves, 0.3, rounds=1)
    assert eased.device.type == "meta" and eased.shape == halves.shape


def test_within_a_run_freed_memory_is_not_fetched_anew_from_the_system():
    """Counted in pages of 4096 bytes: 64 MB are 15625 of them. In a process whose heap is its own; the second tensor is
    a little smaller, because glibc wants room to spare for aligning it."""
    code = """
import resource, torch
from SymRegistrationLib.registration import devices
def faults(numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with devices.kept_pages():
    first, again = faults(16_000_000), faults(15_900_000)
assert again < 1000 < first, (first, again)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size, prealign", [("small", False), ("recurrent", True)])
@pytest.mark.parametrize("name", networks.names())
def test_a_network_reads_nothing_back_before_it_is_finished(name, size, prealign, monkeypatch):
    """The one exception: behind an alignment of its own, a network of repeated passes asks for two boxes, about what
    it matches and about what has matched."""
    with torch.device("meta"):
        network = networks.create(name, size, prealign=prealign).eval()
    boxes = []

    def whole(image, multiple):
        boxes.append(image.device.type)
        return [0, 0, 0], list(image.shape[2:])

    monkeypatch.setattr(_prealign, "content_box", whole)
    starts = _pose._starts
    monkeypatch.setattr(_pose, "_starts", lambda centre: starts(centre)[:1])  # the others are the same again
    n = max(network.card.minimum_size, 48)
    moving, fixed = (torch.empty(1, 1, n, n, n, device="meta") for _ in range(2))
    with torch.no_grad():
        output = network(moving, fixed)
    pair = output.pair
    assert {pair.fixed_to_moving.device.type, pair.moving_to_fixed.device.type, pair.residual.device.type} == {"meta"}
    assert pair.fixed_to_moving.shape == (1, 3, n, n, n)
    assert boxes == (["meta"] * 2 if prealign and size == "recurrent" else [])
    with pytest.raises((RuntimeError, NotImplementedError)):  # this is where the host reads
        output.finished()


@pytest.fixture
def never_asked(monkeypatch):
    """As on a device that is not asked whether a loop is at its end."""

    def run():
        for module in (_attention, _passes, _pose, _prealign):
            monkeypatch.setattr(module, "settled", lambda answer: False)

    return run


def opposite_fields(strength):
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    u = fields.gaussian(strength * torch.randn(2, 1, 3, 18, 20, 16, generator=generator).flatten(0, 1), 2.5)
    return u[:1], 0.2 * u[1:] - u[:1]


def test_rounds_behind_the_end_of_a_loop_change_nothing(never_asked):
    u, w = opposite_fields(8.0)
    points = _pose.KeyPoints(6)
    scans = phantom((32, 32, 32), 1), phantom((32, 32, 32), 2)

    def results():
        pose = _pose.found_pose(points, *scans)
        return [
            *_attention.balanced_pair(u, w),
            *_prealign.symmetrise_inverses(u, w),
            _prealign.eased(4 * u),
            *pose.parts,
        ]

    with torch.no_grad():
        asked = results()
        never_asked()
        for one, other in zip(asked, results()):
            assert torch.equal(one, other)


def test_inverting_all_voxels_is_inverting_one_by_one():
    u, _ = opposite_fields(25.0)
    found = inversion.invert(u, tolerance=0.01, iterations=40)
    start = inversion._guess(u, 40)
    for _ in range(inversion._NEWTON_STEPS):
        start = inversion._newton(start, start + fields.warp(u, start))
    residual = start + fields.warp(u, start)
    assert float(fields.square_sum(residual).max()) > 0.01**2  # there is something left to do
    w, least = inversion._converge_everywhere(u, start, residual, 0.01, 38)
    torch.testing.assert_close(w, found.field, atol=1e-4, rtol=0)
    assert float(least) == pytest.approx(found.residual, abs=1e-4)
