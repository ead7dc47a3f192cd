"""What the self-test checks, apart from the test class, so that it runs in Slicer and in the harness alike."""

import numpy as np
import slicer

from . import nodes, sampledata


def registerHeads(logic):
    """Register the synthetic pair; the result must undo the known deformation.

    Raises:
        AssertionError: with the number that is wrong.
    """
    fixed, moving, fixedPoints, movingPoints = sampledata.makePair(slicer.mrmlScene)
    result = logic.register(fixed, moving, preset="fast", inputs={"fixedPoints": fixedPoints, "movingPoints": movingPoints})
    for part in ("forward", "inverse", "warped_moving", "jacobian", "table"):
        assert result[part].GetScene() is slicer.mrmlScene, f"{part} is not in the scene"
    assert (nodes.volumeArray(result["jacobian"]) > 0).all(), "space is folded"
    expected, _labels = nodes.worldPoints(fixedPoints)
    moved = movedPoints(movingPoints, result["inverse"])
    error = np.linalg.norm(moved - expected, axis=1).mean()
    before = np.linalg.norm(nodes.worldPoints(movingPoints)[0] - expected, axis=1).mean()
    assert error < 2.5 < before, f"landmarks miss by {error:.2f} mm (before {before:.2f} mm)"
    logic.engine.close()
    return error


def movedPoints(markups, inverse):
    """(n, 3) LPS mm: points of the moving scan, carried to the fixed one."""
    places = nodes.rasFromLps(nodes.worldPoints(markups)[0])
    transform = inverse.GetTransformFromParent()
    return nodes.rasFromLps([transform.TransformPoint(place) for place in places])


def openPanel():
    """The panel opens, knows every method, and starts nothing."""
    import SymRegistration

    widget = SymRegistration.SymRegistrationWidget()
    assert widget.ui.methodComboBox.count >= 5, "methods are missing"
    assert not widget.logic.engine.client.running, "opening the module started a process"
    widget.cleanup()
