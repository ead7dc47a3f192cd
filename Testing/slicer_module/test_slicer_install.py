"""Installing: nothing before Register, one question, the right helpers, repair of half installations,
help when offline."""

import importlib
import importlib.metadata
import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
slicer_harness.pythonqtStyle(__name__)


@pytest.fixture
def app():
    return slicer_harness.start()


class Machine:
    """A computer on which some packages are there; installs are recorded, take a while as Slicer's do, and take effect.

    Attributes:
        during: called in the middle of each installation, when Slicer processes events.
    """

    def __init__(self, monkeypatch, here):
        from SymRegistrationGui import install

        self.here, self.calls, self.stopped, self.during = dict(here), [], 0, lambda: None
        monkeypatch.setattr(install, "_state", lambda name: self.here.get(name, "missing"))
        monkeypatch.setitem(sys.modules, "slicer.packaging", None)  # Slicer before 5.12, until packaging() is called
        monkeypatch.setattr(slicer.util, "pip_install", self._pip, raising=False)
        monkeypatch.setattr(
            slicer.util, "pip_uninstall", lambda name: self.calls.append(("uninstall", name)), raising=False
        )

    def stop(self):
        self.stopped += 1

    def _takeTime(self):
        """Slicer shows pip's output line by line, and processes events after each."""
        for _line in range(3):
            slicer.app.processEvents()
            self.during()

    def _pip(self, requirement):
        self.calls.append(("pip", requirement))
        self._takeTime()
        self.here[requirement.split(">")[0]] = ""

    def pytorchExtension(self, error=None, result="torch"):
        def installTorch(self_, askConfirmation, torchVersionRequirement):
            self.calls.append(("torch", askConfirmation, torchVersionRequirement))
            self._takeTime()
            if error:
                raise error
            if result:
                self.here["torch"] = ""
            return result

        logic = type("PyTorchUtilsLogic", (), {"installTorch": installTorch})
        sys.modules["PyTorchUtils"] = types.SimpleNamespace(PyTorchUtilsLogic=logic)

    def packaging(self):
        def ensure(requirements, requester, prompt_install, skip_in_testing):
            self.calls.append(("ensure", tuple(requirements), prompt_install))
            self._takeTime()
            for line in requirements:
                self.here[line.split(">")[0]] = ""

        module = types.ModuleType("slicer.packaging")
        module.pip_ensure = ensure
        sys.modules["slicer.packaging"] = module


def test_with_everything_there_nothing_is_asked(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {"torch": "", "safetensors": "", "psutil": ""})
    assert install.ensure(machine) and app.shown == [] and machine.calls == []


def test_one_question_then_the_extension_and_pip_ensure(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {})
    machine.pytorchExtension()
    machine.packaging()
    assert install.ensure(machine)
    assert len(app.shown) == 1 and all(word in app.shown[0][1] for word in ("PyTorch", "safetensors", "psutil", "GB"))
    assert machine.calls == [("torch", False, ">=2.2"), ("ensure", ("safetensors>=0.4", "psutil>=5.9"), False)]
    assert machine.stopped == 1, "a running worker may hold the files that are replaced"


def test_no_means_no(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {"safetensors": ""})
    app.answers = [False]
    assert install.ensure(machine) is False and machine.calls == [] and machine.stopped == 0


def test_slicer_before_5_12_uses_pip(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {"torch": "", "psutil": ""})
    assert install.ensure(machine) and machine.calls == [("pip", "safetensors>=0.4")]
    assert "2 MB" in app.shown[0][1] and "PyTorch" not in app.shown[0][1]


# ---------------------------------------------------------------------------------------------- meanwhile, in the panel


@pytest.fixture(name="fresh")
def freshFixture(module, monkeypatch):
    """(module with two scans chosen, a machine without the libraries, what the panel showed meanwhile)."""
    machine, seen = Machine(monkeypatch, {}), []
    machine.pytorchExtension()
    module.choose(*scenes.pair(module.scene))
    monkeypatch.setattr(module.engine.client, "stop", machine.stop)
    ui = module.ui

    def look():
        seen.append((ui.statusLabel.text, module.app.cursors))
        assert module.panel.busy and not ui.registerButton.enabled and not ui.cancelButton.enabled
        assert not ui.inputsCollapsibleButton.enabled and not ui.methodCollapsibleButton.enabled
        for name in ("registerButton", "tryItButton", "devicesButton", "swapButton"):
            getattr(ui, name).click()
        module.panel.register()
        module.panel.onDevices()

    machine.during = look
    return module, machine, seen


