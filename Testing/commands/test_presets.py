"""Presets by anatomy are data; they set what the user has not set, and the old spellings by time keep working."""

import argparse

import pytest

from SymRegistrationLib.commands import steering
from SymRegistrationLib.commands.arguments import add_options, options_of
from SymRegistrationLib.job import ANATOMIES, InputError, Job, Options


def parsed(*words) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return options_of(parser.parse_args(words))


@pytest.mark.parametrize("name", ANATOMIES)
def test_every_preset_is_a_valid_choice_and_says_why(name):
    entry = ANATOMIES[name]
    assert entry["title"] and entry["reason"]
    options = parsed("--preset", name)
    assert options == Options(**entry["options"])


def test_anatomy_and_effort_are_two_things():
    options = parsed("--preset", "ct-mr", "--effort", "fast")
    assert (options.preset, options.initial, options.similarity) == ("fast", "rigid", "mind")
    assert parsed("--effort", "thorough").preset == "thorough"


def test_what_the_user_sets_wins():
    assert parsed("--preset", "ct-mr", "--similarity", "lncc").similarity == "lncc"


def test_old_spellings_keep_working():
    assert parsed("--preset", "fast") == Options(preset="fast")
    assert parsed() == Options()
    assert parsed("--metric", "mind") == parsed("--similarity", "mind") == Options(similarity="mind")
    update = argparse.ArgumentParser()
    steering.continuing_arguments(update, region=True)
    assert update.parse_args(["out", "--metric", "mse"]).similarity == "mse"
    assert update.parse_args(["out"]).similarity is None
    assert "--metric" not in update.format_help()


def test_a_job_of_an_earlier_version_means_the_same():
    old = {"fixed": "a.nii", "moving": "b.nii", "output": "out", "options": {"metric": "mind"}}
    assert Job.from_dict(old) == Job("a.nii", "b.nii", "out", options=Options(similarity="mind"))
    with pytest.raises(InputError, match="'similarity' twice, also as 'metric'"):
        Job.from_dict({**old, "options": {"metric": "mind", "similarity": "mind"}})
