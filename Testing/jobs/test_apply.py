"""Images, labels and points through transforms whose effect is known; points go the way that points go."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.points import PointSet, read_points, write_points
from SymRegistrationLib.geometry.resampling import covering, invert_points, map_points
from SymRegistrationLib.geometry.transform_files import write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform
from SymRegistrationLib.geometry.volumes import Volume, read_volume, write_volume
from SymRegistrationLib.job import InputError, RegistrationError
from SymRegistrationLib.jobs import apply
from SymRegistrationLib.jobs.apply import Application, apply_transform


def _rotation(degrees, axis=(1.0, 2.0, -1.0)):
    transform = sitk.VersorTransform(tuple(np.array(axis) / np.linalg.norm(axis)), float(np.radians(degrees)))
    return np.array(transform.GetMatrix()).reshape(3, 3)


FIXED = Grid.from_itk((30, 28, 26), (2.0, 2.5, 3.0), (-20, 10, 5), _rotation(25).ravel())
MATRIX = np.eye(4)
MATRIX[:3, :3] = _rotation(70, (0, 1, 3)) * 1.1
MATRIX[:3, 3] = (40, -25, 15)


def _grid_points(grid):
    return grid.points(np.moveaxis(np.indices(grid.shape), 0, -1))


def _forward(points):
    """A strong rotation with a smooth bend: fixed point -> moving point, LPS mm."""
    bent = points + 4 * np.sin(points[..., [1, 2, 0]] / 18)
    return bent @ MATRIX[:3, :3].T + MATRIX[:3, 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run leaves it: forward, inverse, metrics.json, and the scans."""
    folder = tmp_path_factory.mktemp("run")
    grown = FIXED.padded(12)
    forward = DenseTransform(grown, (_forward(_grid_points(grown)) - _grid_points(grown)).astype(np.float32))
    corners = _forward(FIXED.corners())
    size = np.ceil((np.ptp(corners, axis=0) + 20) / 2.4).astype(int)
    moving = Grid.from_itk(size.tolist(), (2.4,) * 3, corners.min(0) - 10, np.eye(3).ravel())
    lattice = moving.resampled(6.0)
    points = _grid_points(lattice).reshape(-1, 3)
    back, _ = invert_points(forward.to_itk(), points, tolerance=0.01)
    inverse = DenseTransform(lattice, (back - points).reshape(*lattice.shape, 3).astype(np.float32))
    write_transform(folder / "forward.h5", forward)
    write_transform(folder / "inverse.h5", inverse)
    (folder / "metrics.json").write_text(
        json.dumps(
            {
                "files": {"forward": "forward.h5", "inverse": "inverse.h5"},
                "job": {"fixed": str(folder / "fixed.nii.gz"), "moving": str(folder / "moving.nii.gz")},
            }
        )
    )
    ramp = (_grid_points(moving) @ [1.0, -2.0, 0.5]).astype(np.float32)
    write_volume(folder / "moving.nii.gz", ramp, moving)
    write_volume(folder / "fixed.nii.gz", np.arange(np.prod(FIXED.shape), dtype=np.float32).reshape(FIXED.shape), FIXED)
    return folder


def _image(run, out, **more):
    request = Application(
        str(run / "moving.nii.gz"), str(run / "forward.h5"), str(out), str(run / "fixed.nii.gz"), **more
    )
    return apply_transform(request)


@pytest.mark.parametrize("how, tolerance", [("linear", 0.05), ("bspline", 0.1), ("nearest", 5.0)])
def test_an_image_is_pulled_back_through_the_transform(run, tmp_path, how, tolerance):
    _image(run, tmp_path / "out.nii.gz", interpolation=how)
    found = read_volume(tmp_path / "out.nii.gz")
    expected = _forward(_grid_points(FIXED)) @ [1.0, -2.0, 0.5]
    assert found.grid.same_as(FIXED)
    assert np.abs(found.array - expected)[2:-2, 2:-2, 2:-2].max() < tolerance


def test_beyond_the_grid_of_the_transform_its_border_counts_not_zero(run):
    forward = sitk.ReadTransform(str(run / "forward.h5"))
    dense = DenseTransform(
        FIXED.padded(12), (_forward(_grid_points(FIXED.padded(12))) - _grid_points(FIXED.padded(12))).astype(np.float32)
    )
    far = FIXED.padded(30).corners()
    np.testing.assert_allclose(map_points(forward, far), dense.map_points(far), atol=1e-3)
    wide = covering(forward, FIXED.padded(30))
    np.testing.assert_allclose([wide.TransformPoint(p) for p in far.tolist()], dense.map_points(far), atol=1e-3)


