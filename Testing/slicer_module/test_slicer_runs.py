"""What a registration leaves in the scene, and what can be done with it; with the real worker and the real pipeline."""

import numpy as np
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
import vtk
from slicer_scenes import clientFixture, doneFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


def gridTransform(node):
    """Lattice, grid, and the matrices before and after of a result's transform node."""
    from SymRegistrationGui import nodes  # imports of the module need a Slicer that runs

    return nodes.gridTransform(node)


def hierarchy(scene):
    return slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)


def test_nodes_know_of_each_other(done):
    module, run = done
    forward, inverse, fixed, moving = (run.node(part) for part in ("forward", "inverse", "fixed", "moving"))
    roles = slicer.vtkMRMLTransformNode
    assert forward.GetNodeReference(roles.GetFixedNodeReferenceRole()) is fixed
    assert forward.GetNodeReference(roles.GetMovingNodeReferenceRole()) is moving
    assert inverse.GetNodeReference(roles.GetFixedNodeReferenceRole()) is moving
    assert (
        forward.GetNodeReference("SymRegistration.inverseOf") is inverse
        and inverse.GetNodeReference("SymRegistration.inverseOf") is forward
    )
    for node in (forward, inverse):
        assert node.GetTransformFromParent().IsA("vtkGeneralTransform")
        lattice, grid, before, after = gridTransform(node)  # stored as FromParent
        assert before.shape == after.shape == (4, 4) and lattice.shape == (*grid.shape, 3)
        assert node.GetDisplayNode() is not None and not node.GetDisplayNode().GetVisibility()
        assert node.GetParentTransformNode() is None
    tree = hierarchy(module.scene)
    folder = tree.GetItemParent(tree.GetItemByDataNode(run.table))
    assert tree.GetItemName(folder) == run.table.GetName() == "Registration of Moving scan to Fixed scan"
    for part in ("forward", "inverse", "warped_moving", "jacobian"):
        assert tree.GetItemParent(tree.GetItemByDataNode(run.node(part))) == folder
    warped = run.node("warped_moving")
    assert warped.GetName() == "Moving scan on Fixed scan"
    assert warped.GetDisplayNode().GetWindow() == moving.GetDisplayNode().GetWindow()
    matrices = [vtk.vtkMatrix4x4() for _ in range(2)]
    warped.GetIJKToRASMatrix(matrices[0])
    fixed.GetIJKToRASMatrix(matrices[1])
    assert np.allclose(
        [matrices[0].GetElement(r, c) - matrices[1].GetElement(r, c) for r in range(4) for c in range(4)], 0, atol=1e-6
    )


def test_a_second_run_updates_the_chosen_outputs(done):
    module, run = done
    before = scenes.names(module.scene)
    field = gridTransform(run.node("forward"))[0].copy()
    slicer.util.arrayFromVolume(run.node("fixed"))[:10] //= 2
    module.state.initial = "rigid"
    again = module.register()
    assert again.table is run.table and scenes.names(module.scene) == before
    assert not np.array_equal(gridTransform(run.node("forward"))[0], field)
    module.settle()
    for name in ("outputForward", "outputInverse", "outputWarpedMoving", "outputJacobian", "outputConsistency"):
        setattr(module.state, name, None)
    other = module.register()
    assert other.table is not run.table and other.node("forward") is not run.node("forward")
    assert other.node("warped_moving").GetName() == "Moving scan on Fixed scan_1"


def test_existing_nodes_can_be_outputs_and_stay_when_the_run_is_removed(module):
    fixed, moving = scenes.pair(module.scene)
    mine = module.scene.AddNewNodeByClass("vtkMRMLTransformNode", "My transform")
    kept = scenes.volume(module.scene, np.zeros((4, 4, 4), np.int16), np.eye(4), "My volume")
    parent = np.eye(4)
    parent[0, 3] = 50
    kept.SetAndObserveTransformNodeID(scenes.linearTransform(module.scene, parent).GetID())
    module.choose(fixed, moving)
    module.ui.outputForwardSelector.setCurrentNode(mine)
    module.ui.outputWarpedMovingSelector.setCurrentNode(kept)
    before = scenes.names(module.scene)
    run = module.register()
    module.settle()
    assert run.node("forward") is mine and run.node("warped_moving") is kept and kept.GetParentTransformNode() is None
    assert slicer.util.arrayFromVolume(kept).shape == slicer.util.arrayFromVolume(fixed).shape
    module.click("removeButton")
    assert scenes.names(module.scene) == before, "removing a run takes what it made and nothing else"
    assert mine.GetScene() is module.scene and module.panel.results.run is None and module.ui.resultsTable.rowCount == 0


