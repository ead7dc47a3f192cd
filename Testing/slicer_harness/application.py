"""``slicer`` with an application: the scene, ``slicer.app``, the parts of ``slicer.util`` that need Qt, settings, modules."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

import slicer
from PySide6 import QtCore, QtWidgets

from . import parameter_node, qt_module, scripted_module


class Application:
    """What a test holds on to.

    Attributes:
        scene: ``slicer.mrmlScene``.
        shown: (kind, text) of every message box that would have opened.
        answers: what the next question is answered; True when empty.
    """

    def __init__(self):
        self.qt = QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
        self.scene = slicer.vtkMRMLScene()
        self.shown: list[tuple[str, str]] = []
        self.answers: list[bool] = []
        self.folder = tempfile.mkdtemp(prefix="slicer-harness-")
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        Path(self.folder, ".slicer-cache").touch()
        self.settingsFile = os.path.join(self.folder, "settings.ini")
        self._applicationLogic()

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

    def processEvents(self, *arguments):
        self.qt.processEvents(*arguments)

    def settings(self):
        return QtCore.QSettings(self.settingsFile, QtCore.QSettings.IniFormat)

    userSettings = settings
    applicationVersion = "5.12.3"
    majorVersion, minorVersion = 5, 12

    def testingEnabled(self):
        return True

    def palette(self):
        return self.qt.palette()

    def layoutManager(self):
        return None

    def moduleManager(self):
        return types.SimpleNamespace(connect=lambda *arguments: None, disconnect=lambda *arguments: None)

    def connect(self, signal, function):
        if signal != "startupCompleted()":
            raise RuntimeError(f"slicer.app has no signal {signal}")

    # ---- for tests

    def wait(self, condition, seconds=60.0, what="the condition"):
        """Process events until ``condition()``; fails after ``seconds``, of which a pause of the whole machine counts little."""
        waited, last = 0.0, time.monotonic()
        while not condition():
            now = time.monotonic()
            waited, last = waited + min(now - last, 0.5), now
            if waited > seconds:
                raise AssertionError(f"{what} did not happen within {seconds} s; messages: {self.shown}")
            self.qt.processEvents(QtCore.QEventLoop.AllEvents | QtCore.QEventLoop.WaitForMoreEvents, 5)

    def _message(self, kind):
        def show(text, *arguments, **keywords):
            self.shown.append((kind, text))

        return show

    def _question(self, kind):
        def ask(text, *arguments, **keywords):
            self.shown.append((kind, text))
            return self.answers.pop(0) if self.answers else True

        return ask


def start(reimport: bool = False) -> Application:
    """A fresh application with an empty scene; with ``reimport``, the module's Python files are imported anew."""
    application = Application()
    slicer.app = application
    slicer.mrmlScene = application.scene
    slicer.modules = types.SimpleNamespace()
    slicer.selfTests = {}
    util = slicer.util
    util.errorDisplay = application._message("error")
    util.warningDisplay = application._message("warning")
    util.infoDisplay = application._message("info")
    util.delayDisplay = application._message("delay")
    util.confirmOkCancelDisplay = application._question("confirm")
    util.confirmYesNoDisplay = application._question("confirm")
    util.startupEnvironment = lambda: dict(os.environ)
    util.settingsValue = lambda key, default, converter=lambda v: v, settings=None: default
    util.childWidgetVariables = scripted_module.childWidgetVariables
    util.modulePath = scripted_module.modulePath
    util.mainWindow = lambda: None
    _module("slicer.i18n", tr=lambda text, context=None: text, translate=lambda context, text, *rest: text)
    _module("slicer.ScriptedLoadableModule", **scripted_module.NAMES)
    _module("slicer.parameterNodeWrapper", **parameter_node.NAMES)
    _module("ctk")
    from . import MODULE

    for name in [n for n in sys.modules if n.split(".")[0] in ("SymRegistration", "SymRegistrationGui")] if reimport else ():
        del sys.modules[name]
    qt_module.install([MODULE])
    for name in ("slicer.packaging", "PyTorchUtils", "SampleData"):
        sys.modules.pop(name, None)
    return application


def _module(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), child, module)


def loadModule(application):
    """The module as Slicer makes it: (module class instance's parent, widget class, logic class)."""
    import SymRegistration

    parent = types.SimpleNamespace(path=SymRegistration.__file__, icon=None)
    SymRegistration.SymRegistration(parent)
    return parent, SymRegistration
