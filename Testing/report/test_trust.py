"""What a user is told about trust: regions to jump to, volumes with a confidence, radii of points, the page
of the report."""

import json
import re

import numpy as np
import pytest
from test_report import METRICS, _result

from SymRegistrationLib.geometry import regions
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import PointSet, read_points, write_points
from SymRegistrationLib.geometry.transform_files import write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import write_volume
from SymRegistrationLib.jobs.apply import Application, apply_transform
from SymRegistrationLib.quality import checks
from SymRegistrationLib.quality.volume_change import folding_regions, volume_changes
from SymRegistrationLib.report import trust
from SymRegistrationLib.report.page import write_report

TOLD = {
    "kind": "runs",
    "runs": 8,
    "level": 68,
    "mean_mm": 0.8,
    "median_mm": 0.7,
    "p95_mm": 1.9,
    "voxel_mm": 2.0,
    "calibrated": True,
    "on": "known warps",
    "judged": {"coverage_68": 69.0, "rank": 0.6},
    "times": {"50": 0.8, "68": 1.0, "95": 2.0},
    "patch_mm": 6.0,
    "disagreement": "",
    "worst": [],
}


def test_folds_are_listed_by_size_with_their_place(oblique):
    jacobian = np.ones(oblique.shape, np.float32)
    jacobian[2:4, 3, 5] = -0.5
    jacobian[4, 4, 5] = 0.0  # touches the first at an edge: the same place
    jacobian[10, 20, 25] = -2.0
    found = folding_regions(jacobian, oblique)
    assert found["count"] == 2 and [r["voxels"] for r in found["regions"]] == [3, 1]
    assert found["regions"][0]["worst"] == pytest.approx(-0.5) and found["regions"][1]["worst"] == pytest.approx(-2.0)
    np.testing.assert_allclose(found["regions"][1]["centre"], oblique.points((10, 20, 25)), atol=0.01)
    np.testing.assert_allclose(found["regions"][0]["centroid"], oblique.points(((2 + 3 + 4) / 3, 10 / 3, 5)), atol=0.01)
    assert found["regions"][1]["ml"] == pytest.approx(3.0 * 1.5 * 1.2 / 1000)
    assert folding_regions(np.ones(oblique.shape), oblique) == {"count": 0, "regions": []}


def test_the_centre_of_a_ring_lies_on_the_ring():
    d, h = np.indices((21, 21)) - 10
    mask = ((np.hypot(d, h) > 7) & (np.hypot(d, h) < 9))[:, :, None].repeat(3, 2)
    found, count = regions.regions(mask, mask.astype(float), Grid.centred(mask.shape, 1.0, (0, 0, 0)))
    assert count == 1 and np.abs(found[0].centroid).max() < 0.01
    assert 6.9 < np.hypot(*sorted(np.abs(found[0].centre))[1:]) < 9.1


def test_a_value_between_voxels_and_outside(oblique):
    array = np.indices(oblique.shape)[1].astype(float)
    points = oblique.points([(3.25, 4.5, 6), (2, 23.4, 3), (-3, 1, 1)])
    np.testing.assert_allclose(regions.values_at(array, oblique, points), [4.5, 23.0, np.nan], atol=1e-6)


def test_volume_change_is_the_integral_of_the_determinant():
    grid = Grid.centred((40, 40, 40), 2.0, (0, 0, 0))
    radius = np.linalg.norm(np.indices(grid.shape) - 19.5, axis=0)
    labels = np.where(radius < 12, 7, 0)
    table = volume_changes(labels, np.full(grid.shape, 1.2), grid)
    ml = (labels > 0).sum() * 8 / 1000
    assert set(table) == {"7"} and table["7"]["plus_minus_ml"] is None
    assert table["7"]["fixed_ml"] == pytest.approx(ml) and table["7"]["change_percent"] == pytest.approx(20)
    # Labels are counted by name, not in a table up to the largest: here that would take 5 GB.
    assert (
        volume_changes(np.where(radius < 12, 614454277, 0), np.full(grid.shape, 1.2), grid)["614454277"] == table["7"]
    )
    # A sphere of 24 mm has 7238 mm^2; in 10 mm patches each moving by sigma = 1 mm an axis: 1 mm * 10 mm *
    # sqrt(7238 mm^2)
    sure = volume_changes(labels, np.full(grid.shape, 1.2), grid, np.full(grid.shape, 1.8779), 10.0)
    assert sure["7"]["plus_minus_ml"] == pytest.approx(7238**0.5 * 10 / 1000, rel=0.06)


