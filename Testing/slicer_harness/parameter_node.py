"""``slicer.parameterNodeWrapper`` for the types the module uses, as strict as the original.

Numbers, texts and booleans live as parameters of the real vtkMRMLScriptedModuleNode, nodes as its node references. Widgets are
found by their ``SlicerParameterName`` property. A type or a widget that is not known fails, as there.
"""

from __future__ import annotations

import dataclasses
import typing

from PySide6 import QtWidgets
from vtk import vtkCommand

from .widgets import qMRMLNodeComboBox


@dataclasses.dataclass
class WithinRange:
    minimum: float
    maximum: float

    def validate(self, value):
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"{value} is not within {self.minimum} and {self.maximum}")


@dataclasses.dataclass
class Choice:
    choices: list

    def validate(self, value):
        if value not in self.choices:
            raise ValueError(f"{value} is none of {self.choices}")


_TO_TEXT = {bool: str, int: str, float: repr, str: str}
_FROM_TEXT = {bool: lambda text: text == "True", int: int, float: float, str: str}


class _Parameter:
    def __init__(self, name, hint, default):
        annotated = typing.get_origin(hint) is typing.Annotated
        self.name = name
        self.kind = typing.get_args(hint)[0] if annotated else hint
        self.validators = list(typing.get_args(hint)[1:]) if annotated else []
        self.isNode = self.kind not in _TO_TEXT
        self.nodeKinds = typing.get_args(self.kind) or (self.kind,) if self.isNode else ()
        if not all(isinstance(kind, type) and kind.__name__.startswith("vtkMRML") for kind in self.nodeKinds):
            raise TypeError(f"no serializer for {self.kind}")
        self.default = None if self.isNode else default

    def read(self, node):
        if self.isNode:
            return node.GetNodeReference(self.name)
        return _FROM_TEXT[self.kind](node.GetParameter(self.name))

    def write(self, node, value):
        if self.isNode:
            if value is not None and not isinstance(value, self.nodeKinds):
                raise TypeError(f"{self.name} must be a {self.kind}, not {type(value).__name__}")
            node.SetNodeReferenceID(self.name, value.GetID() if value is not None else None)
            return
        if type(value) is not self.kind:
            raise TypeError(f"{self.name} must be {self.kind.__name__}, not {value!r}")
        for validator in self.validators:
            validator.validate(value)
        node.SetParameter(self.name, _TO_TEXT[self.kind](value))

    def connector(self, widget):
        """(read, write, changed signal) of a widget that can hold this parameter."""
        if type(widget) is qMRMLNodeComboBox and self.isNode:
            widget.nodeTypes = [kind.__name__ for kind in self.nodeKinds]  # whatever the .ui file says
            return widget.currentNode, widget.setCurrentNode, widget.currentNodeChanged
        if type(widget) is QtWidgets.QCheckBox and self.kind is bool:
            return widget.isChecked, widget.setChecked, widget.stateChanged
        if type(widget) is QtWidgets.QSpinBox and self.kind is int:
            bounds = next(v for v in self.validators if isinstance(v, WithinRange))
            widget.setRange(bounds.minimum, bounds.maximum)
            return widget.value, widget.setValue, widget.valueChanged
        if type(widget) is QtWidgets.QDoubleSpinBox and self.kind is float:
            bounds = next(v for v in self.validators if isinstance(v, WithinRange))
            widget.setRange(bounds.minimum, bounds.maximum)
            return widget.value, widget.setValue, widget.valueChanged
        if type(widget) is QtWidgets.QLineEdit and self.kind is str:
            return widget.text, widget.setText, widget.textChanged
        raise RuntimeError(f"no GUI connector between {self.name} and {type(widget).__name__}")


def parameterNodeWrapper(cls):
    """Class decorator; see Slicer's documentation of the same name."""
    parameters = {name: _Parameter(name, hint, getattr(cls, name, None))
                  for name, hint in typing.get_type_hints(cls, include_extras=True).items()}

    def construct(self, parameterNode):
        self.parameterNode = parameterNode
        self._guis, self._updating = {}, False
        for parameter in parameters.values():
            if not parameter.isNode and not parameterNode.HasParameter(parameter.name):
                default = parameter.default if parameter.default is not None else parameter.kind()
                parameter.write(parameterNode, default)

    def connectGui(self, gui):
        tag = len(self._guis)
        found = {w.property("SlicerParameterName"): w for w in vars(gui).values() if w.property("SlicerParameterName")}
        unknown = set(found) - set(parameters)
        if unknown:
            raise ValueError(f"Cannot find a param with the given name: {sorted(unknown)}")
        self._guis[tag] = {}
        for name, widget in found.items():
            read, write, changed = parameters[name].connector(widget)
            write(getattr(self, name))

            def slot(*_, name=name, read=read):
                if not self._updating and tag in self._guis:
                    setattr(self, name, read())

            changed.connect(slot)
            self._guis[tag][name] = (write, changed, slot)
        self.AddObserver(vtkCommand.ModifiedEvent, lambda caller, event: update(self))
        return tag

    def update(self):
        if not self._updating:
            self._updating = True
            for mapping in list(self._guis.values()):
                for name, (write, _, _) in mapping.items():
                    write(getattr(self, name))
            self._updating = False

    def disconnectGui(self, tag):
        for write, changed, slot in self._guis.pop(tag, {}).values():
            changed.disconnect(slot)

    for name, parameter in parameters.items():
        setattr(cls, name, property(lambda self, p=parameter: p.read(self.parameterNode),
                                    lambda self, value, p=parameter: p.write(self.parameterNode, value)))
    cls.__init__ = construct
    cls.connectGui, cls.disconnectGui = connectGui, disconnectGui
    for name in ("AddObserver", "RemoveObserver", "Modified", "StartModify", "EndModify"):
        setattr(cls, name, lambda self, *arguments, n=name: getattr(self.parameterNode, n)(*arguments))
    cls.allParameters = parameters
    return cls


NAMES = {"parameterNodeWrapper": parameterNodeWrapper, "WithinRange": WithinRange, "Choice": Choice}
