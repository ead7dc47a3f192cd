"""The report: self-contained, right way round, right colours, stated thresholds, a command that repeats the run."""

import base64
import dataclasses
import gc
import json
import re
import shlex
import tracemalloc
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from SymRegistrationLib.commands.arguments import build_parser
from SymRegistrationLib.commands.cli import _job_of
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import Volume
from SymRegistrationLib.job import Job, Options
from SymRegistrationLib.quality import checks
from SymRegistrationLib.report import drawing, rows
from SymRegistrationLib.report.page import write_report
from SymRegistrationLib.report.views import unaligned

OBLIQUE = sitk.VersorTransform((0.3, 0.5, 0.81), np.radians(20)).GetMatrix()


def _ball(grid, centre=None):
    """Intensity 100 inside a ball of a third of the field of view, brighter towards its middle."""
    points = grid.points(np.moveaxis(np.indices(grid.shape), 0, -1)) - (grid.centre if centre is None else centre)
    radius = np.linalg.norm(points, axis=-1) / (np.array(grid.shape) * grid.spacing).min() * 3
    return np.where(radius < 1, 100 + 100 * (1 - radius), 0).astype(np.float32)


def _result(grid=None, name="fixed.nii.gz"):
    grid = grid or Grid.from_itk((40, 36, 24), (1.5, 1.5, 2.5), (5, 6, 7), OBLIQUE)
    ball = _ball(grid)
    jacobian = np.ones(grid.shape, np.float32)
    return SimpleNamespace(
        fixed=Volume(ball, grid, name),
        moving=Volume(ball, grid, "moving.nii.gz"),
        warped_moving=ball,
        map_grid=grid,
        jacobian=jacobian,
        ice_mm=0 * jacobian,
        uncertainty=None,
        forward=DenseTransform(grid, np.zeros((*grid.shape, 3), np.float32)),
    )


METRICS = {
    "version": "0.1.0",
    "method": "syn",
    "preset": "default",
    "similarity_measure": "lncc",
    "device": "cpu",
    "seed": 0,
    "peak_memory_gb": 1.5,
    "alignment": {
        "kind": "affine",
        "confidence": 0.6,
        "unsure": False,
        "similarity": 0.9,
        "matrix": np.eye(4).tolist(),
    },
    "quality": {
        "folded_voxels": 0,
        "folded_percent": 0.0,
        "folded_percent_content": 0.0,
        "jacobian_min": 0.4,
        "jacobian_median": 1.0,
        "jacobian_max": 2.0,
        "sd_log_jacobian": 0.2,
        "ice_mean_mm": 0.02,
        "ice_p95_mm": 0.05,
        "ice_max_mm": 0.3,
        "ice_mean_voxel": 0.02,
        "inverse_method": "symmetric",
        "residual_voxel": 0.1,
    },
    "similarity": {"name": "lncc", "before": 0.1, "aligned": 0.4, "after": 0.7},
    "labels": None,
    "landmarks": None,
    "seconds": {"read": 0.5, "align": 2.0, "method": 9.0, "output": 1.0, "total": 12.5},
    "notes": [],
    "environment": {"python": "3.11", "torch": "2.13"},
    "job": dataclasses.asdict(Job("f.nii.gz", "m.nii.gz", "out")),
}


def _page(tmp_path, result=None, **changes):
    write_report(tmp_path / "report.html", result or _result(), {**METRICS, **changes})
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def _pictures(page, folder):
    """Class name -> array of every inline PNG, decoded by SimpleITK."""
    found = {}
    for name, data in re.findall(r"\.([a-z]+-[a-z]+)\{background-image:url\(data:image/png;base64,([^)]+)\)", page):
        (folder / "p.png").write_bytes(base64.b64decode(data))
        found[name] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "p.png")))
    return found


def test_the_page_needs_nothing_else_and_is_well_formed(tmp_path):
    page = _page(tmp_path)
    assert not re.search(r"https?:|src=|@import|<link", page)

    class Balance(HTMLParser):
        open_tags: list = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "input", "rect", "line", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("meta", "input", "rect", "line", "br"):
                assert self.open_tags.pop() == tag

    checker = Balance()
    checker.feed(page)
    assert checker.open_tags == []
    used = set(re.findall(r'class="layer ([a-z]+-[a-z]+)', page))
    assert used == set(_pictures(page, tmp_path)), "every picture is stored once and used"
    assert "prefers-color-scheme:dark" in page