def test_outputs_that_are_inputs_or_chosen_twice_are_refused(module):
    from SymRegistrationGui.exporting import Request

    fixed, moving = scenes.pair(module.scene)
    for outputs, said in (
        ({"warped_moving": moving}, "is an input and cannot be an output"),
        ({"jacobian": fixed}, "is an input"),
    ):
        with pytest.raises(Exception, match=said):
            module.engine.register(Request(fixed, moving, outputs=outputs))
    twice = scenes.volume(module.scene, np.zeros((4, 4, 4), np.int16), np.eye(4))
    with pytest.raises(Exception, match="chosen for two outputs"):
        module.engine.register(Request(fixed, moving, outputs={"warped_moving": twice, "jacobian": twice}))


def test_saving_and_loading_the_scene_keeps_everything(done, tmp_path):
    module, run = done
    module.click("jacobianButton")
    module.state.metric = "lncc"
    field = gridTransform(run.node("forward"))[0].copy()
    jacobian = slicer.util.arrayFromVolume(run.node("jacobian")).copy()
    metrics, report = run.metrics, run.node("report").GetText()
    created = sorted(node.GetName() for node in run.created())
    assert module.scene.WriteToMRB(str(tmp_path / "scene.mrb"))
    module.scene.Clear()
    assert module.panel.results.run is None
    assert module.scene.ReadFromMRB(str(tmp_path / "scene.mrb"))
    found = module.panel.results.run
    assert found is not None and found.id is not None
    assert np.allclose(gridTransform(found.node("forward"))[0], field, atol=1e-6)
    assert len(gridTransform(found.node("inverse"))) == 4
    assert np.array_equal(slicer.util.arrayFromVolume(found.node("jacobian")), jacobian)
    assert found.metrics == metrics and found.node("report").GetText() == report
    assert sorted(node.GetName() for node in found.created()) == created
    colors = found.node("jacobian").GetDisplayNode().GetColorNode()
    assert colors.GetNumberOfColors() == 256 and colors.GetAttribute("SymRegistration.Colors") == "jacobian"
    assert module.state.metric == "lncc" and module.state.fixedVolume is found.node("fixed")
    assert module.ui.resultsTable.rowCount == found.table.GetNumberOfRows()
    tree = hierarchy(module.scene)
    assert tree.GetItemName(tree.GetItemParent(tree.GetItemByDataNode(found.node("forward")))) == found.table.GetName()
    module.click("differenceButton")
    module.click("removeButton")
    assert not [n for n in scenes.names(module.scene) if " on " in n or "Registration of" in n]


# ------------------------------------------------------------------------------------------------ looking


def shown(module):
    """(background, foreground, opacity) of the first slice view."""
    composite = module.panel.results.views.composites()[0]
    ids = composite.GetBackgroundVolumeID(), composite.GetForegroundVolumeID()
    return *(module.scene.GetNodeByID(i) if i else None for i in ids), composite.GetForegroundOpacity()


def test_compare_views(done):
    module, run = done
    views = module.panel.results.views
    fixed, warped = run.node("fixed"), run.node("warped_moving")
    module.ui.viewSlider.value = 30
    assert shown(module) == (fixed, warped, 0.3) and module.ui.blendButton.checked
    module.click("flickerButton")
    seen = set()
    module.app.wait(lambda: seen.add(shown(module)[2]) or len(seen) == 2, 5, "two states")
    assert seen == {0.0, 1.0} and not module.ui.blendButton.checked
    module.click("checkerboardButton")
    module.app.wait(lambda: shown(module)[0] is run.node("comparison"), 5)
    board = slicer.util.arrayFromVolume(run.node("comparison")).copy()
    ranges = [
        (n.GetDisplayNode().GetLevel() - n.GetDisplayNode().GetWindow() / 2, n.GetDisplayNode().GetWindow())
        for n in (fixed, warped)
    ]
    one, two = (
        np.clip((slicer.util.arrayFromVolume(n) - low) / window, 0, 1) * 255
        for n, (low, window) in zip((fixed, warped), ranges)
    )
    from_fixed, from_warped = np.abs(board - one) <= 1, np.abs(board - two) <= 1
    assert (from_fixed | from_warped).all() and 0.3 < from_fixed[(np.abs(one - two) > 5)].mean() < 0.7
    module.ui.viewSlider.value = 95
    module.app.wait(
        lambda: (
            not views._steps.busy and not np.array_equal(slicer.util.arrayFromVolume(run.node("comparison")), board)
        ),
        5,
    )
    assert module.ui.sliderLabel.text == "Tiles:"
    module.click("differenceButton")
    module.app.wait(lambda: shown(module)[1] is run.node("comparison"), 5)
    difference = slicer.util.arrayFromVolume(run.node("comparison"))
    assert np.abs(difference).mean() < 3 and difference.min() >= -100 and difference.max() <= 100
    module.click("blendButton")
    slicer.util.arrayFromVolume(fixed)[:] = (
        slicer.util.arrayFromVolume(warped) * 2 + 100
    )  # another scanner, the same anatomy
    fixed.GetDisplayNode().SetWindowLevelMinMax(100, 2000)
    warped.GetDisplayNode().SetWindowLevelMinMax(0, 950)
    module.click("differenceButton")
    module.app.wait(lambda: not views._steps.busy, 5)
    assert np.abs(slicer.util.arrayFromVolume(run.node("comparison"))).max() <= 1, "equal anatomy shows no difference"
    module.click("differenceButton")
    assert shown(module)[1] is None and views.mode == "", "one more click goes back to what was shown before"


