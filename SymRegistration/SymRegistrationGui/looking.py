"""Looking closer: a cursor that shows its partner in the other scan, and fixed outlines over the registered scan."""

import slicer
from slicer.i18n import tr as _

from . import nodes
from .layers import Layers

NAME = "SymRegistration linked cursor"


class LinkedCursor:
    """A point under the mouse, read as a point of the fixed scan, and its partner in the moving scan as it lies.

    Args:
        scene: the vtkMRMLScene.
        onText: gets what there is to say.
    """

    def __init__(self, scene, onText):
        self.scene, self.onText = scene, onText
        self._run = self._crosshair = self._tag = self._marks = None

    @property
    def on(self):
        return self._run is not None

    def start(self, run):
        """Follow the mouse until :meth:`stop`."""
        self.stop()
        self._run = run
        self._crosshair = self.scene.GetFirstNodeByClass("vtkMRMLCrosshairNode")
        if self._crosshair is not None:
            event = slicer.vtkMRMLCrosshairNode.CursorPositionModifiedEvent
            self._tag = self._crosshair.AddObserver(event, self._moved)

    def _moved(self, caller, event):
        place = [0.0] * 3
        if self._crosshair.GetCursorPositionRAS(place):
            self.point(place)

    def point(self, place):
        """Show a place of the fixed scan (world mm, as Slicer shows it) and its partner; returns (partner, radius or
        None)."""
        forward = self._run.node("forward")
        if forward is None:
            self.stop()
            return None, None
        partner = forward.GetTransformFromParent().TransformPoint(place)
        radius = self._radius(place)
        self._mark(place, partner)
        text = _("Fixed {here} \u2194 moving {there}").format(here=_numbers(place), there=_numbers(partner))
        if radius is not None:
            text += _(", 68 % within {radius:.1f} mm").format(radius=radius)
        self.onText(text)
        return partner, radius

    def _radius(self, place):
        """mm, where the run has a calibrated map; None elsewhere."""
        node = self._run.node("uncertainty")
        if node is None or not (self._run.metrics.get("uncertainty") or {}).get("calibrated"):
            return None
        return nodes.valueAt(node, place)

    def _mark(self, here, there):
        if self._marks is None or self._marks.GetScene() is None:
            self._marks = self.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", NAME)
            self._marks.SetHideFromEditors(1)
            self._marks.SetSaveWithScene(False)
            self._marks.CreateDefaultDisplayNodes()
            self._marks.AddControlPoint(list(here), _("fixed"))
            self._marks.AddControlPoint(list(there), _("moving"))
            self._marks.SetLocked(True)
        for index, place in enumerate((here, there)):
            self._marks.SetNthControlPointPositionWorld(index, *place)

    def stop(self):
        """Nothing follows the mouse any more; the marks go."""
        if self._crosshair is not None and self._tag is not None:
            self._crosshair.RemoveObserver(self._tag)
        if self._marks is not None and self._marks.GetScene() is not None:
            nodes.discard(self._marks)
        self._run = self._crosshair = self._tag = self._marks = None
        self.onText("")

    def forget(self):
        """The scene was closed."""
        self._marks = None
        self.stop()


def _numbers(place):
    return "(" + ", ".join(f"{value:.1f}" for value in place) + ")"


class Outlines:
    """The fixed segmentation as lines over the registered moving scan.

    Args:
        scene: the vtkMRMLScene.
    """

    def __init__(self, scene):
        self.scene = scene
        self.layers = Layers(scene)
        self._undo = []

    @property
    def on(self):
        return bool(self._undo)

    def show(self, run, labels):
        """``labels``: a segmentation or label map of the fixed scan."""
        self.hide()
        self.layers.show(run.node("warped_moving"), None, 0.0)
        if labels.IsA("vtkMRMLSegmentationNode"):
            labels.CreateDefaultDisplayNodes()
            display = labels.GetDisplayNode()
            for name, value in (
                ("Visibility", True),
                ("Visibility2D", True),
                ("Visibility2DFill", False),
                ("Visibility2DOutline", True),
            ):
                self._set(display, name, value)
            return
        for composite in self.layers.composites():
            before = composite.GetLabelVolumeID()
            composite.SetLabelVolumeID(labels.GetID())
            self._undo.append((composite.SetLabelVolumeID, before))
        count = self.scene.GetNumberOfNodesByClass("vtkMRMLSliceNode")
        for view in [self.scene.GetNthNodeByClass(index, "vtkMRMLSliceNode") for index in range(count)]:
            self._set(view, "UseLabelOutline", True)

    def _set(self, node, name, value):
        self._undo.append((getattr(node, f"Set{name}"), getattr(node, f"Get{name}")()))
        getattr(node, f"Set{name}")(value)

    def hide(self):
        """Everything as it was."""
        for setter, value in reversed(self._undo):
            setter(value)
        self._undo = []
        self.layers.restore()

    def forget(self):
        """The scene was closed."""
        self._undo = []
        self.layers.forget()
