"""A brain without its skull is recognised beside a whole head, and found in it (Colin27 and its atlas, 3 mm)."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ATLASES, moved, movement, turn

from SymRegistrationLib.geometry.grid import transform_points
from SymRegistrationLib.geometry.resampling import nearest
from SymRegistrationLib.geometry.volumes import Volume, read_labels
from SymRegistrationLib.job import Options
from SymRegistrationLib.pipeline import register
from SymRegistrationLib.registration import cutouts


@pytest.fixture(scope="module")
def brain(head) -> Volume:
    """What lies within the grey matter of an atlas of this head; the rest is set to zero."""
    atlas = read_labels(ATLASES / "aal3.nii.gz")
    grey = nearest((atlas.array > 0).astype(np.float32), atlas.grid, head.grid)
    whole = sitk.BinaryMorphologicalClosing(sitk.GetImageFromArray(np.pad(grey > 0.5, 6).astype(np.uint8)), (5, 5, 5))
    shown = sitk.GetArrayFromImage(sitk.BinaryFillhole(whole))[6:-6, 6:-6, 6:-6] > 0
    return Volume(np.where(shown, head.array, 0).astype(np.float32), head.grid, "brain")


def masks(*volumes):
    notes: list[str] = []
    found = cutouts.masks(volumes, (None, None), notes)
    assert len(notes) == sum(one is not None for one in found)
    return found


def test_only_the_cut_out_scan_is_masked_less_its_rim(head, brain):
    fixed, moving = masks(head, brain)
    assert fixed is None
    again, none = masks(brain, head)
    assert none is None and np.array_equal(again, moving)
    shown = brain.array > 0
    assert moving.sum() > 0.6 * shown.sum()
    # Nothing of it lies within one voxel, 3 mm, of what was cut away on all sides.
    assert (brain.array[moving] > 0).mean() > 0.95
    low, high = (np.argwhere(shown).min(0), np.argwhere(shown).max(0))
    inner = np.argwhere(moving)
    assert (inner.min(0) > low).all() and (inner.max(0) < high).all()


def test_two_brains_two_heads_and_given_masks_are_left_alone(head, brain):
    lower = np.arange(brain.array.shape[0])[:, None, None] < 18
    smaller = replace(brain, array=np.where(lower, 0, brain.array))
    assert (smaller.array > 0).sum() < 0.82 * (brain.array > 0).sum()
    for pair in ((brain, brain), (head, head), (brain, smaller)):
        assert masks(*pair) == (None, None)
    given = head.array > 0
    assert cutouts.masks((head, brain), (given, None), []) == (given, None)


def test_two_slices_keep_their_rim(head, brain):
    only = np.zeros(brain.array.shape, bool)
    only[30:32] = brain.array[30:32] > 0
    thin = replace(brain, array=np.where(only, brain.array, 0))
    found = masks(head, thin)[1]
    assert found is not None and found[only].all()


def test_air_with_noise_is_no_cut(head, brain):
    noise = np.random.default_rng(0).integers(0, 3, brain.array.shape)
    assert masks(head, replace(brain, array=brain.array + noise)) == (None, None)


def test_a_brain_is_found_in_a_head_and_the_result_says_how(head, brain):
    true = movement(head.grid.centre, turn((1, 0.5, -1), 50), (30, -20, 40))
    result = register(head, moved(brain, true), Options(method="affine"))
    where = head.grid.points(np.argwhere(brain.array > 0)[::20])
    apart = transform_points(result.alignment.matrix, where) - transform_points(true, where)
    assert np.linalg.norm(apart, axis=1).mean() < 1.0
    assert any("was cut out of its surroundings" in note for note in result.metrics["notes"])
