"""Batches with real workers: results, resuming by what was recorded, kills, workers that die or hang,
and the summary."""

import csv
import dataclasses
import hashlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
from pairs import scan

from SymRegistrationLib.cohort import run as batch
from SymRegistrationLib.cohort import workers as batch_workers
from SymRegistrationLib.cohort.page import page
from SymRegistrationLib.cohort.pair import RECORD, Digests, PairRequest, content_files, recorded, run_pair, signature
from SymRegistrationLib.cohort.summary import COLUMNS, PairState, csv_text, judge, ordered
from SymRegistrationLib.cohort.table import Row
from SymRegistrationLib.cohort.workers import Pool, Slot, WorkerLost
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


class Fake:
    """A worker that does what the test says: ``script(identity) -> "done" | "lost" | exception``."""

    def __init__(self, script):
        self.script = script
        self.ended = queue.Queue()

    def ready(self):
        return {"devices": []}

    def ask(self, command, fields, worker_timeout_s, progress):
        outcome = self.script(fields["pair"]["job"]["fixed"])
        if outcome == "wait":
            self.ended.get(timeout=600)
            outcome = "lost"
        if outcome == "lost":
            raise WorkerLost("the worker was killed")
        if isinstance(outcome, Exception):
            raise outcome
        return {"fixed": fields["pair"]["job"]["fixed"]}

    def kill(self):
        self.ended.put(None)

    close = kill


def pool(script, count, slots=2):
    made, events = [], []

    def start():
        made.append(Fake(script))
        return made[-1]

    requests = [PairRequest(Job(f"p{k}", "m", "o")) for k in range(count)]
    Pool([Slot()] * slots, 1.0, start).run(requests, events.append)
    return events, made


def test_a_pair_that_kills_every_worker_is_tried_twice_and_listed():
    events, made = pool(lambda name: "lost" if name == "p3" else "done", 6)
    assert [e.index for e in events if e.kind == "failed"] == [3] and len([e for e in events if e.kind == "done"]) == 5
    failed = next(e for e in events if e.kind == "failed")
    assert failed.attempts == 2 and "killed, 2 times" in failed.message and len(made) <= 4


def test_errors_of_a_pair_are_not_tried_again():
    events, made = pool(lambda name: RegistrationError("no overlap.", "Look.") if name == "p1" else "done", 4)
    assert [(e.index, e.message) for e in events if e.kind == "failed"] == [(1, "no overlap. Look.")] and len(made) <= 2


def test_no_slot_leaves_while_a_lost_pair_may_come_back():
    lost = threading.Event()

    def script(name):
        if name == "p0" and not lost.is_set():
            time.sleep(0.3)
            lost.set()
            return "lost"
        return "done"

    assert sorted(e.index for e in pool(script, 2)[0] if e.kind == "done") == [0, 1]


def test_stopping_ends_waiting_workers():
    def tell(event):
        raise KeyboardInterrupt

    made = []

    def start():
        made.append(Fake(lambda name: "wait" if name != "p0" else "done"))
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        Pool([Slot()] * 2, 1.0, start).run([PairRequest(Job(f"p{k}", "m", "o")) for k in range(5)], tell)


def test_two_batches_do_not_share_a_folder(cohort, monkeypatch, capsys):
    folder = cohort[0]
    monkeypatch.setattr(batch, "LOCK_SECONDS", 0.3)
    with batch._locked(folder / "out"):
        assert main(command(folder)) == 2
    assert "another batch is at work" in capsys.readouterr().err


def test_workers_follow_memory_processors_and_gpus(tmp_path, monkeypatch):
    class Needs:
        def memory_gb(self, job):
            return 3.0

    monkeypatch.setattr(batch, "cores", lambda: 16)
    cpu = {"name": "cpu", "memory_gb": 64, "free_gb": 20.0}
    gpus = [{"name": f"cuda:{k}", "memory_gb": 80} for k in range(2)]

    def slots(devices, count=40, workers=None, **options):
        plan = batch.CohortPlan(str(tmp_path), workers)
        run = batch._Run([], plan, Console(quiet=True), Needs(), -1)
        return run._slots([PairRequest(Job("f", "m", "o", options=Options(**options)))] * count, devices)

    assert len(slots([cpu])) == 5 and slots([cpu])[0].threads == 3, (
        "0.8 x 20 GB hold five workers of 3 GB; 16 cores over 5"
    )
    assert len(slots([cpu], count=2)) == 2 and len(slots([cpu], workers=7)) == 7
    assert len(slots([{**cpu, "free_gb": 1.0}])) == 1
    assert [slot.device for slot in slots([cpu, *gpus])] == ["cuda:0", "cuda:1"]
    assert [slot.device for slot in slots([cpu, *gpus], workers=3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {slot.device for slot in slots([cpu, *gpus], device="cpu")} == {None}
    assert slots([cpu], threads=2)[0].threads == 2 and slots([cpu], memory_gb=4.0)[0].memory_gb == 4.0
    (tmp_path / "batch.json").write_text('{"threads": 6, "memory_gb": 1.5}')
    assert (slots([cpu])[0].threads, slots([cpu])[0].memory_gb) == (6, 1.5), "a resumed batch computes as it began"


# ---------------------------------------------------------------------------------------------- summary


def states(count=20):
    draw = np.random.default_rng(0)
    found = []
    for k in range(count):
        numbers = {
            "similarity_after": 0.8 + 0.01 * draw.standard_normal(),
            "ice_mean_mm": 0.05 + 0.004 * draw.standard_normal(),
            "folded_percent": 0.0,
            "confidence": 0.9,
            "verdict": "good",
        }
        found.append(
            PairState(
                Row(f"p{k}", k + 2, Job("f", f"m{k}", f"o/p{k}")), "done", numbers=numbers, seconds=1.0, attempts=1
            )
        )
    return found


def test_what_stands_out_and_what_does_not():
    found = states()
    judge(found)
    assert not any(state.stands_out for state in found), "ordinary spread accuses nobody"
    found[4].numbers["similarity_after"] = 0.5
    found[9].numbers["folded_percent"] = 0.3
    found[11].numbers["similarity_after"] = 0.99
    found[13].numbers["verdict"] = "bad"
    found[15].status, found[15].reason = "failed", "it\nbroke"
    judge(found)
    # (0.8 - 0.5) / (MAD about 0.01 * 0.67) * 0.67: far beyond 3.5; folded: 0.6745 * 0.3 / 0.002 = 101
    assert {k for k in range(20) if found[k].stands_out} == {4, 9, 13}
    assert (
        found[9].score == pytest.approx(0.6745 * 0.3 / 0.002)
        and "folded, % 0.3000 (usual 0.0000)" in found[9].stands_out
    )
    assert [state.row.identity for state in ordered(found)][:4] == ["p15", "p9", "p4", "p13"]
    assert csv_text(found).splitlines()[0] == ",".join(COLUMNS) and ",failed,it broke," in csv_text(found)


def test_few_pairs_say_nothing_about_the_usual():
    found = states(4)
    found[0].numbers["similarity_after"] = 0.1
    judge(found)
    assert not found[0].stands_out


def test_the_page_escapes_what_tables_say():
    state = PairState(Row("a&b", 2, Job("<script>.nii", "m.nii", "o")), "failed", "<img src=x onerror=alert(1)>")
    text = page([state], "<b>", 1.0)
    assert "<script>" not in text and "<img src=x" not in text and "a&amp;b" in text and "&lt;b&gt;" in text