def test_the_panel_says_what_it_installs_and_takes_no_second_click(fresh):
    module, machine, seen = fresh
    started = []
    register, module.engine.register = (
        module.engine.register,
        lambda request, task: (started.append(1), register(request, task))[1],
    )
    assert module.register() is not None
    module.settle()
    assert [call[0] for call in machine.calls].count("torch") == 1 and len(started) == 1 and machine.stopped == 1
    assert len(seen) >= 6 and all(
        "Installing PyTorch, safetensors, psutil" in text and cursors == 1 for text, cursors in seen
    )
    assert module.app.cursors == 0 and [kind for kind, _text in module.app.shown] == ["confirm"]
    assert module.ui.statusLabel.text.startswith("Done")


def test_a_failed_installation_leaves_a_panel_that_works(fresh):
    module, machine, _seen = fresh
    machine.pytorchExtension(error=OSError("no route to host"))
    assert module.register() is None
    assert module.app.cursors == 0 and not module.panel.busy and module.ui.registerButton.enabled
    assert [kind for kind, _text in module.app.shown] == [
        "confirm",
        "error",
    ] and "no route to host" in module.ui.statusLabel.text


@pytest.mark.parametrize("happens", ["the scene is closed", "a scan is deleted"])
def test_what_happens_to_the_scans_during_the_installation(fresh, happens):
    module, machine, _seen = fresh
    moving = module.state.movingVolume
    close = module.scene.Clear if happens == "the scene is closed" else lambda: module.scene.RemoveNode(moving)
    machine.during = lambda: moving.GetScene() is not None and close()
    module.app.inEventLoop(lambda: module.ui.registerButton.click())
    before = scenes.names(module.scene)
    assert not module.engine.busy and not module.panel.busy and module.app.cursors == 0
    assert [kind for kind, _text in module.app.shown] == ["confirm", "error"]
    assert "scene was closed during the installation; nothing was registered" in module.app.shown[1][1]
    assert (
        module.app.shown[1][1] in module.ui.statusLabel.text
        and scenes.names(module.scene) == before
        and scenes.folders() == []
    )


def test_a_reload_during_the_installation_starts_nothing(fresh):
    module, machine, _seen = fresh
    old, once = module.panel, []
    machine.during = lambda: once or once.append(module.widget.onReload())
    old.ui.registerButton.click()
    assert module.panel is not old and old.closed and not old.busy and not module.panel.busy
    assert module.app.cursors == 0 and [kind for kind, _text in module.app.shown] == ["confirm"]


def test_what_cannot_be_registered_installs_nothing(fresh):
    module, machine, _seen = fresh
    slicer.util.arrayFromVolume(module.state.movingVolume)[:] = 7
    assert module.register() is None
    assert (
        machine.calls == []
        and [kind for kind, _text in module.app.shown] == ["error"]
        and "is empty" in module.app.shown[0][1]
    )


# --------------------------------------------------------------------------------------------- repair, offline, by hand


def test_the_calls_fit_the_installers_of_this_release(app, monkeypatch):
    """Whatever the layer has: slicer.util always, slicer.packaging from 5.12 on."""
    from SymRegistrationGui import install

    try:
        packaging = importlib.import_module("slicer.packaging")
    except ImportError:
        packaging = None
    fitted = []
    for module, name in ((slicer.util, "pip_install"), (slicer.util, "pip_uninstall"), (packaging, "pip_ensure")):
        if module is not None:
            expected = inspect.signature(getattr(module, name))
            monkeypatch.setattr(
                module, name, lambda *given, e=expected, n=name, **named: fitted.append((n, e.bind(*given, **named)))
            )
    states = {"torch": iter(["damaged", ""]), "safetensors": iter(["missing", ""]), "psutil": iter(["missing", ""])}
    monkeypatch.setattr(install, "_state", lambda name: next(states[name]))
    logic = types.SimpleNamespace(installTorch=lambda askConfirmation, torchVersionRequirement: "torch")
    monkeypatch.setitem(sys.modules, "PyTorchUtils", types.SimpleNamespace(PyTorchUtilsLogic=lambda: logic))
    assert install.ensure(types.SimpleNamespace(stop=lambda: None))
    assert {name for name, _bound in fitted} == {"pip_uninstall", "pip_install" if packaging is None else "pip_ensure"}


