"""``slicer.parameterNodeWrapper`` for the imitation: the types the module uses, with the checks and the names
of the original.

Numbers, texts and booleans are parameters of the real vtkMRMLScriptedModuleNode; a node is a node reference and an
empty parameter of its name; a Union has one such place per member, ``name.0``, ``name.1`` and so on; a list has
one per element, and ``name.len``. Values are kept in memory and read anew when the node changes. Widgets are found by
their ``SlicerParameterName``; ``disconnectGui`` leaves the observer of ``connectGui`` on the node, as Slicer does up to
5.10. A type, a value or a widget that does not fit fails, as there.
"""

from __future__ import annotations

import dataclasses
import typing
import weakref

import slicer
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


# ------------------------------------------------------------------------------------------------ how values are stored


class _Plain:
    """bool, int, float or str."""

    kinds = {bool: (bool, lambda text: text == "True"), int: (int, int), float: ((int, float), float), str: (str, str)}

    def __init__(self, kind):
        self.accepted, self.fromText = self.kinds[kind]
        self.default = kind()

    def check(self, value):
        if value is None:
            raise ValueError("the value must not be None")
        if not isinstance(value, self.accepted):
            raise TypeError(f"the value must be {self.accepted}, not {value!r}")

    def isIn(self, node, name):
        return bool(node.HasParameter(name))

    def write(self, node, name, value):
        self.check(value)
        node.SetParameter(name, str(value))

    def read(self, node, name):
        return self.fromText(node.GetParameter(name))

    def remove(self, node, name):
        node.UnsetParameter(name)


class _Node(_Plain):
    def __init__(self, kind):
        self.kind, self.default = kind, None

    def check(self, value):
        if value is not None and not isinstance(value, self.kind):
            raise TypeError(f"the value must be a {self.kind.__name__}, not {type(value).__name__}")

    def write(self, node, name, value):
        self.check(value)
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)

    def read(self, node, name):
        return node.GetNodeReference(name)

    def remove(self, node, name):
        node.UnsetParameter(name)
        node.RemoveNodeReferenceIDs(name)


class _Nothing(_Plain):
    """None, as a member of a Union."""

    def __init__(self):
        self.default = None

    def check(self, value):
        if value is not None:
            raise ValueError("the value must be None")

    def write(self, node, name, value):
        node.SetParameter(name, "None")

    def read(self, node, name):
        return None


class _Union:
    """Kept in the place of the first member that takes the value. Without None as a member, None has no place."""

    def __init__(self, kinds):
        self.members = [(kind, _store(kind)) for kind in kinds]
        self.default = self.members[0][1].default

    def _of(self, value):
        for index, (kind, store) in enumerate(self.members):
            if (value is None and kind is type(None)) or (value is not None and isinstance(value, kind)):
                return index, store
        raise TypeError(f"{value!r} of {type(value).__name__} cannot be written: no member of the Union takes it")

    def check(self, value):
        _index, store = self._of(value)
        store.check(value)

    def isIn(self, node, name):
        return any(store.isIn(node, f"{name}.{k}") for k, (_kind, store) in enumerate(self.members))

    def write(self, node, name, value):
        index, store = self._of(value)
        self.remove(node, name)
        store.write(node, f"{name}.{index}", value)

    def read(self, node, name):
        return next(
            store.read(node, f"{name}.{k}")
            for k, (_kind, store) in enumerate(self.members)
            if store.isIn(node, f"{name}.{k}")
        )

    def remove(self, node, name):
        for k, (_kind, store) in enumerate(self.members):
            store.remove(node, f"{name}.{k}")


class _List:
    """``name.len`` and one place per element, ``name.0``, ``name.1`` and so on."""

    default: list = []

    def __init__(self, kind):
        self.element, self.length = _store(kind), _Plain(int)

    def check(self, values):
        for value in values:
            self.element.check(value)

    def isIn(self, node, name):
        return self.length.isIn(node, f"{name}.len")

    def write(self, node, name, values):
        self.check(values)
        self.remove(node, name)
        for k, value in enumerate(values):
            self.element.write(node, f"{name}.{k}", value)
        self.length.write(node, f"{name}.len", len(values))

    def read(self, node, name):
        return [self.element.read(node, f"{name}.{k}") for k in range(self.length.read(node, f"{name}.len"))]

    def remove(self, node, name):
        if self.isIn(node, name):
            for k in range(self.length.read(node, f"{name}.len")):
                self.element.remove(node, f"{name}.{k}")
            self.length.remove(node, f"{name}.len")


def _store(kind):
    if typing.get_origin(kind) is list:
        return _List(*typing.get_args(kind))
    if typing.get_origin(kind) is typing.Union:
        return _Union(typing.get_args(kind))
    if kind is type(None):
        return _Nothing()
    if kind in _Plain.kinds:
        return _Plain(kind)
    if isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode):
        return _Node(kind)
    raise Exception(f"Unable to create serializer for type: {kind}")


