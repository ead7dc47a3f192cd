"""Reading scans: every format lands at the same place in space, and what cannot be used is refused by name."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import turn

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import (
    Volume,
    foreground,
    grid_of,
    looks_like_labels,
    read_labels,
    read_mask,
    read_volume,
    robust_range,
    to_itk,
    write_volume,
)
from SymRegistrationLib.job import InputError


@pytest.fixture
def scan(oblique):
    array = np.random.default_rng(3).integers(-1000, 1500, oblique.shape).astype(np.int16)
    return Volume(array, oblique, "scan")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd"])
def test_formats_agree_on_values_and_place(scan, tmp_path, name):
    write_volume(tmp_path / name, scan.array, scan.grid)
    again = read_volume(tmp_path / name)
    assert np.array_equal(again.array, scan.array)
    assert again.grid.same_as(scan.grid, 1e-3)


def test_mgz_agrees(scan, tmp_path):
    ras = np.diag([-1.0, -1, 1, 1]) @ scan.grid.matrix
    affine = np.column_stack([ras[:, [2, 1, 0]], ras[:, 3]])
    nibabel.save(nibabel.MGHImage(scan.array.transpose(2, 1, 0).astype(np.int32), affine), tmp_path / "a.mgz")
    again = read_volume(tmp_path / "a.mgz")
    assert np.array_equal(again.array, scan.array) and again.grid.same_as(scan.grid, 1e-3)


def test_dicom_folder_agrees(tmp_path):
    rotation = turn((1, 0, 0), 20)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation @ np.diag([0.8, 0.9, 2.5])[:, ::-1]
    matrix[:3, 3] = (-10, 20, 5)
    grid = Grid((6, 20, 24), matrix)
    image = to_itk(np.random.default_rng(1).integers(0, 900, grid.shape).astype(np.int16), grid)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        part = image[:, :, k]
        for tag, value in {
            "0008|0060": "MR",
            "0020|000d": "1.2.3.4",
            "0020|000e": "1.2.3.4.5",
            "0008|0018": f"1.2.3.4.5.{k + 1}",
            "0020|0013": str(k),
            "0020|0037": "\\".join(f"{v:.12g}" for v in rotation[:, :2].T.ravel()),
            "0020|0032": "\\".join(f"{v:.12g}" for v in image.TransformIndexToPhysicalPoint((0, 0, k))),
        }.items():
            part.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.Execute(part)
    again = read_volume(tmp_path)
    assert again.grid.same_as(grid, 1e-2)
    assert np.array_equal(again.array, sitk.GetArrayFromImage(image))


def _series(folder, places, seed=2):
    """A DICOM series of axial slices at (x, y, z) mm."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, (x, y, z) in enumerate(places):
        part = sitk.GetImageFromArray(np.random.default_rng(seed + k).integers(0, 900, (16, 16)).astype(np.int16))
        for tag, value in {
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{k + 1}",
            "0020|0013": str(k),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0032": f"{x}\\{y}\\{z}",
        }.items():
            part.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(part)
    return folder


