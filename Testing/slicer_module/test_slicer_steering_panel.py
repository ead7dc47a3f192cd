"""The hand on the wheel in the panel: align, snap, what pulls, update, repair, undo, redo, live view, looking closer;
every button of the real .ui file, with the real worker."""

import numpy as np
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, doneFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)

PLACES = np.array([(5, -8, 12), (15, 0, 20), (-8, -20, 5), (12, 8, 0), (0, -15, 28.0)])


def carried(node, ras=PLACES):
    return np.array([node.GetTransformFromParent().TransformPoint(p) for p in np.asarray(ras, float)])


def press(module, name, seconds=90):
    """Click and wait for the end; returns the run."""
    module.click(name)
    module.app.wait(lambda: not module.engine.busy, seconds, f"the end of {name}")
    return module.panel.results.run


def ready(module, oblique=False):
    fixed, moving = scenes.pair(module.scene, oblique=oblique)
    module.choose(fixed, moving)
    return fixed, moving


def registered(module):
    """A pair and its registration: (fixed, moving, run, where :data:`PLACES` go)."""
    fixed, moving = ready(module)
    run = press(module, "registerButton")
    module.settle()
    return fixed, moving, run, carried(run.node("forward"))


def temporary(scene):
    """Nodes that are not saved with the scene and that this module made."""
    words = ("SymRegistration l", "in its pose")
    return [name for name in scenes.names(scene) if any(word in name for word in words)]


def test_align_turn_snap_and_register(module):
    ui = module.ui
    fixed, moving = ready(module)
    assert not ui.snapButton.enabled and ui.alignButton.enabled and "Align first" in ui.snapButton.toolTip
    run = press(module, "alignButton")
    assert module.app.shown == []
    pose = module.state.initialTransform
    assert module.state.initial == "transform" and pose is run.node("pose") and pose.IsLinear()
    assert run.node("forward").IsLinear() and moving.GetTransformNodeID() is None, "the scan itself is not moved"
    composite = module.panel.results.views.composites()[0]
    shown = module.scene.GetNodeByID(composite.GetForegroundVolumeID())
    assert shown.GetName() == "Moving scan in its pose" and composite.GetForegroundOpacity() == 0.5
    assert shown.GetImageData() is moving.GetImageData() and shown.GetParentTransformNode() is pose
    assert not shown.GetSaveWithScene() and shown.GetHideFromEditors()
    display = pose.GetDisplayNode()
    assert display.GetEditorVisibility() and display.GetEditorSliceIntersectionVisibility()
    ui.handlesCheckBox.checked = False
    assert not display.GetEditorVisibility()
    ui.handlesCheckBox.checked = True
    found = carried(pose)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scenes.rotation((5.0, 0, 4.0)), (2.0, 3.0, -1.0)
    pose.ApplyTransformMatrix(scenes.vtkMatrix(matrix))
    turned = np.abs(carried(pose) - found).max()
    run = press(module, "snapButton")
    assert turned > 1.5 and np.abs(carried(pose) - found).max() < 0.5, "refined from where the user had laid it"
    ui.showPoseButton.checked = False
    assert temporary(module.scene) == [] and not display.GetEditorVisibility()
    ui.showPoseButton.checked = True
    run = press(module, "registerButton")
    assert temporary(module.scene) == [] and not run.node("forward").IsLinear()
    truth = scenes.shift(PLACES.copy())
    assert np.linalg.norm(carried(run.node("forward")) - truth, axis=1).max() < 1.5
    texts = [ui.stepsTable.item(row, 0).text() for row in range(ui.stepsTable.rowCount)]
    assert texts == ["1 Align (rigid)", "2 Align (rigid)", "\u25b6 3 Register (syn)"]
    module.settle()
    module.click("removeButton")
    assert module.state.initial == "affine" and module.state.initialTransform is None and ui.registerButton.enabled


