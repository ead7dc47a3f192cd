"""Using a result: carrying other nodes along, evaluation, report; and the same transforms through every door."""

import json

import commandlines
import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import slicer_harness
import slicer_scenes as scenes
import vtk
from slicer_scenes import clientFixture, doneFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


# ------------------------------------------------------------------------------------------------ carrying along


@pytest.mark.parametrize("under", ["plain", "parents", "bent parent"])
def test_markup_volume_and_command_line_agree(module, tmp_path, under):
    """A landmark on the moving scan, the scan hardened with the forward transform, and `symreg apply`:
    within 0.1 mm."""
    fixed, moving = scenes.pair(module.scene, spacing=2.0, oblique=True)
    k, j, i = (int(n) for n in np.array(slicer.util.arrayFromVolume(moving).shape) // 2)
    spots = [(k - 3, j + 2, i - 4), (k + 5, j - 6, i + 3), (k, j + 7, i + 6)]
    ball = scenes.volume(
        module.scene, np.zeros_like(slicer.util.arrayFromVolume(moving), np.float32), np.eye(4), "Ball"
    )
    matrix = vtk.vtkMatrix4x4()
    moving.GetIJKToRASMatrix(matrix)
    ball.SetIJKToRASMatrix(matrix)
    table = np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])
    local = np.array([(table @ (s[2], s[1], s[0], 1))[:3] for s in spots])
    markup = scenes.fiducials(module.scene, local, "Spots")
    if under != "plain":
        shear = np.eye(4)
        shear[:3, :3], shear[:3, 3] = scenes.rotation((8, -5, 12)), (14, -6, 9)
        parent = scenes.linearTransform(module.scene, shear)
        if under == "bent parent":
            parent = bent(module.scene, shear)
        for node in (moving, ball, markup):
            node.SetAndObserveTransformNodeID(parent.GetID())
        fixed.SetAndObserveTransformNodeID(scenes.linearTransform(module.scene, np.diag([1, 1, 1, 1.0])).GetID())
    module.choose(fixed, moving)
    module.state.initial = "rigid"
    run = module.register()
    module.settle()
    made = module.engine.wait(module.engine.apply(run, [markup]))
    carried = scenes.positions(made[0])
    assert made[0].GetParentTransformNode() is None and made[0].GetName() == "Spots on Fixed scan"
    from SymRegistrationGui import exporting, nodes
    from SymRegistrationGui.exchange import PrivateFolder
    from SymRegistrationGui.steps import complete

    from SymRegistrationLib.commands import cli

    folder = PrivateFolder()
    paths = {part: str(tmp_path / f"{part}.h5") for part in ("forward", "inverse")}
    for part, path in paths.items():
        complete(exporting.exportField(run.node(part), path))
    points = complete(exporting.exportPoints(markup, moving, folder, "points"))
    assert (
        cli.main(
            [
                "apply",
                points,
                "--points",
                "--transform",
                paths["forward"],
                "--inverse",
                paths["inverse"],
                "-q",
                "-o",
                str(tmp_path / "o.csv"),
            ]
        )
        == 0
    )
    folder.remove()
    lines = (tmp_path / "o.csv").read_text().splitlines()[1:]
    byCommand = np.array([[float(v) for v in line.split(",")[1:4]] for line in lines]) * (-1, -1, 1)
    assert np.abs(carried - byCommand).max() < 0.1
    for spot, expected in zip(spots, carried):
        array = slicer.util.arrayFromVolume(ball)
        z, y, x = (np.arange(n) - s for n, s in zip(array.shape, spot))
        array[:] = np.exp(-(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2) / (2 * 1.6**2))
        ball.Modified()
        hardened = module.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Hardened")
        hardened.CopyContent(ball, True)
        hardened.SetAndObserveTransformNodeID(ball.GetTransformNodeID())
        hardened.HardenTransform()
        hardened.SetAndObserveTransformNodeID(run.node("forward").GetID())
        place = peak(hardened, expected, nodes)
        print(under, "volume against markup, mm:", np.linalg.norm(place - expected))
        assert np.linalg.norm(place - expected) < 0.1, (under, place, expected)
        module.scene.RemoveNode(hardened)


