"""The example that runs a table inside Slicer: its logic on real MRML with the real worker; files through
MRML's own storage.
"""

import csv
import importlib.util
import json

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import slicer_harness
import slicer_scenes as scenes
from slicer_scenes import clientFixture, moduleFixture  # noqa: F401

slicer_harness.pythonqtStyle(__name__)
QUICK = ["preset=fast", "initial=centre", "threads=1"]


def loader(kind, storage):
    def load(path, properties=None):
        node = slicer.mrmlScene.AddNewNodeByClass(kind, "loaded")
        made = getattr(slicer, storage)()
        made.SetFileName(str(path))
        if not made.ReadData(node):
            raise RuntimeError(f"Failed to load node from file: {path}")
        return node

    return load


def saveNode(node, path):
    storage = (
        slicer.vtkMRMLTransformStorageNode() if node.IsA("vtkMRMLTransformNode") else slicer.vtkMRMLNRRDStorageNode()
    )
    storage.SetFileName(path)
    return bool(storage.WriteData(node))


@pytest.fixture(name="example")
def exampleFixture(module, monkeypatch):
    """The example, imported as Slicer runs it, with slicer.util's loading and saving by MRML's storage nodes."""
    for name, kind, storage in (
        ("loadVolume", "vtkMRMLScalarVolumeNode", "vtkMRMLNRRDStorageNode"),
        ("loadLabelVolume", "vtkMRMLLabelMapVolumeNode", "vtkMRMLNRRDStorageNode"),
        ("loadMarkups", "vtkMRMLMarkupsFiducialNode", "vtkMRMLMarkupsJsonStorageNode"),
        ("loadTransform", "vtkMRMLLinearTransformNode", "vtkMRMLTransformStorageNode"),
    ):
        monkeypatch.setattr(slicer.util, name, loader(kind, storage), raising=False)
    monkeypatch.setattr(slicer.util, "saveNode", saveNode, raising=False)
    monkeypatch.setattr(module.engine.client, "stop", lambda: None)
    spec = importlib.util.spec_from_file_location(
        "register_table", slicer_harness.MODULE / "Examples/register_table.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(name="table")
def tableFixture(module, tmp_path):
    """Two good pairs, one with mask, landmarks, a further contrast and a start transform; one missing file; one that is
    no scan."""
    fixed, moving = scenes.pair(module.scene)
    for node, name in ((fixed, "fixed"), (moving, "moving ü")):
        assert saveNode(node, str(tmp_path / f"{name}.nrrd"))
    mask = sitk.ReadImage(str(tmp_path / "fixed.nrrd")) > -1
    sitk.WriteImage(mask, str(tmp_path / "mask.nrrd"))
    ras = np.array([(5, -8, 12), (12, 0, 4), (-6, -20, 18.0)])
    for name, places in (("f", ras), ("m", scenes.shift(ras.copy()))):
        storage = slicer.vtkMRMLMarkupsJsonStorageNode()
        storage.SetFileName(str(tmp_path / f"{name}.mrk.json"))
        assert storage.WriteData(scenes.fiducials(module.scene, places, name))
    sitk.WriteTransform(sitk.TranslationTransform(3, (-4, 3, 2)), str(tmp_path / "start.tfm"))
    (tmp_path / "broken.nrrd").write_text("no scan")
    lines = [
        "fixed,moving,id,fixed_mask,fixed_points,moving_points,initial,fixed_2,moving_2",
        "fixed.nrrd,moving ü.nrrd,plain,,,,,,",
        "fixed.nrrd,moving ü.nrrd,full,mask.nrrd,f.mrk.json,m.mrk.json,start.tfm,fixed.nrrd,moving ü.nrrd",
        "fixed.nrrd,none.nrrd,missing,,,,,,",
        "fixed.nrrd,broken.nrrd,broken,,,,,,",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    slicer.mrmlScene.Clear()
    return tmp_path / "pairs.csv"


def test_a_table_becomes_folders_and_goes_on(example, table, module, monkeypatch):
    out = table.parent / "out"
    words = [str(table), str(out), *QUICK]
    assert example.main(words) == 1
    with open(out / "summary.csv", encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert [rows[name]["status"] for name in ("plain", "full", "missing", "broken")] == [
        "done",
        "done",
        "failed",
        "failed",
    ]
    assert "none.nrrd' does not exist" in rows["missing"]["reason"] and float(rows["plain"]["similarity"]) > 0.9
    full = json.loads((out / "full/metrics.json").read_text())
    assert full["landmarks"]["count"] == 3 and full["landmarks"]["mean_after_mm"] < 1.5
    assert full["alignment"]["kind"] == "file" and len(full["job"]["fixed_contrasts"]) == 1
    ras = np.array((5, -8, 12.0))
    lps = np.array((-1, -1, 1.0))
    for name in ("plain", "full"):
        transform = sitk.ReadTransform(str(out / name / "forward.h5"))
        there = np.array(transform.TransformPoint((ras * lps).tolist())) * lps
        assert np.linalg.norm(there - scenes.shift(ras[None].copy())[0]) < 1.5, "a fixed point goes to its partner"
        assert {"inverse.h5", "warped_moving.nrrd", "jacobian.nrrd", "done.json"} <= {
            p.name for p in (out / name).iterdir()
        }
    assert module.scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 0, "nothing gathers in the scene"
    registered = []
    monkeypatch.setattr(example, "registerRow", lambda logic, row, folder: registered.append(row.identity) or full)
    assert example.main([str(table), str(out), *QUICK]) == 0 and registered == ["missing", "broken"], (
        "finished pairs are not done again"
    )
    assert example.main([str(table), str(out), "preset=default", *QUICK[1:]]) == 0 and "plain" in registered, (
        "other options, other result"
    )


def test_bad_tables_and_options_are_refused(example, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("fixed\nx\n")
    (tmp_path / "g.csv").write_text("fixed,moving\nx,y\n")
    for words, said in (
        ([], "Give a table"),
        ([str(tmp_path / "t.csv"), "o"], "no column 'moving'"),
        ([str(tmp_path / "g.csv"), "o", "speed=3"], "unknown field 'speed'"),
        ([str(tmp_path / "g.csv"), "o", "preset=slow"], "preset is 'slow'"),
    ):
        assert example.main(words) == 2
        assert said in capsys.readouterr().out
