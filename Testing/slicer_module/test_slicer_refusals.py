"""What the panel guesses, offers and refuses: scans, weights, sample data, bad input."""

import numpy as np
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, doneFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


# --------------------------------------------------------------------------------------------- what is shown and chosen


def test_only_scans_are_guessed(client, monkeypatch):
    for extra in ("label map", "hidden", "vector"):
        opened = scenes.Opened(client, monkeypatch)
        scan = scenes.pair(opened.scene)[0]
        opened.scene.RemoveNode(opened.scene.GetFirstNodeByName("Moving scan"))
        kind = {"label map": "vtkMRMLLabelMapVolumeNode", "vector": "vtkMRMLVectorVolumeNode"}.get(
            extra, "vtkMRMLScalarVolumeNode"
        )
        other = scenes.volume(opened.scene, np.ones((4, 4, 4), np.uint8), np.eye(4), extra, kind)
        other.SetHideFromEditors(extra == "hidden")
        slicer_harness.unloadModule(opened.app)
        opened.widget.enter()
        assert opened.state.fixedVolume is None and opened.state.movingVolume is None, f"one scan and one {extra}"
        scenes.volume(opened.scene, slicer.util.arrayFromVolume(scan), np.eye(4), "Second")
        slicer_harness.unloadModule(opened.app)
        opened.widget.cleanup()
        opened.widget.enter()
        assert {opened.state.fixedVolume.GetName(), opened.state.movingVolume.GetName()} == {"Fixed scan", "Second"}
        opened.widget.cleanup()


def test_weights_can_be_chosen_typed_and_cleared(module):
    edit = module.ui.weightsPathEdit
    module.choose(*scenes.pair(module.scene))
    for text in ("/x/a.safetensors", "/x/a.safetensor", "/x/a", "", "b.txt", "", "/x/b.safetensors", ""):
        edit.currentPath = text
        assert module.state.weights == text
    module.state.weights = "/x/c.safetensors"
    assert edit.currentPath == "/x/c.safetensors"
    module.state.weights = ""
    assert edit.currentPath == ""


def test_sample_data_loads_both_pairs_and_shows_the_scans(module, monkeypatch):
    import SampleData

    slicer_harness.loadModule(module.app)
    module.app.startup()
    module.app.startup()
    sources = SampleData.SampleDataLogic.sampleDataSourcesByCategory("SymRegistration")
    assert [s.sampleName for s in sources] == ["SymRegistrationHeads", "SymRegistrationTumorPair"], (
        "registered once each"
    )
    heads, tumors = sources
    from pathlib import Path

    assert Path(heads.thumbnailFileName).is_file() and heads.customDownloader is not None
    module.app.layout.calls.clear()
    made = heads.customDownloader(heads)
    composites = module.panel.results.views.composites()
    assert [(c.GetBackgroundVolumeID(), c.GetForegroundVolumeID(), c.GetForegroundOpacity()) for c in composites] == [
        (made[0].GetID(), made[1].GetID(), 0.5)
    ] * 3
    assert "mrmlSliceLogics" in module.app.layout.calls, "the views are fitted to the scans"
    # the tumor pair is a pair of files: Sample Data's own thumbnail of the first, its own download with checksums
    assert tumors.customDownloader is None and tumors.nodeNames == ["MRBrainTumor1", "MRBrainTumor2"]
    assert len(tumors.uris) == len(tumors.fileNames) == len(tumors.checksums) == 2 and all(tumors.checksums)
    logic = SampleData.SampleDataLogic()
    monkeypatch.setattr(
        logic,
        "downloadFileIntoCache",
        lambda uri, name, checksum, forceDownload=False: f"/nowhere/{name}",
        raising=False,
    )
    monkeypatch.setattr(
        logic,
        "loadNode",
        lambda path, name, kind=None, properties=None: scenes.volume(
            module.scene, np.zeros((4, 4, 4), np.int16), np.eye(4), name
        ),
        raising=False,
    )
    loaded = logic.downloadFromSource(tumors)
    assert [node.GetName() for node in loaded] == ["MRBrainTumor1", "MRBrainTumor2"]
    expected = __import__("SymRegistrationGui.sampledata", fromlist=["partner"]).partner(
        scenes.positions(made[2]) * (-1, -1, 1)
    ) * (-1, -1, 1)
    assert np.abs(scenes.positions(made[3]) - expected).max() < 1e-6


def test_an_application_without_sample_data_starts(monkeypatch):
    import sys

    app = slicer_harness.start()
    slicer_harness.loadModule(app)
    monkeypatch.setitem(sys.modules, "SampleData", None)
    app.startup()


def test_try_it_shows_the_scans_before_the_run(module, monkeypatch):
    shown = []
    monkeypatch.setattr(
        module.panel,
        "register",
        lambda: shown.append(
            [(c.GetBackgroundVolumeID(), c.GetForegroundVolumeID()) for c in module.panel.results.views.composites()]
        ),
    )
    module.click("tryItButton")
    assert shown == [[(module.state.fixedVolume.GetID(), module.state.movingVolume.GetID())] * 3]