def test_maps_have_colors_and_a_legend(done):
    module, run = done
    from SymRegistrationGui import colors

    module.click("jacobianButton")
    node = run.node("jacobian")
    assert shown(module)[:2] == (run.node("fixed"), node)
    display = node.GetDisplayNode()
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == (0.0, 4.0)
    assert "folded" in module.ui.legendLabel.text and "#ff00ff" in module.ui.legendLabel.text
    table, rgba = display.GetColorNode(), [0.0] * 4
    table.GetColor(0, rgba)
    assert tuple(rgba[:3]) == colors.FOLDED, "what is folded has a color of its own"
    table.GetColor(round(255 / 4), rgba)
    assert min(rgba[:3]) > 0.97, "no change is white"
    assert len({tuple(round(c, 3) for c in colors.jacobianColor(v)) for v in (-1, 0.3, 0.6, 1, 1.5, 3.5)}) == 6
    legend = slicer.vtkSlicerColorLogic.GetColorLegendDisplayNode(node)
    assert legend is not None and legend.GetVisibility()
    module.click("consistencyButton")
    assert (
        shown(module)[1] is run.node("inverse_consistency")
        and not legend.GetVisibility()
        and "mm" in module.ui.legendLabel.text
    )
    assert not module.ui.uncertaintyButton.enabled, "no uncertainty was asked for"
    module.click("consistencyButton")
    assert module.ui.legendLabel.isHidden()


def test_grid_and_arrows(done):
    module, run = done
    display = run.node("forward").GetDisplayNode()
    module.click("gridButton")
    assert display.GetVisibility() and display.GetVisibility2D()
    assert display.GetVisualizationMode() == slicer.vtkMRMLTransformDisplayNode.VIS_MODE_GRID
    assert display.GetRegionNode() is run.node("fixed")
    module.click("glyphsButton")
    assert (
        display.GetVisualizationMode() == slicer.vtkMRMLTransformDisplayNode.VIS_MODE_GLYPH
        and not module.ui.gridButton.checked
    )
    module.click("glyphsButton")
    assert not display.GetVisibility()


def test_a_deleted_part_is_told(done):
    module, run = done
    module.scene.RemoveNode(run.node("warped_moving"))
    module.panel.update()
    assert not module.ui.flickerButton.enabled
    module.panel.results.onMode("flickerButton", True)
    assert "Warped moving scan: not made" in module.app.shown[-1][1]


def test_uncertainty_is_made_on_demand_and_shown_in_mm(module):
    module.choose(*scenes.pair(module.scene))
    module.ui.uncertaintySpinBox.value = 2
    module.ui.makeJacobianCheckBox.checked = False
    run = module.register()
    node = run.node("uncertainty")
    values = slicer.util.arrayFromVolume(node)
    assert (
        values.min() >= 0 and values.max() > 0 and run.node("jacobian") is None and not module.ui.jacobianButton.enabled
    )
    module.click("uncertaintyButton")
    assert shown(module)[1] is node and "mm" in module.ui.legendLabel.text
    top = node.GetDisplayNode().GetWindowLevelMax()
    assert run.metrics["uncertainty"]["p95_mm"] < top <= 12 * max(run.metrics["uncertainty"]["p95_mm"], 0.01)
    module.settle()
    module.ui.uncertaintySpinBox.value = 0
    again = module.register()
    assert again.table is run.table and again.node("uncertainty") is None, "a map of the run before would be wrong now"
    assert not module.ui.uncertaintyButton.enabled
