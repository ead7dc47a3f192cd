"""3D Slicer for tests, without Slicer: real MRML (slicer-core), real Qt widgets (PySide6, offscreen), Slicer's own
Python files where they are at hand, and as little else as the module needs.

``slicer_harness.start()`` gives a fresh :class:`Application`: ``slicer.mrmlScene``, ``slicer.app``, ``slicer.util``,
``qt``, ``ctk``, ``slicer.ScriptedLoadableModule``, ``slicer.parameterNodeWrapper``, ``slicer.i18n``, ``SampleData``.
:mod:`.layer` says where the last four come from: Slicer's genuine files, or an imitation that is as strict.
``openModule()`` shows the module as Slicer's C++ does, ``unloadModule()`` ends it.

Modules of the extension see Qt as PythonQt shows it (properties are attributes, their setters do not exist), through
PySide6's ``true_property``, so that a call where PythonQt has an attribute fails here as it fails there. ``.ui`` files
are loaded by the real QUiLoader; qMRML and ctk classes are stand-ins bound to the real scene, and a property in a
``.ui`` file that the real class does not have fails. The worker is started through a launcher that behaves as
PythonSlicer does. Message boxes run the event loop; one that opens in the middle of a scene event is a fault.

What it cannot show: rendering and layouts of Slicer's views, the subject hierarchy's plugins, PythonQt's own
conversions and signal overloads, the look of Slicer's style, and other Qt versions than PySide6's. The self-test in
SymRegistration.py is for those; a real Slicer runs it.
"""

from __future__ import annotations

import os

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import ctypes
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = REPOSITORY / "SymRegistration"

for _path in (REPOSITORY, MODULE):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

if sys.version_info < (3, 12):
    # PySide6 6.12 drops one reference to None, True or False with every method that returns it; before Python 3.12 made
    # them immortal, that ends the interpreter after some thousand calls. A large head start outlasts any test.
    for _constant in (None, True, False):
        ctypes.c_ssize_t.from_address(id(_constant)).value += 1 << 40

from .application import Application, start  # noqa: E402, F401
from .factory import loadModule, openModule, unloadModule  # noqa: E402, F401
from .qt_module import CHECKED, pythonqtStyle  # noqa: E402, F401
