"""Stand-ins for the qMRML and ctk widgets of the module's .ui file, bound to the real scene.

Each has the properties, methods and signals of the real class that are used here, and no others.
"""

from __future__ import annotations

import re
import sys
import types

import slicer
from PySide6 import QtCore
from PySide6.QtCore import Property, QRect, QRegularExpression, Qt, Signal
from PySide6.QtGui import QPalette, QRegularExpressionValidator
from PySide6.QtWidgets import QComboBox, QFrame, QGroupBox, QHBoxLayout, QPushButton, QToolButton, QVBoxLayout, QWidget
from vtk import VTK_OBJECT, calldata_type


def _property(kind, name, default):
    field = f"_{name}"

    def read(self):
        return getattr(self, field, default)

    def write(self, value):
        setattr(self, field, value)
        self._propertyChanged()

    return Property(kind, read, write)


class qMRMLWidget(QWidget):
    mrmlSceneChanged = Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._scene = None

    def setMRMLScene(self, scene):
        self._scene = scene
        self.mrmlSceneChanged.emit(scene)

    def mrmlScene(self):
        return self._scene


def _forget(observed):
    """Remove observers, (scene, tag) each, and empty the list."""
    while observed:
        scene, tag = observed.pop()
        scene.RemoveObserver(tag)


class _SceneList(QWidget):
    """Follows the scene and keeps the nodes of its types in a combo box."""

    nodeTypes = _property("QStringList", "nodeTypes", [])
    showHidden = _property(bool, "showHidden", False)
    showChildNodeTypes = _property(bool, "showChildNodeTypes", True)
    noneEnabled = _property(bool, "noneEnabled", False)
    noneDisplay = _property(str, "noneDisplay", "None")
    addEnabled = _property(bool, "addEnabled", True)
    removeEnabled = _property(bool, "removeEnabled", True)
    renameEnabled = _property(bool, "renameEnabled", False)
    editEnabled = _property(bool, "editEnabled", False)
    selectNodeUponCreation = _property(bool, "selectNodeUponCreation", True)
    baseName = _property(str, "baseName", "")

    def __init__(self, parent=None):
        super().__init__(parent)
        self._scene, self._updating = None, False
        self._observed = observed = []  # (scene, tag): the real widget's observers end with it, so do these
        self.destroyed.connect(lambda *_unused: _forget(observed))
        self._attributes = []
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = QComboBox()
        self._box.setMinimumWidth(80)
        self._box.setSizeAdjustPolicy(QComboBox.AdjustToMinimumContentsLengthWithIcon)
        layout.addWidget(self._box)

    def setMRMLScene(self, scene):
        _forget(self._observed)
        self._scene = scene
        if scene is not None:
            for event in (scene.NodeAddedEvent, scene.NodeRemovedEvent):
                self._observed.append((scene, scene.AddObserver(event, self._nodeEvent)))
            for event in (scene.EndCloseEvent, scene.EndImportEvent):
                self._observed.append((scene, scene.AddObserver(event, lambda caller, name: self._fill())))
        self._fill()

    @calldata_type(VTK_OBJECT)
    def _nodeEvent(self, caller, event, node):
        # the real widgets are as fast as C++; these look only when one of their kinds comes or goes
        if any(node.IsA(kind) for kind in self.nodeTypes):
            self._fill()

    def mrmlScene(self):
        return self._scene

    def addAttribute(self, nodeType, name, value=None):
        self._attributes.append((nodeType, name, value))
        self._fill()

    def nodes(self):
        if self._scene is None:
            return []
        found = {}
        for kind in self.nodeTypes:
            for index in range(self._scene.GetNumberOfNodesByClass(kind)):
                node = self._scene.GetNthNodeByClass(index, kind)
                if self._accepts(node):
                    found[node.GetID()] = node
        return list(found.values())

    def nodeCount(self):
        return len(self.nodes())

    def _accepts(self, node):
        kinds = [kind for kind in self.nodeTypes if node.IsA(kind)]
        if not kinds or (node.GetHideFromEditors() and not self.showHidden):
            return False
        if not self.showChildNodeTypes and node.GetClassName() not in self.nodeTypes:
            return False
        return all(
            node.GetAttribute(name) is not None and value in (None, node.GetAttribute(name))
            for kind, name, value in self._attributes
            if node.IsA(kind)
        )

    def _propertyChanged(self):
        self._fill()

    def _fill(self):
        raise NotImplementedError