def _run_folder(folder, calibrated: bool):
    """A run's folder: a shift by (3, 0, 0) mm, an uncertainty map that grows along z."""
    grid = Grid.from_itk((20, 20, 20), (2, 2, 2), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    shift = np.zeros((*grid.shape, 3), np.float32)
    shift[..., 0] = 3
    write_transform(folder / "forward.h5", DenseTransform(grid, shift))
    write_transform(folder / "inverse.h5", DenseTransform(grid, -shift))
    write_volume(folder / "uncertainty.nii.gz", (0.1 * np.indices(grid.shape)[0]).astype(np.float32), grid)
    metrics = {
        "job": {"fixed": "f.nii.gz", "moving": "m.nii.gz"},
        "uncertainty": {**TOLD, "calibrated": calibrated},
        "files": {"forward": "forward.h5", "inverse": "inverse.h5", "uncertainty": "uncertainty.nii.gz"},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder / "forward.h5")


@pytest.mark.parametrize("ending", ["csv", "fcsv", "mrk.json"])
def test_points_carry_the_radius_of_the_place_on_the_fixed_scan(tmp_path, ending):
    transform = _run_folder(tmp_path, True)
    write_points(tmp_path / "p.csv", PointSet(np.array([[13.0, 10, 20], [13, 10, 30], [13, 10, 500]]), ("a", "b", "c")))
    out = tmp_path / f"out.{ending}"
    done = apply_transform(Application(str(tmp_path / "p.csv"), transform, str(out), kind="points"))
    assert done["radius_mm"] == [1.0, 1.5, None], "0.1 mm a voxel of 2 mm, read at the fixed end"
    text = out.read_text()
    assert "68 %: within 1.00 mm" in text and "68 %: within 1.50 mm" in text and text.count("within") == 2
    np.testing.assert_allclose(read_points(out).points[:2], [[10, 10, 20], [10, 10, 30]], atol=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "metrics.json").unlink(), "no metrics.json"),
        (lambda folder: _run_folder(folder, False), "relative only"),
        (lambda folder: (folder / "uncertainty.nii.gz").unlink(), "is missing"),
        (
            lambda folder: (folder / "metrics.json").write_text(
                (folder / "metrics.json").read_text().replace('"uncertainty": {', '"was": {')
            ),
            "--uncertainty 8",
        ),
    ],
)
def test_why_a_point_has_no_radius(tmp_path, change, words):
    transform = _run_folder(tmp_path, True)
    change(tmp_path)
    write_points(tmp_path / "p.csv", PointSet(np.array([[13.0, 10, 20]]), ("a",)))
    done = apply_transform(Application(str(tmp_path / "p.csv"), transform, str(tmp_path / "o.csv"), kind="points"))
    assert done["radius_mm"] is None and words in done["no_radius"] and "within" not in (tmp_path / "o.csv").read_text()


def _page(folder, result=None, **changes):
    write_report(folder / "report.html", result or _result(), {**METRICS, **changes})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_names_its_thresholds_and_what_to_try(tmp_path):
    page = _page(tmp_path)
    assert "Can I trust it?" in page and "not asked for" in page and "--uncertainty 8" in page
    result = _result()
    result.uncertainty = np.linspace(0, 3, result.jacobian.size, dtype=np.float32).reshape(result.jacobian.shape)
    place = {"centre": result.fixed.grid.centre.tolist(), "centroid": [0, 0, 0], "voxels": 30, "ml": 0.4, "worst": 2.5}
    page = _page(tmp_path, result, uncertainty={**TOLD, "worst": [place]})
    assert "calibrated on known warps" in page and "held 69 %" in page and "Where it is least certain" in page
    assert len(re.findall(r"\.worst-[a-z]+1\{background-image", page)) == 3, "three views of the place"
    page = _page(tmp_path, result, uncertainty={**TOLD, "calibrated": False})
    assert "relative only" in page and "held 69 %" not in page