# ------------------------------------------------------------------------------------------------ parameters


class _Parameter:
    """Name, type, validators, default of one parameter."""

    def __init__(self, name, hint, default):
        self.name, self.unalteredType = name, hint
        kind, *self.validators = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        self.kind, self.store = kind, _store(kind)
        self.default = self.store.default if default is None else default

    def write(self, node, value):
        self.store.check(value)
        for validator in self.validators:
            validator.validate(value)
        self.store.write(node, self.name, value)

    def connector(self, widget):
        """(read, write, changed signal) of a widget that can hold this parameter."""
        bounds = next((v for v in self.validators if isinstance(v, WithinRange)), None)
        kinds = typing.get_args(self.kind) or (self.kind,)
        if type(widget) is qMRMLNodeComboBox and isinstance(self.store, (_Node, _Union)):
            widget.nodeTypes = [kind.__name__ for kind in kinds if kind is not type(None)]  # whatever the .ui file says
            return widget.currentNode, widget.setCurrentNode, widget.currentNodeChanged
        if type(widget) is QtWidgets.QCheckBox and self.kind is bool:
            return widget.isChecked, widget.setChecked, widget.stateChanged
        if type(widget) is QtWidgets.QSpinBox and self.kind is int and bounds:
            widget.setRange(bounds.minimum, bounds.maximum)
            return widget.value, widget.setValue, widget.valueChanged
        if type(widget) is QtWidgets.QDoubleSpinBox and self.kind in (float, int):
            if bounds:
                widget.setRange(bounds.minimum, bounds.maximum)
            return widget.value, widget.setValue, widget.valueChanged
        if type(widget) is QtWidgets.QLineEdit and self.kind is str:
            return widget.text, widget.setText, widget.textChanged
        raise RuntimeError(f"no GUI connector between {self.name} and {type(widget).__name__}")


class _Kept:
    """The value of one parameter of one node, in memory until the node changes."""

    def __init__(self, parameter, node):
        self.parameter, self.node, self._writing = parameter, node, False
        if not parameter.store.isIn(node, parameter.name):
            parameter.write(node, parameter.default)
        self._read()
        myself = weakref.ref(self)
        self._tag = node.AddObserver(vtkCommand.ModifiedEvent, lambda caller, event: myself()._modified())

    def __del__(self):
        if hasattr(self, "_tag"):
            self.node.RemoveObserver(self._tag)

    def _read(self):
        if not self.parameter.store.isIn(self.node, self.parameter.name):
            self.parameter.write(self.node, self.parameter.default)
        self.value = self.parameter.store.read(self.node, self.parameter.name)

    def _modified(self):
        if not self._writing:
            self._read()

    def write(self, value):
        self._writing = True
        try:
            with slicer.util.NodeModify(self.node):
                self.parameter.write(self.node, value)
                self._read()
        finally:
            self._writing = False


def parameterNodeWrapper(cls):
    """Class decorator; see Slicer's documentation of the same name."""
    parameters = {
        name: _Parameter(name, hint, getattr(cls, name, None))
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
    }

    def construct(self, parameterNode):
        self.parameterNode = parameterNode
        self._guis, self._updating = {}, False
        self._kept = {name: _Kept(parameter, parameterNode) for name, parameter in parameters.items()}

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

            def slot(*_unused, name=name, read=read):
                if not self._updating and tag in self._guis:
                    with slicer.util.NodeModify(self.parameterNode):
                        setattr(self, name, read())

            changed.connect(slot)
            self._guis[tag][name] = (write, changed, slot)
        self.AddObserver(vtkCommand.ModifiedEvent, lambda caller, event: update(self))
        return tag

    def update(self):
        if not self._updating:
            self._updating = True
            try:
                for mapping in list(self._guis.values()):
                    for name, (write, _changed, _slot) in mapping.items():
                        write(getattr(self, name))
            finally:
                self._updating = False

    def disconnectGui(self, tag):
        for _write, changed, slot in self._guis.pop(tag, {}).values():
            changed.disconnect(slot)

    for name in parameters:
        setattr(
            cls,
            name,
            property(lambda self, n=name: self._kept[n].value, lambda self, value, n=name: self._kept[n].write(value)),
        )
    cls.__init__ = construct
    cls.connectGui, cls.disconnectGui = connectGui, disconnectGui
    cls.AddObserver = lambda self, event, callback, priority=0.0: self.parameterNode.AddObserver(
        event, callback, priority
    )
    cls.RemoveObserver = lambda self, tag: self.parameterNode.RemoveObserver(tag)
    cls.StartModify = lambda self: self.parameterNode.StartModify()
    cls.EndModify = lambda self, wasModifying: self.parameterNode.EndModify(wasModifying)
    cls.Modified = lambda self: self.parameterNode.Modified()
    cls.allParameters = parameters
    return cls


NAMES = {"parameterNodeWrapper": parameterNodeWrapper, "WithinRange": WithinRange, "Choice": Choice}
