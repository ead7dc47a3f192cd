"""Batches with real workers: results, resuming by what was recorded, kills, workers that die or hang,
and the summary."""

import csv
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
from pairs import scan

from SymRegistrationLib.cohort import run as batch
from SymRegistrationLib.cohort import workers as batch_workers
from SymRegistrationLib.cohort.pair import RECORD, Digests, PairRequest, content_files, recorded, run_pair, signature
from SymRegistrationLib.cohort.summary import PairState
from SymRegistrationLib.cohort.table import Row
from SymRegistrationLib.cohort.workers import Pool, Slot
from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.console import Console
from SymRegistrationLib.geometry.volumes import to_itk
from SymRegistrationLib.job import InputError, Job, Options, RegistrationError

ROOT = Path(__file__).resolve().parents[2]
#: Settings that take about a second on a 24^3 pair.
QUICK = ["--preset", "fast", "--initial", "centre", "--threads", "1", "--no-report"]


def images(folder, count=4, shape=(24, 26, 22)):
    for k in range(count):
        sitk.WriteImage(to_itk(*scan(shape, shift=1.5 * k, spacing=4.0)), str(folder / f"Köpf {k}.nii.gz"))


def command(folder, *more, table="pairs.csv"):
    return ["batch", str(folder / table), "-o", str(folder / "out"), *QUICK, *map(str, more)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Five good pairs and two bad ones, done once by two workers; (folder, exit code, events)."""
    folder = tmp_path_factory.mktemp("cohort")
    images(folder)
    lines = ["fixed,moving,id"] + [f"Köpf 0.nii.gz,Köpf {k}.nii.gz,zu {k} 頭" for k in (1, 2, 3)]
    lines += [
        "Köpf 1.nii.gz,Köpf 2.nii.gz,a",
        "Köpf 2.nii.gz,Köpf 3.nii.gz,b",
        "Köpf 0.nii.gz,none.nii.gz,missing",
        "Köpf 0.nii.gz,flat.nii.gz,flat",
    ]
    (folder / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    sitk.WriteImage(to_itk(np.full((24, 26, 22), 7, np.int16), scan((24, 26, 22))[1]), str(folder / "flat.nii.gz"))
    done = subprocess.run(
        [sys.executable, "-m", "SymRegistrationLib", *command(folder, "--workers", 2, "--json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    return folder, done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def summary(folder):
    with open(folder / "out/summary.csv", encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def hashes(out):
    """Per pair and file, a digest of what the file holds: transforms by their vectors, for .h5 stores the
    time of writing."""
    found = {}
    for path in sorted(out.glob("*/*")):
        if path.suffix == ".h5":
            parts = sitk.CompositeTransform(sitk.ReadTransform(str(path)))
            field = sitk.DisplacementFieldTransform(parts.GetNthTransform(1)).GetDisplacementField()
            content = sitk.GetArrayFromImage(field).tobytes() + repr(field.GetOrigin()).encode()
        elif path.name in ("metrics.json", "report.html", RECORD):
            continue
        else:
            content = path.read_bytes()
        found[f"{path.parent.name}/{path.name}"] = hashlib.sha256(content).hexdigest()
    return found


def test_good_pairs_are_done_bad_ones_listed(cohort):
    folder, code, events = cohort
    assert code == 1
    result = events[-1]["result"]
    assert (result["done"], result["failed"], result["waiting"]) == (5, 2, 0)
    assert "none.nii.gz' does not exist" in result["failures"]["missing"] and "constant" in result["failures"]["flat"]
    assert {e["id"]: e["status"] for e in events if e["event"] == "pair"} == {
        "zu 1 頭": "done",
        "zu 2 頭": "done",
        "zu 3 頭": "done",
        "a": "done",
        "b": "done",
        "missing": "failed",
        "flat": "failed",
    }
    fractions = [e["fraction"] for e in events if e["event"] == "progress"]
    assert fractions == sorted(fractions) and fractions[-1] == 1 and len(fractions) > 5
    assert all("seconds_left" in e for e in events if e["event"] == "progress")
    rows = summary(folder)
    assert list(rows) == ["zu 1 頭", "zu 2 頭", "zu 3 頭", "a", "b", "missing", "flat"]
    assert float(rows["a"]["similarity_after"]) > float(rows["a"]["similarity_before"])
    assert rows["flat"]["status"] == "failed" and "constant" in rows["flat"]["reason"]
    assert not list(folder.glob("out/*/.symreg*")) and not (folder / "out/flat/metrics.json").exists()


def test_the_page_shows_failures_first_and_needs_nothing_else(cohort):
    text = (cohort[0] / "out/index.html").read_text(encoding="utf-8")
    order = [text.index(f"{name}<div") for name in ("missing", "flat", "zu 1 頭")]
    assert order == sorted(order) and text.count("data:image/png;base64,") == 5
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text and 'src="data:' in text


def test_a_batch_gives_what_register_gives(cohort, tmp_path):
    folder = cohort[0]
    words = [
        "register",
        "--no-keep-state",
        str(folder / "Köpf 0.nii.gz"),
        str(folder / "Köpf 1.nii.gz"),
        "-o",
        str(tmp_path / "zu 1 頭"),
        *QUICK,
        "-q",
    ]
    assert main(words) == 0
    alone = hashes(tmp_path)
    assert len(alone) == 6 and alone.items() <= hashes(folder / "out").items()


def test_the_same_command_again_starts_no_worker(cohort, monkeypatch, capsys):
    folder = cohort[0]
    before = (folder / "out/a/pair.json").stat().st_mtime_ns, hashes(folder / "out")
    rows = (folder / "pairs.csv").read_text(encoding="utf-8").splitlines()[:6]
    (folder / "good.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(batch, "WorkerProcess", None)
    assert main(command(folder, table="good.csv")) == 0
    assert "5 pairs are finished already" in capsys.readouterr().err
    assert before == ((folder / "out/a/pair.json").stat().st_mtime_ns, hashes(folder / "out"))


@pytest.fixture
def single(tmp_path):
    """One finished pair, made in this process: (request, folder)."""
    images(tmp_path, 2)
    options = Options(preset="fast", initial="centre", threads=1)
    job = Job(
        str(tmp_path / "Köpf 0.nii.gz"),
        str(tmp_path / "Köpf 1.nii.gz"),
        str(tmp_path / "out"),
        report=False,
        options=options,
    )
    request = PairRequest(job)
    run_pair(request)
    return request, tmp_path / "out"


def test_finished_is_what_the_record_proves(single):
    request, out = single

    def finished(verify_outputs=False, **changes):
        options = dataclasses.replace(request.job.options, **changes)
        return (
            recorded(PairRequest(dataclasses.replace(request.job, options=options)), Digests(), verify_outputs)
            is not None
        )

    assert finished() and finished(verify_outputs=True)
    assert finished(threads=2, memory_gb=3.0, device="cpu"), "the machine's settings do not count"
    assert not finished(seed=1) and not finished(preset="default") and not finished(method_options={"a": 1})
    moving = Path(request.job.moving)
    content = moving.read_bytes()
    os.utime(moving, (1, 1))
    assert finished(), "the time of an input does not count"
    moving.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not finished(), "its content does"
    moving.write_bytes(content)
    target = out / "warped_moving.nii.gz"
    output = target.read_bytes()
    target.write_bytes(output[:-1] + bytes([output[-1] ^ 1]))
    assert finished() and not finished(verify_outputs=True), "--verify compares the outputs themselves"
    target.write_bytes(output[:-1])
    assert not finished(), "a cut output is no result"
    target.unlink()
    assert not finished()
    target.write_bytes(output)
    for broken in (b"", b"{", b"[]", b'{"signature": 1}', b'{"schema": 1, "signature": {}, "files": 3}'):
        (out / RECORD).write_bytes(broken)
        assert not finished()


def test_a_pair_done_again_leaves_nothing_of_the_first(single):
    request, out = single
    nrrd = dataclasses.replace(request.job, transform_format="nrrd")
    (out / ".symreg-partial-1-x").mkdir()
    run_pair(PairRequest(nrrd, group=True))
    assert {"forward.nrrd", "log_jacobian.nii.gz", "coverage.nii.gz"} <= {p.name for p in out.iterdir()}
    assert not (out / "forward.h5").exists() and not (out / ".symreg-partial-1-x").exists()


def test_an_input_that_changes_during_the_run_is_no_result(single, monkeypatch):
    request, _ = single

    def touch(stage, fraction, message):
        if stage == "write":
            os.utime(request.job.moving, (5, 5))

    with pytest.raises(RegistrationError, match="changed while"):
        run_pair(request, touch)
    assert recorded(request, Digests()) is None


def test_weights_and_start_transforms_count_by_their_content(tmp_path):
    for name in ("f", "m", "w.safetensors", "t.tfm", "other.tfm"):
        (tmp_path / name).write_text("x")

    def signed(**changes):
        options = Options(method="hsyn", weights=str(tmp_path / "w.safetensors"), initial=str(tmp_path / "t.tfm"))
        job = Job(str(tmp_path / "f"), str(tmp_path / "m"), "o", options=dataclasses.replace(options, **changes))
        return signature(PairRequest(job), Digests())

    before = signed()
    assert signed(initial=str(tmp_path / "other.tfm")) == before, "the same content under another name"
    (tmp_path / "other.tfm").write_text("y")
    assert signed(initial=str(tmp_path / "other.tfm")) != before and signed(initial="rigid") != before
    (tmp_path / "w.safetensors").write_text("z")
    assert signed() != before


def test_headers_with_data_files_beside_them(tmp_path):
    image = to_itk(*scan((6, 7, 8)))
    for name in ("a.mhd", "b.nhdr", "c.hdr"):
        sitk.WriteImage(image, str(tmp_path / name))
    for name, data in (("a.mhd", "a.raw"), ("b.nhdr", "b.raw"), ("c.hdr", "c.img")):
        found = {path.name for path in content_files(tmp_path / name)}
        assert name in found and any(other.startswith(data[:2]) for other in found - {name}), found
        before = Digests().of(tmp_path / name)
        (other,) = (path for path in content_files(tmp_path / name) if path.name != name)
        other.write_bytes(other.read_bytes()[::-1])
        assert Digests().of(tmp_path / name) != before


def test_one_input_that_cannot_be_read_stops_nothing(cohort, tmp_path, monkeypatch):
    def unreadable(request, digests, verify_outputs):
        raise InputError("no permission.")

    monkeypatch.setattr(batch, "recorded", unreadable)
    (tmp_path / "p").mkdir()
    state = PairState(Row("p", 2, Job("f", "m", str(tmp_path / "p"))))
    batch._Run([state], batch.CohortPlan(str(tmp_path)), Console(quiet=True), None, -1)._keep_finished()
    assert state.status == "waiting"


@pytest.mark.parametrize(
    "raw",
    [
        None,
        3,
        [],
        {},
        {"job": 1},
        {"job": {}, "group": 1},
        {"job": {"fixed": "f", "moving": "m", "output": "o"}, "more": 1},
    ],
)
def test_a_pair_request_that_is_none_is_refused(raw):
    with pytest.raises(InputError):
        PairRequest.from_dict(raw)
    request = PairRequest(Job("f", "m", "o"), True)
    assert PairRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


# ---------------------------------------------------------------------------------------------- kills


def test_killed_at_random_moments_and_resumed_gives_the_same(cohort, tmp_path):
    """kill -9 of the batch itself; its workers notice and end; the next start goes on."""
    source = cohort[0]
    (tmp_path / "out").mkdir()
    lines = (source / "pairs.csv").read_text(encoding="utf-8").splitlines()[:6]
    lines = [lines[0]] + [
        ",".join(str(source / part) if part.endswith(".gz") else part for part in line.split(",")) for line in lines[1:]
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "SymRegistrationLib", *command(tmp_path, "--workers", 2, "--json")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for line in process.stdout:
            if json.loads(line).get("stage") == "start":
                break
        for _, line in zip(range(draw.randrange(30)), process.stdout):
            if json.loads(line)["event"] == "result":
                break
        process.kill()
        process.communicate()
        for path in tmp_path.glob("out/*/" + RECORD):
            assert json.loads(path.read_text())["files"], "a record is whole or not there"
    assert main(command(tmp_path, "--workers", 2)) == 0
    assert hashes(tmp_path / "out") == hashes(source / "out")
    assert not list(tmp_path.glob("out/*/.*"))


def test_ctrl_c_ends_all_workers_and_says_so(cohort, tmp_path):
    source = cohort[0]
    (tmp_path / "pairs.csv").write_text(
        "fixed,moving\n" + "".join(f"{source}/Köpf 0.nii.gz,{source}/Köpf {k}.nii.gz\n" for k in (1, 2, 3)),
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "SymRegistrationLib", *command(tmp_path, "--workers", 1)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if "of 3 pairs" in line:
            break
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 130
    assert not [
        worker for worker in psutil.wait_procs(workers, timeout=600)[1] if worker.status() != psutil.STATUS_ZOMBIE
    ]
    states = [row["status"] for row in summary(tmp_path).values()]
    assert "done" in states and "waiting" in states, "the summary says how far it came"


def test_a_worker_that_is_killed_or_hangs_is_replaced_and_its_pair_done(cohort, tmp_path, monkeypatch):
    """The first worker is killed with kill -9, the second one is stopped so that it hangs; both pairs
    are still done."""
    source = cohort[0]
    requests = [
        PairRequest(
            Job(
                str(source / "Köpf 0.nii.gz"),
                str(source / f"Köpf {k}.nii.gz"),
                str(tmp_path / str(k)),
                report=False,
                options=Options(preset="fast", initial="centre", threads=1),
            )
        )
        for k in (1, 2)
    ]
    started, events = [], []

    class Watched(batch_workers.WorkerProcess):
        """Only the second one is soon taken for hanging, so that a busy machine changes nothing."""

        def ask(self, command, fields, worker_timeout_s, progress):
            return super().ask(command, fields, 5.0 if started.index(self) == 1 else worker_timeout_s, progress)

    def start():
        started.append(Watched())
        return started[-1]

    def tell(event):
        if event.kind == "progress" and len(started) <= 2 and event.fraction > 0.05:
            with_signal = {1: signal.SIGKILL, 2: signal.SIGSTOP}[len(started)]
            os.kill(started[-1].pid, with_signal)
        events.append(event)

    monkeypatch.setattr(batch_workers, "START_SECONDS", 600)
    Pool([Slot(threads=1)], 600.0, start).run(requests, tell)
    again = [event.message for event in events if event.kind == "again"]
    assert len(again) == 2 and "was killed" in again[0] and "said nothing" in again[1]
    assert sorted((e.index, e.attempts) for e in events if e.kind == "done") == [(0, 2), (1, 2)] and len(started) == 3
    assert all(not psutil.pid_exists(p.pid) or psutil.Process(p.pid).status() == "zombie" for p in started)


def test_two_batches_do_not_share_a_folder(cohort, monkeypatch, capsys):
    folder = cohort[0]
    monkeypatch.setattr(batch, "LOCK_SECONDS", 0.3)
    with batch._locked(folder / "out"):
        assert main(command(folder)) == 2
    assert "another batch is at work" in capsys.readouterr().err
