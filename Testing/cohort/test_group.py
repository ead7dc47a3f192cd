"""Group jobs: mean, spread and volume maps against known numbers; labels carried and fused, with known votes."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from pairs import scan
from test_batch import QUICK

from SymRegistrationLib.cohort.fusion import ABSENT, fuse, majority
from SymRegistrationLib.cohort.summary import PairState
from SymRegistrationLib.cohort.table import Row
from SymRegistrationLib.cohort.template import Moments, average
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import read_labels, read_map, to_itk, write_volume
from SymRegistrationLib.job import InputError, Job, RegistrationError

GRID = Grid.centred((6, 7, 8), 2.0, (1, 2, 3))


def test_running_moments_are_those_of_all_at_once():
    draw = np.random.default_rng(3)
    values, where = draw.normal(50, 9, (7, 4, 5, 6)).astype(np.float32), draw.random((7, 4, 5, 6)) > 0.3
    moments = Moments.empty((4, 5, 6))
    for one, here in zip(values, where):
        moments.add(one, here)
    masked = np.ma.masked_array(values.astype(float), ~where)
    assert np.array_equal(moments.count, where.sum(0))
    assert np.allclose(moments.mean, masked.mean(0).filled(0), atol=1e-4)
    spread = np.where(where.sum(0) > 1, masked.std(0, ddof=1).filled(0), 0)
    assert np.allclose(moments.deviation(), spread, atol=1e-4)


def finished(folder, name, warped, log, covered, grid=GRID):
    (folder / name).mkdir()
    for part, array in (("warped_moving", warped), ("log_jacobian", log), ("coverage", covered)):
        write_volume(folder / name / f"{part}.nii.gz", array, grid)
    return PairState(
        Row(name, 2, Job("t", f"{name}.nii", str(folder / name))),
        "done",
        numbers={"log_scale": 0.25, "similarity_after": 0.9},
    )


def test_averages_count_only_what_a_scan_shows(tmp_path):
    shape = GRID.shape
    half = np.ones(shape, np.uint8)
    half[:, :, 4:] = 0
    first = finished(
        tmp_path, "a", np.full(shape, 10.0, np.float32), np.full(shape, 0.5, np.float32), np.ones(shape, np.uint8)
    )
    second = finished(tmp_path, "b", np.full(shape, 30, np.int16), np.full(shape, -0.1, np.float32), half)
    failed = PairState(Row("c", 4, Job("t", "c", str(tmp_path / "c"))), "failed", "no")
    assert average([first, second, failed], tmp_path, "raw")["scans"] == 2
    mean, sd, cover, log, log_sd = (
        read_map(tmp_path / f"{name}.nii.gz").array
        for name in ("mean", "sd", "coverage", "log_jacobian_mean", "log_jacobian_sd")
    )
    assert (mean[:, :, :4] == 20).all() and (mean[:, :, 4:] == 10).all(), (
        "beyond the second scan only the first one counts"
    )
    assert np.allclose(sd[:, :, :4], np.sqrt(200)) and (sd[:, :, 4:] == 0).all()
    assert (cover[:, :, :4] == 2).all() and (cover[:, :, 4:] == 1).all()
    assert np.allclose(log[:, :, :4], 0.2, atol=1e-4) and np.allclose(log_sd[:, :, :4], 0.6 / np.sqrt(2), atol=1e-3)
    with open(tmp_path / "scans.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b"] and float(rows[0]["log_scale"]) == 0.25


def test_scaled_intensities_make_scanners_comparable(tmp_path):
    pattern = np.random.default_rng(1).random(GRID.shape).astype(np.float32)
    ones, zeros = np.ones(GRID.shape, np.uint8), np.zeros(GRID.shape, np.float32)
    average(
        [
            finished(tmp_path, "a", 100 + 50 * pattern, zeros, ones),
            finished(tmp_path, "b", 3000 * pattern, zeros, ones),
        ],
        tmp_path,
    )
    mean, sd = (read_map(tmp_path / f"{name}.nii.gz").array for name in ("mean", "sd"))
    assert sd.max() < 1e-3 and mean.min() >= 0 and np.corrcoef(mean.ravel(), pattern.ravel())[0, 1] > 0.999


def test_nothing_to_average_and_damaged_results(tmp_path):
    with pytest.raises(InputError, match="no scan was registered"):
        average([], tmp_path)
    ones = np.ones(GRID.shape, np.uint8)
    good = finished(tmp_path, "a", ones, ones, ones)
    other = finished(tmp_path, "b", ones, ones, ones, Grid.centred(GRID.shape, 3.0, (0, 0, 0)))
    with pytest.raises(RegistrationError, match="another grid"):
        average([good, other], tmp_path)
    (tmp_path / "a/coverage.nii.gz").write_bytes(b"x")
    with pytest.raises(RegistrationError, match="result of 'a' cannot be used"):
        average([good], tmp_path)
    assert not (tmp_path / "mean.nii.gz").exists()


# ---------------------------------------------------------------------------------------------- fusion


def test_votes_draws_and_absence():
    a, b, c, d = 0, 17, 2035, ABSENT
    cases = [  # what three atlases say (the first is most trusted), the winner, the share that agrees
        ((b, b, c), b, 2 / 3),
        ((a, b, b), b, 2 / 3),
        ((b, c, a), b, 1 / 3),
        ((c, b, a), c, 1 / 3),
        ((c, c, c), c, 1),
        ((d, b, b), b, 1),
        ((d, b, c), b, 1 / 2),
        ((d, d, c), c, 1),
        ((d, d, d), 0, 0),
        ((b, d, c), b, 1 / 2),
    ]
    maps = [np.array([case[0][k] for case in cases], np.int32).reshape(1, 2, 5) for k in range(3)]
    fused, agreement = fuse(maps)
    assert fused.ravel().tolist() == [case[1] for case in cases]
    assert np.allclose(agreement.ravel(), [case[2] for case in cases])
    draw = np.array([[3], [1], [1], [3]], np.int32)[..., None, None]
    assert majority(draw).item() == 3, "a draw goes to what the most trusted of the drawn says"


def test_majority_is_that_of_simpleitk_where_that_decides():
    draw = np.random.default_rng(5)
    stack = draw.integers(0, 4, (5, 8, 9, 10)).astype(np.int32)
    voted = sitk.GetArrayFromImage(
        sitk.LabelVoting([sitk.GetImageFromArray(one.astype(np.uint8)) for one in stack], 99)
    )
    clear = voted != 99
    assert clear.mean() > 0.5 and np.array_equal(majority(stack)[clear], voted[clear])


def test_staple_trusts_the_better_atlases_and_keeps_values():
    """Two atlases that are nearly right against three that share one mistake: STAPLE and majority differ,
    both keep values."""
    truth = np.zeros((20, 20, 20), np.int32)
    truth[4:16, 4:16, 4:16] = 12175
    truth[8:12, 8:12, 8:12] = 2
    draw = np.random.default_rng(7)
    maps = []
    for noise in (0.01, 0.01, 0.45, 0.45, 0.45):
        one = truth.copy()
        wrong = (draw.random(truth.shape) < noise) & (truth > 0)
        one[wrong] = 0
        maps.append(one)
    staple, _ = fuse(maps, "staple")
    vote, agreement = fuse(maps)
    errors = [(found != truth).mean() for found in (staple, vote)]
    print("errors of staple and majority:", errors)
    assert set(np.unique(staple)) == {0, 2, 12175} and errors[0] < 0.2 * errors[1] and errors[1] > 0
    assert agreement[0, 0, 0] == 1 and agreement.min() >= 0.2
    assert np.array_equal(fuse(maps[:1], "staple")[0], maps[0])


# ---------------------------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A template and three moved scans with labels."""
    folder = tmp_path_factory.mktemp("people")
    (folder / "scans").mkdir()
    for k in range(4):
        array, grid = scan((24, 26, 22), shift=1.5 * k, spacing=4.0)
        name = "template" if k == 0 else f"scans/p{k}"
        sitk.WriteImage(to_itk(array, grid), str(folder / f"{name}.nii.gz"))
        write_volume(
            folder / f"labels{k}.nii.gz", np.select([array > 700, array > 350], [2035, 17], 0).astype(np.int16), grid
        )
    return folder


