"""``slicer.ScriptedLoadableModule`` for the imitation: the base classes, with the order of calls that Slicer's have."""

from __future__ import annotations

import importlib
import os
import unittest

import slicer
from PySide6.QtWidgets import QVBoxLayout


class ScriptedLoadableModule:
    def __init__(self, parent):
        super().__init__()
        self.parent = parent
        self.moduleName = type(self).__name__
        parent.title, parent.categories, parent.dependencies, parent.contributors = (
            "",
            [],
            [],
            ["the template's authors"],
        )
        parent.helpText = parent.acknowledgementText = "texts of the template"
        slicer.selfTests[self.moduleName] = self.runTest

    def resourcePath(self, filename):
        return os.path.join(os.path.dirname(self.parent.path), "Resources", filename)

    def runTest(self, msec=100):
        test = getattr(importlib.import_module(self.__module__), f"{self.moduleName}Test")()
        test.messageDelay = msec
        test.runTest()


class ScriptedLoadableModuleWidget:
    """Without a parent, it makes a window of its own, which stays until somebody deletes it."""

    def __init__(self, parent=None):
        super().__init__()
        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.parent = parent
        if parent is None:
            self.parent = slicer.qMRMLWidget()
            QVBoxLayout(self.parent)
            self.parent.setMRMLScene(slicer.mrmlScene)
        self.layout = self.parent.layout()
        if parent is None:
            self.setup()
            self.parent.show()
        slicer.app.moduleManager().connect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def resourcePath(self, filename):
        return os.path.join(os.path.dirname(slicer.util.modulePath(self.moduleName)), "Resources", filename)

    def setup(self):
        pass

    def cleanup(self):
        pass

    def _onModuleAboutToBeUnloaded(self, moduleName):
        if moduleName == self.moduleName:
            self.cleanup()
            slicer.app.moduleManager().disconnect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def onReload(self):
        slicer.util.reloadScriptedModule(self.moduleName)

    def onTest(self):
        with slicer.util.tryWithErrorDisplay("Test failed."):
            slicer.selfTests[self.moduleName](
                msec=int(slicer.app.userSettings().value("Developer/SelfTestDisplayMessageDelay"))
            )

    def onReloadAndTest(self):
        with slicer.util.tryWithErrorDisplay("Reload and Test failed."):
            self.onReload()
            self.onTest()


class ScriptedLoadableModuleLogic:
    def __init__(self, parent=None):
        super().__init__()
        self.moduleName = type(self).__name__.removesuffix("Logic")
        self.isSingletonParameterNode = True

    def getParameterNode(self):
        node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        if node is None:
            node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
            node.UnRegister(None)
            node.SetSingletonTag(self.moduleName)
            node.SetName(slicer.mrmlScene.GenerateUniqueName(self.moduleName))
            node = slicer.mrmlScene.AddNode(node)
        node.SetAttribute("ModuleName", self.moduleName)
        return node


class ScriptedLoadableModuleTest(unittest.TestCase):
    def delayDisplay(self, message, requestedDelay=None, msec=None):
        slicer.util.delayDisplay(message, getattr(self, "messageDelay", msec or requestedDelay or 100))


NAMES = {
    cls.__name__: cls
    for cls in (
        ScriptedLoadableModule,
        ScriptedLoadableModuleWidget,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
    )
}
NAMES["__all__"] = list(NAMES)