def test_png_survives_another_decoder(tmp_path):
    random = np.random.default_rng(5)
    for shape in ((7, 9), (7, 9, 3), (7, 9, 4)):
        image = random.integers(0, 256, shape).astype(np.uint8)
        (tmp_path / "x.png").write_bytes(drawing.png(image))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.png"))), image)


@pytest.mark.parametrize("order", ["xyz", "zyx", "yzx"])
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("tilt", [False, True])
def test_pictures_are_the_right_way_round_whatever_the_axes(order, flip, tilt):
    """A mark at the patient's left, front and top must appear right, top or left, and top."""
    direction = np.eye(3)[:, ["xyz".index(c) for c in order]] * flip
    direction = np.array(OBLIQUE).reshape(3, 3) @ direction if tilt else direction
    grid = Grid.from_itk((40, 44, 48), (1.0, 1.0, 2.0), (-3, 8, 2), direction.ravel())
    array = _ball(grid)
    for view, normal in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        toward = np.array([1.0, -1.0, 1.0])
        toward[normal] = 0
        marked = array + 300 * (_ball(grid, grid.centre + 9 * toward) > 150)
        plane = next(p for p in drawing.planes(Volume(array, grid)) if p.name == view)
        cut = plane.cut(marked)
        rows, columns = np.nonzero(cut > 300)
        middle = (np.array(cut.shape) - 1) / 2
        left_or_right = 1 if view != "sagittal" else -1
        assert rows.mean() < middle[0] - 5 and (columns.mean() - middle[1]) * left_or_right > 5, (view, plane.letters)
    assert [p.letters for p in drawing.planes(Volume(array, grid))] == [
        ("A", "P", "R", "L"),
        ("S", "I", "R", "L"),
        ("S", "I", "A", "P"),
    ]


def test_pixels_are_square_in_mm():
    grid = Grid.from_itk((60, 60, 12), (1.0, 1.0, 5.0), (0, 0, 0), np.eye(3).ravel())
    array = np.zeros(grid.shape, np.float32)
    array[1:-1, 2:-2, 2:-2] = 1
    for plane in drawing.planes(Volume(array, grid)):
        assert plane.shape[0] == plane.shape[1] == drawing.PIXELS, "a cube of 60 mm looks like one"
        points = plane.points(grid)
        steps = np.linalg.norm(points[1, 0] - points[0, 0]), np.linalg.norm(points[0, 1] - points[0, 0])
        assert steps == pytest.approx((plane.pixel_mm, plane.pixel_mm))


def test_before_is_sampled_through_physical_space():
    grid = Grid.from_itk((20, 22, 24), (1.5, 1.0, 2.0), (4, 5, 6), OBLIQUE)
    points = grid.points(np.random.default_rng(3).uniform(1, 17, (200, 3)))
    ramp = (grid.points(np.moveaxis(np.indices(grid.shape), 0, -1)) @ [1.0, -2.0, 3.0]).astype(np.float32)
    np.testing.assert_allclose(
        drawing.sample_points(Volume(ramp, grid), points, -99), points @ [1.0, -2.0, 3.0], atol=1e-3
    )
    assert drawing.sample_points(Volume(ramp, grid), grid.points([[-2.0, 5, 5]]), -99) == [-99]


def test_jacobian_colours_no_change_growth_shrinkage_and_folding(tmp_path):
    result = _result()
    middle = np.array(result.fixed.grid.shape) // 2
    result.jacobian[:, : middle[1], :] = 2.0
    result.jacobian[:, middle[1] :, : middle[2]] = 0.5
    result.jacobian[middle[0] - 1 : middle[0] + 2, middle[1] + 3 : middle[1] + 6, middle[2] + 3 : middle[2] + 6] = -0.1
    seen = _pictures(_page(tmp_path, result), tmp_path)["jacobian-axial"].astype(int)
    magenta = (seen == drawing.FOLDED).all(axis=-1)
    assert 20 < magenta.sum() < 0.02 * magenta.size
    red, blue = seen[..., 0] - seen[..., 2] > 60, seen[..., 2] - seen[..., 0] > 60
    assert red.mean() > 0.3 and (blue & ~magenta).mean() > 0.1
    flat = _pictures(_page(tmp_path), tmp_path)["jacobian-axial"]
    assert (flat[..., 0] == flat[..., 2]).all(), "no change is grey"


