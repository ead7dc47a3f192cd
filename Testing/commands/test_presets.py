"""Presets by anatomy are data; they set what the user has not set, and the old spellings by time keep working."""

import argparse
import json

import numpy as np
import pytest

from SymRegistrationLib.commands import choosing, steering
from SymRegistrationLib.commands.arguments import add_options, options_of
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import Volume, write_volume
from SymRegistrationLib.job import ANATOMIES, InputError, Job, Options
from SymRegistrationLib.registration import alignment, anatomies
from SymRegistrationLib.registration.suggestion import suggest


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


OURS = {"title": "Spine", "reason": "bones stay", "options": {"initial": "rigid", "preset": "thorough", "refine": 1}}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of settings of the test's own, and the file of presets in it."""
    monkeypatch.setenv("SYMREG_CONFIG", str(tmp_path / "settings"))
    return tmp_path / "settings/presets.json"


def test_users_keep_presets_in_their_settings_and_in_files(own, tmp_path):
    assert anatomies.save("our-spines", OURS["title"], OURS["options"], OURS["reason"]) == own
    anatomies.save("other", "Other", {})
    assert [*anatomies.anatomies()][-2:] == ["our-spines", "other"]
    assert parsed("--preset", "our-spines") == Options(initial="rigid", preset="thorough", refine=1)
    assert parsed("--preset", "our-spines", "--effort", "fast", "--initial", "none").preset == "fast"
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"presets": {"our-spines": {"options": {"refine": 3}}}}))
    assert parsed("--preset", "our-spines", "--preset-file", str(file)) == Options(refine=3)
    assert anatomies.remove("our-spines") == own
    assert [*anatomies.anatomies()] == [*ANATOMIES, "other"]
    for name in ("our-spines", "brain"):
        with pytest.raises(InputError, match=f"holds no preset '{name}'"):
            anatomies.remove(name)
    assert anatomies.anatomies()["other"].title == "Other"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"options": {"initail": "rigid"}}, "initail"),
        ({"options": {"initial": 3}}, "initial"),
        ({"options": {"refine": -2}}, "refine"),
        ({"options": {"threads": 2}}, "threads"),
        ({"options": []}, "options"),
        ({"titel": "x"}, "titel"),
        ([], "not an object"),
    ],
)
def test_a_preset_that_no_run_could_use_is_refused_by_file_and_key(own, tmp_path, entry, words):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"presets": {"spine": entry}}))
    with pytest.raises(InputError) as error:
        parsed("--preset", "fast", "--preset-file", str(file))
    assert "bad.json" in str(error.value) and "'spine'" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"presets": []}', '{"presets": {"fast": {}}}', '{"presets": {"A b": {}}}']
)
def test_a_file_that_holds_no_presets_is_refused(own, tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(InputError, match="bad.json"):
        anatomies.read(file)
    own.parent.mkdir()
    own.write_text(text)
    with pytest.raises(InputError, match=r"presets\.json"):
        anatomies.save("mine", "Mine", {})
    assert own.read_text() == text


def test_an_unknown_preset_is_refused_with_what_is_known(own):
    with pytest.raises(InputError, match="brain-two-contrasts"):
        parsed("--preset", "spines")


def test_presets_are_listed_for_people_and_programs(own, capsys):
    anatomies.save("our-spines", OURS["title"], OURS["options"], OURS["reason"])
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert "our-spines" in text and "bones stay" in text and str(own) in text and "thorough" in text
    assert main(["presets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert [one["name"] for one in found["anatomies"]] == [*ANATOMIES, "our-spines"]
    assert [one["name"] for one in found["efforts"]] == ["fast", "default", "thorough"]


def scan(shape, spacing, values):
    """An ellipsoid of ``values`` (inside, outside) with some structure, on a grid of its own."""
    radius = sum(((w - (n - 1) / 2) / (0.42 * n)) ** 2 for w, n in zip(np.indices(shape), shape)) ** 0.5
    rough = np.random.default_rng(3).normal(size=shape) * 20
    array = np.where(radius < 1, values[0] + rough, values[1]).astype(np.float32)
    return Volume(array, Grid.centred(shape, spacing, (0, 0, 0)), "scan")


def test_presets_are_suggested_by_modality_size_and_content():
    chest = scan((60, 50, 70), 5.0, (-800, -1000))
    trunk = scan((60, 50, 80), 5.0, (50, -1000))
    mr = scan((40, 40, 34), 5.0, (400, 0))
    wide = scan((40, 50, 80), 5.0, (400, 0))
    assert suggest(chest, chest).preset == "lung-ct"
    assert suggest(trunk, trunk).preset == "abdomen"
    assert suggest(trunk, mr).preset == "ct-mr" and suggest(mr, trunk, ("MR", "CT")).preset == "ct-mr"
    assert suggest(mr, mr, ("US", "MR")).preset == "prostate-mr-us"
    found = suggest(wide, mr)
    assert found.preset == "unknown" and "mm" in found.reason


def test_one_contrast_or_two_decides_between_the_presets_of_brains(head, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(alignment, "mirrored_gain", lambda *_: float("nan"))  # a third of each alignment, not asked for
    fixed = Volume(head.array, head.grid, "fixed")
    inverted = np.where(head.array > 20, head.array.max() - head.array, 0).astype(np.float32)
    other = Volume(inverted, head.grid, "moving")
    assert suggest(fixed, fixed).preset == "brain"
    for one in (fixed, other):
        write_volume(tmp_path / f"{one.name}.nii.gz", one.array.astype(np.float32), one.grid)
    assert main(["suggest", str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz")]) == 0
    assert "--preset brain-two-contrasts" in capsys.readouterr().out


def test_the_worker_answers_what_can_be_chosen_and_refuses_what_it_cannot_read(own):
    anatomies.save("our-spines", OURS["title"], OURS["options"], OURS["reason"])
    found = choosing.asked_catalogue({"id": 1, "command": "presets"})
    assert found["user_file"] == str(own) and found["anatomies"][-1]["reason"] == "bones stay"
    with pytest.raises(InputError, match="'preset_file' must be text"):
        choosing.asked_catalogue({"preset_file": 3})
    with pytest.raises(InputError, match="names no scans"):
        choosing.asked_suggestion({"fixed": "a.nii"})
