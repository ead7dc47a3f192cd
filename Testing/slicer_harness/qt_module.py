"""The module ``qt`` as PythonQt offers it: one flat namespace over PySide6."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets
from shibokensupport import feature

TRUE_PROPERTY = 2
CHECKED = QtCore.Qt.Checked


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

    def load(self, device, parent=None):
        """Load a .ui file; scene connections are made here, because the stand-ins' signals carry Python objects."""
        root = ElementTree.fromstring(bytes(device.readAll().data()))
        self._checkProperties(root)
        connections = root.find("connections")
        made = [tuple(c.findtext(part) for part in ("sender", "signal", "receiver", "slot")) for c in connections]
        root.remove(connections)
        buffer = QtCore.QBuffer()
        buffer.setData(ElementTree.tostring(root))
        buffer.open(QtCore.QIODevice.ReadOnly)
        widget = super().load(buffer, parent)
        named = {child.objectName(): child for child in [widget, *widget.findChildren(QtCore.QObject)]}
        for sender, signal, receiver, slot in made:
            if signal != "mrmlSceneChanged(vtkMRMLScene*)" or slot != "setMRMLScene(vtkMRMLScene*)":
                raise RuntimeError(f"the harness does not know the connection {signal} -> {slot}")
            named[sender].mrmlSceneChanged.connect(named[receiver].setMRMLScene)
        return widget

    @staticmethod
    def _checkProperties(root):
        """Refuse properties that Slicer's widget would not have; Qt would take them silently as dynamic ones."""
        from . import widgets

        for element in root.iter("widget"):
            cls = widgets.CLASSES.get(element.get("class"))
            for found in element.findall("property") if cls else ():
                dynamic = found.get("stdset") == "0"
                if not dynamic and cls.staticMetaObject.indexOfProperty(found.get("name")) < 0:
                    raise RuntimeError(f"{element.get('class')} has no property {found.get('name')}")


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
                pythonqtStyle(name)


@contextlib.contextmanager
def _withoutTouchyModules():
    """PySide looks into the source of every loaded module; some of torch's fail on any unknown attribute."""
    hidden = {}
    for name, module in list(sys.modules.items()):
        try:
            inspect.unwrap(module)
        except Exception:
            hidden[name] = sys.modules.pop(name)
    try:
        yield
    finally:
        sys.modules.update(hidden)


def pythonqtStyle(module: str) -> None:
    """Let the code of a module (by name) see Qt as PythonQt shows it."""
    with _withoutTouchyModules():
        feature.set_selection(TRUE_PROPERTY, module)
