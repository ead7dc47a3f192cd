"""Tables of pairs: what is understood, what is refused and in which words, and that no row leaves the output folder."""

import json
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from SymRegistrationLib.cohort.table import UNSET, check_identity, read_cells, read_table, write_cells
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.geometry.volumes import write_volume
from SymRegistrationLib.job import InputError, Job, Options

TEMPLATE = Job(UNSET, UNSET, "out", options=Options(preset="fast"))


def rows(folder, text, encoding="utf-8", template=TEMPLATE):
    (folder / "pairs.csv").write_bytes(text.encode(encoding))
    return read_table(folder / "pairs.csv", folder / "out", template)


def test_a_row_becomes_a_job(tmp_path):
    (row,) = rows(
        tmp_path,
        "id,fixed,moving,fixed_labels,moving_labels,initial,method\na b,f.nii,/abs/m.nii,x.nii,y.nii,t.tfm,hsyn\n",
    )
    job = row.job
    assert (row.identity, row.line) == ("a b", 2)
    assert (
        job.output == str(tmp_path / "out/a b") and job.fixed == str(tmp_path / "f.nii") and job.moving == "/abs/m.nii"
    )
    assert (
        job.options.method == "hsyn" and job.options.initial == str(tmp_path / "t.tfm") and job.options.preset == "fast"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_spreadsheets_write_is_read(tmp_path, encoding, separator):
    lines = ["Fixed,MOVING ,id,,", "köpf/ä b.nii,頭.nii,Müller 頭,,", ",,,,", '"c,d.nii" , e.nii ,z,,']
    text = "\r\n".join(lines[:3]).replace(",", separator) + "\r\n"
    text += separator.join(['"c,d.nii"', " e.nii ", "z", "", ""]) + "\r\n"
    first, second = rows(tmp_path, text, encoding)
    assert first.identity == "Müller 頭" and first.job.fixed == str(tmp_path / "köpf/ä b.nii")
    assert (
        second.job.fixed == str(tmp_path / "c,d.nii")
        and second.job.moving == str(tmp_path / "e.nii")
        and second.line == 4
    )


def test_ids_are_made_of_the_scans_and_never_fall_together(tmp_path):
    text = "fixed,moving\na/T1.nii.gz,b/T1.nii.gz\na/T1.nii.gz,c/T1.nii.gz\nx.nrrd,y.mha\n"
    found = rows(tmp_path, text)
    names = [row.identity for row in found]
    assert names[2] == "y_to_x" and names[0].startswith("T1_to_T1-") and len(set(names)) == 3
    shuffled = rows(tmp_path, "fixed,moving\nx.nrrd,y.mha\na/T1.nii.gz,c/T1.nii.gz\na/T1.nii.gz,b/T1.nii.gz\n")
    assert {r.identity: r.job.moving for r in found} == {r.identity: r.job.moving for r in shuffled}, (
        "order of rows changes no id"
    )


def test_columns_name_further_contrasts_pair_by_pair(tmp_path):
    text = "fixed,moving,fixed_2,moving_2,moving_3,fixed_3\na,b,c,d,e,f\na,g,,,,\n"
    first, second = rows(tmp_path, text)
    assert first.job.fixed_contrasts == [str(tmp_path / name) for name in "cf"]
    assert first.job.moving_contrasts == [str(tmp_path / name) for name in "de"]
    assert second.job.fixed_contrasts == second.job.moving_contrasts == []
    with pytest.raises(InputError, match=r"line 2.*'fixed_2' is given without 'moving_2'"):
        rows(tmp_path, "fixed,moving,fixed_2,moving_3\na,b,c,d\n")


BAD = [
    ("", "is empty"),
    ("\n \n", "is empty"),
    ("fixed,moving\n", "has no rows"),
    ("fixed,id\na,b\n", "has no column 'moving'"),
    ("moving\na\n", "has no column 'fixed'"),
    ("fixed,moving,speed\na,b,c\n", "unknown column 'speed'"),
    ("fixed,moving,fixed\na,b,c\n", "names the column 'fixed' twice"),
    ("fixed,moving\na,b\n,c\n", "line 3: 'fixed' is empty"),
    ("fixed,moving\na,b\nc,d,e\n", "line 3: it has 3 cells"),
    ("fixed,moving,id\na,b,x\nc,d,x\n", "line 3: the id 'x' is that of line 2 too"),
    ("fixed,moving,id\na,b,Ä\nc,d,a\u0308\n", "line 3: the id 'a\u0308' is that of line 2 too"),
    ("fixed,moving,id\na,b,../x\n", "line 2: the id '../x' starts with a dot"),
    ("fixed,moving,id\na,b,/etc\n", "line 2: the id '/etc' holds '/'"),
    ("fixed,moving,id\na,b,x\\y\n", "holds '\\'"),
    ("fixed,moving,id\na,b,..\n", "starts with a dot"),
    ("fixed,moving,id\na,b,summary.csv\n", "reserved"),
    ("fixed,moving,id\na,b,NUL.x\n", "reserved"),
    ("fixed,moving,id\na,b," + "x" * 300 + "\n", "longer than 120 bytes"),
    ("fixed,moving,id\na,b,x\u202ey\n", "invisible"),
    ("fixed,moving,fixed_labels\na,b,c\n", "line 2: labels are given for one scan only"),
    ('fixed,moving\na,"b\n', "is not CSV"),
    ('fixed,moving\n"a"b,c\n', "is not CSV"),
    ("PK\x03\x04\0\0", "is not text"),
]


@pytest.mark.parametrize("text, said", BAD)
def test_a_bad_table_is_refused_by_name_and_line(tmp_path, text, said, capfd):
    with pytest.raises(InputError) as error:
        rows(tmp_path, text)
    assert str(tmp_path / "pairs.csv") in str(error.value) and said in str(error.value), error.value
    assert main(["batch", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "o")]) == 2
    seen = capfd.readouterr().err
    assert seen.count("\n") == 1 and "Traceback" not in seen and not (tmp_path / "o").exists()


