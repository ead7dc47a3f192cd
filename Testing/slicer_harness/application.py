"""``slicer.app`` and ``slicer.mrmlScene``: what C++ gives to Slicer's Python files, over real MRML and real Qt."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

import slicer
import vtk
from PySide6 import QtCore, QtWidgets

from . import factory, imitation, layer, qt_module, widgets

#: Applications are never collected: VTK calls observers of a scene whose Python side is just going, which ends
#: the process.
_kept = []
LAUNCHER = Path(__file__).resolve().parent / "launcher"


class Signals:
    """Something whose signals Python connects by their text.

    Args:
        known: the signals that exist.
    """

    def __init__(self, *known):
        self.slots = {signal: [] for signal in known}

    def connect(self, signal, slot):
        self._slots(signal).append(slot)

    def disconnect(self, signal, slot):
        self._slots(signal).remove(slot)

    def emit(self, signal, *arguments):
        for slot in list(self._slots(signal)):
            slot(*arguments)

    def _slots(self, signal):
        if signal not in self.slots:
            raise RuntimeError(f"there is no signal {signal}")
        return self.slots[signal]


class LayoutManager:
    """The slice views, as far as Python code asks for them.

    Attributes:
        calls: names of what was called, in order.
    """

    def __init__(self, logic):
        self._logic, self.calls = logic, []

    def resetSliceViews(self):
        self.calls.append("resetSliceViews")

    def resetThreeDViews(self):
        self.calls.append("resetThreeDViews")

    def mrmlSliceLogics(self):
        self.calls.append("mrmlSliceLogics")
        return self._logic.GetSliceLogics() or vtk.vtkCollection()


class Application:
    """What a test holds on to.

    Attributes:
        scene: ``slicer.mrmlScene``.
        shown: (kind, text) of every message box that opened. A box runs the event loop, as in Slicer.
        answers: what the next question is answered; True when empty.
        faults: what would have gone wrong in Slicer: a box in the middle of a scene event, a wrong cursor count.
        layout: the :class:`LayoutManager`; None = there is no main window.
        testing: Slicer's testing mode, in which boxes are skipped.
    """

    applicationName = "Slicer"
    applicationVersion = layer.release()
    majorVersion, minorVersion = (int(n) for n in applicationVersion.split(".")[:2])
    slicerHome = ""

    def __init__(self):
        self.qt = QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
        self.scene = slicer.vtkMRMLScene()
        self.shown: list[tuple[str, str]] = []
        self.answers: list[bool] = []
        self.faults: list[str] = []
        self.cursors = 0
        self.testing = False
        self.folder = tempfile.mkdtemp(prefix="slicer-harness-")
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        Path(self.folder, ".slicer-cache").touch()
        self._signals = Signals("startupCompleted()")
        self._modules = Signals("moduleAboutToBeUnloaded(QString)")
        self._removing = 0
        self._settings()
        self._applicationLogic()
        self.layout = LayoutManager(self.logic)
        for event, step, priority in (
            (self.scene.NodeAboutToBeRemovedEvent, 1, 1000.0),
            (self.scene.NodeRemovedEvent, -1, -1000.0),
        ):
            self.scene.AddObserver(
                event, lambda caller, name, s=step: setattr(self, "_removing", self._removing + s), priority
            )

    def _settings(self):
        """Settings of this application only, at the place where ``QSettings()`` looks."""
        QtCore.QCoreApplication.setOrganizationName("slicer-harness")
        QtCore.QCoreApplication.setApplicationName("Slicer")
        QtCore.QSettings.setDefaultFormat(QtCore.QSettings.IniFormat)
        QtCore.QSettings.setPath(QtCore.QSettings.IniFormat, QtCore.QSettings.UserScope, self.folder)
        self.settings().setValue("Developer/SelfTestDisplayMessageDelay", "10")

    def _applicationLogic(self):
        """What the real application adds to a new scene: subject hierarchy, colors, views, cache."""
        self.logic = slicer.vtkMRMLApplicationLogic()
        self.cache = slicer.vtkCacheManager()
        self.cache.SetRemoteCacheDirectory(self.folder)
        self.data = slicer.vtkDataIOManager()
        self.data.SetCacheManager(self.cache)
        self.scene.SetCacheManager(self.cache)
        self.scene.SetDataIOManager(self.data)
        self.logic.SetMRMLScene(self.scene)
        slicer.vtkMRMLSubjectHierarchyNode.ResolveSubjectHierarchy(self.scene)
        self.segmentations = slicer.vtkSlicerSegmentationsModuleLogic()
        self.segmentations.SetMRMLScene(self.scene)
        self.colors = slicer.vtkMRMLColorLogic()
        self.colors.SetMRMLScene(self.scene)
        self.scene.RegisterNodeClass(slicer.vtkMRMLColorLegendDisplayNode())
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene)
        for name in ("Red", "Green", "Yellow"):
            sliceNode = self.scene.CreateNodeByClass("vtkMRMLSliceNode")
            sliceNode.UnRegister(None)
            sliceNode.SetName(name)
            sliceNode.SetLayoutName(name)
            sliceNode.SetSingletonTag(name)
            self.scene.AddNode(sliceNode)
            sliceNode.SetOrientation({"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}[name])
            composite = slicer.vtkMRMLSliceCompositeNode()
            composite.SetSingletonTag(name)
            composite.SetLayoutName(name)
            self.scene.AddNode(composite)

    # ---- slicer.app

    def processEvents(self, flags=QtCore.QEventLoop.AllEvents):
        self.qt.processEvents(flags)

    def settings(self):
        return QtCore.QSettings()

    userSettings = settings

    def startupEnvironment(self):
        return QtCore.QProcessEnvironment.systemEnvironment()

    def testingEnabled(self):
        return self.testing

    def translate(self, context, text):
        return text

    def palette(self):
        return self.qt.palette()

    def screens(self):
        return []

    def layoutManager(self):
        return self.layout

    def moduleManager(self):
        return self._modules

    def connect(self, signal, function):
        self._signals.connect(signal, function)

    def setOverrideCursor(self, shape):
        self.cursors += 1

    def restoreOverrideCursor(self):
        self.cursors -= 1
        if self.cursors < 0:
            self.faults.append("a cursor was restored that nobody had set")

    # ---- for tests

    def startup(self):
        """The application has started: modules hear of it."""
        self._signals.emit("startupCompleted()")

    def wait(self, condition, seconds=60.0, what="the condition"):
        """Process events until ``condition()``; fails after ``seconds``, of which a pause of the whole
        machine counts little.
        """
        waited, last = 0.0, time.monotonic()
        tick = QtCore.QTimer()  # an event at least every few milliseconds: between them the processor is left to others
        tick.start(5)
        while not condition():
            now = time.monotonic()
            waited, last = waited + min(now - last, 0.5), now
            if waited > seconds:
                raise AssertionError(f"{what} did not happen within {seconds} s; messages: {self.shown}")
            self.qt.processEvents(QtCore.QEventLoop.AllEvents | QtCore.QEventLoop.WaitForMoreEvents)
        tick.stop()

    def inEventLoop(self, function):
        """Call ``function`` from a running event loop, as everything in Slicer is, and let the loop go
        round twice afterwards.
        """
        loop, failed = QtCore.QEventLoop(), []

        def call():
            try:
                function()
            except BaseException as error:
                failed.append(error)
            QtCore.QTimer.singleShot(0, lambda: QtCore.QTimer.singleShot(0, loop.quit))

        QtCore.QTimer.singleShot(0, call)
        loop.exec()
        if failed:
            raise failed[0]

    def box(self, kind, text, asks):
        """A message box: noted, answered; meanwhile the event loop runs."""
        if self.scene.IsBatchProcessing() or self._removing:
            self.faults.append(f"a message box opened in the middle of a scene event: {text}")
        self.shown.append((kind, text))
        self.qt.processEvents(QtCore.QEventLoop.ExcludeUserInputEvents)
        return self.answers.pop(0) if asks and self.answers else True


def start(reimport: bool = False) -> Application:
    """A fresh application with an empty scene; with ``reimport``, the module's Python files are imported anew."""
    application = Application()
    _kept.append(application)
    os.environ["HARNESS_PYTHON"] = sys.executable
    if str(LAUNCHER) not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{LAUNCHER}{os.pathsep}{os.environ['PATH']}"
    slicer.app = application
    slicer.mrmlScene = application.scene
    slicer.modules = types.ModuleType("slicer.modules")
    sys.modules["slicer.modules"] = slicer.modules
    slicer.selfTests = {}
    qt_module.install([factory.MODULE])
    widgets.install()
    for name in ("slicer.packaging", "PyTorchUtils", "SampleData"):
        sys.modules.pop(name, None)
    if layer.folder() is None:
        imitation.install()
    else:
        from . import genuine_layer

        genuine_layer.install(layer.folder())
    _messages(application)
    for name in (
        [n for n in sys.modules if n.split(".")[0] in ("SymRegistration", "SymRegistrationGui")] if reimport else ()
    ):
        del sys.modules[name]
    factory.describe()
    return application


def _messages(application):
    """slicer.util's functions for boxes end in one function, which would need a main window."""
    import qt

    box = qt.QMessageBox

    def display(
        logLevel,
        text,
        testingReturnValue,
        mainWindowNeeded=False,
        parent=None,
        windowTitle=None,
        icon=None,
        standardButtons=None,
        detailedText=None,
    ):
        logging.log(logLevel, text)
        if application.testingEnabled():
            return testingReturnValue
        asks = standardButtons not in (None, box.Ok)
        agreed = application.box("confirm" if asks else logging.getLevelName(logLevel).lower(), text, asks)
        yes, no = (box.Yes, box.No) if asks and standardButtons & box.Yes else (box.Ok, box.Cancel)
        return yes if agreed else no

    slicer.util._messageDisplay = display
    slicer.util.mainWindow = lambda: None