@pytest.mark.parametrize("kind", ["similarity", "affine"])
def test_linear_methods_can_be_chosen(module, kind):
    ready(module)
    ui = module.ui
    ui.methodComboBox.currentIndex = ui.methodComboBox.findData(kind)
    module.state.uncertaintyRuns = 4
    run = press(module, "registerButton")
    assert module.app.shown == [] and run.node("forward").IsLinear() and run.node("inverse").IsLinear()
    there = carried(run.node("forward"))
    assert np.abs(carried(run.node("inverse"), there) - PLACES).max() < 1e-6
    assert np.linalg.norm(there - scenes.shift(PLACES.copy()), axis=1).max() < 5
    assert not ui.repairButton.enabled
    points = scenes.fiducials(module.scene, there, "there")
    ui.applyNodesSelector.setCheckState(points, slicer_harness.CHECKED)
    press(module, "applyButton")
    assert np.abs(scenes.positions(module.scene.GetFirstNodeByName("there on Fixed scan")) - PLACES).max() < 1e-6
    module.settle()


def test_landmarks_pull_update_undo_and_redo(module):
    from SymRegistrationGui import importing

    ui = module.ui
    _fixed, _moving, run, first = registered(module)
    assert not ui.undoButton.enabled and not ui.driveLandmarksCheckBox.enabled
    press(module, "updateButton")
    assert "Nothing pulls" in module.app.shown.pop()[1]
    p = scenes.fiducials(module.scene, PLACES[:3], "p")
    q = scenes.fiducials(module.scene, scenes.shift(PLACES[:3].copy()) + (0, 2.5, 0), "q")
    ui.fixedLandmarksSelector.setCurrentNode(p)
    ui.movingLandmarksSelector.setCurrentNode(q)
    ui.driveLandmarksCheckBox.click()
    ui.landmarkToleranceSpinBox.value = 1.0
    assert module.state.driveLandmarks and module.state.landmarkTolerance == 1.0
    press(module, "updateButton")
    assert module.app.shown == [] and ui.statusLabel.text.startswith("Updated.")
    pulled = carried(run.node("forward"))
    assert np.linalg.norm(pulled[:3] - scenes.positions(q), axis=1).max() < 1.0 + 0.3
    assert ui.residualTable.rowCount == 3 and ui.residualTable.item(0, 0).text() == "P1"
    assert {ui.residualTable.item(row, 3).text() for row in range(3)} <= {"met", "NOT met"}
    assert ui.stepsTable.rowCount == 2 and ui.stepsTable.item(1, 0).text() == "\u25b6 2 Update"
    assert ui.previousButton.enabled
    ui.previousButton.checked = True
    composite = module.panel.results.views.composites()[0]
    before = module.scene.GetNodeByID(composite.GetBackgroundVolumeID())
    now = module.scene.GetNodeByID(composite.GetForegroundVolumeID())
    assert now is run.node("warped_moving") and not before.GetSaveWithScene()
    earlier = slicer.util.arrayFromVolume(before).copy()
    assert np.abs(earlier - slicer.util.arrayFromVolume(now)).max() > 10
    ui.previousButton.checked = False
    module.settle()
    press(module, "undoButton")
    assert np.abs(carried(run.node("forward")) - first).max() < 0.02 and ui.statusLabel.text.startswith("Undone.")
    assert ui.stepsTable.item(0, 0).text() == "\u25b6 1 Register (syn)" and not ui.undoButton.enabled
    module.settle()
    press(module, "redoButton")
    assert np.abs(carried(run.node("forward")) - pulled).max() < 0.02
    module.settle()
    importing._previous.clear()  # as after a scene was loaded
    press(module, "previousButton")
    assert ui.previousButton.checked and module.app.shown == [] and ui.stepsTable.item(1, 0).text().startswith("\u25b6")
    again = module.scene.GetNodeByID(composite.GetBackgroundVolumeID())
    assert np.abs(slicer.util.arrayFromVolume(again) - earlier).max() < 10, "made again from the state of its step"
    assert np.abs(carried(run.node("forward")) - pulled).max() < 0.02, "the run itself stays"
    ui.previousButton.checked = False


