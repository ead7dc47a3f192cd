"""The module as a user meets it: opened, clicked, canceled; with the real worker and the real pipeline."""

import sys

import numpy as np
import psutil
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


class NoTorch:
    """An import system without torch."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not installed here")


def test_opens_without_torch_and_starts_nothing(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    for name in [n for n in sys.modules if n.split(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    opened = scenes.Opened(None, monkeypatch, reimport=True)
    assert not opened.engine.client.running and opened.app.shown == [] and opened.workers() == []
    assert opened.ui.methodComboBox.itemData(0) == "syn"
    slicer_harness.unloadModule(opened.app)


def test_two_volumes_and_one_click(module):
    ui = module.ui
    assert not ui.registerButton.enabled and "Choose a fixed and a moving volume" in ui.registerButton.toolTip
    fixed, moving = scenes.pair(module.scene)
    assert ui.statusLabel.text == ui.registerButton.toolTip, "why it cannot be pressed is told, not only when asked"
    module.choose(fixed, moving)
    assert ui.statusLabel.text == ""
    seen = []
    progress = module.panel._progress
    module.panel._progress = lambda *event: (
        progress(*event),
        seen.append((event, ui.progressBar.value, ui.statusLabel.text)),
    )
    module.click("registerButton")
    assert ui.cancelButton.enabled and not ui.registerButton.enabled and not ui.methodCollapsibleButton.enabled
    assert not ui.progressBar.isHidden()
    module.app.wait(lambda: not module.engine.busy, 90)
    assert module.app.shown == []
    assert {"align", "write", "import"} <= {event[0] for event, _value, _text in seen}
    values = [value for event, value, _text in seen if event[0] != "export"]
    assert values == sorted(values) and values[-1] == 1000
    assert ui.statusLabel.text.startswith("Done in ") and ui.progressBar.isHidden() and ui.registerButton.enabled
    run = module.panel.results.run
    assert {
        part for part in ("forward", "inverse", "warped_moving", "jacobian", "inverse_consistency") if run.node(part)
    } == {"forward", "inverse", "warped_moving", "jacobian", "inverse_consistency"}
    metrics = run.metrics
    assert metrics["similarity"]["after"] > metrics["similarity"]["before"]
    assert ui.resultsTable.item(0, 0).text() == "Similarity (0 to 1)"
    assert ui.resultsTable.item(0, 3).text() == f"{metrics['similarity']['after']:.3f}"
    assert run.table.GetNumberOfRows() == ui.resultsTable.rowCount
    assert metrics["verdict"]["words"] in ui.verdictLabel.text
    composite = module.panel.results.views.composites()[0]
    assert composite.GetBackgroundVolumeID() == fixed.GetID()
    assert composite.GetForegroundVolumeID() == run.node("warped_moving").GetID()


def test_the_result_brings_the_scans_together(module):
    fixed, moving = scenes.pair(module.scene, oblique=True)
    module.choose(fixed, moving)
    run = module.register()
    ras = np.array([(5, -8, 12), (15, 0, 20), (-8, -20, 5), (12, 8, 0), (0, -15, 28.0)])
    forward, inverse = (run.node(part).GetTransformFromParent() for part in ("forward", "inverse"))
    moved = np.array([forward.TransformPoint(p) for p in ras])
    assert np.linalg.norm(moved - scenes.shift(ras), axis=1).max() < 1.5, (
        "fixed points go to their partners on the moving scan"
    )
    back = np.array([inverse.TransformPoint(p) for p in moved])
    assert np.linalg.norm(back - ras, axis=1).max() < 0.3, "inverse takes them back"
    before, after = (
        np.corrcoef(slicer.util.arrayFromVolume(fixed).ravel(), other.ravel())[0, 1]
        for other in (slicer.util.arrayFromVolume(run.node("warped_moving")), slicer.util.arrayFromVolume(fixed))
    )
    assert before > 0.97 and after == pytest.approx(1)


def test_cancel_in_the_middle_leaves_the_scene_as_it_was(module):
    fixed, moving = scenes.pair(module.scene, spacing=1.0)
    module.choose(fixed, moving, quick=False)
    module.state.preset = "thorough"
    before = scenes.names(module.scene)
    module.click("registerButton")
    module.app.wait(lambda: module.ui.progressBar.value > 30, 60, "progress")
    assert len(module.workers()) == 1
    module.click("cancelButton")
    assert not module.engine.busy and not module.engine.client.running
    module.app.wait(lambda: module.workers() == [], 20, "the worker's end")
    assert scenes.names(module.scene) == before and scenes.folders() == []
    assert module.ui.statusLabel.text == "Canceled." and module.app.shown == []
    module.state.preset, module.state.initial = "fast", "centre"
    assert module.register() is not None, "after Cancel, the next run starts a new worker"


def bad(module, said, unchanged=True, kind="error"):
    """One message box with ``said``; nothing else happened."""
    assert len(module.app.shown) == 1 and module.app.shown[0][0] == kind, module.app.shown
    assert said in module.app.shown[0][1], module.app.shown
    assert not module.engine.busy


def test_same_volume_twice_and_missing_choices(module):
    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, fixed)
    assert not module.ui.registerButton.enabled and module.ui.registerButton.toolTip == "Choose two different volumes."
    module.choose(fixed, moving)
    module.state.initial = "transform"
    assert "start transform" in module.ui.registerButton.toolTip
    module.state.initial, module.state.method = "centre", "hsyn"
    assert module.ui.registerButton.enabled, "weights come with the module"
    module.panel._methods["hsyn"]["weights_here"] = False
    module.panel.update()
    assert not module.ui.registerButton.enabled and "HSyN needs trained weights" in module.ui.registerButton.toolTip
    from SymRegistrationGui.exporting import Request

    for request, said in (
        (Request(fixed, fixed), "as fixed and as moving"),
        (Request(None, moving), "No fixed volume"),
        (Request(fixed, None), "No moving volume"),
    ):
        with pytest.raises(Exception, match=said):
            module.engine.register(request)


def test_empty_volume(module):
    fixed, moving = scenes.pair(module.scene)
    slicer.util.arrayFromVolume(moving)[:] = 7
    module.choose(fixed, moving)
    before = scenes.names(module.scene)
    assert module.register() is None
    bad(module, "'Moving scan' is empty: all its voxels have the value 7")
    assert scenes.names(module.scene) == before


def test_volumes_far_apart_without_a_start(module):
    fixed, moving = scenes.pair(module.scene)
    matrix = np.eye(4)
    matrix[0, 3] = 2000
    moving.SetAndObserveTransformNodeID(scenes.linearTransform(module.scene, matrix).GetID())
    module.choose(fixed, moving)
    module.state.initial = "none"
    before = scenes.names(module.scene)
    assert module.register() is None
    bad(module, "overlap")
    assert scenes.names(module.scene) == before
    module.app.shown.clear()
    module.state.initial = "centre"
    assert module.register() is not None and module.app.shown == []


def test_segmentation_without_content(module):
    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    empty = module.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Liver")
    module.ui.fixedMaskSelector.setCurrentNode(empty)
    assert module.register() is None
    bad(module, "'Liver' has no segment")


def test_a_volume_deleted_during_the_run(module):
    fixed, moving = scenes.pair(module.scene, spacing=1.5)
    module.choose(fixed, moving, quick=False)
    module.click("registerButton")
    module.app.wait(lambda: module.ui.progressBar.value > 30, 60, "progress")
    before = scenes.names(module.scene)
    module.app.inEventLoop(lambda: module.scene.RemoveNode(moving))
    bad(module, "'Moving scan' was deleted")
    assert "'Moving scan' was deleted" in module.ui.statusLabel.text and "Choose a fixed" in module.ui.statusLabel.text
    assert len(scenes.names(module.scene)) == len(before) - 1 and scenes.folders() == []


def test_a_scene_closed_in_mid_run(module):
    fixed, moving = scenes.pair(module.scene, spacing=1.5)
    module.choose(fixed, moving, quick=False)
    module.click("registerButton")
    module.app.wait(lambda: module.ui.progressBar.value > 30, 60, "progress")
    module.app.inEventLoop(module.scene.Clear)
    bad(module, "scene was closed")
    assert scenes.folders() == [] and module.state is not None and module.state.fixedVolume is None
    assert not module.ui.registerButton.enabled and module.panel.results.run is None


def test_a_worker_killed_from_outside(module):
    fixed, moving = scenes.pair(module.scene, spacing=1.5)
    module.choose(fixed, moving, quick=False)
    before = scenes.names(module.scene)
    module.click("registerButton")
    module.app.wait(lambda: module.ui.progressBar.value > 30, 60, "progress")
    module.workers()[0].kill()
    module.app.wait(lambda: not module.engine.busy, 20, "the news")
    bad(module, "crashed or was ended from outside; most often the computer ran out of memory")
    assert scenes.names(module.scene) == before and scenes.folders() == []


def test_a_worker_that_hangs(module, monkeypatch):
    from SymRegistrationGui.client import Patience

    fixed, moving = scenes.pair(module.scene, spacing=1.5)
    module.choose(fixed, moving, quick=False)
    before = scenes.names(module.scene)
    module.click("registerButton")
    module.app.wait(lambda: module.ui.progressBar.value > 30, 60, "progress")
    client, hanging = module.engine.client, module.workers()[0]
    hanging.suspend()
    module.app.wait(lambda: hanging.status() == psutil.STATUS_STOPPED, 20, "its standstill")
    module.app.processEvents()
    now = client._clock()
    for minute in range(1, 32):
        monkeypatch.setattr(client, "_clock", lambda m=minute: now + 60.0 * m)
        monkeypatch.setattr(client, "_patience", Patience(tick=100.0))
        client.look()
    bad(module, "has said nothing for")
    assert scenes.names(module.scene) == before and scenes.folders() == []
    module.state.preset, module.state.initial = "fast", "centre"
    monkeypatch.undo()
    assert module.register() is not None, "the next run starts a new worker"


def test_no_gpu_and_no_weights(module, tmp_path):
    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    before = scenes.names(module.scene)
    module.state.device = "cuda:5"
    assert module.register() is None
    bad(module, "'cuda:5' is not available")
    module.app.shown.clear()
    module.state.device, module.state.method = "auto", "sm-gicnet"
    module.ui.weightsPathEdit.currentPath = str(tmp_path / "none.safetensors")
    assert module.state.weights.endswith("none.safetensors")
    assert module.register() is None
    bad(module, "none.safetensors")
    assert scenes.names(module.scene) == before


def test_no_torch_declined_then_no_extension(module, monkeypatch):
    from SymRegistrationGui import install

    monkeypatch.setattr(install, "_state", lambda name: "missing")
    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    before = scenes.names(module.scene)
    module.app.answers = [False]
    assert module.register() is None
    bad(module, "Install now?", kind="confirm")
    assert "not started" in module.ui.statusLabel.text
    module.app.shown.clear()
    assert module.register() is None
    assert "Extensions Manager" in module.app.shown[-1][1] and scenes.names(module.scene) == before


def test_a_broken_installation_is_offered_to_be_repaired(module, monkeypatch):
    from SymRegistrationGui import install
    from SymRegistrationGui.client import WorkerError

    calls = []

    def ensure(client, repair, onBegin):
        calls.append(repair)
        return False

    monkeypatch.setattr(install, "ensure", ensure)
    module.choose(*scenes.pair(module.scene))
    module.panel.fail(WorkerError("A library is damaged.", "Install it again.", environment=True))
    assert calls == [True] and "Install the libraries again now?" in module.app.shown[0][1]


def test_widgets_follow_the_state_and_the_state_follows_widgets(module):
    ui, state = module.ui, module.state
    fixed, moving = scenes.pair(module.scene)
    module.panel.setParameters(module.widget.logic.getParameterNode())
    state = module.state
    assert (state.fixedVolume, state.movingVolume) == (fixed, moving), "with two scans there is nothing to choose"
    mask = module.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Mask")
    ui.movingMaskSelector.setCurrentNode(mask)
    module.click("swapButton")
    assert (state.fixedVolume, state.movingVolume, state.fixedMask, state.movingMask) == (moving, fixed, mask, None)
    assert ui.fixedSelector.currentNode() is moving
    for combo, name in (
        ("presetComboBox", "preset"),
        ("metricComboBox", "metric"),
        ("initialComboBox", "initial"),
        ("methodComboBox", "method"),
    ):
        box = getattr(ui, combo)
        box.currentIndex = box.count - 1
        assert getattr(state, name) == box.itemData(box.currentIndex)
        setattr(state, name, box.itemData(0))
        assert box.currentIndex == 0
    state.method = "ad-regnet"
    assert "attention" in ui.methodDescriptionLabel.text and "arXiv" in ui.methodDescriptionLabel.text
    assert not ui.weightsPathEdit.isHidden() and not ui.presetComboBox.enabled
    ui.refineSpinBox.value = 2
    assert state.refine == 2 and ui.presetComboBox.enabled
    state.method = "syn"
    assert ui.weightsPathEdit.isHidden() and ui.presetComboBox.enabled
    ui.makeWarpedFixedCheckBox.checked = True
    assert state.makeWarpedFixed and ui.outputWarpedFixedSelector.enabled
    assert ui.initialTransformSelector.isHidden()
    state.initial = "transform"
    assert not ui.initialTransformSelector.isHidden()


def test_detect_lists_devices_with_memory(module):
    module.click("devicesButton")
    module.app.wait(lambda: module.ui.deviceComboBox.count >= 2 and not module.engine.client.busy, 60, "the devices")
    module.engine.client.onDevices(
        [
            {"name": "cpu", "title": "CPU, 8 cores", "memory_gb": 31.9},
            {"name": "cuda:0", "title": "NVIDIA H200", "memory_gb": 150.1},
        ]
    )
    texts = [module.ui.deviceComboBox.itemText(k) for k in range(module.ui.deviceComboBox.count)]
    assert texts == ["Automatic", "CPU, 8 cores, 32 GB", "NVIDIA H200, 150 GB"]
    module.ui.deviceComboBox.currentIndex = 2
    assert module.state.device == "cuda:0"


def test_try_it_makes_a_pair_and_registers_it(module):
    module.state.preset = "fast"
    module.click("tryItButton")
    module.app.wait(lambda: not module.engine.busy, 120, "the end")
    marks = module.panel.results.run.metrics["landmarks"]
    print("landmark error, mm:", marks["mean_before_mm"], marks["mean_after_mm"])
    assert module.app.shown == [] and marks["mean_before_mm"] > 10 and marks["mean_after_mm"] < 2.5


def test_scripts_get_nodes_back(module):
    fixed, moving = scenes.pair(module.scene)
    mask = scenes.segmentation(module.scene, fixed, [np.ones((34, 36, 32), bool)])
    nodes = module.widget.logic.register(
        fixed, moving, method="syn", preset="fast", initial="centre", inputs={"fixedMask": mask}
    )
    assert (
        set(nodes) == {"forward", "inverse", "warped_moving", "jacobian", "table"}
        and nodes["table"].GetNumberOfRows() > 4
    )
    done = []
    task = module.widget.logic.register(fixed, moving, wait=False, onDone=done.append, preset="fast", initial="centre")
    assert not task.finished
    with pytest.raises(Exception, match="Another registration is under way"):
        module.widget.logic.register(fixed, moving)
    module.app.wait(lambda: done, 60)
    assert done[0].node("forward") is not None


def test_selectors_offer_what_fits_and_nothing_else(module):
    """The parameter node decides the types of every selector; the .ui file must say the same, for Qt Designer."""
    import re
    from xml.etree import ElementTree

    from SymRegistrationGui import parts

    from SymRegistrationLib.quality import outputs

    root = ElementTree.parse(slicer_harness.MODULE / "Resources/UI/SymRegistration.ui").getroot()
    checked = 0
    for element in root.iter("widget"):
        if element.get("class") == "qMRMLNodeComboBox":
            listed = [entry.text for entry in element.findall("property[@name='nodeTypes']/stringlist/string")]
            assert listed == list(getattr(module.ui, element.get("name")).nodeTypes), element.get("name")
            checked += 1
    generated = {f"{output}Selector": part for part, (output, _switch) in parts.OUTPUTS.items()}
    for name, part in generated.items():
        kind = "vtkMRMLTransformNode" if outputs.of(part).kind == "transform" else "vtkMRMLScalarVolumeNode"
        assert list(getattr(module.ui, name).nodeTypes) == [kind] and getattr(module.ui, name).mrmlScene(), name
        checked += 1
    assert checked == 21
    connected = set(
        re.findall(
            r"<receiver>(\w+)</receiver>", (slicer_harness.MODULE / "Resources/UI/SymRegistration.ui").read_text()
        )
    )
    assert connected | set(generated) == {
        name
        for name, widget in vars(module.ui).items()
        if hasattr(widget, "setMRMLScene") and name != "SymRegistration"
    }
    scenes.pair(module.scene)
    segmentation = module.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Organs")
    labels = scenes.volume(module.scene, np.ones((4, 4, 4), np.uint8), np.eye(4), "Labels", "vtkMRMLLabelMapVolumeNode")
    assert {node.GetName() for node in module.ui.fixedMaskSelector.nodes()} == {"Organs", "Labels"}
    assert {node.GetName() for node in module.ui.fixedSelector.nodes()} == {"Fixed scan", "Moving scan"}
    for node in (segmentation, labels):
        module.ui.fixedMaskSelector.setCurrentNode(node)
        assert module.state.fixedMask is node


def test_icons_follow_the_style(module):
    import types

    import qt

    _parent, made = slicer_harness.loadModule(module.app)
    colors = []
    for window in ("#f0f0f0", "#303030"):
        palette = qt.QPalette()
        palette.setColor(qt.QPalette.Window, qt.QColor(window))
        module.app.palette = lambda p=palette: p
        parent = types.SimpleNamespace(path=made.__file__)
        made.SymRegistration(parent)
        image = parent.icon.pixmap(64, 64).toImage()
        colors.append(
            {
                image.pixelColor(x, y).name()
                for x in range(64)
                for y in range(64)
                if image.pixelColor(x, y).alpha() == 255
            }
        )
    assert "#1f77b4" in colors[0] and "#6db7ee" in colors[1] and "#6db7ee" not in colors[0]
