"""Training data: what belongs together is found, every bad scan is named, and the cache knows when it is stale."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from SymRegistrationLib.commands import cli
from SymRegistrationLib.geometry.grid import Grid, canonical_axes
from SymRegistrationLib.geometry.points import PointSet, write_points
from SymRegistrationLib.geometry.volumes import write_volume
from SymRegistrationLib.job import InputError, RegistrationError
from SymRegistrationLib.training import dataset, loop
from SymRegistrationLib.training import plan as training_plan
from SymRegistrationLib.training.dataset import Cache, Case
from SymRegistrationLib.training.options import TrainingOptions
from SymRegistrationLib.training.samples import Mixture, Part, Samples, all_pairs, seed_of
from SymRegistrationLib.training.synthetic import Synthesis


def scene(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label map: a bright ball with a brighter off-centre core, in world coordinates."""
    points = grid.points(np.moveaxis(np.indices(grid.shape), 0, -1))
    ball = np.linalg.norm(points, axis=-1) < 40
    core = np.linalg.norm(points - (12, 0, 8), axis=-1) < 14
    labels = np.where(core, 2, np.where(ball, 1, 0)).astype(np.int16)
    return (labels * 400 + 10).astype(np.float32), labels


def grid_of(spacing=4.0, size=28, axes=None) -> Grid:
    return Grid.centred((size,) * 3, spacing, (0, 0, 0), axes)


def store(folder: Path, name: str, grid: Grid, labels: str = "aseg", points: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image, found = scene(grid)
    write_volume(folder / f"{name}_T1w.nii.gz", image, grid)
    if labels:
        write_volume(folder / f"{name}_{labels}.nii.gz", found, grid)
    if points:
        write_points(
            folder / f"{name}_landmarks.csv", PointSet(np.array([[12.0, 0, 8], [0, 0, 0]]), ("core", "middle"))
        )


# ---------------------------------------------------------------------------------------------- finding


def test_flat_and_bids_folders(tmp_path):
    store(tmp_path / "flat", "anna", grid_of(), points=True)
    store(tmp_path / "flat", "bert", grid_of(), labels="")
    store(tmp_path / "bids" / "sub-01" / "ses-1" / "anat", "sub-01_ses-1", grid_of(), "desc-brain_dseg")
    store(tmp_path / "bids" / "sub-02" / "anat", "sub-02", grid_of())
    flat = dataset.find(tmp_path / "flat").cases
    assert [Path(c.image).name for c in flat] == ["anna_T1w.nii.gz", "bert_T1w.nii.gz"]
    assert flat[0].labels.endswith("anna_aseg.nii.gz") and flat[0].points.endswith("anna_landmarks.csv")
    assert flat[1].labels is None and flat[0].subject != flat[1].subject
    bids = dataset.find(tmp_path / "bids").cases
    assert [c.subject for c in bids] == ["sub-01_ses-1", "sub-02"]
    assert all(c.labels for c in bids)


def test_label_maps_are_not_taken_for_one_subject(tmp_path):
    for k in (1, 2, 3):
        write_volume(tmp_path / f"labels_{k:02d}.nii.gz", scene(grid_of())[1], grid_of())
    cases = dataset.find(tmp_path, only_labels=True).cases
    assert len({c.subject for c in cases}) == 3 and all(c.image is None for c in cases)


def test_tables_of_scans_and_of_pairs(tmp_path):
    (tmp_path / "scans.csv").write_text("image,labels,subject,split\na.nii,la.nii,one,train\nb.nii,,two,validation\n")
    listing = dataset.find(tmp_path / "scans.csv")
    assert listing.cases[0] == Case(str(tmp_path / "a.nii"), str(tmp_path / "la.nii"), subject="one", split="train")
    assert listing.part("validation") == [1] and listing.pairs is None
    (tmp_path / "pairs.tsv").write_text("fixed\tmoving\na.nii\tb.nii\na.nii\tc.nii\n")
    listing = dataset.find(tmp_path / "pairs.tsv")
    names = [Path(c.image).name for c in listing.cases]
    assert [(names[m], names[f]) for m, f in listing.pairs] == [("b.nii", "a.nii"), ("c.nii", "a.nii")]


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "neither a column"),
        ("picture\na.nii\n", "neither a column"),
        ("image,colour\na.nii,red\n", "unknown columns: colour"),
        ("image,split\na.nii,test\n", "line 2: split"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path, text, told):
    (tmp_path / "scans.csv").write_text(text)
    with pytest.raises(InputError, match=told):
        dataset.find(tmp_path / "scans.csv")


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="holds no scan"):
        dataset.find(tmp_path)