def bent(scene, matrix):
    """A non-linear transform node: a turn and shift with a gentle bend, as a FromParent grid."""
    from SymRegistrationGui import nodes
    from SymRegistrationGui.steps import complete

    from SymRegistrationLib.geometry.grid import Grid, transform_points

    grid = Grid.centred((25, 25, 25), 12.0, (0, 0, 0))
    points = grid.points(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
    there = transform_points(nodes.FLIP @ np.linalg.inv(matrix) @ nodes.FLIP, points)
    there[..., 0] += 1.5 * np.sin(points[..., 1] / 60)
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "bent")
    complete(nodes.gridTransformFiller((there - points).astype(np.float32), grid))(node)
    return node


def peak(node, near, nodes):
    """Where a blob is after the node's transform, in world: the place whose pulled-back position is the blob's center.

    The blob's center in the volume is found by its moments; the world place is found by inverting FromParent with
    Newton's method, in double precision, independently of VTK's inverse.
    """
    array = slicer.util.arrayFromVolume(node).astype(float)
    index = np.array(np.unravel_index(array.argmax(), array.shape))
    window = tuple(slice(max(0, n - 6), n + 7) for n in index)
    part = array[window]
    grids = np.meshgrid(*(np.arange(w.start, w.start + s) for w, s in zip(window, part.shape)), indexing="ij")
    weight = np.maximum(part - part.max() * 0.02, 0)
    center = [float((g * weight).sum() / weight.sum()) for g in grids][::-1]
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    target = np.array(matrix.MultiplyPoint((*center, 1.0))[:3])
    pull = node.GetParentTransformNode().GetTransformFromParent()
    place = np.array(near, float)
    for _ in range(60):
        place += 0.7 * (target - np.array(pull.TransformPoint(place)))
    return place


def test_models_segmentations_and_volumes_are_carried_along(done):
    module, run = done
    fixed, moving = run.node("fixed"), run.node("moving")
    sphere = vtk.vtkSphereSource()
    sphere.SetCenter(5, -8, 12)
    sphere.SetRadius(15)
    sphere.SetThetaResolution(60)
    sphere.SetPhiResolution(60)
    sphere.Update()
    model = module.scene.AddNewNodeByClass("vtkMRMLModelNode", "Lesion model")
    model.SetAndObserveMesh(sphere.GetOutput())
    bright = slicer.util.arrayFromVolume(moving) > 500
    segmentation = scenes.segmentation(module.scene, moving, [bright], "Lesion")
    second = scenes.volume(module.scene, slicer.util.arrayFromVolume(moving).copy(), np.eye(4), "Second contrast")
    matrix = vtk.vtkMatrix4x4()
    moving.GetIJKToRASMatrix(matrix)
    second.SetIJKToRASMatrix(matrix)
    box = module.ui.applyNodesSelector
    module.panel.update()
    assert not module.ui.applyButton.enabled
    for node in (model, segmentation, second):
        box.setCheckState(node, slicer_harness.CHECKED)
    module.click("applyButton")
    module.app.wait(lambda: not module.engine.busy, 60)
    assert module.app.shown == []
    found = {
        name: module.scene.GetFirstNodeByName(f"{name} on Fixed scan")
        for name in ("Lesion model", "Lesion", "Second contrast")
    }
    points = slicer.util.arrayFromModelPoints(found["Lesion model"])
    push = run.node("inverse").GetTransformFromParent()
    expected = np.array([push.TransformPoint(p) for p in slicer.util.arrayFromModelPoints(model)])
    assert np.abs(points - expected).max() < 1e-3
    warped = slicer.util.arrayFromVolume(run.node("warped_moving")).astype(float)
    again = slicer.util.arrayFromVolume(found["Second contrast"]).astype(float)
    from SymRegistrationGui import nodes

    # up to one voxel from the moving scan's border, where ITK and torch blend with the outside differently
    grid, movingGrid = nodes.worldVolume(fixed)[1], nodes.worldVolume(moving)[1]
    forward = run.node("forward").GetTransformFromParent()
    places = grid.points(np.argwhere(np.ones(grid.shape)))[::7]
    there = movingGrid.indices([np.array(forward.TransformPoint(p * (-1, -1, 1))) * (-1, -1, 1) for p in places])
    well = ((there > 1) & (there < np.array(movingGrid.shape) - 2)).all(1)
    assert np.abs(again - warped).ravel()[::7][well].max() <= 1 and well.mean() > 0.3, (
        "the same scan carried along is the warped scan"
    )
    carried, grid = nodes.worldLabels(found["Lesion"], fixed)
    assert found["Lesion"].GetSegmentation().GetNthSegment(0).GetName() == "part 1"
    expected = warped > 500
    dice = 2 * (expected & (carried > 0)).sum() / (expected.sum() + (carried > 0).sum())
    assert dice > 0.9
    before = scenes.names(module.scene)
    roi = module.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Box")
    with pytest.raises(Exception, match="'Box' cannot be carried along"):
        module.engine.wait(module.engine.apply(run, [second, roi]))
    module.scene.RemoveNode(roi)
    assert scenes.names(module.scene) == before


