"""The schema of metrics.json: it accepts what runs write, and names what does not fit."""

import copy

import pytest

from SymRegistrationLib.quality.outputs import OUTPUTS, names
from SymRegistrationLib.quality.schema import Quality, meanings, problems

METRICS = {
    "schema": 1,
    "method": "syn",
    "seconds": {"total": 3},
    "notes": [],
    "quality": {
        name: "symmetric" if name == "inverse_method" else 0 if name == "folded_voxels" else 1.5
        for name in meanings(Quality)
    },
    "similarity": {"name": "lncc", "before": 0.1, "aligned": 0.2, "after": 0.3},
    "landmarks": None,
    "uncertainty": {"calibrated": True, "anything": [1]},
}


def test_a_record_fits_and_whole_numbers_count_as_numbers():
    assert problems(METRICS) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("seed",), "7", "metrics.seed should be int"),
        (("quality", "ice_mean_mm"), None, "metrics.quality.ice_mean_mm should be float"),
        (("quality", "folded_voxels"), True, "metrics.quality.folded_voxels should be int"),
        (("quality", "new_number"), 1.0, "metrics.quality has an unknown 'new_number'"),
        (("landmarks",), [1], "metrics.landmarks should be"),
        (("seconds",), {"total": "3 s"}, "metrics.seconds.total should be float"),
        (("notes",), [1], "metrics.notes[0] should be str"),
    ],
)
def test_what_does_not_fit_is_named(path, value, words):
    metrics = copy.deepcopy(METRICS)
    part = metrics
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert len(problems(metrics)) == 1 and problems(metrics)[0].startswith(words)


def test_what_is_missing_is_named():
    metrics = copy.deepcopy(METRICS)
    del metrics["quality"], metrics["similarity"]["after"]
    assert problems(metrics) == ["metrics lacks 'quality'", "metrics.similarity lacks 'after'"]
    assert problems([]) and problems(None)


def test_every_number_and_every_output_can_be_explained():
    assert set(meanings(Quality)) == set(Quality.__annotations__)
    assert all(meaning.name and meaning.sentence for meaning in meanings(Quality).values())
    assert len(set(names())) == len(OUTPUTS) and all(output.title and output.meaning for output in OUTPUTS)
    assert all((output.kind == "map") == bool(output.unit and output.colours) for output in OUTPUTS)
