"""Trust in the panel: the fast map, what it is worth, places to jump to, radii of carried points."""

import numpy as np
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


def test_a_fast_map_says_what_it_is_worth_and_leads_to_its_places(module):
    from SymRegistrationGui import results, runs

    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    module.ui.uncertaintySpinBox.value = 1
    run = module.register()
    told = run.metrics["uncertainty"]
    assert told["kind"] == "fast" and told["runs"] == 0 and run.node("uncertainty") is not None
    module.click("uncertaintyButton")
    assert results.worthText(told) in module.ui.legendLabel.text

    relative = {**told, "calibrated": False, "worst": []}
    assert "Relative only" in results.worthText(relative)
    assert any("relative only" in row[0] for row in results.rows({"uncertainty": relative}))
    array = slicer.util.arrayFromVolume(run.node("uncertainty"))
    centre = np.array(array.shape) // 2
    array[:] = 0.5
    array[tuple(centre)] = 1.25
    grid = runs_grid(run.node("uncertainty"))
    lps = grid.points(centre)
    place = {"centre": lps.tolist(), "centroid": lps.tolist(), "voxels": 4, "ml": 0.1, "worst": 1.25}
    calibrated = {**relative, "calibrated": True, "on": "known warps", "worst": [place]}
    run.setMetrics({**run.metrics, "uncertainty": calibrated, "folding": {"count": 1, "regions": [place]}})
    module.panel.update()
    table = module.ui.resultsTable
    texts = [table.item(row, 0).text() for row in range(table.rowCount)]
    assert "Folded place 1: 4 voxels" in texts and any(text.startswith("Radius that holds 68 %") for text in texts)
    slices = [
        slicer.mrmlScene.GetNthNodeByClass(k, "vtkMRMLSliceNode")
        for k in range(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSliceNode"))
    ]
    module.panel.results.onCell(texts.index("Folded place 1: 4 voxels"), 0)
    ras = np.array([-lps[0], -lps[1], lps[2]])
    for node in slices:
        matrix = node.GetSliceToRAS()
        normal = np.array([matrix.GetElement(k, 2) for k in range(3)])
        at = np.array([matrix.GetElement(k, 3) for k in range(3)])
        assert abs(normal @ (ras - at)) < 1e-3, node.GetName()
    module.panel.results.onCell(0, 0)  # a row of numbers leads nowhere

    spots = scenes.fiducials(module.scene, [ras, ras + 500], "Spots")
    carried = module.engine.wait(module.engine.apply(runs.Run(run.table), [spots], fromMoving=False))[0]
    assert (
        carried.GetNthControlPointDescription(0) == "68 %: within 1.25 mm"
        and carried.GetNthControlPointDescription(1) == ""
    )


def runs_grid(node):
    from SymRegistrationGui import nodes

    return nodes.worldVolume(node)[1]