def test_a_group_from_folder_to_maps(people, tmp_path, capsys):
    out = tmp_path / "g"
    words = [
        "group",
        str(people / "scans"),
        "--to",
        str(people / "template.nii.gz"),
        "-o",
        str(out),
        *QUICK,
        "--workers",
        "1",
    ]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]
    assert result["scans"] == result["done"] == 3
    for name in result["files"]:
        assert (out / name).exists() and name in (out / "index.html").read_text(encoding="utf-8")
    jacobian, log, cover = (
        read_map(out / f"p1/{name}.nii.gz").array for name in ("jacobian", "log_jacobian", "coverage")
    )
    inside = cover > 0
    assert inside.mean() > 0.8 and np.allclose(log[inside], np.log(jacobian[inside]), atol=1e-3)
    template = read_map(people / "template.nii.gz").array
    mean = read_map(out / "mean.nii.gz").array
    assert np.corrcoef(mean.ravel(), template.ravel())[0, 1] > 0.97 and (
        read_map(out / "coverage.nii.gz").array.max() == 3
    )
    assert main([*words, "-q", "--leave-out", "outliers", "--intensities", "raw"]) == 0
    assert np.corrcoef(read_map(out / "mean.nii.gz").array.ravel(), template.ravel())[0, 1] > 0.97


