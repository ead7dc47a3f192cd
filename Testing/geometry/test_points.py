"""Landmark files: one truth in LPS mm whatever the file, read by the real Slicer classes, and clear refusals."""

import json

import numpy as np
import pytest

from SymRegistrationLib.geometry.points import PointSet, paired, read_points, write_points
from SymRegistrationLib.job import InputError

LPS = np.array([[1.5, -2.25, 3.0], [-40.0, 50.5, -60.125]])
POINTS = PointSet(LPS, ("tip", "second, with comma"))


def _write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "x,y,z\n1.5,-2.25,3\n-40,50.5,-60.125\n",
        "x_lps_mm,y_lps_mm,z_lps_mm\n1.5,-2.25,3\n-40,50.5,-60.125\n",
        "name;X;Y;Z\ntip;1.5;-2.25;3\n\nb;-40;50.5;-60.125\n",
        "1.5,-2.25,3\n-40,50.5,-60.125\n",
        "1.5 -2.25 3 tip\n-40 50.5 -60.125 b\n",
        "\ufefflabel,r,a,s,defined\ntip,-1.5,2.25,3,1\nb,40,-50.5,-60.125,1\n",
        "z,y,x\n3,-2.25,1.5\n-60.125,50.5,-40\n",
        "x_ras_mm\ty_ras_mm\tz_ras_mm\n-1.5\t2.25\t3\n40\t-50.5\t-60.125\n",
        "# Markups fiducial file version = 4.10\n# CoordinateSystem = 0\n# columns = id,x,y,z,label\n"
        "1,-1.5,2.25,3,tip\n2,40,-50.5,-60.125,b\n",
        "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n"
        "1,1.5,-2.25,3,tip\n2,-40,50.5,-60.125,b\n",
        json.dumps(
            {
                "markups": [
                    {
                        "coordinateSystem": "RAS",
                        "controlPoints": [
                            {"position": [-1.5, 2.25, 3]},
                            {"position": [0, 0, 0], "positionStatus": "undefined"},
                        ],
                    },
                    {"coordinateSystem": "LPS", "controlPoints": [{"label": "b", "position": [-40, 50.5, -60.125]}]},
                ]
            }
        ),
    ],
)
def test_every_spelling_gives_the_same_lps_points(tmp_path, text):
    points = read_points(_write(tmp_path, "points.txt", text))
    np.testing.assert_allclose(points.points, LPS, atol=1e-12)
    assert len(points.labels) == 2


@pytest.mark.parametrize(
    "text",
    [
        "label,l,p,s,defined,selected\ntip,1.5,-2.25,3,1,1\nnowhere,7,7,7,0,1\nb,-40,50.5,-60.125,1,1\n",
        "# Markups fiducial file version = 5.8\n# CoordinateSystem = LPS\n"
        "# columns = "
        "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n1,1.5,-2.25,3,0,0,0,1,1,1,0,tip,,,2,0\n"
        "2,7,7,7,0,0,0,1,1,1,0,nowhere,,,3,0\n3,-40,50.5,-60.125,0,0,0,1,1,1,0,b,,,2,0\n",
    ],
)
def test_points_that_slicer_lists_but_that_were_not_placed_are_no_landmarks(tmp_path, text):
    points = read_points(_write(tmp_path, "points.txt", text))
    np.testing.assert_allclose(points.points, LPS, atol=1e-12)
    assert points.labels == ("tip", "b")


def test_label_columns_are_kept(tmp_path):
    path = _write(tmp_path, "a.csv", "region,x_lps_mm,y_lps_mm,z_lps_mm\nliver,1,2,3\noutside,4,5,6\n")
    assert read_points(path).labels == ("liver", "outside")


@pytest.mark.parametrize("name", ["p.csv", "p.fcsv", "p.mrk.json"])
def test_round_trip(tmp_path, name):
    points = PointSet(LPS, ('a "quoted", one', ""))
    write_points(tmp_path / name, points)
    back = read_points(tmp_path / name)
    np.testing.assert_allclose(back.points, LPS, atol=1e-6)
    assert back.labels == points.labels


def _slicer_points(node):
    """Control points of a Slicer node as LPS, with labels."""
    ras = np.array([node.GetNthControlPointPosition(i) for i in range(node.GetNumberOfControlPoints())])
    return ras * [-1, -1, 1], [node.GetNthControlPointLabel(i) for i in range(node.GetNumberOfControlPoints())]


