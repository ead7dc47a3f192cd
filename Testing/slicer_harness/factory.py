"""What Slicer's C++ does with a scripted module: finds it, makes its classes, shows, reloads and unloads it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import slicer

MODULE = Path(__file__).resolve().parents[2] / "SymRegistration"
NAME = "SymRegistration"


class Module:
    """``slicer.modules.symregistration``, which is also the ``parent`` of the module's class. It has
    no other attributes.
    """

    __slots__ = (
        "path",
        "name",
        "title",
        "categories",
        "dependencies",
        "contributors",
        "helpText",
        "acknowledgementText",
        "icon",
        "_shown",
    )

    def __init__(self):
        self.path, self.name, self.icon, self._shown = str(MODULE / f"{NAME}.py"), NAME, None, None

    def widgetRepresentation(self):
        """The module's one widget, made when it is first asked for."""
        if self._shown is None:
            self._shown = ModuleWidget()
            self._shown.create()
        return self._shown.parent


class ModuleWidget:
    """Owns the parent widget, makes the Python class, makes it again on Reload."""

    def __init__(self):
        import qt

        class Parent(slicer.qMRMLWidget):
            reload = lambda _widget: self.create()  # noqa: E731  a slot of the C++ class

        self.parent = Parent()
        self.parent.setLayout(qt.QVBoxLayout())
        self.parent.setMRMLScene(slicer.mrmlScene)

    def create(self):
        made = getattr(sys.modules[NAME], f"{NAME}Widget")(self.parent)
        setattr(slicer.modules, f"{NAME}Widget", made)
        made.setup()


def describe():
    """Put the module's description where Slicer has it."""
    setattr(slicer.modules, NAME.lower(), Module())


def loadModule(application):
    """The module's class, made as at the start of Slicer: (its parent, the Python module)."""
    python = importlib.import_module(NAME)
    parent = getattr(slicer.modules, NAME.lower())
    setattr(slicer.modules, f"{NAME}Instance", getattr(python, NAME)(parent))
    return parent, python


def openModule(application):
    """The module is chosen in the toolbar; returns its widget."""
    from . import loadModule as load

    if not hasattr(slicer.modules, f"{NAME}Instance"):
        load(application)
    getattr(slicer.modules, NAME.lower()).widgetRepresentation()
    widget = getattr(slicer.modules, f"{NAME}Widget")
    widget.enter()
    return widget


def unloadModule(application):
    """The module is unloaded, or Slicer ends."""
    application.moduleManager().emit("moduleAboutToBeUnloaded(QString)", NAME)