def test_structures_are_listed_ticked_and_pull(module):
    ui = module.ui
    fixed, moving = ready(module)
    nodes = []
    for node in (fixed, moving):
        array = slicer.util.arrayFromVolume(node) > 300
        side = np.arange(array.shape[2]) < array.shape[2] // 2
        nodes.append(scenes.segmentation(module.scene, node, [array & side, array & ~side], f"of {node.GetName()}"))
    assert ui.structuresList.count == 0
    ui.fixedLabelsSelector.setCurrentNode(nodes[0])
    ui.movingLabelsSelector.setCurrentNode(nodes[1])
    assert [ui.structuresList.item(k).text() for k in range(2)] == ["part 1", "part 2"]
    ui.structuresList.item(1).setCheckState(slicer_harness.CHECKED)
    assert module.state.driveSegments == "part 2"
    run = press(module, "registerButton")
    assert module.app.shown == [] and run.metrics["steering"]["labels"]["driven"] == [2]
    rows = [ui.resultsTable.item(row, 0).text() for row in range(ui.resultsTable.rowCount)]
    assert "  part 1" in rows and "  part 2" in rows, "Dice before and after, by name"
    module.settle()
    ui.outlinesButton.checked = True
    display = nodes[0].GetDisplayNode()
    assert not display.GetVisibility2DFill() and display.GetVisibility2DOutline()
    composite = module.panel.results.views.composites()[0]
    assert composite.GetBackgroundVolumeID() == run.node("warped_moving").GetID()
    ui.blendButton.checked = True
    assert not ui.outlinesButton.checked and display.GetVisibility2DFill()
    nodes[1].GetSegmentation().GetNthSegment(1).SetName("other")
    nodes[1].Modified()
    module.panel.update()
    assert ui.structuresList.count == 1


def test_repair_by_segment_box_and_place(module):
    ui = module.ui
    fixed, _moving, run, before = registered(module)
    press(module, "repairButton")
    assert "No region is chosen" in module.app.shown.pop()[1]
    box = module.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    box.SetCenterWorld(15.0, 0.0, 20.0)
    box.SetSizeWorld(12.0, 12.0, 12.0)
    ui.repairRegionSelector.setCurrentNode(box)
    ui.repairStiffnessSpinBox.value = 2.0
    press(module, "repairButton")
    assert module.app.shown == [] and ui.statusLabel.text.startswith("Repaired.")
    after = carried(run.node("forward"))
    far = np.linalg.norm(PLACES - (15.0, 0.0, 20.0), axis=1) > 26
    assert far.any() and np.abs(after - before)[far].max() < 0.05
    assert run.metrics["job"]["options"]["stiffness"] == 2.0 and run.metrics["job"]["rim_mm"] == 10.0
    module.settle()
    array = np.zeros((34, 36, 32), bool)
    array[15:19, 16:20, 14:18] = True
    painted = scenes.segmentation(module.scene, fixed, [np.roll(array, 3, 0), array], "painted")
    ui.repairRegionSelector.setCurrentNode(painted)
    ui.repairSegmentComboBox.currentIndex = ui.repairSegmentComboBox.findData("part 2")
    assert module.state.repairSegment == "part 2"
    press(module, "repairButton")
    assert module.app.shown == [] and ui.stepsTable.rowCount == 3
    module.settle()
    ui.repairWhereComboBox.currentIndex = ui.repairWhereComboBox.findData("place")
    press(module, "repairButton")
    assert "No place is chosen" in module.app.shown.pop()[1]
    metrics = run.metrics
    metrics["folding"] = {"regions": [{"voxels": 5, "centre": [-5.0, 8.0, 12.0]}]}
    run.setMetrics(metrics)
    module.panel.update()
    module.panel.results.onCell(ui.resultsTable.rowCount - 1, 0)
    assert "Folded place 1" in ui.placeLabel.text
    press(module, "repairButton")
    assert module.app.shown == [] and run.metrics["job"]["sphere"].startswith("-5.0,8.0,12.0,15.0")
    module.settle()


def test_levels_are_seen_and_good_enough_delivers(module):
    ui = module.ui
    fixed, _moving = scenes.pair(module.scene, spacing=1.5)
    module.choose(fixed, _moving)
    module.state.preset = "thorough"
    before = [c.GetForegroundVolumeID() for c in module.panel.results.views.composites()]
    module.click("registerButton")
    assert not ui.enoughButton.isHidden()
    module.app.wait(lambda: module.panel.live.levels, 120, "the first level")
    composite = module.panel.results.views.composites()[0]
    node = module.scene.GetNodeByID(composite.GetForegroundVolumeID())
    array = slicer.util.arrayFromVolume(node)
    assert array.min() >= 0 and array.max() < 1.001 and max(array.shape) <= 64 and array.std() > 0.05
    assert ui.liveLabel.text.startswith("Level 1 of ") and "folded" in ui.liveLabel.text
    assert not ui.liveCurveLabel.pixmap.isNull() and temporary(module.scene)
    module.click("enoughButton")
    module.app.wait(lambda: not module.engine.busy, 120, "the result")
    run = module.panel.results.run
    assert module.app.shown == [] and temporary(module.scene) == [] and ui.enoughButton.isHidden()
    assert run.metrics["quality"]["folded_voxels"] == 0 and run.node("warped_moving") is not None
    assert np.linalg.norm(carried(run.node("forward")) - scenes.shift(PLACES.copy()), axis=1).max() < 6
    assert [c.GetForegroundVolumeID() for c in module.panel.results.views.composites()] != before, "the result is shown"
    assert ui.liveLabel.isHidden()
    module.settle()