def test_integers_are_rounded_and_labels_never_mixed(tmp_path):
    grid = Grid.from_itk((8, 8, 8), (1, 1, 1), (0, 0, 0), np.eye(3).ravel())
    image = np.zeros((8, 8, 8), np.uint8)
    image[:, :, 4:] = 3
    write_volume(tmp_path / "i.nii.gz", image, grid)
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.6, 0, 0)), str(tmp_path / "t.tfm"))
    for kind, how, middle in (("image", "linear", 2), ("labels", "nearest", 3), ("labels", "smooth", 3)):
        apply_transform(
            Application(
                str(tmp_path / "i.nii.gz"),
                str(tmp_path / "t.tfm"),
                str(tmp_path / "o.nii.gz"),
                str(tmp_path / "i.nii.gz"),
                kind,
                how,
            )
        )
        assert read_volume(tmp_path / "o.nii.gz").array[4, 4].tolist() == [0, 0, 0, middle, 3, 3, 3, 0]


def test_smooth_labels_follow_a_sphere_better_than_nearest(tmp_path):
    coarse = Grid.centred((16, 16, 16), 4.0, (0, 0, 0))
    fine = Grid.centred((60, 60, 60), 1.0, (0, 0, 0))
    inside = {g: np.linalg.norm(_grid_points(g), axis=-1) < 22 for g in (coarse, fine)}
    labels = np.where(inside[coarse], np.where(_grid_points(coarse)[..., 0] > 0, 7, 200), 0).astype(np.int16)
    write_volume(tmp_path / "l.nii.gz", labels, coarse)
    write_volume(tmp_path / "r.nii.gz", inside[fine].astype(np.uint8), fine)
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.0, 0, 0)), str(tmp_path / "t.tfm"))
    wrong = {}
    for how in ("nearest", "smooth"):
        apply_transform(
            Application(
                str(tmp_path / "l.nii.gz"),
                str(tmp_path / "t.tfm"),
                str(tmp_path / "o.nrrd"),
                str(tmp_path / "r.nii.gz"),
                "labels",
                how,
            )
        )
        found = read_volume(tmp_path / "o.nrrd").array
        assert set(np.unique(found)) == {0, 7, 200} and found.dtype == np.uint8
        wrong[how] = ((found > 0) != inside[fine]).sum()
    assert wrong["smooth"] < 0.75 * wrong["nearest"]


def _landmarks(seed=11):
    print("seed", seed)
    index = np.random.default_rng(seed).uniform(0.15, 0.85, (40, 3)) * np.array(FIXED.shape)
    fixed = FIXED.points(index)
    return fixed, _forward(fixed)


@pytest.mark.parametrize(
    "transform, origin, method, tolerance",
    [
        ("forward.h5", "moving", "inverse.h5", 0.15),
        ("inverse.h5", "moving", "inverse.h5, as it is", 0.15),
        ("forward.h5", "fixed", "forward.h5, as it is", 0.15),
        ("inverse.h5", "fixed", "forward.h5", 0.15),
        ("alone.h5", "moving", "numerical inverse", 0.15),
        ("alone.h5", "fixed", "alone.h5, as it is", 0.15),
    ],
)
def test_points_of_either_scan_reach_the_other_with_either_file(run, tmp_path, transform, origin, method, tolerance):
    (tmp_path / "alone.h5").write_bytes((run / "forward.h5").read_bytes())
    folder = tmp_path if transform == "alone.h5" else run
    fixed, moving = _landmarks()
    given, expected = (moving, fixed) if origin == "moving" else (fixed, moving)
    write_points(tmp_path / "in.csv", PointSet(given, tuple(f"P{k}" for k in range(40))))
    result = apply_transform(
        Application(
            str(tmp_path / "in.csv"),
            str(folder / transform),
            str(tmp_path / "out.mrk.json"),
            kind="points",
            points_from=origin,
        )
    )
    found = read_points(tmp_path / "out.mrk.json")
    assert np.linalg.norm(found.points - expected, axis=1).max() < tolerance
    assert np.linalg.norm(_forward(given) - _forward(expected), axis=1).mean() > 20, "the wrong way would be seen"
    assert result["method"] == method and result["count"] == 40 and not result["notes"]
    assert result["residual_max_mm"] < 0.1 and found.labels[3] == "P3"
    if folder == run:
        assert (Path(result["from"]).name[:-7], Path(result["to"]).name[:-7]) == (
            ("moving", "fixed") if origin == "moving" else ("fixed", "moving")
        )


