"""A pose that is found, seen, turned and shifted by hand before anything bends: a linear transform node with handles,
and a copy of the moving scan behind it, which shares its voxels. The scans' own nodes are not touched."""

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import nodes
from .layers import Layers, temporaryVolume


def setPose(run):
    """The pose of a run whose result is linear, as its linear transform node ("pose"), made when missing.

    Put on the moving scan it brings it onto the fixed one; as start transform it says where to go on.
    """
    node = run.node("pose")
    if node is None:
        scene, moving = run.scene, run.node("moving")
        name = scene.GenerateUniqueName(_("Pose of {name}").format(name=moving.GetName()))
        node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
        run.setNode("pose", node, True)
        run.own([node])
    node.SetMatrixTransformToParent(nodes.vtkFromMatrix(toParent(run.node("forward"))))
    return node


def toParent(forward):
    """(4, 4) of a linear transform node's ToParent."""
    matrix = slicer.vtkMRMLTransformNode()  # keeps the node's own matrix from being changed
    matrix.SetAndObserveTransformFromParent(forward.GetTransformFromParent())
    found = nodes.vtkFromMatrix(np.eye(4))
    matrix.GetMatrixTransformToParent(found)
    return nodes.matrixFromVtk(found)


class PoseView:
    """Shows a pose in the slice views, and its handles.

    Args:
        scene: the vtkMRMLScene.
    """

    def __init__(self, scene):
        self.scene = scene
        self.layers = Layers(scene)
        self._copy = self._pose = self._moving = None

    @property
    def shown(self):
        return self._copy is not None

    def isOf(self, moving, pose):
        """True while what is shown is this scan in this pose."""
        return self._moving is moving and self._pose is pose

    def show(self, fixed, moving, pose, handles=True):
        """The fixed scan, half covered by the moving one as ``pose`` (a transform node) lays it."""
        if self._copy is None or self._copy.GetScene() is None:
            self._copy = temporaryVolume(self.scene, _("{name} in its pose").format(name=moving.GetName()))
            if moving.GetDisplayNode() is not None:
                self._copy.CreateDefaultDisplayNodes()
                self._copy.GetDisplayNode().CopyContent(moving.GetDisplayNode(), True)
        nodes.shareVoxels(moving, self._copy)
        self._copy.SetAndObserveTransformNodeID(pose.GetID())
        self._pose, self._moving = pose, moving
        center = nodes.worldCenter(moving)
        pose.SetCenterOfTransformation(*center)
        self.setHandles(handles)
        self.layers.show(fixed, self._copy, 0.5)

    def setHandles(self, on):
        """Handles in the slice and 3-D views, with which the pose is turned and shifted."""
        if self._pose is None or self._pose.GetScene() is None:
            return
        self._pose.CreateDefaultDisplayNodes()
        display = self._pose.GetDisplayNode()
        with slicer.util.NodeModify(display):
            display.SetEditorVisibility(on)
            display.SetEditorVisibility3D(on)
            display.SetEditorSliceIntersectionVisibility(on)
            display.SetEditorScalingEnabled(False)
            display.SetEditorScalingSliceEnabled(False)

    def hide(self):
        """The views as they were; the pose itself stays."""
        if not self.shown:
            return
        self.setHandles(False)
        self.layers.restore()
        if self._copy.GetScene() is not None:
            nodes.discard(self._copy)
        self._copy = self._pose = self._moving = None

    def forget(self):
        """The scene was closed."""
        self.layers.forget()
        self._copy = self._pose = self._moving = None
