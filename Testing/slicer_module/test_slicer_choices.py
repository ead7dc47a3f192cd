"""What the panel offers to choose: presets of one's own, several contrasts a side, outputs from the library's table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)

PLACES = np.array([(5, -8, 12), (15, 0, 20), (-8, -20, 5), (12, 8, 0), (0, -15, 28.0)])
#: Where a parent transform carries the moving scan's other contrast, RAS mm.
STEP = (0.0, 2.0, 0.0)


def copied(scene, node, name, move=None):
    """The same voxels as another volume, under a parent transform by ``move`` mm."""
    made = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    made.CopyContent(node, True)
    made.CreateDefaultDisplayNodes()
    if move is not None:
        matrix = np.eye(4)
        matrix[:3, 3] = move
        made.SetAndObserveTransformNodeID(scenes.linearTransform(scene, matrix, f"{name} lies").GetID())
    return made


def contrasted(module):
    """(fixed, moving, their other contrasts) in the scene; the other contrast says STEP more than the first one."""
    fixed, moving = scenes.pair(module.scene)
    return fixed, moving, copied(module.scene, fixed, "Fixed T2"), copied(module.scene, moving, "Moving T2", STEP)


def excess(forward):
    """How much further along STEP than the first pair says a transform carries, mean mm."""
    there = np.array([forward.GetTransformFromParent().TransformPoint(p) for p in PLACES])
    return float((there - scenes.shift(PLACES.copy()))[:, 1].mean())


def press(module, name, seconds=90):
    module.click(name)
    module.app.wait(lambda: not module.engine.busy, seconds, f"the end of {name}")
    return module.panel.results.run


def fill(module, rows):
    """Choose in the table as a user does: (fixed, moving, weight), the weight of the scans themselves first."""
    ui = module.ui
    first, *pairs = rows
    for row, (one, other, weight) in enumerate(pairs, 1):
        if ui.contrastsTable.rowCount <= row:
            module.click("addContrastButton")
        for column, node in enumerate((one, other)):
            ui.contrastsTable.cellWidget(row, column).setCurrentNode(node)
        ui.contrastsTable.cellWidget(row, 2).value = weight
    ui.contrastsTable.cellWidget(0, 2).value = first


# ---------------------------------------------------------------------------------------- several contrasts a side


def test_contrasts_are_chosen_in_a_table_and_checked_in_words(module):
    fixed, moving, fixedOther, movingOther = contrasted(module)
    ui, state = module.ui, module.state
    module.choose(fixed, moving)
    assert ui.contrastsTable.isHidden() and not ui.removeContrastButton.enabled and ui.registerButton.enabled
    module.click("addContrastButton")
    assert [ui.contrastsTable.item(0, column).text() for column in (0, 1)] == ["Fixed scan", "Moving scan"]
    assert "Pair 2 of the contrasts is not complete" in ui.statusLabel.text and not ui.registerButton.enabled
    fill(module, [1.0, (fixedOther, fixed, 0.5)])
    assert "'Fixed scan' is chosen twice" in ui.statusLabel.text and not ui.registerButton.enabled
    fill(module, [1.0, (fixedOther, movingOther, 0.5)])
    assert ui.registerButton.enabled and list(state.contrastWeights) == [1.0, 0.5]
    for change, back, words in (
        (("method", "affine"), ("method", "syn"), "looks at one contrast a side. Choose a method that bends"),
        (("uncertaintyRuns", 4), ("uncertaintyRuns", 1), "Perturbed runs look at one contrast"),
    ):
        setattr(state, *change)
        assert words in ui.statusLabel.text and not ui.registerButton.enabled and ui.alignButton.enabled
        setattr(state, *back)
        assert ui.registerButton.enabled
    module.click("swapButton")
    assert state.fixedContrasts[0] is movingOther and state.movingContrasts[0] is fixedOther
    assert ui.contrastsTable.cellWidget(1, 0).currentNode() is movingOther
    module.scene.RemoveNode(movingOther)
    assert state.fixedContrasts[0] is None and "Pair 2" in ui.statusLabel.text
    for count in range(2, 9):
        assert len(state.fixedContrasts) == count - 1
        module.click("addContrastButton")
    assert not ui.addContrastButton.enabled, "the library takes nine contrasts a side"
    while ui.removeContrastButton.enabled:
        module.click("removeContrastButton")
    assert ui.registerButton.enabled and list(state.contrastWeights) == [] and module.app.shown == []


def test_contrasts_drive_the_run_as_they_lie_and_are_kept_with_its_steps(module, tmp_path):
    """The other contrast contradicts the first one by STEP, through its parent transform; the weights decide."""
    from SymRegistrationLib.job import Job

    fixed, moving, fixedOther, movingOther = contrasted(module)
    module.choose(fixed, moving)
    fill(module, [10.0, (fixedOther, movingOther, 0.05)])
    run = press(module, "registerButton")
    assert module.app.shown == [] and abs(excess(run.node("forward"))) < 0.5, excess(run.node("forward"))
    module.settle()
    fill(module, [0.05, (fixedOther, movingOther, 10.0)])
    run = press(module, "registerButton")
    module.settle()
    second = excess(run.node("forward"))
    assert abs(second - STEP[1]) < 0.5, second
    assert run.metrics["job"]["options"]["contrast_weights"] == "0.05,10"
    press(module, "updateButton")
    assert "Nothing pulls" in module.app.shown.pop()[1]
    points = [scenes.fiducials(module.scene, PLACES[:1], "p"), scenes.fiducials(module.scene, PLACES[:1] + 4.0, "q")]
    ui = module.ui
    ui.fixedLandmarksSelector.setCurrentNode(points[0])
    ui.movingLandmarksSelector.setCurrentNode(points[1])
    ui.driveLandmarksCheckBox.click()
    run = press(module, "updateButton")
    assert module.app.shown == [], "an update goes on with the contrasts of its step"
    run = press(module, "undoButton")
    assert module.app.shown == [] and abs(excess(run.node("forward")) - second) < 0.01
    path = module.widget.logic.saveSteps(run.table, str(tmp_path / "steps"))
    jobs = [Job.from_dict(step["job"]) for step in json.loads(Path(path).read_text())["steps"]]
    assert [len(job.fixed_contrasts) for job in jobs] == [1, 1, 1]
    assert all(Path(name).is_file() for job in jobs for name in (*job.fixed_contrasts, *job.moving_contrasts))
    assert len({job.moving_contrasts[0] for job in jobs}) == 1, "one scan, one file"
    nodes = module.widget.logic.register(
        fixed,
        moving,
        preset="fast",
        initial="centre",
        fixedContrasts=[fixedOther],
        movingContrasts=[movingOther],
        contrast_weights="0.05,10",
    )
    assert excess(nodes["forward"]) == second, "a script gives the panel's transform"
    module.settle()
    module.scene.RemoveNode(movingOther)
    press(module, "redoButton")
    assert "was deleted" in module.app.shown.pop()[1]
    assert abs(excess(run.node("forward")) - second) < 0.01, "the result stays"


def test_a_name_of_a_scan_is_never_given_to_another_one(module):
    from SymRegistrationGui import history

    class Run:
        def __init__(self, node):
            self._node = node

        def text(self, part):
            jobs = [{"fixed_contrasts": ["@scan1.nrrd"], "moving_contrasts": ["@scan2.nrrd"]}]
            steps = [{"number": k, "job": job} for k, job in enumerate(jobs, 1)]
            return json.dumps({"current": 1, "steps": steps})

        def node(self, part):
            return self._node if part == "scan2" else None

    known, other = (module.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode") for _unused in range(2))
    assert history.named(None, [known, other]) == {"scan1": known, "scan2": other}
    assert history.named(Run(known), [known, other]) == {"scan2": known, "scan3": other}, "scan1 was deleted"
    assert history.further(Run(known), (1,)) == {"scan1": None, "scan2": known}


def test_scripts_are_told_what_is_wrong_with_contrasts(module):
    from SymRegistrationLib.job import InputError

    fixed, moving, fixedOther, movingOther = contrasted(module)
    logic = module.widget.logic
    labels = scenes.volume(module.scene, np.ones((4, 4, 4), np.uint8), np.eye(4), "Labels", "vtkMRMLLabelMapVolumeNode")
    flat = copied(module.scene, moving, "Flat")
    slicer.util.updateVolumeFromArray(flat, np.full((5, 5, 5), 3, np.int16))
    for one, other, options, words in (
        ([fixedOther], [], {}, "1 further contrasts of the fixed and 0 of the moving side"),
        ([fixedOther], [labels], {}, "'Labels' is no scan"),
        ([fixedOther], [fixedOther], {}, "'Fixed T2' is chosen twice"),
        ([fixedOther], [flat], {}, "'Flat' is empty"),
        ([fixedOther], [movingOther], {"method": "rigid"}, "looks at one contrast a side"),
        ([fixedOther], [movingOther], {"method": "sm-gicnet"}, "The network itself looks at one contrast a side"),
        ([fixedOther], [movingOther], {"uncertainty": 4}, "Perturbed runs look at one contrast"),
    ):
        with pytest.raises(InputError) as told:
            logic.register(fixed, moving, fixedContrasts=one, movingContrasts=other, **options)
        assert words in told.value.message and told.value.hint, told.value.message
    assert not module.engine.busy


# ---------------------------------------------------------------------------------------------- presets of one's own


def test_a_preset_of_ones_own_is_saved_listed_chosen_and_deleted(module, monkeypatch, tmp_path):
    from SymRegistrationGui import presetpanel

    from SymRegistrationLib.registration import anatomies

    monkeypatch.setenv("SYMREG_CONFIG", str(tmp_path))
    ui, state, box = module.ui, module.state, module.ui.anatomyComboBox
    module.choose(*scenes.pair(module.scene), quick=False)
    state.metric, state.initial, state.stiffness, state.preset, state.device = "mind", "rigid", 1.5, "thorough", "cpu"
    state.uncertaintyRuns = 1
    assert not ui.deletePresetButton.enabled
    for typed in ("", "Brain", "\u5fc3"):
        monkeypatch.setattr(presetpanel, "askTitle", lambda typed=typed: typed)
        module.click("savePresetButton")
    texts = [text for _kind, text in module.app.shown]
    assert len(texts) == 2 and "shipped preset" in texts[0] and "no letters" in texts[1], "nothing typed: nothing said"
    module.app.shown.clear()
    assert not (tmp_path / "presets.json").exists()
    monkeypatch.setattr(presetpanel, "askTitle", lambda: " Wirbels\u00e4ule, CT/MR ")
    module.click("savePresetButton")
    assert state.anatomy == "wirbelsaule-ct-mr" and box.currentText == "Wirbels\u00e4ule, CT/MR"
    kept = anatomies.anatomies()["wirbelsaule-ct-mr"]
    wanted = {"similarity": "mind", "initial": "rigid", "stiffness": 1.5, "uncertainty": "fast"}
    assert dict(kept.options) == wanted, "neither the time a run may take nor what belongs to this machine"
    box.currentIndex = box.findData("unknown")
    assert (state.metric, state.initial, state.stiffness, state.preset) == ("auto", "affine", 1.0, "thorough")
    state.preset, state.uncertaintyRuns = "fast", 0
    box.currentIndex = box.findData("wirbelsaule-ct-mr")
    assert (state.metric, state.initial, state.stiffness, state.uncertaintyRuns) == ("mind", "rigid", 1.5, 1)
    assert state.preset == "fast", "the effort is another choice"
    module.click("deletePresetButton")
    assert box.findData("wirbelsaule-ct-mr") < 0 and state.anatomy == "unknown" and not ui.deletePresetButton.enabled
    assert "wirbelsaule-ct-mr" not in anatomies.anatomies() and module.app.shown == []
    anatomies.save("elsewhere", "Saved elsewhere", {"initial": "rigid"})
    module.widget.enter()
    assert box.findData("elsewhere") > 0 and box.currentText == "I do not know", "opened again, the module reads anew"


def test_a_damaged_file_of_presets_stays_and_is_told(module, monkeypatch, tmp_path):
    from SymRegistrationGui import presetpanel

    monkeypatch.setenv("SYMREG_CONFIG", str(tmp_path))
    (tmp_path / "presets.json").write_text("{")
    monkeypatch.setattr(presetpanel, "askTitle", lambda: "Knee")
    module.click("savePresetButton")
    assert "presets.json" in module.app.shown.pop()[1] and (tmp_path / "presets.json").read_text() == "{"
    assert module.ui.anatomyComboBox.findData("knee") < 0


# ---------------------------------------------------------------------------------------------- one table of outputs


def test_a_new_map_is_one_entry_of_the_librarys_table(monkeypatch):
    """Row, switch, node, button, colors and legend follow from the entry."""
    from SymRegistrationLib.quality import outputs

    new = outputs.Output(
        "least_stretch", "map", "maps", "jacobian", "Least stretch", "How thin it gets.", "times", "sequential"
    )
    monkeypatch.setattr(outputs, "OUTPUTS", (*outputs.OUTPUTS, new))
    for name in [n for n in sys.modules if n.split(".")[0] in ("SymRegistration", "SymRegistrationGui")]:
        monkeypatch.delitem(sys.modules, name)
    opened = scenes.Opened(None, monkeypatch)
    ui, state = opened.ui, opened.state
    opened.choose(*scenes.pair(opened.scene))
    from SymRegistrationGui import nodes, parameters, runs
    from SymRegistrationGui.steps import complete

    assert ui.makeLeastStretchCheckBox.checked and "least_stretch" in parameters.wantedParts(state)
    ui.makeLeastStretchCheckBox.click()
    assert not ui.outputLeastStretchSelector.enabled and "least_stretch" not in parameters.wantedParts(state)
    array, grid = nodes.worldVolume(state.fixedVolume)
    fillers = {part: complete(nodes.volumeFiller(np.float32(array) / 100, grid)) for part in ("least_stretch",)}
    forward = complete(nodes.gridTransformFiller(np.zeros((*array.shape, 3), np.float32), grid))
    run = runs.commit(state.fixedVolume, state.movingVolume, {**fillers, "forward": forward}, {}, {})
    run.setNode("fixed", state.fixedVolume, False)
    parameters.rememberOutputs(state, run)
    assert state.outputLeastStretch is run.node("least_stretch") and ui.leastStretchButton.enabled
    ui.leastStretchButton.click()
    assert "times" in ui.legendLabel.text and ui.leastStretchButton.text == "Least stretch"
    composite = opened.panel.results.views.composites()[0]
    assert composite.GetForegroundVolumeID() == run.node("least_stretch").GetID()
    slicer_harness.unloadModule(opened.app)


def test_what_slides_is_chosen_as_segments_that_belong_together_by_name(module):
    fixed, moving = scenes.pair(module.scene)
    ui, state = module.ui, module.state
    state.fixedVolume, state.movingVolume, state.preset = fixed, moving, "fast"
    assert ui.fixedSlidingMaskSelector.isHidden() and ui.slidingComboBox.count == 3
    ui.slidingComboBox.currentIndex = ui.slidingComboBox.findData("auto")
    assert state.sliding == "auto" and not ui.movingSlidingMaskSelector.isHidden()
    low = np.zeros((34, 36, 32), bool)
    low[:17] = True
    first = scenes.segmentation(module.scene, fixed, [low, ~low], "Slides", ("low", "high"))
    second = scenes.segmentation(module.scene, moving, [~low, low], "Slides too", ("high", "low"))
    ui.fixedSlidingMaskSelector.setCurrentNode(first)
    module.click("registerButton")
    assert "chosen for one scan only" in module.app.shown[-1][1] and not module.engine.busy
    ui.movingSlidingMaskSelector.setCurrentNode(second)
    told = press(module, "registerButton").metrics["sliding"]
    print("what slides:", told)
    assert told["regions"] == 2 and 0 < told["surface_percent"] < 50
    ui.slidingComboBox.currentIndex = 0  # the masks stay chosen, but say nothing
    assert press(module, "registerButton").metrics["sliding"] is None


def test_a_preset_shows_what_it_lets_slide(module):
    from SymRegistrationGui import parameters

    for name, expected in (("abdomen", "auto"), ("lung-ct", "auto"), ("unknown", "off")):
        parameters.applyAnatomy(module.state, name)
        box = module.ui.slidingComboBox
        assert box.itemData(box.currentIndex) == expected == parameters.options(module.state).sliding
