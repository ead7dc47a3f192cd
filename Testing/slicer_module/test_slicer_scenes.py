"""A user's day with the module: coming and going, Reload, scenes that close and load, the end of the
application; bad input.
"""

import numpy as np
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, doneFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)


@pytest.fixture(name="opened")
def openedFixture(client, monkeypatch):
    """The module, opened on an empty scene; the test itself ends it."""
    opened = scenes.Opened(client, monkeypatch)
    yield opened
    opened.app.wait(lambda: not client.busy, 60)
    assert scenes.folders() == []


def reactions(panel, calls):
    """Note every reaction of a panel in ``calls``."""
    for name in ("update", "setParameters", "register", "choose", "fail", "status"):
        original = getattr(panel, name)
        setattr(
            panel,
            name,
            lambda *arguments, n=name, o=original, **keywords: (calls.append(n), o(*arguments, **keywords))[1],
        )


# ------------------------------------------------------------------------------------------------ coming and going


def test_reload_leaves_one_panel_that_reacts(opened):
    module = opened
    fixed, moving = scenes.pair(module.scene)
    module.choose(fixed, moving)
    old, oldUi, signals = module.panel, module.ui, []
    module.widget.onReload()
    reactions(old, signals)
    assert module.panel is not old and module.state.fixedVolume is fixed and module.ui.registerButton.enabled
    module.state.refine = 2
    module.ui.metricComboBox.currentIndex = 1
    scenes.volume(module.scene, np.zeros((4, 4, 4), np.int16), np.eye(4), "Another")
    assert module.register() is not None
    module.settle()
    assert signals == [], "a panel that was reloaded reacts to the parameter node, to the scene or to a run"
    oldUi.fixedSelector.setCurrentNode(None)
    oldUi.metricComboBox.currentIndex = 2
    oldUi.registerButton.click()
    assert module.state.fixedVolume is fixed and module.state.metric == "lncc", (
        "widgets of the old panel change nothing"
    )
    assert not module.engine.busy and oldUi.fixedSelector.nodeCount() == 0
    signals.clear()
    module.app.inEventLoop(module.scene.Clear)
    assert signals == [] and module.app.shown == []
    slicer_harness.unloadModule(module.app)


def test_reload_in_mid_run_gives_it_up(opened):
    module = opened
    module.choose(*scenes.pair(module.scene))
    before = scenes.names(module.scene)
    for _twice in range(2):
        module.click("registerButton")
        old = module.engine
        module.widget.onReload()
        assert not old.busy and not module.engine.busy and scenes.names(module.scene) == before
    assert module.register() is not None and module.app.shown == []
    module.settle()
    slicer_harness.unloadModule(module.app)


def test_two_panels_worth_of_signals_never_fire(opened):
    """After Reloads, one click is one run, one change of a parameter is one update, and nothing is connected twice."""
    module = opened
    module.choose(*scenes.pair(module.scene))

    def updates():
        calls = []
        update, module.panel.update = module.panel.update, lambda: (calls.append(1), update())
        module.state.refine = (module.state.refine + 1) % 4
        module.panel.update = update
        return len(calls)

    first = updates()
    for _again in range(3):
        module.widget.onReload()
        module.app.inEventLoop(module.scene.Clear)
    module.choose(*scenes.pair(module.scene))
    assert updates() == first
    runs, register = [], module.engine.register
    module.engine.register = lambda request, task: (runs.append(request), register(request, task))[1]
    assert module.register() is not None
    module.settle()
    assert len(runs) == 1 and slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLTableNode") == 1
    slots = module.app.moduleManager().slots["moduleAboutToBeUnloaded(QString)"]
    assert len(slots) == 1, "Reload leaves the module manager one widget to clean up"
    slicer_harness.unloadModule(module.app)


def test_leaving_stops_what_moves_and_entering_goes_on(done):
    module, run = done
    views = module.panel.results.views
    module.click("flickerButton")
    state = module.state
    module.widget.exit()
    assert not views._timer.active and views.composites()[0].GetForegroundOpacity() == 1.0
    module.widget.enter()
    assert views._timer.active and views.mode == "flicker" and module.state is state
    module.click("blendButton")
    for _again in range(2):
        module.widget.exit()
        module.widget.enter()
    assert not views._timer.active and views.mode == "blend" and module.panel.results.run.table is run.table


def test_leaving_in_mid_run_does_not_end_it(module):
    module.choose(*scenes.pair(module.scene))
    module.click("registerButton")
    module.widget.exit()
    module.app.wait(lambda: not module.engine.busy, 90)
    module.widget.enter()
    assert module.panel.results.run is not None and module.app.shown == []