def test_tables_that_are_none(tmp_path):
    for path, said in ((tmp_path / "no.csv", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=said):
            read_cells(path)
    (tmp_path / "latin.csv").write_bytes("fixed,moving\nä,ö\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_cells(tmp_path / "latin.csv")


def test_no_id_leaves_the_folder():
    """Random texts: what is allowed as an id is one plain name below the folder on every system."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)
    letters = "ab.. //\\:ö頭\0\n\t ~$%*?<>|'\"-\u202e\ud800CONnul"
    allowed = 0
    for _ in range(5000):
        text = "".join(draw.choice(letters) for _ in range(draw.randrange(1, 8)))
        try:
            text.encode()
        except UnicodeEncodeError:
            continue
        if check_identity(text) is None:
            allowed += 1
            path = Path("/base") / text
            assert path.parent == Path("/base") and path.name == text and not set(text) & set('/\\:*?"<>|\0\n')
    assert allowed > 50


def test_everything_onto_one_scan(tmp_path):
    template = Job("t.nii", UNSET, "out", fixed_mask="tm.nii")
    (row,) = rows(tmp_path, "image,mask\nsub/a.nii,sub/am.nii\n", template=template)
    assert row.identity == "a" and row.job.fixed == "t.nii" and row.job.fixed_mask == "tm.nii"
    assert row.job.moving == str(tmp_path / "sub/a.nii") and row.job.moving_mask == str(tmp_path / "sub/am.nii")


def test_the_work_for_a_row_does_not_grow_with_the_table(tmp_path):
    """Counted in calls of functions, Python's and C's."""
    calls = []
    for count in (500, 1000):
        text = "fixed,moving,id\n" + "".join(f"f{k}.nii,m{k}.nii,p{k}\n" for k in range(count))
        calls.append(0)

        def count_call(frame, event, argument):
            calls[-1] += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            found = rows(tmp_path, text)
        finally:
            sys.setprofile(None)
        assert len(found) == count
    print("calls for 500 and 1000 rows:", calls)
    assert calls[1] < 2.1 * calls[0]


# ---------------------------------------------------------------------------------------------- folders and dry runs


def scan_file(path, seed=0, spacing=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 500, (6, 7, 8)).astype(np.int16)
    write_volume(path, array, Grid.centred((6, 7, 8), spacing, (0, 0, 0)))


@pytest.fixture
def bids(tmp_path):
    root = tmp_path / "bids"
    for person, sessions in (("01", ("1", "2", "10")), ("02", ("1",)), ("03", ("1", "2"))):
        for session in sessions:
            stem = f"sub-{person}_ses-{session}"
            for suffix in ("T1w", "T2w"):
                scan_file(root / f"sub-{person}/ses-{session}/anat/{stem}_{suffix}.nii.gz")
            scan_file(root / f"derivatives/seg/sub-{person}/{stem}_dseg.nii.gz")
    (root / "dataset_description.json").write_text("{}")
    return root


def dry(words, capsys):
    code = main(["batch", *map(str, words), "--dry-run", "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])["result"]["pairs"]


def test_sessions_of_a_bids_folder_make_pairs(bids, tmp_path, capsys):
    table = tmp_path / "made.csv"
    code, found = dry([bids, "-o", tmp_path / "o", "--save-table", table], capsys)
    names = [pair["id"] for pair in found]
    assert code == 0 and names == [
        "sub-01_ses-2_T1w_to_sub-01_ses-1_T1w",
        "sub-01_ses-10_T1w_to_sub-01_ses-1_T1w",
        "sub-03_ses-2_T1w_to_sub-03_ses-1_T1w",
    ]
    again = read_table(table, "o", TEMPLATE)
    assert [row.identity for row in again] == names, "the saved table asks for the same"
    assert again[0].job.fixed_labels.endswith("derivatives/seg/sub-01/sub-01_ses-1_dseg.nii.gz")
    assert not (tmp_path / "o").exists()


def test_other_pairs_of_a_folder(bids, tmp_path, capsys):
    scan_file(tmp_path / "t.nii.gz")
    code, found = dry([bids, "-o", "o", "--to", tmp_path / "t.nii.gz", "--suffix", "T2w"], capsys)
    assert code == 0 and len(found) == 6 and found[0]["id"] == "sub-01_ses-1_T2w"
    assert len(dry([bids, "-o", "o", "--pairs", "all"], capsys)[1]) == 30
    flat = tmp_path / "flat"
    for name in "abc":
        scan_file(flat / f"{name}.nrrd")
    assert len(dry([flat, "-o", "o", "--pairs", "all"], capsys)[1]) == 6
    for words, said in (
        ([flat], "Give --to TEMPLATE"),
        ([bids, "--suffix", "FLAIR"], "no scan 'FLAIR'"),
        ([tmp_path / "flat", "--pairs", "sessions"], "holds no pair"),
        ([bids / "derivatives/none"], "does not exist"),
    ):
        assert main(["batch", *map(str, words), "-o", "o", "--dry-run"]) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run_checks_every_row_by_its_headers(tmp_path, capsys):
    scan_file(tmp_path / "a.nii.gz")
    scan_file(tmp_path / "b.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:200])
    (tmp_path / "text.nii").write_text("no image")
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n4,5,6\n")
    (tmp_path / "q.csv").write_text("x,y,z\n1,2,3\n")
    lines = [
        "fixed,moving,id,fixed_points,moving_points,method,initial",
        "a.nii.gz,b.nii.gz,good,p.csv,p.csv,,",
        "a.nii.gz,none.nii,missing,,,,",
        "cut.nii.gz,b.nii.gz,cut,,,,",
        "a.nii.gz,text.nii,text,,,,",
        "a.nii.gz,b.nii.gz,points,p.csv,q.csv,,",
        "a.nii.gz,b.nii.gz,method,,,magic,",
        "a.nii.gz,b.nii.gz,start,,,,none.tfm",
        *(f"a.nii.gz,b.nii.gz,m{k},,,," for k in range(3000)),
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    code, found = dry([tmp_path / "pairs.csv", "-o", tmp_path / "o"], capsys)
    problems = {pair["id"]: pair["problem"] for pair in found if pair["problem"]}
    assert code == 2 and list(problems) == ["missing", "cut", "text", "points", "method", "start"], problems
    for name, said in (
        ("missing", "none.nii' does not exist"),
        ("cut", "cut off"),
        ("text", "could not be read"),
        ("points", "landmarks"),
        ("method", "magic"),
        ("start", "none.tfm"),
    ):
        assert said in problems[name]
    assert not (tmp_path / "o").exists()


def test_a_linked_folder_cannot_lead_out(tmp_path, capsys):
    scan_file(tmp_path / "a.nii.gz")
    write_cells(
        tmp_path / "pairs.csv", ["fixed", "moving", "id"], [{"fixed": "a.nii.gz", "moving": "a.nii.gz", "id": "x"}]
    )
    (tmp_path / "o").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "o/x").symlink_to(tmp_path / "elsewhere")
    assert main(["batch", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "o")]) == 2
    assert "link that leads elsewhere" in capsys.readouterr().err and list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "words, said",
    [
        (["--workers", "0"], "--workers is '0'"),
        (["--workers", "many"], "--workers is 'many'"),
        (["--timeout", "0"], "--timeout"),
        (["--to-mask", "{a}"], "without --to"),
        (["--to", "none.nii"], "none.nii' does not exist"),
        (["--pairs", "all"], "is a table"),
        (["--guide-with-points"], "needs landmarks"),
        (["--preset", "slow"], "no preset 'slow'"),
        (["--spacing", "-1"], "spacing"),
        (["--scheduler", "tcp://127.0.0.1:9"], "no Dask scheduler answers"),
    ],
)
def test_bad_options_of_a_batch(tmp_path, capsys, monkeypatch, words, said):
    from SymRegistrationLib.cohort import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    scan_file(tmp_path / "a.nii.gz")
    (tmp_path / "pairs.csv").write_text("fixed,moving\na.nii.gz,a.nii.gz\n")
    words = [word.format(a=tmp_path / "a.nii.gz") for word in words]
    assert main(["batch", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "o"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_timeout_without_end_is_one_that_threads_can_wait_for():
    from SymRegistrationLib.commands.batch import build_parser, plan_of

    plan = plan_of(build_parser().parse_args(["pairs.csv", "-o", "out", "--timeout", "inf"]))
    assert 1e8 < plan.worker_timeout_s <= threading.TIMEOUT_MAX