def test_labels_from_three_atlases(people, tmp_path, capsys):
    table = tmp_path / "atlases.tsv"
    lines = ["image\tlabels\tid"] + [
        f"{people}/scans/p{k}.nii.gz\t{people}/labels{k}.nii.gz\tatlas {k}" for k in (1, 2, 3)
    ]
    table.write_text("\n".join(lines))
    words = [
        "propagate",
        str(people / "template.nii.gz"),
        "--atlases",
        str(table),
        "--target-labels",
        str(people / "labels0.nii.gz"),
        "-o",
        str(tmp_path / "p"),
        *QUICK,
        "--workers",
        "1",
        "--json",
    ]
    dices = {}
    for more in (["--fusion", "majority"], ["--fusion", "staple"], ["--interpolation", "nearest"]):
        assert main([*words, *more]) == 0
        dices[more[-1]] = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]["mean_dice"]
    print(dices)
    assert all(value > 0.9 for value in dices.values())
    fused = read_labels(tmp_path / "p/labels.nii.gz")
    assert set(np.unique(fused.array)) == {0, 17, 2035} and fused.grid.same_as(
        read_map(people / "template.nii.gz").grid
    )
    agreement = read_map(tmp_path / "p/agreement.nii.gz").array
    assert set(np.round(np.unique(agreement * 3), 3)) <= {0, 1, 1.5, 2, 3} and (agreement == 1).mean() > 0.8
    with open(tmp_path / "p/volumes.csv", newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert int(rows["17"]["voxels"]) == (fused.array == 17).sum()
    assert float(rows["17"]["ml"]) == pytest.approx((fused.array == 17).sum() * 4.0**3 / 1000)
    assert (tmp_path / "p/atlas 2/labels.nii.gz").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "no atlas is given"),
        (["--atlas", "{i}", "{l}", "--atlases", "{t}"], "either --atlas or --atlases"),
        (["--atlas", "{i}", "none.nii"], "none.nii' does not exist"),
        (["--atlases", "{t}"], "has no column 'labels'"),
        (["--atlases", "{u}"], "line 2: 'labels' is empty"),
        (["--atlas", "{i}", "{l}", "--target-labels", "none.nii"], "target labels 'none.nii' does not exist"),
        (["--atlas", "{i}", "{l}", "--fusion", "mean"], "invalid choice"),
    ],
)
def test_bad_requests_are_refused_before_any_work(people, tmp_path, capsys, words, said):
    (tmp_path / "t.csv").write_text("image,id\na,b\n")
    (tmp_path / "u.csv").write_text("image,labels\na,\n")
    names = {
        "i": people / "scans/p1.nii.gz",
        "l": people / "labels1.nii.gz",
        "t": tmp_path / "t.csv",
        "u": tmp_path / "u.csv",
    }
    out = tmp_path / "out"
    assert (
        main(["propagate", str(people / "template.nii.gz"), *(word.format(**names) for word in words), "-o", str(out)])
        == 2
    )
    seen = capsys.readouterr().err
    assert said in seen and seen.count("\n") == 1 and not out.exists()


def test_a_group_without_its_template_or_scans(people, tmp_path, capsys):
    for words, said in (
        (["{f}/scans", "--to", "none.nii"], "template 'none.nii' does not exist"),
        (["{f}/none", "--to", "{f}/template.nii.gz"], "does not exist"),
        (["{f}/scans"], "--to"),
    ):
        assert main(["group", *(word.format(f=people) for word in words), "-o", str(tmp_path / "o")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "o").exists()
