"""Slicer's own Python files over this harness, unchanged: parameterNodeWrapper, ScriptedLoadableModule, i18n, util,
packaging, SampleData. They are read from where they lie and never copied.

Not seen by this: PythonQt's conversions, the real qMRML widgets, views, installers, Slicer's style, and the Qt, Python
and MRML of that very release (PySide6 and slicer-core are newer).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import slicer

from .qt_module import pythonqtStyle

PACKAGES = ("slicer.util", "slicer.i18n", "slicer.ScriptedLoadableModule", "slicer.parameterNodeWrapper")
#: name -> (module, its content as it was imported), once :func:`install` was called
_loaded: dict = {}


def install(folder: Path) -> None:
    """Put the genuine files of ``folder`` in place; quick from the second time on."""
    if not _loaded:
        _import(folder)
    for name in [n for n in sys.modules if _genuine(n)]:
        del sys.modules[name]
    for name, (module, content) in _loaded.items():
        vars(module).update(content)  # tests and the harness put functions into slicer.util
        sys.modules[name] = module
        if name.count(".") == 1:
            setattr(slicer, name.partition(".")[2], module)
    if not any(isinstance(finder, _SampleData) for finder in sys.meta_path):
        sys.meta_path.append(_SampleData(folder))


def _genuine(name):
    return any(name == package or name.startswith(f"{package}.") for package in (*PACKAGES, "slicer.packaging"))


def _import(folder):
    for name in [n for n, value in vars(slicer).items() if getattr(value, "__module__", "") == "slicer.util"]:
        delattr(slicer, name)  # slicer-core offers the functions of slicer.util in slicer as well, Slicer does not
    for name in [n for n in sys.modules if _genuine(n)]:
        del sys.modules[name]
    slicer.__path__.insert(0, str(folder / "slicer"))
    for path in (folder / "slicer").rglob("*.py"):
        pythonqtStyle(".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"))
    for name in PACKAGES:
        module = importlib.import_module(name)
        if folder not in Path(module.__file__).resolve().parents:
            raise ImportError(f"{name} comes from {module.__file__} and not from {folder}")
    _loaded.update({name: (module, dict(vars(module))) for name, module in list(sys.modules.items()) if _genuine(name)})


class _SampleData:
    """Finds the module SampleData in the folder; asked last, so that a test may put another one in its place."""

    def __init__(self, folder):
        self._places = [
            folder / "SampleData.py",
            *folder.parent.parent.glob("lib/Slicer-*/qt-scripted-modules/SampleData.py"),
        ]

    def find_spec(self, name, path=None, target=None):
        if name != "SampleData":
            return None
        place = next((p for p in self._places if p.is_file()), None)
        return importlib.util.spec_from_file_location(name, place) if place else None