def test_from_fixed_to_moving(done):
    module, run = done
    ras = np.array([(5, -8, 12), (12, 0, 4.0)])
    node = scenes.fiducials(module.scene, ras, "On fixed")
    made = module.engine.wait(module.engine.apply(run, [node], fromMoving=False))
    expected = [run.node("forward").GetTransformFromParent().TransformPoint(p) for p in ras]
    assert (
        np.allclose(scenes.positions(made[0]), expected, atol=1e-4) and made[0].GetName() == "On fixed on Moving scan"
    )


# ------------------------------------------------------------------------------------------------ evaluating, reporting


def test_evaluation_with_segmentations_and_landmarks(done):
    module, run = done
    fixed, moving = run.node("fixed"), run.node("moving")
    ras = np.array([(5, -8, 12), (12, 0, 4), (-6, -20, 18.0)])
    module.state.fixedLandmarks = scenes.fiducials(module.scene, ras, "F")
    module.state.movingLandmarks = scenes.fiducials(module.scene, scenes.shift(ras), "M")
    module.state.fixedLabels = scenes.segmentation(
        module.scene, fixed, [slicer.util.arrayFromVolume(fixed) > 480], "FL"
    )
    module.state.movingLabels = scenes.segmentation(
        module.scene, moving, [slicer.util.arrayFromVolume(moving) > 480], "ML"
    )
    module.click("evaluateButton")
    module.app.wait(lambda: not module.engine.busy, 60)
    assert module.app.shown == []
    metrics = run.metrics
    assert metrics["labels"]["mean_after"] > max(0.75, metrics["labels"]["mean_before"])
    before = np.linalg.norm(scenes.shift(ras) - ras, axis=1).mean()
    assert (
        metrics["landmarks"]["mean_before_mm"] == pytest.approx(before, abs=0.01)
        and metrics["landmarks"]["mean_after_mm"] < 1.5
    )
    texts = [module.ui.resultsTable.item(row, 0).text() for row in range(module.ui.resultsTable.rowCount)]
    assert "Overlap of labels, mean Dice" in texts and "Landmark error, mean of 3, mm" in texts
    assert run.table.GetNumberOfRows() == len(texts)


def test_report_export(done, tmp_path, monkeypatch):
    from SymRegistrationGui import resultspanel

    module, run = done
    for ending in ("html", "csv", "json"):
        path = str(tmp_path / f"report.{ending}")
        monkeypatch.setattr(resultspanel, "askPath", lambda suggested, p=path: p)
        module.click("exportButton")
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8") and "data:image/png" in (
        tmp_path / "report.html"
    ).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["quality"] == run.metrics["quality"]
    assert (
        (tmp_path / "report.csv")
        .read_text(encoding="utf-8")
        .startswith('"Measure","Before","Aligned","After"\n"Similarity')
    )
    monkeypatch.setattr(resultspanel, "askPath", lambda suggested: "/nowhere/report.csv")
    module.click("exportButton")
    assert "/nowhere/report.csv could not be written" in module.app.shown[-1][1]
    run.setText("report", "")
    monkeypatch.setattr(resultspanel, "askPath", lambda suggested: str(tmp_path / "x.html"))
    module.click("exportButton")
    assert "not there" in module.app.shown[-1][1]