@pytest.mark.parametrize("reload", [False, True])
def test_unloading_and_the_end_of_the_application(opened, reload):
    module = opened
    module.choose(*scenes.pair(module.scene))
    node = module.state.parameterNode
    if reload:
        module.widget.onReload()
    module.click("registerButton")
    widget, cleaned = module.widget, []
    cleanup = widget.cleanup
    widget.cleanup = lambda: (cleaned.append(1), cleanup())
    slicer_harness.unloadModule(module.app)
    slicer_harness.unloadModule(module.app)
    assert cleaned == [1], "cleaned up once"
    assert not module.engine.busy and scenes.folders() == [] and module.app.shown == []
    assert not module.app.moduleManager().slots["moduleAboutToBeUnloaded(QString)"]
    signals = []
    reactions(module.panel, signals)
    node.SetParameter("refine", "3")
    module.app.inEventLoop(module.scene.Clear)
    assert signals == []


def test_after_cleanup_nothing_of_the_panel_is_left_on_the_node(opened):
    module = opened
    node = module.state.parameterNode
    slicer_harness.unloadModule(module.app)
    module.panel.parameters = None
    slicer.modules.SymRegistrationWidget.logic = None
    import gc

    gc.collect()
    assert not node.HasObserver("ModifiedEvent")


def test_a_widget_of_its_own_window_is_cleaned_up_as_well():
    """Made without a parent, the base class has called setup() before the rest of the constructor runs."""
    app = slicer_harness.start()
    _parent, python = slicer_harness.loadModule(app)
    widget = python.SymRegistrationWidget()
    assert len(widget.Observations) == 3
    signals = []
    slicer_harness.unloadModule(app)
    reactions(widget.panel, signals)
    app.inEventLoop(app.scene.Clear)
    assert signals == [] and widget.Observations == []
    widget.parent.hide()


def test_a_module_that_could_not_be_set_up_is_left_and_unloaded_in_peace(monkeypatch):
    app = slicer_harness.start()
    _parent, python = slicer_harness.loadModule(app)
    monkeypatch.setattr(python.SymRegistrationWidget, "resourcePath", lambda self, name: "/nowhere/" + name)
    with pytest.raises(RuntimeError):
        slicer_harness.openModule(app)
    widget = slicer.modules.SymRegistrationWidget
    widget.enter()
    widget.exit()
    slicer_harness.unloadModule(app)


# ------------------------------------------------------------------------------------------------ scenes


def test_closing_a_scene_does_not_grow_more_expensive(module):
    """Slicer 5.10 leaves an observer per closed scene on the node, which N closings make N times as much work."""
    counts, calls = [], []
    for _again in range(5):
        calls.clear()
        update = module.panel.update
        module.panel.update = lambda original=update: (calls.append(1), original())
        module.state.refine = 1
        module.panel.update = update
        counts.append(len(calls))
        module.app.inEventLoop(module.scene.Clear)
    assert counts == counts[:1] * 5


def test_garbage_collected_while_a_scene_closes_is_never_called(module):
    import gc

    module.choose(*scenes.pair(module.scene))
    module.scene.AddObserver(module.scene.StartCloseEvent, lambda caller, event: gc.collect())
    for _again in range(3):
        module.scene.Clear()
        module.state.refine = 1
    assert module.state.refine == 1


def test_a_scene_closed_in_mid_run_is_told_after_it_is_closed(module):
    """The box opens when the scene is whole again, and the panel works."""
    module.choose(*scenes.pair(module.scene))
    module.click("registerButton")
    states = []
    box, module.app.box = (
        module.app.box,
        lambda *arguments: (states.append(module.scene.IsBatchProcessing()), box(*arguments))[1],
    )
    module.app.inEventLoop(module.scene.Clear)
    module.app.box = box
    assert states == [False] and len(module.app.shown) == 1 and "scene was closed" in module.app.shown.pop()[1]
    assert "scene was closed" in module.ui.statusLabel.text and scenes.folders() == []
    module.choose(*scenes.pair(module.scene))
    assert module.register() is not None


CHANGED = {
    "guideWithLandmarks": True,
    "method": "hsyn",
    "preset": "thorough",
    "metric": "mind",
    "initial": "transform",
    "device": "cpu",
    "weights": "/nowhere/a.safetensors",
    "refine": 3,
    "uncertaintyRuns": 4,
    "makeWarpedMoving": False,
    "makeWarpedFixed": True,
    "makeJacobian": False,
    "makeConsistency": False,
    "liveView": False,
    "driveLandmarks": True,
    "landmarkWeight": 0.5,
    "landmarkTolerance": 1.5,
    "driveSegments": "one\ntwo",
    "labelWeight": 0.6,
    "stiffness": 2.5,
    "contrastWeights": [1.0, 0.5, 2.0],
    "alignKind": "similarity",
    "anatomy": "ct-mr",
    "sliding": "auto",
    "repairWhere": "place",
    "repairSegment": "one",
    "repairRadius": 7.5,
    "repairRim": 4.5,
    "repairStiffness": 0.5,
    "repairMetric": "mind",
    "repairSpacing": 0.8,
}


