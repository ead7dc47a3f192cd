"""The layer below the module: genuine or imitated, it refuses the same mistakes. Each of these once made the panel
useless in Slicer while an earlier harness forgave it."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Union

import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_harness import layer

slicer_harness.pythonqtStyle(__name__)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def app():
    return slicer_harness.start()


def wrapped(**hints):
    """A parameter node wrapper with these parameters, on a new node."""
    from slicer.parameterNodeWrapper import parameterNodeWrapper

    made = type("Parameters", (), {"__annotations__": hints, "__module__": __name__})
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")
    return parameterNodeWrapper(made)(node), node


def test_the_layer_is_told_and_can_be_chosen(monkeypatch, tmp_path):
    def told(value):
        environment = {**os.environ, "SLICER_PYTHON": value}
        done = subprocess.run(
            [sys.executable, layer.__file__], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    (tmp_path / "slicer/parameterNodeWrapper").mkdir(parents=True)
    assert told("imitation") == "Slicer's Python layer: imitated by the test harness"
    assert told(str(tmp_path)) == f"Slicer's Python layer: genuine, {tmp_path}"
    assert "there is no slicer/parameterNodeWrapper in it" in told(str(tmp_path / "slicer"))
    monkeypatch.setattr(layer, "BESIDE", tmp_path)
    monkeypatch.delenv("SLICER_PYTHON", raising=False)
    assert layer.folder() == tmp_path
    monkeypatch.setattr(layer, "BESIDE", tmp_path / "nowhere")
    assert layer.folder() is None
    assert "Testing/slicer_harness/layer.py" in (ROOT / ".ci/run").read_text(), "CI says which layer it used"


def test_no_file_of_slicer_is_in_the_project(app):
    """Genuine files are read from outside; nothing in the project holds one of them."""
    folder = layer.folder()
    if folder is not None:
        assert ROOT not in folder.parents
    own = {path.name for path in (ROOT / "Testing").rglob("*.py")}
    assert not own & {"guiConnectors.py", "serializers.py", "SampleData.py", "ScriptedLoadableModule.py"}


def test_a_union_of_nodes_needs_none(app):
    segmentation, labels = slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLLabelMapVolumeNode
    with pytest.raises(TypeError):
        wrapped(mask=Union[segmentation, labels])  # noqa: UP007
    state, node = wrapped(mask=Union[segmentation, labels, None])  # noqa: UP007
    assert state.mask is None
    other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    state.mask = other
    assert state.mask is other and node.GetNodeReference("mask.1") is other, "each member has its own place"
    first = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    state.mask = first
    assert node.GetNodeReference("mask.0") is first and node.GetNodeReference("mask.1") is None
    with pytest.raises(TypeError):
        state.mask = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode")
    assert state.mask is first


def test_values_are_checked_stored_and_read_anew(app):
    from slicer.parameterNodeWrapper import WithinRange

    state, node = wrapped(
        count=Annotated[int, WithinRange(0, 4)], on=bool, text=str, volume=slicer.vtkMRMLScalarVolumeNode
    )
    assert (state.count, state.on, state.text, state.volume) == (0, False, "", None)
    for name, wrong, error in (
        ("count", 5, ValueError),
        ("count", "2", TypeError),
        ("count", None, ValueError),
        ("text", 1, TypeError),
        ("text", None, ValueError),
        ("on", "yes", TypeError),
        ("volume", slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode"), TypeError),
    ):
        with pytest.raises(error):
            setattr(state, name, wrong)
    state.count, state.on = 3, True
    assert (node.GetParameter("count"), node.GetParameter("on"), node.GetParameter("volume")) == ("3", "True", "")
    node.SetParameter("count", "2")
    assert state.count == 2, "a value in memory follows the node"
    volume = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    state.volume = volume
    slicer.mrmlScene.RemoveNode(volume)
    node.Modified()
    assert state.volume is None
    with pytest.raises(Exception, match="serializer"):
        wrapped(thing=complex)


def test_a_wrapper_that_goes_leaves_no_observer_of_values(app):
    state, node = wrapped(count=int)
    del state
    gc.collect()
    node.SetParameter("count", "7")  # an observer of something collected would be heard of


def test_translation_takes_one_text(app):
    from slicer.i18n import tr

    app.translate = lambda context, text: f"<{text}>"
    assert tr("Text") == "<Text>"
    with pytest.raises(TypeError):
        tr("Text", "context")


def test_sample_data_wants_fields_of_equal_length(app):
    import SampleData

    register = SampleData.SampleDataLogic.registerCustomSampleDataSource
    with pytest.raises(TypeError):
        register(category="Mine", sampleName="A", customDownloader=print)
    with pytest.raises(ValueError, match="same length"):
        register(category="Mine", sampleName="A", uris=["a", "b"], fileNames=["a"], nodeNames=["a", "b"])
    for _again in range(2):
        register(category="Mine", sampleName="A", uris=[], fileNames=[], nodeNames=[], customDownloader=print)
    assert len(SampleData.SampleDataLogic.sampleDataSourcesByCategory("Mine")) == 1


def test_a_path_edit_is_silent_about_invalid_text(app):
    import ctk

    edit, said = ctk.ctkPathLineEdit(), []
    edit.nameFilters = ["Weights (*.safetensors)"]
    edit.currentPathChanged.connect(lambda path: said.append(path))
    edit.validInputChanged.connect(lambda valid: said.append(valid))
    for text in ("a.txt", "/x/a.safetensors", "/x/b.safetensors", "/x/b.safetensor", "/x/b", ""):
        edit.currentPath = text
    assert said == ["/x/a.safetensors", True, "/x/b.safetensors", False] and edit.currentPath == ""


def test_a_box_runs_the_event_loop_and_is_a_fault_in_a_scene_event(app):
    from PySide6 import QtCore

    ticks = []
    QtCore.QTimer.singleShot(0, lambda: ticks.append(1))
    slicer.util.errorDisplay("Something", windowTitle="Title")
    assert app.shown == [("error", "Something")] and ticks == [1] and app.faults == []
    app.answers = [False]
    assert slicer.util.confirmOkCancelDisplay("Really?") is False and slicer.util.confirmYesNoDisplay("Really?") is True
    node = app.scene.AddNewNodeByClass("vtkMRMLModelNode")
    for event, cause in (
        (app.scene.NodeAboutToBeRemovedEvent, lambda: app.scene.RemoveNode(node)),
        (app.scene.StartCloseEvent, app.scene.Clear),
    ):
        tag = app.scene.AddObserver(event, lambda caller, name: slicer.util.errorDisplay("Now"))
        cause()
        app.scene.RemoveObserver(tag)
        assert len(app.faults) == 1 and "in the middle of a scene event" in app.faults.pop()


def test_testing_mode_skips_boxes(app):
    app.testing = True
    assert slicer.util.confirmOkCancelDisplay("Really?") in (True, False)
    slicer.util.errorDisplay("Something")
    assert app.shown == []


def test_a_widget_without_parent_is_a_window_and_a_second_mixin_init_forgets(app):
    """Why the module's widget initializes its bases once, and why the self-test takes the module's own panel."""
    from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget
    from slicer.util import VTKObservationMixin

    heard = []

    class SymRegistrationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
        def setup(self):
            self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, lambda caller, event: heard.append(1))

    made = SymRegistrationWidget()
    assert made.parent.visible and len(made.Observations) == 1
    made.removeObservers()
    slicer.mrmlScene.Clear()
    assert heard == []
    VTKObservationMixin.__init__(made)
    assert len(made.Observations) == 0
    made.parent.hide()


def test_the_launcher_hides_how_its_child_ended(app):
    from SymRegistrationGui.processes import QtWorkerProcess, pythonProgram

    for code, said in (
        ("raise SystemExit(3)", (3, b"")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", (1, b"exit abnormally")),
    ):
        process, ends, errors = QtWorkerProcess(), [], []
        process.onOutput, process.onErrorOutput = print, errors.append
        process.onExit = lambda exitCode, crashed, e=ends: e.append((exitCode, crashed))
        assert process.start(pythonProgram(), ["-c", code], dict(os.environ), ".")
        app.wait(lambda e=ends: e, 20, "its end")
        assert ends == [(said[0], False)] and said[1] in b"".join(errors)


def test_startup_reaches_the_module(app):
    slicer_harness.loadModule(app)
    app.startup()
    import SampleData

    assert len(SampleData.SampleDataLogic.sampleDataSourcesByCategory("SymRegistration")) == 2
    with pytest.raises(RuntimeError, match="no signal"):
        app.connect("startupComplete()", print)


def test_exceptions_in_slots_and_observers_fail_a_test(app, nothing_unseen):
    from PySide6 import QtCore

    def fail(*_unused):
        raise LookupError("nobody sees this")

    QtCore.QTimer.singleShot(0, fail)
    app.wait(lambda: nothing_unseen, 5, "the exception in a slot")
    tag = app.scene.AddObserver(app.scene.EndCloseEvent, fail)
    app.scene.Clear()
    app.scene.RemoveObserver(tag)
    assert nothing_unseen == ["LookupError: nobody sees this"] * 2
    nothing_unseen.clear()
    assert scenes.folders() == []