def test_the_lattice_shows_the_deformation_without_the_alignment(tmp_path):
    """After a pure affine the lines are straight: every column of the picture is alike away from horizontal lines."""
    result = _result(Grid.centred((40, 40, 40), 2.0, (0, 0, 0)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(OBLIQUE).reshape(3, 3) * 1.2
    matrix[:3, 3] = (30, 0, -8)
    grid = result.fixed.grid
    points = grid.points(np.moveaxis(np.indices(grid.shape), 0, -1))
    result.forward = DenseTransform(grid, (points @ matrix[:3, :3].T + matrix[:3, 3] - points).astype(np.float32))
    plane = drawing.planes(result.fixed)[0]
    where = unaligned(plane, result, matrix)
    assert (
        np.abs(where - plane.points(grid)[..., [1, 0]] - (where - plane.points(grid)[..., [1, 0]])[0, 0]).max() < 1e-3
    )
    lines = drawing.lattice_lines(where, 10.0)
    assert 0.02 < (lines > 0.5).mean() < 0.2


def test_levels_of_the_verdict():
    def level(**changes):
        quality = {**METRICS["quality"], **changes.pop("quality", {})}
        return checks.verdict(checks.checks({**METRICS, "quality": quality, **changes}))[0]

    assert level() == "good"
    assert level(quality={"folded_percent": 0.009, "folded_voxels": 9}) == "look"
    assert level(quality={"folded_percent": 0.011, "folded_voxels": 11}) == "bad"
    assert level(quality={"ice_mean_voxel": 0.11}) == "look" and level(quality={"ice_mean_voxel": 0.51}) == "bad"
    assert level(quality={"jacobian_max": 11.0}) == "look"
    assert level(alignment={"kind": "affine", "unsure": True}) == "bad"
    assert level(similarity={"name": "lncc", "before": 0.5, "aligned": 0.6, "after": 0.55}) == "bad"
    marks = {"count": 3, "mean_before_mm": 5.0, "mean_aligned_mm": 2.0, "mean_after_mm": 3.0}
    assert level(landmarks=marks) == "bad"
    assert level(labels={"mean_before": 0.1, "mean_aligned": 0.5, "mean_after": 0.8, "per_label": {}}) == "good"


def test_landmarks_labels_and_notes_are_shown_and_names_are_escaped(tmp_path):
    page = _page(
        tmp_path,
        _result(name="<script>alert(1)</script>.nii.gz"),
        notes=["2 NaN <b>voxels</b>"],
        landmarks={
            "count": 2,
            "mean_before_mm": 5.5,
            "mean_aligned_mm": 3.0,
            "mean_after_mm": 1.25,
            "labels": ["tip & end", "base"],
            "before_mm": [5.0, 6.0],
            "after_mm": [1.0, 1.5],
        },
        labels={
            "mean_before": 0.1,
            "mean_aligned": 0.5,
            "mean_after": 0.8,
            "per_label": {"17": {"before": 0.1, "aligned": 0.5, "after": 0.8}},
        },
    )
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "2 NaN &lt;b&gt;voxels" in page
    assert "tip &amp; end" in page and ">1.25<" not in page and "1.25 mm registered" in page
    assert "label 17" in page and ">0.800<" in page


def test_poses_that_the_alignment_looked_at_are_shown_with_scores_and_reasons(tmp_path):
    aside, result = np.eye(4), _result()
    aside[0, 3] = 12.0
    poses = (("headers", 0.0629, 8.4, 12.0, aside), ("taken", 0.1834, 0.0, 0.0, np.eye(4)))
    candidates = [
        {"name": name, "score": score, "degrees": turn, "mm": mm, "matrix": matrix.tolist()}
        for name, score, turn, mm, matrix in poses
    ]
    told = {**METRICS["alignment"], "candidates": candidates, "reasons": ["Rigid, as <one> patient is."]}
    page = _page(tmp_path, result, alignment=told)
    pictures = _pictures(page, tmp_path)
    assert "score 0.063<br>8\u00b0 and 12 mm away" in page and "score 0.183</span>" in page
    assert "Rigid, as &lt;one&gt; patient is." in page
    # At the pose that was taken the scans are one and the same; at the headers' the ball lies 12 mm aside.
    fixed, headers, taken = (pictures[f"{name}-axial"].astype(float) for name in ("fixed", "posea", "poseb"))
    half = fixed[::2, ::2]
    assert np.abs(taken - half).mean() < 1.5
    middle = [(image.sum(0) * np.arange(image.shape[1])).sum() / image.sum() for image in (taken, headers)]
    pixel = 2 * drawing.planes(result.fixed)[0].pixel_mm
    assert 9 < abs(middle[0] - middle[1]) * pixel < 12.5  # the scan is tilted
    assert 'class="layer outline-axial' in page and "What the alignment looked at" not in _page(tmp_path)


@pytest.mark.parametrize(
    "job",
    [
        Job("a b.nii.gz", "m'x.nrrd", "out dir"),
        Job(
            "f.mha",
            "m.mha",
            "o",
            fixed_mask="k.nii",
            fixed_labels="l",
            moving_labels="n",
            fixed_points="p.csv",
            moving_points="q.csv",
            transform_format="nrrd",
            report=False,
            guide_with_points=True,
            options=Options(
                method="hsyn",
                preset="fast",
                similarity="mind",
                initial="rigid",
                refine=2,
                spacing=1.5,
                device="cuda:1",
                seed=7,
                threads=4,
                weights="w.safetensors",
                uncertainty=5,
                memory_gb=6.0,
                method_options={"size": "small", "deep": True, "k": 3},
            ),
        ),
        Job("f", "m", "o", composite=True, options=Options(initial="start.tfm")),
        Job("f", "m", "o", fixed_contrasts=["f 2", "f3"], moving_contrasts=["m2", "m3"]),
        Job("f", "m", "o", options=Options(uncertainty="fast", maps=True)),
        Job("f", "m", "o", options=Options(uncertainty=3, ensemble="hsyn,caml", average=True)),
    ],
)
def test_the_command_repeats_the_very_same_job(tmp_path, job):
    words = shlex.split(rows.command_of(json.loads(job.to_json())))
    assert words[0] == "symreg"
    assert _job_of(build_parser().parse_args(words[1:])) == job
    (tmp_path / "metrics.json").write_text(json.dumps({"job": json.loads(job.to_json()), "seed": 1}))
    again = _job_of(build_parser().parse_args(["register", "--job", str(tmp_path / "metrics.json"), "-o", "elsewhere"]))
    assert again == dataclasses.replace(job, output="elsewhere")


def test_a_large_volume_is_not_copied_and_makes_no_large_page(tmp_path):
    small = Grid.centred((50, 50, 50), 4.0, (0, 0, 0))
    peaks: dict[int, float] = {}
    for size in (96, 96, 96, 192):  # pictures are drawn in threads: how many at once, chance decides
        grid = Grid.centred((size,) * 3, 192 / size, (0, 0, 0))
        scan = _ball(small)[:48, :48, :48].astype(np.int16)
        for axis in range(3):
            scan = scan.repeat(size // 48, axis)
        flat = np.broadcast_to(np.float32(1), grid.shape)
        result = SimpleNamespace(
            fixed=Volume(scan, grid, "f"),
            moving=Volume(scan, grid, "m"),
            warped_moving=scan,
            map_grid=grid,
            jacobian=flat,
            ice_mm=flat,
            uncertainty=flat,
            forward=DenseTransform(small, np.zeros((50, 50, 50, 3), np.float32)),
        )
        gc.collect()
        tracemalloc.start()
        try:
            write_report(tmp_path / "r.html", result, METRICS)
            peaks[size] = max(tracemalloc.get_traced_memory()[1], peaks.get(size, 0.0))
        finally:
            tracemalloc.stop()
    print("peak MB", {size: round(peak / 1e6, 1) for size, peak in peaks.items()})
    assert peaks[192] - peaks[96] < 4 * (192**3 - 96**3), "less than one copy as float32"
    assert (tmp_path / "r.html").stat().st_size < 4e6


def test_missing_parts_and_empty_pictures_do_no_harm(tmp_path):
    grid = Grid.centred((5, 6, 7), 1.0, (0, 0, 0))
    result = _result(grid)
    result.fixed = Volume(np.arange(210, dtype=np.float32).reshape(5, 6, 7), grid, "tiny")
    write_report(tmp_path / "r.html", result, {})
    assert "No fault found" in (tmp_path / "r.html").read_text(encoding="utf-8")
