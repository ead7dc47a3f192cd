"""The self-test that drives the panel as a user does, in Slicer or in the harness: one line of result per step
in the log.

*Reload and Test*, ctest and ``SymRegistrationTest`` run it. It needs no main window; without one, what the views draw
is told as not tested. It begins with an empty scene and leaves one.
"""

import contextlib
import logging
import os
import tempfile
import time

import numpy as np
import slicer

from . import install, nodes, runs, sampledata
from .views import COMPARE, MAPS

#: Seconds after which something that does not happen is taken for broken; the first start of the worker may be slow.
LIMIT = 600.0


class SelfTest:
    """The steps, in order of their methods' names; the first line of a method's documentation is the step's name
    in the log.

    Args:
        widget: the module's widget.
        show: called with each line of result.

    Attributes:
        lines: (name, result) of the steps so far; a result begins with "ok", "not tested" or "FAILED".
    """

    def __init__(self, widget, show=lambda line: None):
        self.widget, self.show = widget, show
        self.panel, self.ui, self.engine = widget.panel, widget.ui, widget.logic.engine
        self.lines = []
        self.pair = None
        self.untestable = ""

    @property
    def state(self):
        return self.panel.parameters

    def all(self):
        """Run every step; one that fails does not keep the others from being tried.

        Raises:
            AssertionError: naming the steps that failed.
        """
        steps = sorted(name for name in dir(self) if name.startswith("step"))
        for number, step in enumerate(steps, start=1):
            function, started = getattr(self, step), time.monotonic()
            name = function.__doc__.split("\n")[0].rstrip(".")
            try:
                result = function() or "ok"
            except Exception as error:  # whatever it is, it is this step's result
                logging.getLogger("SymRegistration").exception("SymRegistration self-test: %s", step)
                result = f"FAILED: {type(error).__name__}: {error}"
            self.lines.append((name, result))
            seconds = time.monotonic() - started
            self.show(f"SymRegistration self-test {number}/{len(steps)}: {name}: {result} ({seconds:.1f} s)")
        failed = [name for name, result in self.lines if result.startswith("FAILED")]
        assert not failed, f"steps that failed: {'; '.join(failed)}. The log has the details."

    # ------------------------------------------------------------------------------------------ helpers

    def click(self, name):
        button = getattr(self.ui, name)
        assert button.enabled, f"{name} cannot be pressed: {button.toolTip}"
        button.click()

    def wait(self, condition, what):
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"{what} did not come within {LIMIT:.0f} s"
            slicer.app.processEvents()
            time.sleep(0.005)

    def register(self):
        """Click Register and wait; returns the run."""
        self.click("registerButton")
        self.wait(lambda: not self.panel.busy, "the end of the registration")
        run = self.panel.results.run
        assert run is not None, self.ui.statusLabel.text
        self.wait(lambda: not self.engine.client.busy, "the report")
        return run

    def needed(self):
        """Why nothing can be registered here, "" when it can."""
        if self.pair is None:
            return "not tested: there are no scans"
        missing = install.check()
        if (
            missing and slicer.app.testingEnabled()
        ):  # the question would be skipped, and a test must not install anything
            return f"not tested: {install.names(missing)} not installed"
        return self.untestable

    # ------------------------------------------------------------------------------------------ steps

    def step01(self):
        """The panel is open and knows its methods."""
        assert self.state is not None, "the panel has no parameter node"
        assert self.ui.methodComboBox.count >= 5, "methods are missing"
        assert not self.ui.registerButton.enabled, "Register can be pressed in an empty scene"
        assert not self.engine.busy

    def step02(self):
        """Sample Data offers two entries; the heads load and are shown."""
        try:
            import SampleData
        except ImportError:
            self.pair = sampledata.makePair(slicer.mrmlScene)
            return "not tested: no Sample Data module here"
        sampledata.register(
            slicer.modules.symregistration.path if hasattr(slicer.modules, "symregistration") else sampledata.__file__
        )
        sources = {s.sampleName: s for s in SampleData.SampleDataLogic.sampleDataSourcesByCategory(sampledata.CATEGORY)}
        assert set(sources) == {"SymRegistrationHeads", "SymRegistrationTumorPair"}, sorted(sources)
        self.pair = sources["SymRegistrationHeads"].customDownloader(sources["SymRegistrationHeads"])
        assert [node.GetClassName() for node in self.pair] == ["vtkMRMLScalarVolumeNode"] * 2 + [
            "vtkMRMLMarkupsFiducialNode"
        ] * 2
        shown = {composite.GetBackgroundVolumeID() for composite in self.panel.results.views.composites()}
        assert shown <= {self.pair[0].GetID()}, "the fixed scan is not shown"
        return "" if shown else "ok, but there are no slice views to show them in"

    def step03(self):
        """The chosen scans reach the parameters and back."""
        fixed, moving, fixedPoints, movingPoints = self.pair
        for name, node in (
            ("fixed", fixed),
            ("moving", moving),
            ("fixedLandmarks", fixedPoints),
            ("movingLandmarks", movingPoints),
        ):
            getattr(self.ui, f"{name}Selector").setCurrentNode(node)
        assert self.state.fixedVolume is fixed and self.state.movingVolume is moving
        assert self.state.fixedLandmarks is fixedPoints and self.state.movingLandmarks is movingPoints
        self.ui.presetComboBox.currentIndex = self.ui.presetComboBox.findData("fast")
        assert self.state.preset == "fast"
        self.click("swapButton")
        assert self.ui.fixedSelector.currentNode() is moving
        self.click("swapButton")
        assert self.ui.registerButton.enabled, self.ui.registerButton.toolTip

    def step04(self):
        """Register makes linked nodes; space is not folded; landmarks meet."""
        problem = self.needed()
        if problem:
            return problem
        self.untestable = "not tested: the registration before did not succeed"
        run = self.register()
        for part in ("forward", "inverse", "warped_moving", "jacobian", "inverse_consistency"):
            assert run.node(part) is not None and run.node(part).GetScene() is slicer.mrmlScene, (
                f"{part} is not in the scene"
            )
        assert self.state.outputForward is run.node("forward")
        assert (nodes.volumeArray(run.node("jacobian")) > 0).all(), "space is folded"
        before, after = landmarkErrors(*self.pair[2:], run.node("inverse"))
        assert after < 2.5 < before, f"landmarks miss by {after:.2f} mm (before {before:.2f} mm)"
        self.untestable = ""
        return f"ok, landmarks {before:.1f} mm before, {after:.2f} mm after"

    def step05(self):
        """The table and the verdict say so."""
        if self.needed():
            return self.needed()
        run = self.panel.results.run
        assert run.table.GetNumberOfRows() > 4 and self.ui.resultsTable.rowCount >= run.table.GetNumberOfRows()
        assert run.metrics["landmarks"]["mean_after_mm"] < 2.5 and self.ui.verdictLabel.text
        assert run.node("report").GetText(), "there is no report"

    def step06(self):
        """Every view can be switched on, and back."""
        if self.needed():
            return self.needed()
        results = self.panel.results
        before = [c.GetForegroundVolumeID() for c in results.views.composites()]
        for name in (
            "checkerboardButton",
            "flickerButton",
            "differenceButton",
            "jacobianButton",
            "consistencyButton",
            "blendButton",
        ):
            getattr(self.ui, name).checked = True
            self.wait(lambda: not results.views._steps.busy, name)
            assert results.views.mode in (*COMPARE, *MAPS), name
        for name in ("gridButton", "glyphsButton"):
            getattr(self.ui, name).checked = True
        results.switchOff()
        assert results.views.mode == "" and len(before) == len(results.views.composites())
        return "" if slicer.app.layoutManager() is not None else "ok, but without a main window nothing was drawn"

    def step07(self):
        """Align, Update, Repair, Undo and Redo change the result and bring it back."""
        if self.needed():
            return self.needed()
        run, state = self.panel.results.run, self.state
        first = self.place(run)
        state.driveLandmarks = True
        self.press("updateButton")
        updated = self.place(run)
        box = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "SymRegistration self-test region")
        box.SetCenterWorld(*nodes.worldCenter(self.pair[0]))
        box.SetSizeWorld(30.0, 30.0, 30.0)
        state.repairRegion = box
        self.press("repairButton")
        for button, place in (("undoButton", updated), ("undoButton", first), ("redoButton", updated)):
            self.press(button)
            left = np.abs(self.place(run) - place).max()
            assert left < 0.1, f"{button} leads {left:.2f} mm away from what was there"
        self.press("alignButton")
        assert run.node("forward").IsLinear() and state.initial == "transform" and state.initialTransform.IsLinear()
        self.press("snapButton")
        self.ui.showPoseButton.checked = False
        state.driveLandmarks, state.initial, state.initialTransform = False, "affine", None
        slicer.mrmlScene.RemoveNode(box)

    def press(self, name):
        """Click and wait for the end, report included; what goes wrong is this step's result."""
        self.click(name)
        self.wait(lambda: not self.panel.busy and not self.engine.client.busy, f"the end of {name}")
        assert not self.panel._told, self.panel._told

    @staticmethod
    def place(run):
        """Where the middle of the fixed scan is carried, mm."""
        middle = nodes.worldCenter(run.node("fixed"))
        return np.array(run.node("forward").GetTransformFromParent().TransformPoint(middle))

    def step08(self):
        """Cancel gives a second run up and leaves the scene as it was."""
        if self.needed():
            return self.needed()
        self.state.preset = "thorough"
        before = slicer.mrmlScene.GetNumberOfNodes()
        self.click("registerButton")
        self.wait(lambda: self.engine.client.busy or not self.engine.busy, "the worker's turn")
        assert self.engine.busy, self.ui.statusLabel.text
        self.click("cancelButton")
        assert not self.engine.busy and not self.engine.client.running
        assert slicer.mrmlScene.GetNumberOfNodes() == before and self.ui.registerButton.enabled
        self.state.preset = "fast"

    def step09(self):
        """Remove result takes out what the run made."""
        if self.needed():
            return self.needed()
        made = self.panel.results.run.created()
        self.click("removeButton")
        assert all(node.GetScene() is None for node in made), "nodes are left"
        assert self.panel.results.run is None and runs.runs(slicer.mrmlScene) == []
        assert self.state.outputForward is None, "an output that is gone is still chosen"

    def step10(self):
        """A script gets the same nodes."""
        if self.needed():
            return self.needed()
        made = self.widget.logic.register(self.pair[0], self.pair[1], preset="fast")
        assert {"forward", "inverse", "warped_moving", "jacobian", "table"} <= set(made), sorted(made)

    def step11(self):
        """Further contrasts and presets of one's own are chosen, kept and given back."""
        ui, state = self.ui, self.state
        state.fixedVolume, state.movingVolume = self.pair[:2]
        others = []
        for node in self.pair[:2]:
            name = f"{node.GetName()}, other contrast"
            others.append(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name))
            nodes.shareVoxels(node, others[-1])
        self.click("addContrastButton")
        assert not ui.registerButton.enabled, "a pair without scans can be registered"
        for column, node in enumerate(others):
            ui.contrastsTable.cellWidget(1, column).setCurrentNode(node)
        ui.contrastsTable.cellWidget(1, 2).value = 0.5
        assert list(state.fixedContrasts) == others[:1] and list(state.movingContrasts) == others[1:]
        assert list(state.contrastWeights) == [1.0, 0.5] and ui.registerButton.enabled, ui.registerButton.toolTip
        self.click("removeContrastButton")
        assert ui.contrastsTable.rowCount == 0 and not list(state.fixedContrasts)
        for node in others:
            nodes.discard(node)
        with temporarySettings():
            state.metric = "mind"
            name = self.panel.presets.keep("SymRegistration self-test")
            state.metric = "auto"
            ui.anatomyComboBox.currentIndex = ui.anatomyComboBox.findData("unknown")
            ui.anatomyComboBox.currentIndex = ui.anatomyComboBox.findData(name)
            assert state.anatomy == name and state.metric == "mind"
            self.click("deletePresetButton")
            assert ui.anatomyComboBox.findData(name) < 0 and state.anatomy == "unknown" and state.metric == "auto"

    def step12(self):
        """Closing the scene leaves an empty panel that works."""
        slicer.mrmlScene.Clear()
        slicer.app.processEvents()
        assert self.state is not None and self.state.fixedVolume is None and self.ui.fixedSelector.currentNode() is None
        assert self.panel.results.run is None and not self.ui.registerButton.enabled