class qMRMLNodeComboBox(_SceneList):
    currentNodeChanged = Signal(object)
    nodeAddedByUser = Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._current = None
        self._box.currentIndexChanged.connect(self._chosen)

    def currentNode(self):
        return self._current

    def setCurrentNode(self, node):
        self._set(node if node is not None and self._accepts(node) else None)

    def _readId(self):
        return self._current.GetID() if self._current is not None else ""

    def setCurrentNodeID(self, identity):
        self.setCurrentNode(self._scene.GetNodeByID(identity) if identity else None)

    currentNodeID = Property(str, _readId, setCurrentNodeID)

    def _set(self, node):
        changed = node is not self._current
        self._current = node
        self._fill(keep=True)
        if changed:
            self.currentNodeChanged.emit(node)

    def _fill(self, keep=False):
        nodes = self.nodes()
        self._updating = True
        self._box.clear()
        if self.noneEnabled or not nodes or self._current is None:
            self._box.addItem(self.noneDisplay, "")
        for node in nodes:
            self._box.addItem(node.GetName(), node.GetID())
        gone = self._current is not None and not any(n is self._current for n in nodes)
        if not keep:
            if gone:
                self._current = None
            if self._current is None and not self.noneEnabled and nodes:
                self._current, gone = nodes[0], True
        self._box.setCurrentIndex(max(0, self._box.findData(self._readId())))
        self._updating = False
        if gone and not keep:
            self.currentNodeChanged.emit(self._current)

    def _chosen(self, index):
        if not self._updating and index >= 0:
            self._set(self._scene.GetNodeByID(self._box.itemData(index)) if self._box.itemData(index) else None)


class qMRMLCheckableNodeComboBox(_SceneList):
    checkedNodesChanged = Signal()

    def __init__(self, parent=None):
        super().__init__(parent)
        self._checked = []
        self._box.setEditable(True)
        self._box.lineEdit().setReadOnly(True)

    def checkedNodes(self):
        return [node for node in self.nodes() if any(node is other for other in self._checked)]

    def setCheckState(self, node, state):
        self._checked = [other for other in self._checked if other is not node]
        if state == Qt.Checked:
            self._checked.append(node)
        self._fill()
        self.checkedNodesChanged.emit()

    def _fill(self):
        self._box.clear()
        for node in self.nodes():
            self._box.addItem(node.GetName(), node.GetID())
        names = [node.GetName() for node in self.checkedNodes()]
        self._box.lineEdit().setText(", ".join(names) or "None")


class ctkCollapsibleButton(QFrame):
    contentsCollapsed = Signal(bool)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._button = QToolButton(self)
        self._button.setCheckable(True)
        self._button.setChecked(True)
        self._button.setToolButtonStyle(Qt.ToolButtonTextBesideIcon)
        self._button.setArrowType(Qt.DownArrow)
        self._button.setObjectName("qt_header")
        font = self._button.font()
        font.setBold(True)
        self._button.setFont(font)
        self._button.setAutoRaise(True)
        self._button.setAutoFillBackground(True)
        self._button.setBackgroundRole(QPalette.Midlight)
        self._button.setFixedHeight(26)
        self._button.toggled.connect(lambda on: self._setCollapsed(not on))
        self.setContentsMargins(0, 24, 0, 0)
        self._shown = []

    def resizeEvent(self, event):
        self._button.setFixedWidth(self.width())
        super().resizeEvent(event)

    def _readText(self):
        return self._button.text()

    def _setText(self, text):
        self._button.setText(text)

    def _readCollapsed(self):
        return not self._button.isChecked()

    def _setCollapsed(self, collapsed):
        self._button.setChecked(not collapsed)
        self._button.setArrowType(Qt.RightArrow if collapsed else Qt.DownArrow)
        self._apply()
        self.contentsCollapsed.emit(collapsed)

    def _apply(self):
        collapsed = self._readCollapsed()
        for child in self.children():
            if isinstance(child, QWidget) and child is not self._button:
                if collapsed and not child.isHidden():
                    child.hide()
                    self._shown.append(child)
                elif not collapsed and child in self._shown:
                    child.show()
        if not collapsed:
            self._shown = []
        self.setMaximumHeight(26 if collapsed else 16777215)

    def showEvent(self, event):
        self._apply()
        super().showEvent(event)

    text = Property(str, _readText, _setText)
    collapsed = Property(bool, _readCollapsed, _setCollapsed)