@pytest.mark.parametrize("end", ["cancel", "close", "kill"])
def test_nothing_of_the_live_view_stays(module, end):
    fixed, moving = scenes.pair(module.scene, spacing=1.5)
    module.choose(fixed, moving)
    module.state.preset = "thorough"
    before = scenes.names(module.scene)
    module.click("registerButton")
    module.app.wait(lambda: module.panel.live.levels, 120, "the first level")
    assert temporary(module.scene)
    if end == "cancel":
        module.click("cancelButton")
    elif end == "close":
        module.app.inEventLoop(module.scene.Clear)
    else:
        module.workers()[0].kill()
        module.app.wait(lambda: not module.engine.busy, 20, "the news")
    assert temporary(module.scene) == [] and module.panel.live.levels == [] and scenes.folders() == []
    if end != "close":
        assert scenes.names(module.scene) == before
    assert module.ui.liveLabel.isHidden() and module.ui.enoughButton.isHidden()


def test_reveal_and_linked_cursor(done):
    module, run = done
    ui, fixed = module.ui, run.node("fixed")
    ui.revealButton.checked = True
    views = module.panel.results.views
    module.app.wait(lambda: not views._steps.busy, 20)
    assert ui.sliderLabel.text == "Border:"
    half = slicer.util.arrayFromVolume(run.node("comparison")).copy()
    ui.viewSlider.value = 100
    module.app.wait(lambda: not views._steps.busy, 20)
    whole = slicer.util.arrayFromVolume(run.node("comparison")).copy()
    ui.viewSlider.value = 0
    module.app.wait(lambda: not views._steps.busy, 20)
    none = slicer.util.arrayFromVolume(run.node("comparison")).copy()
    d, h, w = half.shape
    assert (half[: d // 3, : h // 3, : w // 3] == whole[: d // 3, : h // 3, : w // 3]).all(), "fixed before the border"
    assert (half[-d // 3 :, -h // 3 :, -w // 3 :] == none[-d // 3 :, -h // 3 :, -w // 3 :]).all()
    assert (whole != none).mean() > 0.05
    ui.revealButton.checked = False
    crosshair = module.scene.AddNewNodeByClass("vtkMRMLCrosshairNode")
    ui.cursorButton.checked = True
    place = [5.0, -8.0, 12.0]
    crosshair.SetCursorPositionRAS(place)
    marks = module.scene.GetFirstNodeByName("SymRegistration linked cursor")
    there = carried(run.node("forward"), [place])[0]
    assert np.allclose(scenes.positions(marks), [place, there], atol=1e-6)
    assert (
        ui.cursorLabel.text == f"Fixed (5.0, -8.0, 12.0) \u2194 moving ({there[0]:.1f}, {there[1]:.1f}, {there[2]:.1f})"
    )
    metrics = run.metrics
    metrics["uncertainty"] = {"calibrated": True, "on": "x", "mean_mm": 1, "p95_mm": 2, "median_mm": 1, "voxel_mm": 1}
    run.setMetrics(metrics)
    radius = module.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "radius")
    radius.CopyContent(fixed, True)
    slicer.util.arrayFromVolume(radius)[:] = 3
    run.setNode("uncertainty", radius, True)
    crosshair.SetCursorPositionRAS([6.0, -8.0, 12.0])
    assert ui.cursorLabel.text.endswith("68 % within 3.0 mm")
    ui.cursorButton.checked = False
    assert temporary(module.scene) == [] and ui.cursorLabel.isHidden()


def test_what_is_not_registered_is_red_and_says_so(done):
    module, run = done
    ui, metrics = module.ui, run.metrics
    assert metrics["verdict"]["conclusion"] in ("PASS", "WARN", "FAIL") and metrics["verdict"]["registered"] is True
    assert metrics["verdict"]["conclusion"] in ui.verdictLabel.text
    metrics["verdict"] = {**metrics["verdict"], "level": "good", "conclusion": "FAIL", "registered": False}
    metrics["alignment"]["reasons"] = ["The header's pose won."]
    run.setMetrics(metrics)
    module.panel.update()
    assert "NOT REGISTERED" in ui.verdictLabel.text and "FAIL" in ui.verdictLabel.text
    assert "The header's pose won." in ui.verdictLabel.toolTip, "how the pose was decided is told, too"
    assert "#ffb3a7" in ui.verdictLabel.styleSheet and "#bfe5bf" not in ui.verdictLabel.styleSheet
    checks = [{"level": "look", "text": "The volume grows threefold."}, {"level": "good", "text": "No folding."}]
    for level, color, reasons in (("look", "#ffe08a", checks), ("good", "#bfe5bf", checks[1:])):
        metrics["verdict"] |= {"level": level, "conclusion": "PASS", "registered": True, "checks": reasons}
        run.setMetrics(metrics)
        module.panel.update()
        assert color in ui.verdictLabel.styleSheet and "No folding" not in ui.verdictLabel.text
        assert ("grows threefold" in ui.verdictLabel.text) == (level == "look"), "reasons stand beneath"


def test_presets_by_anatomy_come_from_the_library(module):
    from SymRegistrationLib.job import ANATOMIES

    ui, state = module.ui, module.state
    box = ui.anatomyComboBox
    assert {box.itemData(k) for k in range(box.count)} >= set(ANATOMIES) and box.itemData(0) == "unknown"
    ready(module)
    box.currentIndex = box.findData("ct-mr")
    assert (state.anatomy, state.initial, state.metric) == ("ct-mr", "rigid", "mind")
    assert ANATOMIES["ct-mr"]["reason"] == box.toolTip
    box.currentIndex = box.findData("unknown")
    assert (state.initial, state.metric, state.stiffness) == ("affine", "auto", 1.0)


def test_a_preset_is_suggested_with_its_reason(module):
    from SymRegistrationLib.job import ANATOMIES

    ui = module.ui
    assert not ui.suggestButton.enabled
    _fixed, moving = ready(module)
    press(module, "suggestButton")
    assert module.app.shown == [] and module.state.anatomy in ANATOMIES
    assert ui.suggestionLabel.text.startswith("Suggested because ") and not ui.suggestionLabel.isHidden()
    module.state.fixedVolume = None
    assert ui.suggestionLabel.isHidden()
    slicer.util.arrayFromVolume(moving)[:] = 7
    module.state.fixedVolume = _fixed
    press(module, "suggestButton")
    assert "'Moving scan' is empty" in module.app.shown.pop()[1]


def test_bad_input_in_the_panel(module):
    ui = module.ui
    _fixed, moving, run, first = registered(module)
    p = scenes.fiducials(module.scene, [(5, -8, 12), (6, -8, 12)], "p")
    q = scenes.fiducials(module.scene, [(9, -11, 14), (40, -11, 14)], "q")
    ui.fixedLandmarksSelector.setCurrentNode(p)
    ui.movingLandmarksSelector.setCurrentNode(q)
    ui.driveLandmarksCheckBox.click()
    press(module, "updateButton")
    assert "P1" in module.app.shown[0][1] and "contradict each other" in module.app.shown.pop()[1]
    before = scenes.names(module.scene)
    slicer.util.arrayFromVolume(moving)[5:8] += 3
    module.app.shown.clear()
    ui.driveLandmarksCheckBox.click()
    ui.driveLandmarksCheckBox.click()
    q.SetNthControlPointPositionWorld(1, 10.0, -11.0, 14.0)
    press(module, "updateButton")
    assert "'Moving scan' is not the scan that was registered" in module.app.shown.pop()[1]
    assert scenes.names(module.scene) == before and np.array_equal(carried(run.node("forward")), first)
    slicer.util.arrayFromVolume(moving)[5:8] -= 3
    press(module, "updateButton")
    assert module.app.shown == [] and ui.undoButton.enabled
    module.settle()
    module.scene.RemoveNode(moving)
    press(module, "undoButton")
    assert "The moving scan of" in module.app.shown[0][1] and "was deleted" in module.app.shown[0][1]
