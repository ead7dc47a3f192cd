"""SymRegistration: register two scans both ways, and see whether to trust it.

The module, its widget, its logic for scripts and its self-test. The parts are in SymRegistrationGui, the mathematics in
SymRegistrationLib, which runs in a process of its own.
"""

import logging
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
        from SymRegistrationGui import about

        parent.title = _("SymRegistration")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = []
        parent.contributors = list(about.CONTRIBUTORS)
        parent.helpText = _(
            "Registers two 3-D scans of any kind in both directions at once, by optimization or with neural networks, "
            "and shows how far the result can be trusted: folding, inverse consistency, volume change, uncertainty, "
            "landmarks and labels."
        )
        parent.helpText += (
            "<p>"
            + _("For more information see the {start}documentation{end}.").format(
                start=f'<a href="{about.documentation()}">', end="</a>"
            )
            + "</p>"
        )
        parent.acknowledgementText = _("To cite: {citation}").format(citation=about.CITATION)
        dark = slicer.app.palette().color(qt.QPalette.Window).lightness() < 128
        parent.icon = qt.QIcon(
            self.resourcePath("Icons/SymRegistrationDark.svg" if dark else "Icons/SymRegistration.svg")
        )
        slicer.app.connect("startupCompleted()", self.onStartup)

    def onStartup(self):
        from SymRegistrationGui import sampledata

        try:
            sampledata.register(self.parent.path)
        except ImportError:  # an application built on Slicer without the module Sample Data
            logging.getLogger("SymRegistration").info("SymRegistration: no Sample Data module here")


class SymRegistrationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """Loads the .ui file and hands it to the panel; tells it of scenes that come and go."""

    logic = panel = None

    def __init__(self, parent=None):
        # The base class initializes the mixin and, without a parent, calls setup(); doing it again would
        # forget observers.
        ScriptedLoadableModuleWidget.__init__(self, parent)

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        from SymRegistrationGui.widget import Panel

        self._widget = slicer.util.loadUI(self.resourcePath("UI/SymRegistration.ui"))
        self.layout.addWidget(self._widget)
        self.ui = slicer.util.childWidgetVariables(self._widget)
        self.logic = SymRegistrationLogic()
        self.panel = Panel(self.ui, self.logic.engine)
        self.enter()

    def enter(self):
        """The module is opened: the state is read; nothing is installed, downloaded or started."""
        if self.panel is None:  # setup() failed, and said so
            return
        if self.panel.parameters is None:
            self._observeScene()
            self.panel.setParameters(self.logic.getParameterNode())
        self.panel.presets.read()
        self.panel.update()
        self.panel.results.views.resume()

    def _observeScene(self):
        scene = slicer.mrmlScene
        self._widget.setMRMLScene(scene)
        self.panel.setScene(scene)
        self.removeObservers()
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.EndImportEvent, self.onSceneEndClose)

    def exit(self):
        """Another module is opened: nothing in the views moves any more."""
        if self.panel is not None:
            self.panel.results.views.pause()

    def onSceneStartClose(self, caller, event):
        self.panel.setParameters(None)
        self.panel.results.sceneClosed()

    def onSceneEndClose(self, caller, event):
        self.panel.setParameters(self.logic.getParameterNode())

    def cleanup(self):
        """Reload, or the end of the application: nothing of this widget reacts to anything afterwards."""
        self.removeObservers()
        if self.panel is not None:
            self.panel.close()
            # Reload only hides the widget, and its selectors would go on following the scene
            self._widget.setMRMLScene(None)
            self.panel.setScene(None)


class SymRegistrationLogic(ScriptedLoadableModuleLogic):
    """For scripts: ``SymRegistrationLogic().register(fixedNode, movingNode)``, and ``align``, ``update``, ``repair``,
    ``undo``, ``redo``, ``history``, ``saveSteps``; :class:`SymRegistrationGui.scripting.Scripting` describes them.
    """

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        from SymRegistrationGui.logic import RegistrationLogic
        from SymRegistrationGui.scripting import Scripting

        self.engine = RegistrationLogic(slicer.mrmlScene)
        self._calls = Scripting()
        self._calls.engine = self.engine
        for name in ("register", "align", "update", "repair", "undo", "redo", "history", "saveSteps"):
            setattr(self, name, getattr(self._calls, name))

    def getParameterNode(self):
        from SymRegistrationGui.parameters import Parameters

        return Parameters(super().getParameterNode())


class SymRegistrationTest(ScriptedLoadableModuleTest):
    """The self-test that a real Slicer runs, by Reload and Test or by ctest; see SymRegistrationGui/selftest.py."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_panel()

    def test_panel(self):
        from SymRegistrationGui import selftest

        selftest.run(self.tell)
        self.delayDisplay("Test passed")

    def tell(self, line):
        """One line of result: in the console, in the log, and on the screen for a moment."""
        print(line)
        self.delayDisplay(line)