@pytest.mark.parametrize(
    "name, storage",
    [("p.fcsv", "vtkMRMLMarkupsFiducialStorageNode"), ("p.mrk.json", "vtkMRMLMarkupsJsonStorageNode"), ("p.csv", None)],
)
def test_slicer_reads_what_we_write_and_we_read_what_slicer_writes(tmp_path, name, storage):
    import slicer

    scene = slicer.vtkMRMLScene()
    node = slicer.vtkMRMLMarkupsFiducialNode()
    scene.AddNode(node)
    write_points(tmp_path / name, POINTS)
    theirs = str(tmp_path / ("slicer_" + name))
    if storage:
        store = getattr(slicer, storage)()
        scene.AddNode(store)
        store.SetFileName(str(tmp_path / name))
        assert store.ReadData(node) == 1
        store.SetFileName(theirs)
        assert store.WriteData(node) == 1
    else:
        logic = slicer.vtkSlicerMarkupsLogic()
        assert logic.ImportControlPointsFromCSV(node, str(tmp_path / name))
        assert logic.ExportControlPointsToCSV(node, theirs, False)
    seen, labels = _slicer_points(node)
    np.testing.assert_allclose(seen, LPS, atol=1e-6)
    assert tuple(labels) == POINTS.labels
    back = read_points(theirs)
    np.testing.assert_allclose(back.points, LPS, atol=1e-3)
    assert back.labels == POINTS.labels


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "no points"),
        ("x,y,z\n", "no points"),
        ("a,b,c\n1,2,3\n", "no coordinate columns"),
        ("x_lps,y_ras,z_lps\n1,2,3\n", "no coordinate columns"),
        ("x,y,z\n1,nan,3\n", "not finite at point 1"),
        ("x,y,z\n1,2,3\n1,oops,3\n", "point 2"),
        ("x,y,z\n1,2\n", "point 1"),
        ("1,2\n", "no header"),
        ("{not json", "not a Slicer markups file"),
        ('{"markups": [{"controlPoints": [{"label": "a"}]}]}', "not a Slicer markups file"),
        ('{"markups": []}', "no points"),
        ('{"markups": [{"coordinateSystem": "IJK", "controlPoints": []}]}', "coordinate system"),
        ("# Markups fiducial file version = 4.10\n# CoordinateSystem = 2\n1,1,2,3\n", "coordinate system"),
    ],
)
def test_bad_files_are_refused_in_words(tmp_path, text, part):
    with pytest.raises(InputError, match=part) as caught:
        read_points(_write(tmp_path, "bad.csv", text), "fixed landmarks")
    assert "bad.csv" in caught.value.message and "\n" not in str(caught.value)


def test_missing_binary_and_unknown_format(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(InputError, match="as text"):
        read_points(tmp_path / "b.csv")
    with pytest.raises(InputError, match="cannot be written"):
        write_points(tmp_path / "p.xlsx", POINTS)


def test_pairs_are_matched_by_name_or_row_and_contradictions_are_refused():
    a = PointSet(LPS, ("p", "q"), "a.csv")
    fixed, moving = paired(a, PointSet(LPS[::-1], ("q", "p"), "b.csv"))
    np.testing.assert_array_equal(moving.points, fixed.points)
    assert paired(a, PointSet(LPS, ("b-1", "b-2"), "b"))[1].points[0, 0] == 1.5
    assert len(paired(PointSet(LPS, ("", "")), PointSet(LPS, ("x", "")))[0]) == 2
    with pytest.raises(InputError, match="landmark 2 is 'q' in 'a.csv' but 'r' in 'b.csv'"):
        paired(a, PointSet(LPS, ("p", "r"), "b.csv"))
    with pytest.raises(InputError, match="2 landmarks and 'b.csv' has 1"):
        paired(a, PointSet(LPS[:1], ("p",), "b.csv"))


def test_a_point_set_cannot_be_changed():
    source = LPS.copy()
    points = PointSet(source, ("a", "b"))
    source[0] = 0
    assert points.points[0, 0] == 1.5
    with pytest.raises(ValueError):
        points.points[0] = 1