@pytest.mark.parametrize("ending", ["mrb", "mrml"])
def test_every_parameter_is_saved_and_loaded_with_the_scene(module, tmp_path, ending):
    fixed, moving = scenes.pair(module.scene)
    state, scene = module.state, module.scene
    ones = np.ones(slicer.util.arrayFromVolume(fixed).shape, np.uint8)
    state.fixedVolume, state.movingVolume = fixed, moving
    for name in type(state).allParameters:
        if name in CHANGED:
            setattr(state, name, CHANGED[name])
        elif name in ("fixedContrasts", "movingContrasts"):
            setattr(state, name, [scenes.volume(scene, ones, np.eye(4), f"{name} {k}") for k in range(2)])
        elif name in ("fixedLandmarks", "movingLandmarks"):
            setattr(state, name, scenes.fiducials(scene, [(1, 2, 3), (4, 5, 6), (7, 9, 8)], name))
        elif name in ("fixedMask", "movingLabels", "fixedSlidingMask"):
            setattr(state, name, scenes.segmentation(scene, fixed, [ones > 0], name))
        elif name in ("movingMask", "fixedLabels", "movingSlidingMask"):
            setattr(state, name, scenes.volume(scene, ones, np.eye(4), name, "vtkMRMLLabelMapVolumeNode"))
        elif name not in ("fixedVolume", "movingVolume"):
            kind = (
                "vtkMRMLMarkupsROINode"
                if name in ("roi", "repairRegion")
                else "vtkMRMLTableNode"
                if name == "resultTable"
                else "vtkMRMLLinearTransformNode"
                if name == "initialTransform"
                else "vtkMRMLTransformNode"
                if name in ("outputForward", "outputInverse")
                else "vtkMRMLScalarVolumeNode"
            )
            node = scene.AddNewNodeByClass(kind, name)
            if kind == "vtkMRMLScalarVolumeNode":
                slicer.util.updateVolumeFromArray(node, ones)
            setattr(state, name, node)

    def content():
        values = {name: getattr(module.state, name) for name in type(module.state).allParameters}
        return {name: named(value) for name, value in values.items()}

    def named(value):
        if hasattr(value, "__len__") and not isinstance(value, str):
            return [named(one) for one in value]
        return value.GetName() if hasattr(value, "GetName") else value

    before = content()
    assert not [name for name, value in before.items() if value in (None, [])], (
        "every parameter has a value that is not the default"
    )
    path = str(tmp_path / f"scene.{ending}")
    if ending == "mrb":
        assert scene.WriteToMRB(path)
    else:
        for k in range(scene.GetNumberOfNodesByClass("vtkMRMLStorableNode")):
            node = scene.GetNthNodeByClass(k, "vtkMRMLStorableNode")
            if (
                node.GetSaveWithScene()
                and not node.IsA("vtkMRMLColorNode")
                and node.AddDefaultStorageNode() is not False
            ):
                storage = node.GetStorageNode()
                if storage is not None:
                    storage.SetFileName(str(tmp_path / f"{node.GetID()}.{storage.GetDefaultWriteFileExtension()}"))
                    assert storage.WriteData(node), node.GetName()
        scene.SetURL(path)
        scene.SetRootDirectory(str(tmp_path))
        assert scene.Commit(path)
    module.app.inEventLoop(scene.Clear)
    empty = content()
    assert empty["fixedVolume"] is None and empty["method"] == "syn" and empty["refine"] == 0 and empty["weights"] == ""
    if ending == "mrb":
        assert scene.ReadFromMRB(path, True)
    else:
        scene.SetURL(path)
        assert scene.Connect()
    module.app.processEvents()
    assert content() == before
    ui = module.ui
    assert (
        ui.refineSpinBox.value == 3
        and ui.weightsPathEdit.currentPath == CHANGED["weights"]
        and ui.makeWarpedFixedCheckBox.checked
    )
    assert (
        ui.fixedSelector.currentNode() is module.state.fixedVolume
        and ui.movingMaskSelector.currentNode() is module.state.movingMask
    )
    assert ui.metricComboBox.itemData(ui.metricComboBox.currentIndex) == "mind"


def test_a_scene_is_saved_without_what_cannot_be_loaded(done, tmp_path):
    """The comparison volume of the views is made anew when it is wanted."""
    module, run = done
    module.click("checkerboardButton")
    module.app.wait(lambda: run.node("comparison") is not None, 20)
    assert not run.node("comparison").GetSaveWithScene()
