"""Stand-ins for the Python files of Slicer that slicer-core does not bring, as strict as the originals.

``slicer.util`` is slicer-core's, which is Slicer's own. The others are written here: the base classes of a module, the
parameter node wrapper, the translation function, Sample Data.
"""

from __future__ import annotations

import importlib
import sys
import types

import slicer
import slicer.util

from . import parameter_node, sample_data, scripted_module
from .qt_module import pythonqtStyle

_util = dict(vars(slicer.util))


def install() -> None:
    pythonqtStyle("slicer.util")
    vars(slicer.util).update(_util)
    module("slicer.i18n", tr=tr, translate=translate)
    module("slicer.ScriptedLoadableModule", **scripted_module.NAMES)
    module("slicer.parameterNodeWrapper", **parameter_node.NAMES)
    module("SampleData", **sample_data.NAMES)


def tr(text):
    """One argument; the context comes from the caller's file."""
    return translate("SymRegistration", text)


def translate(context, text):
    return slicer.app.translate(context, text)


def module(name, **content):
    """Put a made module in place."""
    made = types.ModuleType(name)
    made.__dict__.update(content)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), child, made)