def test_slicer_carries_points_of_the_moving_scan_to_the_same_place(run, tmp_path):
    import slicer

    scene = slicer.vtkMRMLScene()
    node, store = slicer.vtkMRMLTransformNode(), slicer.vtkMRMLTransformStorageNode()
    scene.AddNode(node)
    scene.AddNode(store)
    store.SetFileName(str(run / "forward.h5"))
    assert store.ReadData(node) == 1
    fixed, moving = _landmarks()
    to_parent = node.GetTransformToParent()
    seen = np.array([to_parent.TransformPoint(p) for p in (moving * [-1, -1, 1]).tolist()]) * [-1, -1, 1]
    ours, residual = invert_points(sitk.ReadTransform(str(run / "forward.h5")), moving)
    assert np.linalg.norm(seen - ours, axis=1).max() < 0.05 and residual.max() < 0.002


def test_a_foreign_inverse_is_noticed(run, tmp_path):
    fixed, moving = _landmarks()
    write_points(tmp_path / "in.csv", PointSet(moving, ("",) * 40))
    for name in ("forward.h5", "metrics.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    sitk.WriteTransform(sitk.TranslationTransform(3, (9.0, 0, 0)), str(tmp_path / "inverse.h5"))
    request = Application(
        str(tmp_path / "in.csv"), str(tmp_path / "forward.h5"), str(tmp_path / "out.csv"), kind="points"
    )
    result = apply_transform(request)
    assert result["method"] == "numerical inverse" and "does not belong to it" in result["notes"][0]
    assert np.linalg.norm(read_points(tmp_path / "out.csv").points - fixed, axis=1).max() < 0.15
    with pytest.raises(InputError, match="is not the inverse of"):
        apply_transform(Application(**{**vars(request), "inverse": str(tmp_path / "inverse.h5")}))


def test_points_outside_the_transform_are_told(run, tmp_path):
    write_points(tmp_path / "in.csv", PointSet(FIXED.padded(60).corners()[:1], ("far",)))
    result = apply_transform(
        Application(
            str(tmp_path / "in.csv"),
            str(run / "forward.h5"),
            str(tmp_path / "out.csv"),
            kind="points",
            points_from="fixed",
        )
    )
    assert result["outside"] == 1 and "outside the transform's grid" in result["notes"][0]


def test_affine_and_composite_files(run, tmp_path):
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(MATRIX[:3, :3].ravel())
    affine.SetTranslation(MATRIX[:3, 3])
    sitk.WriteTransform(affine, str(tmp_path / "a.tfm"))
    sitk.WriteTransform(
        sitk.CompositeTransform([affine, sitk.TranslationTransform(3, (1.0, 2, 3))]), str(tmp_path / "c.h5")
    )
    points = FIXED.corners()
    for name, source in (
        ("a.tfm", points @ MATRIX[:3, :3].T + MATRIX[:3, 3]),
        ("c.h5", (points + [1, 2, 3]) @ MATRIX[:3, :3].T + MATRIX[:3, 3]),
    ):
        write_points(tmp_path / "in.csv", PointSet(source, ("",) * 8))
        apply_transform(
            Application(str(tmp_path / "in.csv"), str(tmp_path / name), str(tmp_path / "out.fcsv"), kind="points")
        )
        np.testing.assert_allclose(read_points(tmp_path / "out.fcsv").points, points, atol=2e-3)


def test_the_transform_of_the_other_direction_is_noticed_for_images(run, tmp_path):
    sitk.WriteTransform(sitk.TranslationTransform(3, (900.0, 0, 0)), str(tmp_path / "t.tfm"))
    result = apply_transform(
        Application(
            str(run / "moving.nii.gz"), str(tmp_path / "t.tfm"), str(tmp_path / "o.nii.gz"), str(run / "fixed.nii.gz")
        )
    )
    assert "other direction" in result["notes"][0]


@pytest.mark.parametrize(
    "kind, image, transform, reference, told",
    [
        ("image", "moving", "forward", "fixed", 0),
        ("image", "fixed", "inverse", "moving", 0),
        ("image", "fixed", "forward", "fixed", 1),
        ("labels", "labels", "forward", "moving", 1),
        ("labels", "labels", "inverse", "fixed", 1),
        ("labels", "labels", "inverse", "moving", 0),
    ],
)
def test_a_run_knows_its_direction(run, tmp_path, kind, image, transform, reference, told):
    write_volume(tmp_path / "labels.nii.gz", np.ones(FIXED.shape, np.uint8), FIXED)
    source = (tmp_path if image == "labels" else run) / f"{image}.nii.gz"
    paths = [str(p) for p in (source, run / f"{transform}.h5", tmp_path / "o.nii.gz", run / f"{reference}.nii.gz")]
    notes = [note for note in apply_transform(Application(*paths, kind))["notes"] if "the other way is" in note]
    assert len(notes) == told
    if told:
        ends = ("moving", "fixed") if transform == "forward" else ("fixed", "moving")
        other = "inverse" if transform == "forward" else "forward"
        scans = " onto ".join(f"'{run / end}.nii.gz'" for end in ends)
        assert notes == [f"{transform}.h5 brings {scans}; the other way is {other}.h5"]


def test_a_failed_write_leaves_nothing(run, tmp_path, monkeypatch):
    def full(path, array, grid):
        path.write_bytes(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(apply, "write_volume", full)
    with pytest.raises(RegistrationError, match="the disk is full"):
        _image(run, tmp_path / "o.nii.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, part",
    [
        ({"kind": "mesh"}, "kind is 'mesh'"),
        ({"interpolation": "cubic"}, "not for image"),
        ({"kind": "labels", "interpolation": "bspline"}, "not for labels"),
        ({"reference": None}, "no reference image"),
        ({"output": "x.png"}, "no known ending"),
        ({"output": "x.NII.GZ"}, "no known ending"),  # ITK would fail on it after the work
        ({"input": "R\udcf6ntgen.nii.gz"}, "not written in UTF-8"),  # Latin-1 on the disk; ITK would end the process
        ({"output": "R\udcf6ntgen.nii.gz"}, "not written in UTF-8"),
        ({"kind": "points", "output": "x.nii.gz"}, "no known ending"),
        ({"points_from": "left"}, "points_from"),
        ({"input": "nowhere.nii.gz"}, "'nowhere.nii.gz' does not exist"),
        ({"transform": "nowhere.h5"}, "'nowhere.h5' does not exist"),
        ({"transform": "{run}/moving.nii.gz"}, "not a displacement grid"),
        ({"transform": "{run}/metrics.json"}, "could not be read"),
        ({"output": "nofolder/x.nii.gz"}, "does not exist"),
        ({"output": "{run}/moving.nii.gz"}, "the output would replace the image"),
        ({"output": "{run}/fixed.nii.gz"}, "the output would replace the reference image"),
        ({"reference": None, "input": "p.mrk.json"}, "Add --points if 'p.mrk.json' holds landmarks"),
    ],
)
def test_bad_requests_are_refused(run, tmp_path, change, part):
    good = {
        "input": str(run / "moving.nii.gz"),
        "transform": str(run / "forward.h5"),
        "output": str(tmp_path / "o.nii.gz"),
        "reference": str(run / "fixed.nii.gz"),
    }
    change = {key: value.format(run=run) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(InputError) as error:
        apply_transform(Application.from_dict({**good, **change}))
    assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {"input": "a"},
        {"input": 1, "transform": "t", "output": "o"},
        {"input": "a", "transform": "t", "output": "o", "speed": "x"},
    ],
)
def test_requests_from_outside_are_checked(raw):
    with pytest.raises(InputError, match="apply request"):
        Application.from_dict(raw)


def test_inputs_are_left_alone(run):
    volume = Volume(np.ones((4, 4, 4), np.int16), Grid.centred((4, 4, 4), 1.0, (0, 0, 0)))
    before = volume.array.copy()
    from SymRegistrationLib.geometry.resampling import resample_image

    resample_image(volume, sitk.TranslationTransform(3, (0.5, 0, 0)), volume.grid)
    np.testing.assert_array_equal(volume.array, before)