@pytest.mark.parametrize(
    "places, words",
    [
        ([(0, 0, 2 * k) for k in range(9) if k != 4], "uneven distances (2 to 4 mm)"),
        ([(0, 0, 2 * (k // 2)) for k in range(8)], "several images at one place"),
        ([(0, 0.5 * k, 2 * k) for k in range(8)], "tilted gantry"),
    ],
)
def test_a_dicom_series_that_is_no_volume_is_refused(tmp_path, places, words):
    """ITK would stack such slices at their mean distance and warn where nobody looks."""
    with pytest.raises(InputError) as caught:
        read_volume(_series(tmp_path / "dicom", places), "fixed image")
    assert words in str(caught.value) and "fixed image" in str(caught.value)


def test_a_dicom_series_with_rounded_positions_is_read(tmp_path):
    volume = read_volume(_series(tmp_path / "dicom", [(0, 0, round(0.625 * k, 2)) for k in range(8)]))
    np.testing.assert_allclose(volume.grid.spacing, (0.625, 1, 1), atol=2e-3)


def test_a_4d_file_of_one_volume_is_a_volume(scan, tmp_path):
    sitk.WriteImage(sitk.JoinSeries([scan.to_itk()]), str(tmp_path / "a.nii.gz"))
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").array, scan.array)


def _bad_files(folder):
    array = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    cases = {
        "2d.nrrd": (image[:, :, 2], "2-D"),
        "4d.nrrd": (sitk.JoinSeries([image, image]), "4-D"),
        "vector.nrrd": (sitk.Compose([image] * 3), "3 values a voxel"),
        "constant.nrrd": (image * 0 + 4, "constant"),
    }
    for name, (bad, words) in cases.items():
        sitk.WriteImage(bad, str(folder / name))
        yield folder / name, words
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    scan = nibabel.Nifti1Image(array, sheared)
    scan.set_qform(None, 0)
    nibabel.save(scan, folder / "sheared.nii")
    yield folder / "sheared.nii", "Resample it onto a grid without shear"
    (folder / "words.nii.gz").write_text("this is not a scan")
    yield folder / "words.nii.gz", "could not be read"
    (folder / "empty.nii.gz").write_bytes(b"")
    yield folder / "empty.nii.gz", "could not be read"
    (folder / "nothing").mkdir()
    yield folder / "nothing", "no DICOM series"
    yield folder / "missing.nii.gz", "does not exist"
    sitk.WriteImage(sitk.GetImageFromArray(array * np.nan), str(folder / "nan.nrrd"))
    yield folder / "nan.nrrd", "no finite voxel"
    nibabel.save(nibabel.Nifti1Image(array * np.nan, np.eye(4)), folder / "nan.nii.gz")
    yield folder / "nan.nii.gz", "no finite voxel"
    header = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 60000 60000 60000\nendian: little\nencoding: raw\n\n"
    (folder / "huge.nrrd").write_bytes(header + b"12")
    yield folder / "huge.nrrd", "declares"


def test_unusable_scans_are_refused_by_name(tmp_path):
    for path, words in _bad_files(tmp_path):
        with pytest.raises(InputError) as caught:
            read_volume(path, "fixed image")
        assert words in str(caught.value) and str(path) in str(caught.value) and "fixed image" in str(caught.value)


@pytest.mark.parametrize("name, kind", [("a.nrrd", "<f4"), ("a.nii", "<f4"), ("a.nii.gz", "<f4"), ("a.nii.gz", ">f8")])
def test_some_nan_voxels_are_repaired_and_said(tmp_path, name, kind):
    """Also those that ITK's reader of NIfTI hands on as 0."""
    array = np.random.default_rng(0).uniform(1, 2, (5, 6, 7)).astype(kind)
    array[2, 3, 4], array[4, 5, 6] = np.nan, np.inf
    if name.endswith(".nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    else:
        header = nibabel.Nifti1Header(endianness=kind[0])
        header.set_data_dtype(kind)
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4), header), tmp_path / name)
    volume = read_volume(tmp_path / name)
    assert volume.array[2, 3, 4] == volume.array[4, 5, 6] == array[np.isfinite(array)].min()
    assert "2 NaN" in volume.notes[0] and np.isfinite(volume.array).all()
    array[2, 3, 4] = array[4, 5, 6] = volume.array[4, 5, 6]
    assert np.array_equal(volume.array, array)


def test_what_lies_in_a_folder_without_a_series_is_named(tmp_path):
    (tmp_path / "study" / "a").mkdir(parents=True)
    (tmp_path / "study" / "a" / "readme.txt").write_text("no scan")
    below = _series(tmp_path / "study" / "b", [(0, 0, 2 * k) for k in range(4)])
    with pytest.raises(InputError, match=f"holds no DICOM series. Give a folder below, such as '{below}'"):
        read_volume(tmp_path / "study")
    (tmp_path / "study" / "T1.nii.gz").write_text("")
    with pytest.raises(InputError, match="Give one of its files, such as '.*T1.nii.gz'"):
        read_volume(tmp_path / "study")


def test_a_mask_on_another_grid_is_resampled_through_space(scan, tmp_path):
    grid = scan.grid.resampled(2.0)
    index = np.indices(grid.shape)
    mask = (index[0] > grid.shape[0] // 2).astype(np.uint8)
    write_volume(tmp_path / "m.nrrd", mask, grid)
    got = read_mask(tmp_path / "m.nrrd", scan.grid)
    assert got[-1].all() and not got[0].any() and abs(got.mean() - mask.mean()) < 0.06
    write_volume(tmp_path / "e.nrrd", mask * 0, grid)
    with pytest.raises(InputError, match="empty"):
        read_mask(tmp_path / "e.nrrd", scan.grid)
    far = Grid.centred((4, 4, 4), 1.0, (5000, 0, 0))
    write_volume(tmp_path / "f.nrrd", np.ones(far.shape, np.uint8), far)
    with pytest.raises(InputError, match="wholly outside"):
        read_mask(tmp_path / "f.nrrd", scan.grid)


def test_labels_must_be_whole_numbers(scan, tmp_path):
    write_volume(tmp_path / "l.nii.gz", scan.array.astype(np.float32), scan.grid)
    assert np.array_equal(read_labels(tmp_path / "l.nii.gz").array, scan.array)
    write_volume(tmp_path / "x.nii.gz", scan.array + np.float32(0.3), scan.grid)
    with pytest.raises(InputError, match="whole numbers"):
        read_labels(tmp_path / "x.nii.gz")


def test_label_maps_are_told_from_scans(head):
    assert not looks_like_labels(head)
    assert not looks_like_labels(Volume(np.round(head.array), head.grid))
    classes = (head.array > 30).astype(np.uint8) + (head.array > 110)
    assert looks_like_labels(Volume(classes, head.grid))
    assert looks_like_labels(Volume(1000.0 * classes, head.grid))
    assert not looks_like_labels(Volume(classes + np.float32(0.5), head.grid))


def test_foreground_and_range_of_a_real_head(head):
    content = foreground(head.array)
    assert 0.15 < content.mean() < 0.6
    assert not content[:, 0].all() and content[content.shape[0] // 2, content.shape[1] // 2, content.shape[2] // 2]
    low, high = robust_range(head.array)
    spiked = head.array.copy()
    spiked[10, 10, 10] = 1e7
    assert robust_range(spiked) == pytest.approx((low, high), rel=0.01)


def test_inputs_are_not_changed(scan):
    before = scan.array.copy()
    scan.to_itk(), foreground(scan.array), robust_range(scan.array)
    assert np.array_equal(before, scan.array) and grid_of(scan.to_itk()).same_as(scan.grid)
