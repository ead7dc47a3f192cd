"""SymRegistration: register two scans both ways, and see whether to trust it.

The module, its widget, its logic for scripts and its self-test. The parts are in SymRegistrationGui, the mathematics in
SymRegistrationLib, which runs in a process of its own.
"""

import os
import sys

import qt
import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

try:
    import SymRegistrationLib  # noqa: F401  installed beside this file
except ImportError:  # run from a source folder: the library lies beside the module's folder
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class SymRegistration(ScriptedLoadableModule):
    """What Slicer's module list shows."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("SymRegistration")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = []
        parent.contributors = ["SymRegistration contributors"]
        parent.helpText = _(
            "Registers two 3-D scans of any kind in both directions at once, by optimization or with neural networks, and shows "
            "how far the result can be trusted: folding, inverse consistency, volume change, uncertainty, landmarks and labels.")
        parent.acknowledgementText = _("See the method's description in the module for the publication to cite.")
        dark = slicer.app.palette().color(qt.QPalette.Window).lightness() < 128
        parent.icon = qt.QIcon(self.resourcePath("Icons/SymRegistrationDark.svg" if dark else "Icons/SymRegistration.svg"))
        slicer.app.connect("startupCompleted()", self.onStartup)

    def onStartup(self):
        from SymRegistrationGui import sampledata

        sampledata.register(self.parent.path)


class SymRegistrationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """Loads the .ui file and hands it to the panel."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        from SymRegistrationGui.widget import Panel

        widget = slicer.util.loadUI(self.resourcePath("UI/SymRegistration.ui"))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)
        self.logic = SymRegistrationLogic()
        self.panel = Panel(self.ui, self.logic.engine)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndClose)
        self.enter()

    def enter(self):
        """The module is opened: the state is read; nothing is installed, downloaded or started."""
        if self.panel.parameters is None:
            self.panel.setParameters(self.logic.getParameterNode())

    def onSceneStartClose(self, caller, event):
        self.panel.setParameters(None)
        self.panel.results.sceneClosed()

    def onSceneEndClose(self, caller, event):
        self.panel.setParameters(self.logic.getParameterNode())

    def cleanup(self):
        self.removeObservers()
        self.panel.close()


class SymRegistrationLogic(ScriptedLoadableModuleLogic):
    """For scripts: ``SymRegistrationLogic().register(fixedNode, movingNode)``."""

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        from SymRegistrationGui.logic import RegistrationLogic

        self.engine = RegistrationLogic(slicer.mrmlScene)

    def getParameterNode(self):
        from SymRegistrationGui.parameters import Parameters

        return Parameters(super().getParameterNode())

    def register(self, fixedNode, movingNode, method="syn", wait=True, onDone=None, inputs=None, **options):
        """Register two volume nodes.

        Args:
            fixedNode, movingNode: volumes.
            method: a name that the module lists.
            wait: process events until the result is there; else return at once.
            onDone: with ``wait=False``: called with the :class:`~SymRegistrationGui.runs.Run`.
            inputs: further fields of :class:`~SymRegistrationGui.exporting.Request`, e.g. ``{"fixedMask": node}``.
            **options: of :class:`SymRegistrationLib.job.Options`, e.g. ``preset="fast"``.

        Returns:
            With ``wait``, a dictionary of nodes: forward, inverse, warped_moving, jacobian, table; else a Task.

        Raises:
            InputError, RegistrationError, WorkerError: what went wrong, in words.
        """
        from SymRegistrationGui import results
        from SymRegistrationGui.exporting import Request
        from SymRegistrationGui.logic import Task
        from SymRegistrationGui.runs import PARTS

        from SymRegistrationLib.job import Options

        def done(run):
            results.fillTable(run.table, run.metrics)
            if onDone is not None:
                onDone(run)

        request = Request(fixedNode, movingNode, Options(method=method, **options), **(inputs or {}))
        task = self.engine.register(request, Task(onDone=done))
        if not wait:
            return task
        run = self.engine.wait(task)
        return {**{part: run.node(part) for part in PARTS if run.node(part) is not None}, "table": run.table}


class SymRegistrationTest(ScriptedLoadableModuleTest):
    """The self-test that a real Slicer runs: Reload and Test, or ctest."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_registersSampleData()

    def test_registersSampleData(self):
        from SymRegistrationGui import install, selftest

        if install.check():
            self.delayDisplay("PyTorch is not installed; only the panel is tested.")
            selftest.openPanel()
            return
        self.delayDisplay("Registering the synthetic heads")
        selftest.registerHeads(SymRegistrationLogic())
        selftest.openPanel()
        self.delayDisplay("Test passed")