class ctkPathLineEdit(QWidget):
    """Says ``currentPathChanged`` only while the text fits ``nameFilters``, and ``validInputChanged`` when that begins
    or ends.
    """

    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        box = QComboBox()
        box.setEditable(True)
        self._edit = box.lineEdit()
        layout.addWidget(box)
        layout.addWidget(QPushButton("..."))
        self._wasValid = False
        self._propertyChanged()
        self._edit.textChanged.connect(self._textChanged)

    def _propertyChanged(self):
        endings = re.findall(r"\*(\.\w+)", " ".join(self._readFilters()))
        pattern = ".+(" + "|".join(map(re.escape, endings)) + ")" if endings else ".+"
        self._edit.setValidator(QRegularExpressionValidator(QRegularExpression(pattern), self))

    def _readFilters(self):
        return getattr(self, "_nameFilters", [])

    def _textChanged(self, text):
        valid = self._edit.hasAcceptableInput()
        if valid:
            self.currentPathChanged.emit(text)
        if valid != self._wasValid:
            self._wasValid = valid
            self.validInputChanged.emit(valid)

    def _read(self):
        return self._edit.text()

    def _write(self, path):
        self._edit.setText(path)

    currentPath = Property(str, _read, _write)
    nameFilters = _property("QStringList", "nameFilters", [])
    settingKey = _property(str, "settingKey", "")


CLASSES = {
    cls.__name__: cls
    for cls in (qMRMLWidget, qMRMLNodeComboBox, qMRMLCheckableNodeComboBox, ctkCollapsibleButton, ctkPathLineEdit)
}


# --------------------------------------------------------------------------------------- where Slicer's code finds them

#: Widgets that only Slicer's own files name, to compare types with them or to lay out buttons.
_NAMED_ONLY = (
    "ctkCheckBox",
    "ctkCheckablePushButton",
    "ctkColorPickerButton",
    "ctkComboBox",
    "ctkDirectoryButton",
    "ctkDoubleRangeSlider",
    "ctkDoubleSlider",
    "ctkDoubleSpinBox",
    "ctkRangeWidget",
    "ctkSliderWidget",
    "qMRMLRangeWidget",
    "qMRMLSliderWidget",
    "qMRMLSpinBox",
    "qSlicerScriptedLoadableModule",
    "qSlicerScriptedLoadableModuleWidget",
    "qSlicerWidget",
)


class _FlowLayout(QVBoxLayout):
    preferredExpandingDirections = None


class _Button(QToolButton):
    def connect(self, signal, slot):
        name, _bracket, arguments = signal.partition("(")
        getattr(self, name).connect((lambda *_unused: slot()) if arguments == ")" else slot)


class _Desktop:
    primaryScreen = 0

    def availableGeometry(self, screen):
        return QRect(0, 0, 1600, 1000)


def install() -> None:
    """The module ``ctk``, the widget classes of ``slicer``, and what PythonQt adds to every QObject."""
    from .qt_module import pythonqtStyle

    ctk = types.ModuleType("ctk")
    classes = {
        **{name: type(name, (QWidget,), {}) for name in _NAMED_ONLY},
        **CLASSES,
        "ctkFlowLayout": _FlowLayout,
        "ctkCollapsibleGroupBox": type("ctkCollapsibleGroupBox", (QGroupBox,), {}),
    }
    for name, cls in classes.items():
        setattr(ctk if name.startswith("ctk") else slicer, name, cls)
    sys.modules["ctk"] = ctk
    qt = sys.modules["qt"]
    qt.QToolButton, qt.QDesktopWidget = _Button, _Desktop
    pythonqtStyle("slicer_harness.style_of_pythonqt")
    for style, code in (
        ("plain", "property(lambda o: o.objectName(), lambda o, name: o.setObjectName(name))"),
        ("style_of_pythonqt", "property(lambda o: o.objectName, lambda o, name: setattr(o, 'objectName', name))"),
    ):
        exec(f"QObject.name = {code}", {"__name__": f"slicer_harness.{style}", "QObject": QtCore.QObject})
