"""Presets by anatomy are data; they set what the user has not set, and the old spellings by time keep working."""

import argparse

import pytest

from SymRegistrationLib.commands.arguments import add_options, options_of
from SymRegistrationLib.job import ANATOMIES, Options


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
    assert (options.preset, options.initial, options.metric) == ("fast", "rigid", "mind")
    assert parsed("--effort", "thorough").preset == "thorough"


def test_what_the_user_sets_wins():
    assert parsed("--preset", "ct-mr", "--metric", "lncc").metric == "lncc"


def test_old_spellings_keep_working():
    assert parsed("--preset", "fast") == Options(preset="fast")
    assert parsed() == Options()