def landmarkErrors(fixedPoints, movingPoints, inverse):
    """(before, after): mean distance in mm of the fixed landmarks from the moving ones, as they lie and
    carried by ``inverse``.
    """
    fixed, moving = (nodes.worldPoints(markups)[0] for markups in (fixedPoints, movingPoints))
    transform = inverse.GetTransformFromParent()
    carried = nodes.rasFromLps([transform.TransformPoint(place) for place in nodes.rasFromLps(moving)])
    return tuple(float(np.linalg.norm(places - fixed, axis=1).mean()) for places in (moving, carried))


@contextlib.contextmanager
def temporarySettings():
    """Presets of one's own lie in a folder that goes; those of the user are neither seen nor touched."""
    before = os.environ.get("SYMREG_CONFIG")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SYMREG_CONFIG"] = folder
        try:
            yield
        finally:
            del os.environ["SYMREG_CONFIG"]
            if before is not None:
                os.environ["SYMREG_CONFIG"] = before


@contextlib.contextmanager
def moduleWidget():
    """The module's own widget, which Slicer makes once; a second panel would react to everything beside the first one.

    Where Slicer does not know the module, because a test imported the file alone, one is made and taken down again.
    """
    if hasattr(slicer.modules, "symregistration"):
        slicer.modules.symregistration.widgetRepresentation()
        yield slicer.modules.SymRegistrationWidget
        return
    import SymRegistration

    widget = SymRegistration.SymRegistrationWidget()
    try:
        yield widget
    finally:
        widget.cleanup()
        slicer.app.moduleManager().disconnect("moduleAboutToBeUnloaded(QString)", widget._onModuleAboutToBeUnloaded)
        widget.parent.hide()
        widget.parent.deleteLater()


def run(show=lambda line: None):
    """The whole test, with an empty scene before and after; returns the :class:`SelfTest`.

    Raises:
        AssertionError: a step failed.
    """
    with moduleWidget() as widget:
        slicer.mrmlScene.Clear()
        widget.enter()
        test = SelfTest(widget, show)
        test.all()
        return test