def test_half_an_installation_is_replaced(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {"torch": "damaged", "safetensors": "", "psutil": ""})
    machine.pytorchExtension()
    assert install.ensure(machine)
    assert machine.calls == [("uninstall", "torch"), ("torch", False, ">=2.2")] and "damaged" in app.shown[0][1]


def test_repair_installs_again_what_looks_fine(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {"torch": "", "safetensors": "", "psutil": ""})
    machine.pytorchExtension()
    machine.packaging()
    assert install.ensure(machine, repair=True)
    assert [call[0] for call in machine.calls] == ["uninstall", "torch", "ensure"]


def test_without_the_extension_the_user_is_told_where_it_is(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {})
    with pytest.raises(install.InstallError, match="PyTorch is not installed") as caught:
        install.ensure(machine)
    assert "Extensions Manager" in caught.value.hint


def test_offline_help_says_what_to_copy_where(app, monkeypatch):
    from SymRegistrationGui import install

    machine = Machine(monkeypatch, {})
    machine.pytorchExtension(error=OSError("Temporary failure in name resolution"))
    with pytest.raises(install.InstallError, match="name resolution") as caught:
        install.ensure(machine)
    for words in (
        "pip download",
        '"torch>=2.2"',
        f"Python {sys.version_info.major}.{sys.version_info.minor}",
        "--no-index",
        "--find-links",
    ):
        assert words in caught.value.hint
    machine.pytorchExtension(result=None)
    with pytest.raises(install.InstallError, match="was not installed"):
        install.ensure(machine)


def test_states_are_read_from_disk_without_importing(app, tmp_path, monkeypatch):
    from SymRegistrationGui.install import _state

    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "demopackage"
    assert _state("demopackage") == "missing"
    package.mkdir()
    importlib.invalidate_caches()
    assert _state("demopackage") == "damaged", "a folder without code: what a broken installation leaves"
    info = tmp_path / "demopackage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demopackage\nVersion: 1.0\n")
    importlib.invalidate_caches()
    assert _state("demopackage") == "damaged"
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    sys.path_importer_cache.clear()
    assert _state("demopackage") == ""
    (info / "METADATA").unlink()
    info.rmdir()
    importlib.invalidate_caches()
    assert _state("demopackage") == "damaged"
    assert "demopackage" not in sys.modules


def test_requirements_are_those_of_the_library():
    from SymRegistrationGui import install

    project = (ROOT / "pyproject.toml").read_text()
    listed = json.loads("[" + project.split("dependencies = [", 1)[1].split("]", 1)[0] + "]")
    bundled = {"numpy>=1.26", "SimpleITK>=2.3"}  # part of Slicer, never touched
    assert set(listed) - bundled == {*install.REQUIREMENTS, f"torch{install.TORCH}"}


def test_methods_shown_before_torch_are_those_of_the_registry(app):
    from SymRegistrationGui import methods

    from SymRegistrationLib.jobs.methods import catalogue

    shown = {method["name"]: method for method in methods.methods()}
    for entry in catalogue():
        method = shown.pop(entry["name"])
        assert method["publication"] == entry["publication"] and entry["title"]
        assert method["weights_here"] == bool(entry["weights"]) and methods.usable(method), (
            "shipped weights are not found"
        )
        assert method["needs_weights"] == bool(entry["weights"]) and len(method["description"]) > 60
        assert (
            method["title"].split()[0].lower().replace("-", "")
            in entry["title"].lower().replace("-", "") + entry["name"]
        )
    assert set(shown) <= set(), f"listed, but not in the registry: {sorted(shown)}"
