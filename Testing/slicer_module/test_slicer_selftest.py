"""The self-test that a real Slicer runs, run here: it finds the panel's own widget, tells every step, and leaves
nothing behind.
"""

import logging

import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


@pytest.fixture(autouse=True)
def small(client, monkeypatch):
    """Heads of a sixth of the voxels, which take a sixth of the time."""
    from SymRegistrationGui import sampledata

    monkeypatch.setattr(sampledata, "SHAPE", (42, 50, 40))
    monkeypatch.setattr(sampledata, "SPACING", 4.5)


def windows():
    """Top-level widgets that are on the screen."""
    from PySide6 import QtCore, QtWidgets

    slicer.app.processEvents()
    QtCore.QCoreApplication.sendPostedEvents(None, QtCore.QEvent.DeferredDelete)
    return [w for w in QtWidgets.QApplication.topLevelWidgets() if not w.isHidden() and w.children()]


def results(caplog):
    """{step's number: result} of the lines in the log."""
    lines = [
        record.message for record in caplog.records if "self-test" in record.message and record.levelno == logging.INFO
    ]
    return {int(line.split("/")[0].split()[-1]): line for line in lines}


def test_reload_and_test_settles_everything_in_twelve_lines(module, caplog):
    """As the button does it: the file again, a new widget, the test on it; the panel stays usable."""
    caplog.set_level(logging.INFO)
    before = windows()
    old = module.widget
    module.widget.onReloadAndTest()
    assert module.app.shown == [] and module.widget is not old
    told = results(caplog)
    assert sorted(told) == list(range(1, 13))
    assert all(": ok" in line for line in told.values()), told
    assert "landmarks" in told[4] and "mm after" in told[4]
    assert windows() == before, "no window is left"
    assert len(module.app.moduleManager().slots["moduleAboutToBeUnloaded(QString)"]) == 1, "one panel is connected"
    module.choose(*scenes.pair(module.scene))
    assert module.register() is not None


def test_without_a_main_window(module, caplog):
    caplog.set_level(logging.INFO)
    module.app.layout = None
    slicer.selfTests["SymRegistration"](msec=10)
    told = results(caplog)
    assert all(": ok" in line for line in told.values()) and "without a main window nothing was drawn" in told[6]


def test_ctest_without_libraries_installs_nothing_and_says_what_was_not_tested(module, caplog, monkeypatch):
    from SymRegistrationGui import install

    caplog.set_level(logging.INFO)
    module.app.testing = True  # Slicer --testing: questions answer themselves with yes
    monkeypatch.setattr(install, "_state", lambda name: "missing")
    monkeypatch.setattr(
        install, "ensure", lambda client, repair, onBegin: pytest.fail("a test must not install anything")
    )
    slicer.selfTests["SymRegistration"](msec=10)
    told = results(caplog)
    assert [k for k, line in told.items() if "not tested: PyTorch, safetensors, psutil not installed" in line] == [
        4,
        5,
        6,
        7,
        8,
        9,
        10,
    ]
    assert all(": ok" in told[k] for k in (1, 2, 3, 11, 12))


def test_a_step_that_fails_is_named_and_the_others_are_tried(module, caplog, monkeypatch):
    from SymRegistrationGui import install, parameters

    caplog.set_level(logging.INFO)
    module.app.testing = True
    monkeypatch.setattr(install, "_state", lambda name: "missing")
    monkeypatch.setattr(parameters, "swap", lambda state: None)
    with pytest.raises(AssertionError, match="The chosen scans reach the parameters"):
        slicer.selfTests["SymRegistration"](msec=10)
    told = results(caplog)
    assert "FAILED: AssertionError" in told[3] and all(": ok" in told[k] for k in (1, 2, 11, 12)) and len(told) == 12


def test_where_slicer_does_not_know_the_module_the_panel_is_taken_down_again(monkeypatch, caplog):
    """ctest may import the file alone."""
    from SymRegistrationGui import install

    app = slicer_harness.start()
    _parent, python = slicer_harness.loadModule(app)
    path = slicer.modules.symregistration.path
    monkeypatch.delattr(slicer.modules, "symregistration")
    monkeypatch.setattr(slicer.util, "modulePath", lambda name: path)
    monkeypatch.setattr(install, "_state", lambda name: "missing")
    app.testing = True
    before = windows()
    python.SymRegistrationTest("test_panel").debug()
    assert windows() == before and not app.moduleManager().slots["moduleAboutToBeUnloaded(QString)"]
