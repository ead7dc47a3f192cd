"""What the slice views show, remembered so that it can be put back; no view widget is touched."""


class Layers:
    """The layers of all slice views of a scene.

    Args:
        scene: the vtkMRMLScene.
    """

    def __init__(self, scene):
        self.scene = scene
        self._before = None

    @property
    def changed(self):
        """True between :meth:`show` and :meth:`restore`."""
        return self._before is not None

    def composites(self):
        """The vtkMRMLSliceCompositeNodes, one per slice view."""
        count = self.scene.GetNumberOfNodesByClass("vtkMRMLSliceCompositeNode")
        return [self.scene.GetNthNodeByClass(index, "vtkMRMLSliceCompositeNode") for index in range(count)]

    def show(self, background, foreground, opacity):
        """Volume nodes or None for both layers, and how much of the foreground is seen, 0 to 1."""
        if self._before is None:
            self._before = [
                (c.GetBackgroundVolumeID(), c.GetForegroundVolumeID(), c.GetForegroundOpacity())
                for c in self.composites()
            ]
        for composite in self.composites():
            composite.SetBackgroundVolumeID(background.GetID() if background is not None else None)
            composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
            composite.SetForegroundOpacity(opacity)

    def fade(self, opacity):
        """Only the foreground's opacity."""
        for composite in self.composites():
            composite.SetForegroundOpacity(opacity)

    def restore(self):
        """As it was before the first :meth:`show`; volumes that are gone leave their layers empty."""
        for composite, (background, foreground, opacity) in zip(self.composites(), self._before or []):
            exists = [
                identity if identity and self.scene.GetNodeByID(identity) else None
                for identity in (background, foreground)
            ]
            composite.SetBackgroundVolumeID(exists[0])
            composite.SetForegroundVolumeID(exists[1])
            composite.SetForegroundOpacity(opacity)
        self._before = None

    def forget(self):
        """The scene was closed: nothing to go back to."""
        self._before = None


def temporaryVolume(scene, name):
    """A scalar volume that no list shows and no scene file keeps."""
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    node.SetHideFromEditors(1)
    node.SetSaveWithScene(False)
    return node