@pytest.mark.parametrize("p95, level", [(2.9, "good"), (4.0, "look"), (7.0, "bad")])
def test_the_light_of_the_uncertainty_follows_its_threshold(p95, level):
    told = {**TOLD, "p95_mm": p95}  # working voxel 2 mm: good below 3 mm, bad from 6 mm
    light = next(light for light in trust.lights({**METRICS, "uncertainty": told}) if light.what == "uncertainty")
    assert light.level == level and f"green below {checks.UNCERTAIN_GOOD:g}" in light.threshold
    assert any(
        check.level == level and "Calibrated" in check.text for check in checks.checks({**METRICS, "uncertainty": told})
    )


@pytest.mark.parametrize(
    "values, level, words",
    [
        ((0.1, 0.4, 0.7), "good", "more alike"),
        ((0.2, 0.65, 0.64999), "good", "more alike"),
        ((0.2, 0.65, 0.646), "good", "below 0.005"),
        ((0.2, 0.65, 0.64), "bad", "LESS alike"),
        ((1.0, 1.0, 0.99996), "good", "were and are alike"),
        ((0.95, 0.9, 0.94), "bad", "LESS alike"),
        ((0.3, 0.3, 0.302), "look", "NO more alike"),
    ],
)
def test_a_similarity_that_moves_in_its_last_digits_is_no_loss(values, level, words):
    similarity = {"name": "lncc", **dict(zip(checks.STAGES, values))}
    found = checks.checks({"similarity": similarity})
    assert [check.level for check in found] == [level] and words in found[0].text and "0.005" in found[0].text


def test_disagreement_folds_and_surprising_landmarks_are_red_or_yellow(tmp_path):
    told = {**TOLD, "disagreement": "repeated runs disagree wildly"}
    marks = {
        "count": 4,
        "mean_before_mm": 9.0,
        "mean_aligned_mm": 5.0,
        "mean_after_mm": 2.0,
        "p95_after_mm": 5.0,
        "labels": list("abcd"),
        "before_mm": [9.0] * 4,
        "after_mm": [1.0, 1.0, 1.0, 5.0],
        "radius_mm": [1.0, 1.0, None, 1.0],
    }
    quality = {**METRICS["quality"], "folded_voxels": 3, "folded_percent": 0.005}
    folding = {
        "count": 1,
        "regions": [{"centre": [1, 2, 3], "centroid": [1, 2, 3], "voxels": 3, "ml": 0.003, "worst": -0.2}],
    }
    found = {
        light.what: light
        for light in trust.lights(
            {**METRICS, "uncertainty": told, "landmarks": marks, "quality": quality, "folding": folding}
        )
    }
    assert (
        found["uncertainty"].level == "bad"
        and found["folding"].level == "look"
        and "1 places" in found["folding"].found
    )
    assert "1 of 4" in found["landmarks and radii"].found and "(d)" in found["landmarks and radii"].found
    volumes = {
        "17": {"fixed_ml": 4.0, "moving_ml": 4.4, "change_ml": 0.4, "change_percent": 10.0, "plus_minus_ml": 0.15}
    }
    page = _page(tmp_path, quality=quality, folding=folding, volumes=volumes, landmarks=marks)
    assert (
        "Folded places" in page
        and re.search("<td>1(.0)?, 2(.0)?, 3(.0)?<.td>", page)
        and "label 17" in page
        and "\u00b1 0.15" in page
        and "68 % radius" in page
    )