def test_results_are_fitted_into_the_views_where_there_are_views(module):
    module.choose(*scenes.pair(module.scene))
    assert module.register() is not None and "resetSliceViews" in module.app.layout.calls
    module.settle()
    module.app.layout = None  # Slicer --no-main-window
    assert module.register() is not None and module.app.shown == []


# ------------------------------------------------------------------------------------------------ bad input


def refused(module, said):
    """One message that says ``said``, in the panel and in a box; nothing else happened."""
    assert len(module.app.shown) == 1 and said in module.app.shown[0][1], module.app.shown
    assert said in module.ui.statusLabel.text and not module.panel.busy and scenes.folders() == []
    module.app.shown.clear()


def test_label_maps_equal_nodes_and_volumes_without_voxels(module):
    from SymRegistrationGui.exporting import Request

    from SymRegistrationLib.job import InputError

    fixed, moving = scenes.pair(module.scene)
    labels = scenes.volume(module.scene, np.ones((8, 8, 8), np.uint8), np.eye(4), "Labels", "vtkMRMLLabelMapVolumeNode")
    hollow = module.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Hollow")
    before = scenes.names(module.scene)
    module.choose(fixed, moving)
    for name, said in (("fixedVolume", "'Labels' is no scan"), ("movingVolume", "'Labels' is no scan")):
        setattr(module.state, name, labels)
        assert not module.ui.registerButton.enabled and said in module.ui.statusLabel.text
        module.choose(fixed, moving)
    for pair in ((labels, moving), (fixed, labels)):
        with pytest.raises(InputError, match="'Labels' is a label map, not a scan"):
            module.engine.register(Request(*pair))
    module.choose(fixed, fixed)
    assert not module.ui.registerButton.enabled and module.ui.statusLabel.text == "Choose two different volumes."
    module.choose(fixed, hollow)
    module.click("registerButton")
    refused(module, "'Hollow' has no voxels.")
    assert scenes.names(module.scene) == before


def test_an_unexpected_error_is_shown_and_not_only_printed(module, monkeypatch, nothing_unseen):
    from SymRegistrationGui import exporting

    def fail(request):
        raise LookupError("something nobody thought of")

    monkeypatch.setattr(exporting, "check", fail)
    module.choose(*scenes.pair(module.scene))
    module.click("registerButton")
    assert nothing_unseen == ["LookupError: something nobody thought of"], "the console has it as well"
    nothing_unseen.clear()
    assert len(module.app.shown) == 1 and "something nobody thought of" in module.app.shown[0][1]
    assert "unexpected error" in module.app.shown[0][1] and not module.panel.busy


def test_an_unexpected_error_after_the_run_is_shown_as_well(module, monkeypatch, nothing_unseen):
    from SymRegistrationGui import parameters

    def fail(state, run):
        raise LookupError("the outputs")

    monkeypatch.setattr(parameters, "rememberOutputs", fail)
    module.choose(*scenes.pair(module.scene))
    module.click("registerButton")
    module.app.wait(lambda: not module.engine.busy, 90)
    module.settle()
    assert nothing_unseen == ["LookupError: the outputs"] and "the outputs" in module.app.shown[0][1]
    nothing_unseen.clear()


def test_the_time_an_idle_process_is_kept_is_a_setting_of_the_computer(module):
    from SymRegistrationGui import settings

    assert module.ui.idleSpinBox.value == 10
    module.ui.idleSpinBox.value = 3
    assert settings.idleMinutes() == 3 and slicer.app.userSettings().value(settings.IDLE_KEY) in (3, "3")
    module.widget.onReload()
    assert module.ui.idleSpinBox.value == 3, "kept over a Reload"
    module.app.inEventLoop(module.scene.Clear)
    assert settings.idleMinutes() == 3, "not a part of the scene"


def test_without_an_event_loop_a_box_opens_at_once_and_else_when_the_event_is_over(module):
    from SymRegistrationGui.events import later

    order = []
    later(lambda: order.append("box"))
    order.append("event over")
    assert order == ["box", "event over"], "nothing would come back to it"
    order.clear()
    module.app.inEventLoop(lambda: (later(lambda: order.append("box")), order.append("event over")))
    assert order == ["event over", "box"]


def test_every_tool_tip_says_something(module):
    """Whatever can be chosen or pressed explains itself."""
    kinds = ("QPushButton", "QComboBox", "QSpinBox", "QCheckBox", "qMRMLNodeComboBox", "ctkPathLineEdit")
    silent = [
        n
        for n, w in vars(module.ui).items()
        if type(w).__name__ in kinds and not n.startswith("qt_") and len(w.toolTip) < 8
    ]
    assert silent == []
