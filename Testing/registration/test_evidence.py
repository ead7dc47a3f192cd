"""A result is delivered only when it is better than where it started, and the numbers say whether
scans belong together."""

import numpy as np
import pytest
import torch
from conftest import moved, movement, turn

from SymRegistrationLib.fields import FieldPair, gaussian, warp
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import Options, silent
from SymRegistrationLib.quality import checks
from SymRegistrationLib.registration import alignment, evidence, working_grid
from SymRegistrationLib.registration.optimisers import RunSettings
from SymRegistrationLib.registration.solver import Solver
from SymRegistrationLib.uncertainty.estimate import estimate_uncertainty

SEED = 11


def inverted(volume: Volume) -> Volume:
    array = np.where(volume.array > 20, volume.array.max() - volume.array, 0)
    return Volume(array.astype(np.float32), volume.grid, "inverted")


def weigh(fixed, moving, pose, warp=0.0):
    """Evidence at a known pose (fixed -> moving), with a random warp of up to ``warp`` voxels of 5 mm."""
    scans = working_grid.prepare(fixed), working_grid.prepare(moving)
    halves = alignment.split_midway(pose, scans[0].centroid, "file")
    space = working_grid.working_pair(*scans, halves.mid_to_fixed, halves.mid_to_moving, working_grid.Layout(5.0))
    noise = torch.randn((1, 3, *space.grid.shape), generator=torch.Generator().manual_seed(SEED))
    u = gaussian(noise, 3.0)
    u = u * (warp / u.abs().max())
    return evidence.weigh(scans, space, FieldPair(u, -u, "symmetric", 0.0))


@pytest.mark.parametrize("contrast", [lambda v: v, inverted])
def test_a_right_pose_is_evident_in_any_contrast(head, contrast):
    true = movement(head.grid.centre, turn((1, 1, 0), 30), (20, 0, 10))
    found = weigh(head, moved(contrast(head), true), true)
    assert found.best == "registered" and found.gain_aligned > 5
    assert found.structure > checks.STRUCTURE_LOOK and found.covered > 0.9


@pytest.mark.parametrize("degrees, shift", [(40, (0, 0, 0)), (0, (15, 0, 0)), (180, (0, 0, 20))])
def test_a_wrong_pose_has_no_structure(head, degrees, shift):
    wrong = movement(head.grid.centre, turn((1, 0.4, 0), degrees), shift)
    away = movement(head.grid.centre, turn((0, 0, 1), 75), (60, 0, 0))  # the headers are no better
    found = weigh(head, moved(inverted(head), away), away @ wrong)
    assert found.structure < checks.STRUCTURE_LOOK


def test_a_scan_that_is_half_empty_has_no_counterpart_for_half_of_the_other(head):
    array = inverted(head).array
    array[: array.shape[0] // 2] = 0
    found = weigh(head, Volume(array, head.grid, "half"), np.eye(4))
    assert found.shared < checks.SHARED_LOOK < 0.9 < weigh(head, inverted(head), np.eye(4)).shared


def test_a_pose_worse_than_the_headers_is_not_delivered(head):
    wrong = movement(head.grid.centre, turn((1, 0.4, 0), 40), (0, 20, 0))
    assert weigh(head, inverted(head), wrong).best == "as scanned"


def test_a_warp_worse_than_the_alignment_is_not_delivered(head):
    print("seed", SEED)
    found = weigh(head, inverted(head), np.eye(4), warp=4.0)
    assert found.best == "aligned" and found.after < found.aligned


def metrics(**evident):
    told = {"before": 0.1, "aligned": 0.2, "after": 0.3, "gain_aligned": 9.0, "gain_after": 5.0, "gain": 10.0}
    return {"evidence": {**told, "structure": 9.0, "covered": 0.95, "delivered": "registered", **evident}}


@pytest.mark.parametrize(
    "evident, level, registered",
    [
        ({}, "PASS", True),
        ({"structure": None}, "PASS", True),
        ({"structure": 3.0}, "WARN", True),
        ({"structure": 0.4}, "FAIL", False),
        ({"covered": 0.6}, "WARN", True),
        ({"covered": 0.3}, "FAIL", False),
        ({"shared": 0.5}, "WARN", True),
        ({"delivered": "aligned"}, "WARN", True),
        ({"delivered": "as scanned"}, "FAIL", False),
    ],
)
def test_the_verdict_follows_from_the_evidence(evident, level, registered):
    judged = checks.conclusion(metrics(**evident))
    assert (judged["level"], judged["registered"]) == (level, registered)
    assert bool(judged["reasons"]) == (level != "PASS")


@pytest.mark.parametrize(
    "pose, evident, level, registered",
    [
        ({"kind": "rigid"}, {"delivered": "aligned"}, "PASS", True),  # what to expect of one patient
        ({"kind": "affine"}, {"delivered": "aligned"}, "WARN", True),
        ({"kind": "rigid", "mirrored_gain": -0.06}, {}, "PASS", True),
        ({"kind": "affine", "mirrored_gain": 0.003}, {}, "WARN", True),  # the images do not tell the sides
        ({"kind": "affine", "mirrored_gain": 0.06}, {}, "FAIL", False),
    ],
)
def test_the_verdict_follows_from_the_alignment(pose, evident, level, registered):
    judged = checks.conclusion({**metrics(**evident), "alignment": pose})
    assert (judged["level"], judged["registered"]) == (level, registered)


@pytest.mark.parametrize("longest", [0.0, 12.0])
def test_detail_must_add_to_what_the_scans_share(head, longest):
    """Two scans of one head with noise of their own, where it should be: detail would follow the noise, and moves
    further from the truth. A head that is bent by up to ``longest`` mm is bent in detail. Only results in detail have
    a calibrated uncertainty."""
    generator = torch.Generator().manual_seed(SEED)
    image = torch.from_numpy(head.array)[None, None]
    u = gaussian(torch.randn((1, 3, *head.array.shape), generator=generator), 3.0)
    bent = warp(image, u * (longest / 3 / u.square().sum(1).sqrt().max()))
    noise = 0.05 * head.array.max() * torch.randn((2, *head.array.shape), generator=generator).numpy()
    scans = [
        working_grid.prepare(Volume(one[0, 0].numpy() + more, head.grid, "head"))
        for one, more in zip((bent, image), noise)
    ]
    pose = alignment.Alignment(np.eye(4), np.eye(4), "none")
    options = Options(preset="fast", spacing=5.0, similarity="lncc", uncertainty="fast")
    solver = Solver((scans[0], scans[1]), pose, options, [])
    delivered = solver.run()
    detailed = solver.optimiser.run(solver.space, RunSettings(solver.preset, "lncc"))
    lengths = [float(pair.fixed_to_moving.square().sum(1).sqrt().mean()) for pair in (delivered, detailed)]
    print("seed", SEED, "moved by voxels, delivered and in detail:", lengths)
    assert solver.smooth == (not longest) == bool(solver.notes)
    assert lengths[0] < 0.7 * lengths[1] if not longest else lengths[0] == lengths[1]
    assert estimate_uncertainty(solver, delivered, head, silent).map.summary["calibrated"] == bool(longest)
