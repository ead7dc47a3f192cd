"""Damaged landmarks, jobs and tables of scans."""

from __future__ import annotations

import json
from pathlib import Path

from SymRegistrationLib.geometry.volumes import write_volume

from .formats import GRID, scan


def points(bad: Path, good: Path) -> None:
    def markups(**changes) -> str:
        point = {"label": "a", "position": [1, 2, 3], **changes.pop("point", {})}
        return json.dumps({"markups": [{"coordinateSystem": "LPS", "controlPoints": [point], **changes}]})

    for name, text in {
        "empty.csv": "",
        "header.csv": "label,x,y,z\n",
        "columns.csv": "a,b,c\n1,2,3\n",
        "words.csv": "x,y,z\none,two,three\n",
        "two.csv": "x,y\n1,2\n",
        "ragged.csv": "x,y,z\n1,2,3\n4,5\n",
        "nan.csv": "x,y,z\n" + "1,2,nan\n" * 4,
        "inf.csv": "x,y,z\n" + "1,2,1e999\n" * 4,
        "bare.csv": "1,2\n3,4\n",
        "short.csv": "x,y,z\n1,2,3\n",
        "mixed.csv": "label,x_ras,y_lps,z_ras\na,1,2,3\n",
        "twice.csv": "label,x,y,z\n" + "d,1,2,3\na,1,2,3\nb,1,2,3\nx,1,2,3\n",
        "ijk.fcsv": "# Markups fiducial file version = 4.11\n# CoordinateSystem = IJK\n# columns = id,x,y,z\n1,2,3,4\n",
        "cut.mrk.json": markups()[:-8],
        "list.mrk.json": "[1, 2]",
        "other.mrk.json": '{"curves": []}',
        "inch.mrk.json": markups(coordinateUnits="inch"),
        "world.mrk.json": markups(coordinateSystem="MNI"),
        "flat.mrk.json": markups(point={"position": [1, 2]}),
        "null.mrk.json": markups(point={"position": None}),
        "none.mrk.json": '{"markups": []}',
        "deep.mrk.json": '{"markups": ' + "[" * 100_000,
        "nanpoint.mrk.json": markups(point={"position": [1, float("nan"), 3]}),
    }.items():
        (bad / name).write_text(text, encoding="utf-8")
    (bad / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (bad / "quote.csv").write_text('label,x,y,z\n"a,' + "1" * 200_000 + "\n", encoding="utf-8")


def jobs(bad: Path, good: Path) -> None:
    base = {"fixed": str(good / "fixed.nii.gz"), "moving": str(good / "moving.nii.gz"), "output": "{out}"}
    for name, job in {
        "unknown": {**base, "speed": 3},
        "missing": {"fixed": "a", "output": "b"},
        "type": {**base, "fixed": 3},
        "options": {**base, "options": [1]},
        "option": {**base, "options": {"colour": 1}},
        "option_type": {**base, "options": {"seed": "one"}},
        "option_bool": {**base, "options": {"refine": True}},
        "option_nan": {**base, "options": {"spacing": float("nan")}},
        "option_inf": {**base, "options": {"spacing": float("inf")}},
        "preset": {**base, "options": {"preset": "slow"}},
        "null": {**base, "fixed": None},
        "list": [base],
        "text": "register",
        "nul": {**base, "fixed": "a\0b.nii"},
        "blank": {**base, "fixed": ""},
        "long": {**base, "fixed": "x" * 5000},
        "nul_output": {**base, "output": "a\0b"},
        "blank_output": {**base, "output": ""},
        "surrogate": {**base, "fixed": "\udcff.nii"},
        "format": {**base, "transform_format": "exe"},
        "method_options": {**base, "options": {"method_options": 3}},
        "composite": {**base, "composite": "yes"},
    }.items():
        (bad / f"job_{name}.json").write_text(json.dumps(job))
    (bad / "job_cut.json").write_text("{oops")
    (bad / "job_empty.json").write_text("")
    (bad / "job_deep.json").write_text("[" * 100_000)
    (bad / "job_binary.json").write_bytes(bytes(range(256)))
    (bad / "job_number.json").write_text('{"fixed": ' + "9" * 5000 + "}")


def tables(bad: Path, good: Path) -> None:
    """Tables of scans for training."""
    a, b = (str(good / "scans" / f"sub-{k}_T1w.nii.gz") for k in (0, 1))
    for name, text in {
        "t_empty": "",
        "t_columns": f"colour,size\n{a},3\n",
        "t_unknown": f"image,colour\n{a},red\n",
        "t_gone": "image\ngone.nii.gz\nx.nii\n",
        "t_split": f"image,split\n{a},maybe\n{b},train\n",
        "t_header": "image,subject\n",
        "t_one": f"image\n{a}\n",
        "t_wide": "image,labels\n" + "x" * 200_000 + ",y\n",
        "t_half": f"fixed,moving\n{a},\n{b},{a}\n",
        "t_same": f"image,subject\n{a},x\n{b},x\n",
    }.items():
        (bad / f"{name}.csv").write_text(text)
    c = good / "scans" / "sub-2_T1w.nii.gz"
    for name, text in {
        "b_empty": "",
        "b_head": "fixed,moving\n",
        "b_columns": f"one,two\n{a},{b}\n",
        "b_no_moving": f"fixed,id\n{a},x\n",
        "b_unknown": f"fixed,moving,colour\n{a},{b},red\n",
        "b_blank": f"fixed,moving\n{a},\n",
        "b_gone": f"fixed,moving\n{a},gone.nii\n",
        "b_twice": f"fixed,moving,id\n{a},{b},x\n{a},{c},x\n",
        "b_case": f"fixed,moving,id\n{a},{b},x\n{a},{c},X\n",
        "b_up": f"fixed,moving,id\n{a},{b},../../out\n",
        "b_root": f"fixed,moving,id\n{a},{b},/etc/x\n",
        "b_dots": f"fixed,moving,id\n{a},{b},..\n",
        "b_hidden": f"fixed,moving,id\n{a},{b},.x\n",
        "b_nul": f"fixed,moving,id\n{a},{b},x\0y\n",
        "b_back": f"fixed,moving,id\n{a},{b},a\\b\n",
        "b_long": f"fixed,moving,id\n{a},{b},{'x' * 300}\n",
        "b_many": f"fixed,moving\n{a},{b},{c}\n",
        "b_header_twice": f"fixed,moving,moving\n{a},{b},{c}\n",
        "b_quote": f'fixed,moving\n"{a},{b}\n',
        "b_labels": f"fixed,moving,fixed_labels\n{a},{b},{a}\n",
        "b_method": f"fixed,moving,method\n{a},{b},magic\n",
        "b_initial": f"fixed,moving,initial\n{a},{b},sideways\n",
        "b_cut": f"fixed,moving\n{a},cut.nii.gz\n",
        "b_pipe": f"fixed,moving\n{a},pipe.nii\n",
        "b_huge": f"fixed,moving\n{a},huge.mha\n",
        "b_wide": "fixed,moving\n" + "x" * 200_000 + ",y\n",
    }.items():
        (bad / f"{name}.csv").write_text(text)
    (good / "pairs.csv").write_text(f"fixed,moving\n{a},{b}\n")
    (bad / "b_binary.csv").write_bytes(bytes(range(256)))
    (bad / "t_binary.csv").write_bytes(bytes(range(256)))
    (bad / "mixed").mkdir()
    write_volume(bad / "mixed" / "sub-1.nii.gz", scan(), GRID)
    (bad / "mixed" / "sub-2.nii.gz").write_bytes(b"")