def test_dividing_by_share_by_name_and_by_table():
    listing = dataset.Listing(tuple(Case(f"scan_{k:02d}.nii", subject=str(k)) for k in range(20)), source="x")
    held = dataset.divide(listing, "0.15", 1).part("validation")
    assert len(held) == 3 and held == dataset.divide(listing, "0.15", 1).part("validation")
    assert dataset.divide(listing, "scan_17,scan_18", 0).part("validation") == [17, 18]
    with pytest.raises(InputError, match="'scan_77'"):
        dataset.divide(listing, "scan_77", 0)
    with pytest.raises(InputError, match="share from 0 to 0.9"):
        dataset.divide(listing, "1.5", 0)


# ---------------------------------------------------------------------------------------------- checking


@pytest.fixture
def spoiled(tmp_path):
    """Three good scans; a cut-off file, an empty one, and one whose label map is an image."""
    for name in ("a", "b", "c"):
        store(tmp_path, name, grid_of())
    whole = (tmp_path / "a_T1w.nii.gz").read_bytes()
    (tmp_path / "cut_T1w.nii.gz").write_bytes(whole[: len(whole) // 2])
    write_volume(tmp_path / "black_T1w.nii.gz", np.zeros((8, 8, 8), np.float32), grid_of(size=8))
    store(tmp_path, "noise", grid_of(), labels="")
    write_volume(tmp_path / "noise_aseg.nii.gz", np.random.default_rng(0).random((28, 28, 28), np.float32), grid_of())
    return tmp_path


def test_every_bad_scan_is_named_at_once(spoiled):
    with pytest.raises(InputError) as caught:
        dataset.check(dataset.find(spoiled))
    message = str(caught.value)
    assert "3 of 6 scans" in message
    assert all(name in message for name in ("cut_T1w", "black_T1w", "noise_aseg", "--bad-scans skip"))


def test_bad_scans_can_be_left_out(spoiled):
    listing, facts = dataset.check(dataset.find(spoiled), "skip")
    assert [Path(c.image).name[0] for c in listing.cases] == ["a", "b", "c"]
    assert len(listing.problems) == 3
    assert facts[0].spacing == pytest.approx(4.0) and np.allclose(facts[0].extent, 80, atol=8)


def test_pairs_with_a_bad_scan_go_with_it(spoiled):
    (spoiled / "pairs.csv").write_text("fixed,moving\na_T1w.nii.gz,cut_T1w.nii.gz\na_T1w.nii.gz,b_T1w.nii.gz\n")
    listing, _ = dataset.check(dataset.find(spoiled / "pairs.csv"), "skip")
    assert len(listing.pairs) == 1
    moving, fixed = listing.pairs[0]
    assert listing.cases[moving].image.endswith("b_T1w.nii.gz") and listing.cases[fixed].image.endswith("a_T1w.nii.gz")


# ---------------------------------------------------------------------------------------------- cache and samples


def test_scans_of_any_orientation_and_spacing_come_onto_one_grid(tmp_path, oblique):
    """The same scene stored upright, and oblique, flipped and anisotropic, agrees in the cache."""
    turned = Grid.centred((60, 50, 40), 1.0, (0, 0, 0))
    matrix = oblique.matrix.copy()
    matrix[:3, 3] = -matrix[:3, :3] @ ((np.array((40, 70, 80)) - 1) / 2)
    turned = Grid((40, 70, 80), matrix)
    store(tmp_path, "a", grid_of(2.0, 56))
    store(tmp_path, "b", turned)
    cases = dataset.find(tmp_path).cases
    cache = Cache(tmp_path / "cache", 4.0, (32, 32, 32))
    for case in cases:
        scan = cache.scan(case)
        labels = scan["labels"]
        volume = [float((labels == k).sum()) * 64 for k in (1, 2)]
        core = 4 / 3 * np.pi * 14**3
        assert volume[1] == pytest.approx(core, rel=0.1) and sum(volume) == pytest.approx(
            4 / 3 * np.pi * 40**3, rel=0.03
        )
        inside = scan["image"][labels == 2].float().mean()
        assert inside > 0.9 and scan["image"][labels == 0].float().mean() < 0.1
    # The core sits at (12, 0, 8) LPS: along the canonical axes of its own grid.
    where = (cache.scan(cases[0])["labels"][0, 0] == 2).nonzero().double().mean(0).numpy()
    axes = canonical_axes(grid_of().axes)
    assert np.allclose(where, 15.5 + axes.T @ (12, 0, 8) / 4, atol=0.3)


def test_what_lies_outside_a_mask_is_black(tmp_path):
    """The ball without the half that its mask leaves out, on the far side of a plane in world coordinates."""
    grid = grid_of(axes=canonical_axes(np.eye(3))[:, [2, 0, 1]])
    store(tmp_path, "a", grid)
    right = grid.points(np.moveaxis(np.indices(grid.shape), 0, -1))[..., 0] > 0
    write_volume(tmp_path / "a_mask.nii.gz", right.astype(np.uint8), grid)
    (case,) = dataset.find(tmp_path).cases
    scan = Cache(tmp_path / "cache", 4.0, (32, 32, 32)).scan(case)
    image, labels = scan["image"][0, 0].float(), scan["labels"][0, 0]
    centres = [(where > 0).nonzero().double().mean(0) for where in (image > 0.2, labels)]
    gone = float(((labels > 0) & (image < 0.05)).sum()) / float((labels > 0).sum())
    assert 0.4 < gone < 0.6 and float((centres[0] - centres[1]).norm()) > 2.5


def test_the_cache_notices_a_changed_file_and_repairs_itself(tmp_path):
    store(tmp_path, "a", grid_of(), points=True)
    (case,) = dataset.find(tmp_path).cases
    cache = Cache(tmp_path / "cache", 4.0, (32, 32, 32))
    first = cache.scan(case)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and torch.equal(cache.scan(case)["image"], first["image"])
    assert len(list((tmp_path / "cache").iterdir())) == 1
    files[0].write_bytes(b"damaged")
    assert torch.equal(cache.scan(case)["image"], first["image"])
    os.utime(case.image, ns=(1, 1))
    cache.scan(case)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written(tmp_path):
    store(tmp_path, "a", grid_of())
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistrationError, match="cannot be written"):
        Cache(tmp_path / "file", 4.0, (32, 32, 32)).scan(dataset.find(tmp_path).cases[0])


@pytest.fixture
def samples(tmp_path):
    for name in "ab":
        store(tmp_path, name, grid_of(), points=True)
    cases = dataset.find(tmp_path).cases
    cache = Cache(tmp_path / "cache", 4.0, (32, 32, 32))
    return Samples(
        Part(cases, all_pairs(cases)), Part(), cache, Synthesis(shape=(32,) * 3, spacing=4.0, shift=10.0), Mixture(), 0
    )


def test_labels_and_landmarks_follow_the_pose_of_a_real_scan(samples):
    """Both scans show one scene, so landmarks must lie where the labels do."""
    for position in range(4):
        pair = samples.training(position, 1.0).pair
        for labels, points in ((pair.fixed_labels, pair.points[0]), (pair.moving_labels, pair.points[1])):
            core = (labels[0, 0] == pair.values.index(2)).nonzero().float().mean(0)
            assert torch.allclose(points[0, 0], core, atol=0.5)


def test_a_position_is_a_pair(samples):
    one, again, next_one = (samples.training(k, 1.0).pair.moving for k in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, next_one)
    assert len({seed_of(0, "training", k) for k in range(1000)}) == 1000


def test_without_published_loss_synthetic_steps_are_supervised():
    cache = Cache(Path("unused"), 4.0, (32, 32, 32))
    shapes = Samples(Part(), Part(), cache, Synthesis(shape=(32,) * 3, spacing=4.0), Mixture(supervised=0.5), 0)
    drawn = [shapes.training(k, 1.0) for k in range(12)]
    assert {s.published for s in drawn} == {True, False}
    assert all(s.pair.one_contrast for s in drawn if s.published)
    assert all(s.supervised and not s.published for s in (shapes.training(k, 1.0, published=False) for k in range(6)))


# ---------------------------------------------------------------------------------------------- plan


def request(folder: Path, data: Path | None = None, **changes) -> TrainingOptions:
    return TrainingOptions("hsyn", str(folder), data=str(data) if data else None, device="cpu", **changes)


def test_the_plan_fits_content_multiples_and_memory(tmp_path):
    for name in "abcdef":
        store(tmp_path / "data", name, grid_of())
    plan = training_plan.prepare(request(tmp_path / "one", tmp_path / "data")).plan
    # 80 mm of content plus a margin at 4 mm, on multiples of 16.
    assert plan.spacing == 4.0 and plan.shape == (32, 32, 32)
    assert plan.iterations == 150_000 and plan.rate == "published"
    assert plan.data["scans"] == 6 and len(plan.held_out) == 2
    assert training_plan.TrainingPlan.from_json(plan.to_json()) == plan
    with pytest.raises(InputError, match="needs about"):
        training_plan.prepare(request(tmp_path / "two", tmp_path / "data", memory_gb=0.1, shape=(96, 96, 96)))


def test_minutes_make_a_plan_that_fits(tmp_path):
    def timer(network, samples, level):
        return {1: 0.1, 2: 0.2, 3: 0.6}[level]

    plan = training_plan.prepare(request(tmp_path, shape=(32, 32, 32), minutes=10.0), timer=timer).plan
    assert [s.iterations for s in plan.stages] == [1800, 900, 300]
    assert sum(s.iterations * c for s, c in zip(plan.stages, (0.1, 0.2, 0.6))) <= 540
    assert plan.rate == "cosine" and "published steps" in plan.notes[-1]


def test_too_few_scans_and_missing_labels(tmp_path):
    store(tmp_path / "one", "a", grid_of())
    with pytest.raises(InputError, match="no pair of two subjects"):
        training_plan.prepare(request(tmp_path / "run", tmp_path / "one"))
    for name, labels in (("a", "aseg"), ("b", ""), ("c", "aseg")):
        store(tmp_path / "three", name, grid_of(), labels)
    plan = training_plan.prepare(request(tmp_path / "run3", tmp_path / "three", validation="0")).plan
    assert any("1 of 3 scans have no labels" in note for note in plan.notes)
    assert any("only 3 subjects" in note for note in plan.notes)


def test_training_on_scans_and_on_label_maps_and_on_both(tmp_path):
    for name in "abc":
        store(tmp_path / "data", name, grid_of())
        (tmp_path / "maps").mkdir(exist_ok=True)
        write_volume(tmp_path / "maps" / f"{name}.nii.gz", scene(grid_of())[1], grid_of())
    for number, (data, labels) in enumerate(((True, False), (False, True), (True, True))):
        result = loop.train(
            TrainingOptions(
                "hsyn",
                str(tmp_path / f"run{number}"),
                data=str(tmp_path / "data") if data else None,
                validation="c",
                labels=str(tmp_path / "maps") if labels else None,
                device="cpu",
                shape=(32, 32, 32),
                spacing=4.0,
                iterations=4,
                stages=(1.0, 0.0, 0.0),
                validation_pairs=2,
                validate_every=4,
            )
        )
        assert result["finished"] and result["validation"]["dice"] > 0.2
        assert (result["validation"]["end_point"] is not None) is labels


def test_the_command_names_a_bad_scan(spoiled, capsys):
    assert (
        cli.main(["train", "--method", "hsyn", "--data", str(spoiled), "-o", str(spoiled / "run"), "--device", "cpu"])
        == 2
    )
    assert "cut_T1w.nii.gz" in capsys.readouterr().err
