"""The module ``qt`` as PythonQt offers it: one flat namespace over PySide6."""

from __future__ import annotations

import sys
import types
from pathlib import Path

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets
from shibokensupport import feature

TRUE_PROPERTY = 2


class QUiLoader(QtUiTools.QUiLoader):
    """Knows the stand-ins for Slicer's widget classes, and refuses classes it does not know."""

    def createWidget(self, className, parent=None, name=""):
        from . import widgets

        if className in widgets.CLASSES:
            widget = widgets.CLASSES[className](parent)
        elif className in self.availableWidgets():
            widget = super().createWidget(className, parent, name)
        else:
            raise RuntimeError(f"the .ui file uses {className}, which the harness does not know")
        widget.setObjectName(name)
        return widget


class _QtModule(types.ModuleType):
    def __getattr__(self, name):
        if name == "QUiLoader":
            return QUiLoader
        for part in (QtCore, QtGui, QtWidgets):
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"qt has no '{name}'")


def install(folders) -> None:
    """Put ``qt`` in place and give every module below ``folders`` PythonQt's attribute style."""
    sys.modules["qt"] = _QtModule("qt")
    for folder in folders:
        for path in Path(folder).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name:
                feature.set_selection(TRUE_PROPERTY, name)
