"""Going on from a result: align, update, repair, undo, redo and their history, by script; the same results as the
library from files, and what is said when it cannot be."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)

QUICK = {"preset": "fast", "initial": "centre"}
#: Places in the fixed scan, RAS mm.
PLACES = np.array([(5, -8, 12), (15, 0, 20), (-8, -20, 5), (12, 8, 0), (0, -15, 28.0)])


@pytest.fixture(name="logic")
def logicFixture(module):
    module.pair = scenes.pair(module.scene)
    yield module.widget.logic
    module.settle()


def carried(node, ras=PLACES):
    """Where the FromParent of a transform node takes points, RAS mm."""
    return np.array([node.GetTransformFromParent().TransformPoint(p) for p in np.asarray(ras, float)])


def carriedByFile(path, ras=PLACES):
    """Where an ITK transform file takes points, RAS mm."""
    transform, flip = sitk.ReadTransform(str(path)), np.array([-1, -1, 1.0])
    return np.array([transform.TransformPoint((p * flip).tolist()) for p in np.asarray(ras, float)]) * flip


def landmarks(scene, count=3, off=(0.0, 0.0, 0.0)):
    """Pairs of markups at true partners, the moving ones ``off`` by so many mm."""
    ras = PLACES[:count]
    return (
        scenes.fiducials(scene, ras, "on fixed"),
        scenes.fiducials(scene, scenes.shift(ras.copy()) + off, "on moving"),
    )


def written(module, logic, folder):
    """The pair as files, for the library."""
    from SymRegistrationGui import exchange, nodes
    from SymRegistrationGui.steps import complete

    paths = []
    for name, node in zip(("fixed", "moving"), module.pair):
        paths.append(str(folder / f"{name}.nrrd"))
        complete(exchange.writeVolume(paths[-1], *nodes.worldVolume(node)))
    return paths


def symreg(*arguments):
    from SymRegistrationLib.commands import cli

    assert cli.main([*map(str, arguments), "-q"]) == 0


def csv(path, node):
    lines = [f"P{k},{-x!r},{-y!r},{z!r}" for k, (x, y, z) in enumerate(scenes.positions(node).tolist(), start=1)]
    path.write_text("\n".join(["label,l,p,s", *lines]) + "\n")
    return path


def test_the_same_results_as_the_command_line(module, logic, tmp_path):
    fixed, moving = written(module, logic, tmp_path)
    out, off = tmp_path / "out", (0.0, 2.5, 0.0)
    points = landmarks(module.scene, off=off)
    p, q = (csv(tmp_path / name, node) for name, node in zip(("p.csv", "q.csv"), points))
    symreg("register", fixed, moving, "-o", out, "--effort", "fast", "--initial", "centre", "--no-report")
    nodes = logic.register(*module.pair, **QUICK)
    table, took = nodes["table"], []

    def same(nodes, tolerance=1e-3):
        for part in ("forward", "inverse"):
            assert np.abs(carried(nodes[part]) - carriedByFile(out / f"{part}.h5")).max() < tolerance
        took.append(carried(nodes["forward"]))

    same(nodes)
    nodes = logic.update(table, fixedPoints=points[0], movingPoints=points[1], landmark_tolerance=1.0)
    symreg("update", out, "--fixed-points", p, "--moving-points", q, "--landmark-tolerance", 1.0, "--no-report")
    same(nodes)
    told = json.loads((out / "metrics.json").read_text())
    run = module.widget.logic.engine  # the numbers are those of the file
    from SymRegistrationGui.runs import Run

    metrics = Run(table).metrics
    assert metrics["steering"]["landmarks"]["residual_mm"] == pytest.approx(
        told["steering"]["landmarks"]["residual_mm"], abs=1e-3
    )
    assert metrics["job"]["names"]["points"] == ["P1", "P2", "P3"] and run.busy is False
    assert np.linalg.norm(took[1][:3] - scenes.positions(points[1]), axis=1).max() < 1.5
    nodes = logic.repair(table, sphere=(5, -8, 12, 12), rim=14, stiffness=2.0)
    symreg("repair", out, "--sphere=-5,8,12,12", "--rim-mm", 14, "--stiffness", 2, "--no-report")
    same(nodes)
    for command, k in (("undo", 1), ("undo", 0), ("redo", 1), ("redo", 2)):
        nodes = getattr(logic, command)(table)
        assert np.abs(carried(nodes["forward"]) - took[k]).max() < 0.02, (command, k)
    current, steps = logic.history(table)
    assert current == 3 and [step["step"] for step in steps] == ["register", "update", "repair"]
    path = logic.saveSteps(table, str(tmp_path / "saved"))
    symreg("register", "--job", path, "-o", tmp_path / "again", "--no-report")
    assert np.abs(carriedByFile(tmp_path / "again/forward.h5") - took[2]).max() < 0.02, "replayed from the folder"
    assert scenes.folders() == [] or module.settle() is None


def test_align_snap_and_register_from_there(module, logic, tmp_path):
    fixed, moving = written(module, logic, tmp_path)
    symreg("register", fixed, moving, "-o", tmp_path / "rigid", "--method", "rigid", "--no-report")
    nodes = logic.align(*module.pair)
    assert nodes["forward"].IsLinear() and nodes["inverse"].IsLinear()
    expected = carriedByFile(tmp_path / "rigid/forward.h5")
    assert np.abs(carried(nodes["forward"]) - expected).max() < 1e-3
    assert np.abs(carried(nodes["inverse"], carried(nodes["forward"])) - PLACES).max() < 1e-6
    pose = nodes["pose"]
    assert pose.GetClassName() == "vtkMRMLLinearTransformNode" and np.abs(carried(pose) - expected).max() < 1e-3
    matrix = np.eye(4)
    matrix[:3, :3] = scenes.rotation((4.0, 0, 5.0))
    matrix[:3, 3] = (2.0, 3.0, -1.0)
    pose.ApplyTransformMatrix(scenes.vtkMatrix(matrix))
    assert np.abs(carried(pose) - expected).max() > 1.5, "turned and shifted by hand"
    moved = carried(pose)
    nodes = logic.align(*module.pair, start=pose, table=nodes["table"])
    assert nodes["pose"] is pose and np.abs(carried(pose) - carried(nodes["forward"])).max() < 1e-6
    assert np.abs(carried(pose) - expected).max() < 0.5, "refined from there"
    nodes = logic.register(
        *module.pair, preset="fast", table=nodes["table"], inputs={"initialTransform": pose, "outputs": {}}
    )
    truth = scenes.shift(PLACES.copy())
    assert not nodes["forward"].IsLinear() and np.linalg.norm(carried(nodes["forward"]) - truth, axis=1).max() < 1.5
    current, steps = logic.history(nodes["table"])
    assert current == 3 and [step["job"]["options"]["method"] for step in steps] == ["rigid", "rigid", "syn"]
    nodes = logic.undo(nodes["table"])
    assert nodes["forward"].IsLinear() and np.abs(carried(nodes["forward"]) - moved).max() > 0.5
    assert np.abs(carried(nodes["forward"]) - expected).max() < 0.5


def test_structures_pull_by_name_and_the_table_names_them(module, logic):
    fixed, moving = module.pair
    k, j, i = np.meshgrid(*map(np.arange, (34, 36, 32)), indexing="ij")
    array = slicer.util.arrayFromVolume(fixed)
    one = (array > 300) & (i < 16)
    other = (array > 300) & (i >= 16)
    k, j, i = np.meshgrid(*map(np.arange, (30, 38, 36)), indexing="ij")
    array = slicer.util.arrayFromVolume(moving)
    parts = [(array > 300) & (i >= 18), (array > 300) & (i < 18)]
    first = scenes.segmentation(module.scene, fixed, [one, other], "first")
    second = scenes.segmentation(module.scene, moving, parts, "second")
    for node, names in ((first, ("left", "right")), (second, ("right", "left"))):
        for index, name in enumerate(names):
            node.GetSegmentation().GetNthSegment(index).SetName(name)
    from SymRegistrationGui import results
    from SymRegistrationGui.runs import Run

    table = logic.register(*module.pair, **QUICK, inputs={"fixedLabels": first, "movingLabels": second})["table"]
    before = Run(table).metrics["labels"]
    assert before["mean_after"] > 0.7, "matched by name, not by order"
    logic.update(table, fixedLabels=first, movingLabels=second, driveSegments=("left",))
    metrics = Run(table).metrics
    assert metrics["steering"]["labels"]["driven"] == [1]
    assert metrics["labels"]["per_label"]["1"]["after"] > before["per_label"]["1"]["after"]
    rows = [row[0] for row in results.rows(metrics)]
    assert "  left" in rows and "  right" in rows
    assert metrics["quality"]["folded_voxels"] == 0


def refused(call, *words):
    with pytest.raises(Exception) as raised:
        call()
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_bad_input_is_said_and_the_last_result_stays(module, logic, nothing_unseen):
    fixed, moving = module.pair
    table = logic.register(fixed, moving, **QUICK)["table"]
    from SymRegistrationGui.runs import Run

    run = Run(table)
    before, there = carried(run.node("forward")), scenes.names(module.scene)

    def asWas():
        assert np.array_equal(carried(run.node("forward")), before) and logic.history(table)[0] == 1

    refused(lambda: logic.undo(table), "nothing to undo")
    refused(lambda: logic.redo(table), "nothing to redo")
    p = scenes.fiducials(module.scene, [(5, -8, 12), (6, -8, 12)], "p")
    q = scenes.fiducials(module.scene, [(9, -11, 14), (40, -11, 14)], "q")
    refused(lambda: logic.update(table, fixedPoints=p, movingPoints=q), "contradict each other")
    far = scenes.fiducials(module.scene, [(900, 0, 0), (5, -8, 12)], "far")
    refused(lambda: logic.update(table, fixedPoints=far, movingPoints=far), "outside both scans")
    one = scenes.fiducials(module.scene, [(5, -8, 12)], "one")
    refused(lambda: logic.update(table, fixedPoints=p, movingPoints=one), "'p' has 2 landmarks and 'one' has 1")
    refused(lambda: logic.update(table, fixedPoints=p), "for one scan only")
    refused(lambda: logic.repair(table, sphere=(900, 0, 0, 5)), "outside the fixed scan")
    roi = module.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenterWorld(900.0, 0, 0)
    roi.SetSizeWorld(10.0, 10, 10)
    refused(lambda: logic.repair(table, region=roi), "'box' lies outside")
    empty = scenes.segmentation(module.scene, fixed, [np.zeros((34, 36, 32), bool)], "empty")
    refused(lambda: logic.repair(table, region=empty), "'empty'")
    refused(lambda: logic.update(table, fixedLabels=empty, movingLabels=empty), "empty")
    refused(lambda: logic.update(table, stiffness=50), "stiffness")
    refused(lambda: logic.update(table, nonsense=1), "nonsense")
    asWas()
    for node in (p, q, far, one, roi, empty):
        slicer.mrmlScene.RemoveNode(node)
    slicer.util.arrayFromVolume(moving)[5:8] += 3
    moving.GetImageData().Modified()
    refused(lambda: logic.update(table, stiffness=2.0), "'Moving scan' is not the scan that was registered")
    asWas()
    module.scene.RemoveNode(run.node("kept"))
    refused(lambda: logic.update(table, stiffness=2.0), "history", "was deleted")
    module.scene.RemoveNode(moving)
    refused(lambda: logic.undo(table), "moving scan", "was deleted")
    asWas()
    assert len(scenes.names(module.scene)) <= len(there)


def test_steps_are_saved_with_the_scene_and_are_compact(module, logic, tmp_path):
    table = logic.register(*module.pair, **QUICK)["table"]
    name = table.GetName()
    points = landmarks(module.scene, off=(0, 2.5, 0))
    took = carried(logic.update(table, fixedPoints=points[0], movingPoints=points[1])["forward"])
    from SymRegistrationGui import history
    from SymRegistrationGui.runs import Run

    kept = [history._files(Run(table))[name] for name in history._names(history.of(Run(table)))]
    assert len(kept) == 4 and all(kept), "two states and two lists of points"
    assert sum(map(len, kept)) < 4e5
    for node in points:
        slicer.mrmlScene.RemoveNode(node)
    assert str(tmp_path) not in json.dumps(history.of(Run(table))) and "/tmp" not in json.dumps(history.of(Run(table)))
    module.settle()
    module.scene.SetRootDirectory(str(tmp_path))
    module.scene.SetURL(str(tmp_path / "scene.mrb"))
    assert module.scene.WriteToMRB(str(tmp_path / "scene.mrb"))
    module.scene.Clear()
    module.scene.ReadFromMRB(str(tmp_path / "scene.mrb"))
    table = module.scene.GetFirstNodeByName(name)
    assert logic.history(table)[0] == 2
    logic.undo(table)
    nodes = logic.redo(table)
    assert np.abs(carried(nodes["forward"]) - took).max() < 0.02