# ------------------------------------------------------------------------------------------------ the same as elsewhere


def test_transforms_are_those_of_the_command_line_and_the_library_bit_by_bit(module, tmp_path):
    from SymRegistrationLib import pipeline, read_volume
    from SymRegistrationLib.commands import cli
    from SymRegistrationLib.job import Options

    fixed, moving = scenes.pair(module.scene, oblique=True)
    for node, name in ((fixed, "fixed"), (moving, "moving")):  # the files that Slicer itself writes, not the module's
        storage = slicer.vtkMRMLNRRDStorageNode()
        storage.SetFileName(str(tmp_path / f"{name}.nrrd"))
        assert storage.WriteData(node)
    nodes = module.widget.logic.register(fixed, moving, preset="fast", initial="centre", threads=1)
    paths = [str(tmp_path / name) for name in ("fixed.nrrd", "moving.nrrd")]
    assert cli.main(commandlines.register(*paths, tmp_path / "out", "--no-report")) == 0
    from SymRegistrationGui.nodes import gridTransform

    from SymRegistrationLib.geometry.transform_files import physical, read_transform

    result = pipeline.register(*map(read_volume, paths), Options(preset="fast", initial="centre", threads=1))
    flip = np.array([-1, -1, 1], np.float32)
    for part in ("forward", "inverse"):
        inSlicer = gridTransform(nodes[part])[0] * flip
        byCommand = physical(read_transform(tmp_path / f"out/{part}.h5"), None).displacement
        assert np.array_equal(byCommand, getattr(result, part).displacement)
        assert np.array_equal(inSlicer, byCommand), (
            f"{part}: largest difference {np.abs(inSlicer - byCommand).max()} mm"
        )


def test_landmarks_region_mask_and_start_reach_the_job(module, tmp_path):
    from SymRegistrationGui import exporting, nodes
    from SymRegistrationGui.exchange import PrivateFolder
    from SymRegistrationGui.steps import complete

    from SymRegistrationLib.geometry.points import read_points
    from SymRegistrationLib.geometry.transform_files import read_transform

    fixed, moving = scenes.pair(module.scene)
    mask = scenes.segmentation(module.scene, fixed, [np.ones((34, 36, 32), bool)])
    roi = module.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenter(5, -8, 12)
    roi.SetSize(30, 30, 30)
    ras = np.array([(5, -8, 12), (12, 0, 4), (-6, -20, 18.0)])
    matrix = np.eye(4)
    matrix[:3, 3] = (-4, 3, -2)
    start = scenes.linearTransform(module.scene, matrix, "start")
    request = exporting.Request(
        fixed,
        moving,
        fixedMask=mask,
        roi=roi,
        initialTransform=start,
        guideWithPoints=True,
        fixedPoints=scenes.fiducials(module.scene, ras),
        movingPoints=scenes.fiducials(module.scene, scenes.shift(ras)),
    )
    folder = PrivateFolder()
    job = complete(exporting.exportJob(request, folder))
    box = sitk.GetArrayFromImage(sitk.ReadImage(job.fixed_mask))
    assert box.sum() == pytest.approx((30 / 3) ** 3, rel=0.3) and box.max() == 1 and job.guide_with_points
    assert np.allclose(read_points(job.moving_points).points, scenes.shift(ras) * (-1, -1, 1))
    transform = read_transform(job.options.initial)
    assert np.allclose(transform.TransformPoint((0, 0, 0)), (-4, 3, 2)), (
        "fixed -> moving, LPS: the inverse of what moves the scan"
    )
    moving.SetAndObserveTransformNodeID(start.GetID())
    again = complete(exporting.exportJob(request, folder))
    assert again.options.initial == "none", "a start that already lies above the moving scan is not applied twice"
    folder.remove()
    run = module.engine.wait(module.engine.register(request))
    assert run.metrics["landmarks"]["count"] == 3
    assert nodes.worldVolume(fixed)[0].any()
