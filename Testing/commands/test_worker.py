"""The worker process: its protocol, its errors in words, and that it survives every failed job."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
from pairs import scan

from SymRegistrationLib import __version__
from SymRegistrationLib.geometry.volumes import to_itk
from SymRegistrationLib.job import Job, Options

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that only keep a fault from hanging the tests.
SAFE = 600
#: Settings that take about a second on a 32^3 pair.
QUICK = {"preset": "fast", "initial": "centre", "threads": 1}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for name, shift in (("fixed", 0.0), ("moving", 4.0)):
        sitk.WriteImage(to_itk(*scan(shift=shift)), str(folder / f"{name}.nrrd"))
    return folder


class Client:
    """A worker process whose answers can be waited for."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "SymRegistrationLib", "worker", "--own-group"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(json.loads(line))  # anything that is no JSON on stdout fails the test that waits
        self.lines.put(None)

    def next(self, seconds=SAFE):
        return self.lines.get(timeout=seconds)

    def send(self, request):
        line = request if isinstance(request, bytes) else json.dumps(request).encode()
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def ask(self, request):
        """(progress events, final event)."""
        self.send(request)
        progress = []
        while (event := self.next())["event"] == "progress":
            progress.append(event)
        return progress, event

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def worker():
    client = Client()
    client.ready = client.next()
    yield client
    client.close()


def job(scans, output, **changes):
    return {
        "fixed": str(scans / "fixed.nrrd"),
        "moving": str(scans / "moving.nrrd"),
        "output": str(output),
        "report": False,
        "options": QUICK,
        **changes,
    }


def test_ready_tells_protocol_version_and_devices_with_memory(worker):
    ready = worker.ready
    assert (ready["event"], ready["protocol"], ready["version"]) == ("ready", 1, __version__)
    cpu = ready["devices"][0]
    assert cpu["name"] == "cpu" and abs(cpu["memory_gb"] - psutil.virtual_memory().total / 1e9) < 0.1


def test_ping_and_methods(worker):
    assert worker.ask({"id": "a", "command": "ping"}) == ([], {"id": "a", "event": "result", "result": {}})
    methods = worker.ask({"id": "b", "command": "methods"})[1]["result"]
    assert methods[0]["name"] == "syn" and {"sm-gicnet", "hsyn"} <= {method["name"] for method in methods}


@pytest.mark.parametrize(
    "line, said",
    [
        (b"this is not JSON", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"id": "x", "command": "dance"}', "unknown command 'dance'"),
        (b'{"id": "x", "command": ["register"]}', "unknown command"),
        (b'{"id": "x", "command": "ping", "now": 1}', "unknown field 'now'"),
        (b'{"id": "x", "command": "register"}', "must be a JSON object"),
        (b'{"id": "x", "command": "register", "job": {"fixed": "a"}}', "has no 'moving'"),
        (
            b'{"id": "x", "command": "register", "job": {"fixed": "a", "moving": "b", "output": "c", "colour": 1}}',
            "unknown field 'colour'",
        ),
        (b'{"id": "x", "command": "register", "job": {}, "outputs": ["everything"]}', "'outputs'"),
        (b'{"id": "x", "command": "apply", "arguments": 3}', "apply request"),
        (b'{"id": "x", "command": "report", "arguments": {"path": 1}}', "report request"),
        (b'{"id": "x", "command": "ping", "pad": "' + b"y" * (2 << 20) + b'"}', "longer than"),
        (b"[" * 200_000, "not JSON"),
        (b'{"id": "x", "command": "\xff\xfe"}', "not JSON"),
    ],
)
def test_bad_lines_get_an_error_line_and_nothing_breaks(worker, line, said):
    worker.send(line)
    event = worker.next()
    assert event["event"] == "error" and event["exit_code"] == 2 and said in event["message"], event
    assert worker.ask({"id": "after", "command": "ping"})[1]["event"] == "result"


def test_register_reports_progress_and_writes_raw_files_on_demand(worker, scans, tmp_path):
    progress, end = worker.ask(
        {"id": "r", "command": "register", "job": job(scans, tmp_path / "out"), "outputs": ["forward", "jacobian"]}
    )
    assert end["event"] == "result" and end["id"] == "r", end
    fractions = [event["fraction"] for event in progress]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert {"read", "align", "write"} <= {event["stage"] for event in progress}
    assert all(event["seconds_left"] is None or event["seconds_left"] >= 0 for event in progress)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"forward.nrrd", "jacobian.nrrd", "metrics.json"}
    assert b"encoding: raw" in (tmp_path / "out/forward.nrrd").read_bytes()[:1000]
    result = end["result"]
    assert result["similarity"]["after"] > result["similarity"]["before"]
    assert result["verdict"]["level"] in ("good", "look", "bad") and result["verdict"]["checks"]
    report = worker.ask({"id": "p", "command": "report", "arguments": {"path": str(tmp_path / "r.html")}})[1]
    assert report["event"] == "result" and "<html" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_transforms_are_those_of_the_library_bit_by_bit(worker, scans, tmp_path):
    from SymRegistrationLib import pipeline, read_volume, run
    from SymRegistrationLib.geometry.transform_files import physical, read_transform

    worker.ask(
        {"id": "r", "command": "register", "job": job(scans, tmp_path / "raw"), "outputs": ["forward", "inverse"]}
    )
    run(Job.from_dict(job(scans, tmp_path / "files")))
    result = pipeline.register(read_volume(scans / "fixed.nrrd"), read_volume(scans / "moving.nrrd"), Options(**QUICK))
    for part in ("forward", "inverse"):
        field = getattr(result, part)
        raw = sitk.ReadImage(str(tmp_path / f"raw/{part}.nrrd"))
        assert np.array_equal(sitk.GetArrayFromImage(raw), field.displacement)
        assert np.allclose(raw.GetOrigin(), field.grid.itk[2], atol=1e-9) and np.allclose(
            raw.GetSpacing(), field.grid.itk[1], atol=1e-12
        )
        stored = physical(read_transform(tmp_path / f"files/{part}.h5"), None)
        assert np.array_equal(stored.displacement, field.displacement)
        for key in ("before", "after"):
            told = np.array(raw.GetMetaData(key).split(), float).reshape(4, 4)
            assert np.array_equal(told, getattr(field, key)) and np.allclose(getattr(stored, key), told, atol=1e-12)


def test_a_failed_job_tells_why_and_the_next_one_runs(worker, scans, tmp_path):
    for change, said in (
        ({"fixed": str(tmp_path / "no.nrrd")}, "does not exist"),
        ({"options": {**QUICK, "method": "magic"}}, "magic"),
        ({"options": {**QUICK, "device": "cuda:7"}}, "not available"),
        ({"options": {**QUICK, "method": "hsyn", "weights": str(tmp_path / "no.safetensors")}}, "no.safetensors"),
    ):
        end = worker.ask({"id": "f", "command": "register", "job": job(scans, tmp_path / "bad", **change)})[1]
        assert end["event"] == "error" and said in end["message"] and end["hint"], end
        assert not list(tmp_path.glob("bad/*"))
    end = worker.ask({"id": "g", "command": "register", "job": job(scans, tmp_path / "good"), "outputs": ["forward"]})[
        1
    ]
    assert end["event"] == "result"


def test_one_job_does_not_influence_the_next(worker, scans, tmp_path):
    """A job without settings computes the same bits, with the same threads, before and after jobs with settings of
    their own, one of which fails in mid-run."""
    plain = {"preset": "fast", "initial": "centre"}

    def register(name, **settings):
        request = job(scans, tmp_path / name, options={**plain, **settings})
        end = worker.ask({"id": name, "command": "register", "job": request, "outputs": ["forward", "inverse"]})[1]
        return end.get("result"), [
            sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted((tmp_path / name).glob("*.nrrd"))
        ]

    first, fields = register("first")
    threads = int(first["environment"]["threads"])
    other = register("other", threads=threads + 1, seed=7, device="cpu", initial="rigid")[0]
    assert (other["environment"]["threads"], other["seed"], other["device"]) == (str(threads + 1), 7, "cpu")
    assert register("failed", threads=threads + 2, seed=8, method="hsyn", weights="none")[0] is None
    again, same = register("again")
    assert (again["environment"], again["seed"]) == (first["environment"], first["seed"])
    assert len(fields) == 2 and all(np.array_equal(a, b) for a, b in zip(fields, same, strict=True))


def test_out_of_memory_and_bugs_are_told_in_words(monkeypatch):
    import io

    import torch

    from SymRegistrationLib.commands.worker import Worker
    from SymRegistrationLib.jobs import register

    for error, said in (
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
    ):

        def fail(*arguments, error=error, memory=None):
            raise error

        monkeypatch.setattr(register, "run", fail)
        answers = io.BytesIO()
        request = json.dumps({"id": "1", "command": "register", "job": {"fixed": "a", "moving": "b", "output": "c"}})
        Worker(io.BytesIO(), answers)._answer(request.encode())
        event = json.loads(answers.getvalue())
        assert event["event"] == "error" and said in event["message"] and event["exit_code"] == 1 and event["hint"]


def test_apply_and_evaluate(worker, scans, tmp_path):
    worker.ask(
        {"id": "r", "command": "register", "job": job(scans, tmp_path / "out"), "outputs": ["forward", "warped_moving"]}
    )
    arguments = {
        "input": str(scans / "moving.nrrd"),
        "transform": str(tmp_path / "out/forward.nrrd"),
        "reference": str(scans / "fixed.nrrd"),
        "output": str(tmp_path / "moved.nrrd"),
    }
    end = worker.ask({"id": "a", "command": "apply", "arguments": arguments})[1]
    assert end["event"] == "result", end
    moved, warped = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(float)
        for path in (tmp_path / "moved.nrrd", tmp_path / "out/warped_moving.nrrd")
    )
    inside = (slice(3, -3),) * 3
    assert np.abs(moved - warped)[inside].max() <= 1
    arguments = {"transform": str(tmp_path / "out/forward.nrrd"), "fixed": str(scans / "fixed.nrrd")}
    end = worker.ask({"id": "e", "command": "evaluate", "arguments": arguments})[1]
    assert end["result"]["quality"]["folded_voxels"] == 0


def test_closed_stdin_ends_an_idle_worker_at_once():
    client = Client()
    client.next()
    client.process.stdin.close()
    assert client.process.wait(timeout=SAFE) == 0
    client.process.stdout.close()


def test_closed_stdin_gives_up_a_running_job_and_leaves_nothing(scans, tmp_path):
    client = Client()
    client.next()
    big = tmp_path / "big.nrrd"
    sitk.WriteImage(to_itk(*scan(shape=(96, 96, 96), spacing=1.1)), str(big))
    client.send(
        {
            "id": "1",
            "command": "register",
            "job": {
                "fixed": str(big),
                "moving": str(scans / "moving.nrrd"),
                "output": str(tmp_path / "out"),
                "options": {"preset": "thorough"},
            },
        }
    )
    while client.next()["fraction"] < 0.03:
        pass
    client.process.stdin.close()
    assert client.process.wait(timeout=SAFE) == 0
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    client.process.stdout.close()


def test_shutdown_command_and_a_killed_worker(scans):
    client = Client()
    client.next()
    assert client.ask({"id": "z", "command": "shutdown"})[1]["event"] == "result"
    assert client.process.wait(timeout=SAFE) == 0
    client.close()
    client = Client()
    client.next()
    assert os.getpgid(client.process.pid) == client.process.pid, "the worker leads no group of its own"
    os.killpg(client.process.pid, signal.SIGKILL)
    assert client.process.wait(timeout=SAFE) == -signal.SIGKILL
    client.close()


def test_starting_without_torch_says_what_is_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "SymRegistrationLib", "worker"],
        env=environment,
        input=b"",
        capture_output=True,
        check=False,
        timeout=SAFE,
    )
    event = json.loads(done.stdout)
    assert (
        done.returncode == 1
        and event["event"] == "error"
        and "libtorch_cpu" in event["message"]
        and "install" in event["hint"]
    )


def test_nothing_but_events_on_stdout(worker, scans, tmp_path):
    """A library that prints, in Python or in C, must not break the protocol."""
    code = (
        "import os, sys\nfrom SymRegistrationLib.commands import worker\nfrom SymRegistrationLib.jobs import methods\n"
        "def noisy():\n    print('python says hello')\n    os.write(1, b'C says hello\\n')\n    return []\n"
        "methods.catalogue = noisy\nsys.exit(worker.main([]))"
    )
    lines = [json.dumps({"id": "1", "command": "methods"}), json.dumps({"id": "2", "command": "shutdown"})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        input="\n".join(lines).encode() + b"\n",
        capture_output=True,
        check=False,
        timeout=SAFE,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["ready", "result", "result"]
    assert b"python says hello" in done.stderr and b"C says hello" in done.stderr


def test_progress_is_throttled(monkeypatch):
    """At most ten lines a second and every new stage: 2000 steps of a millisecond, the second half a new stage."""
    import io

    from SymRegistrationLib.commands import worker as module

    now = iter(range(10_000, 20_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now) / 1000)
    answers = io.BytesIO()
    progress = module.Worker(io.BytesIO(), answers)._progress("1")
    for k in range(2000):
        progress("align" if k < 1000 else "optimise", k / 2000, "step")
    stages = [json.loads(line)["stage"] for line in answers.getvalue().splitlines()]
    assert stages == sorted(stages) and [stages.count(stage) for stage in ("align", "optimise")] == [10, 10]


def test_levels_good_enough_undo_and_redo(worker, scans, tmp_path):
    out = str(tmp_path / "out")
    job = Job(
        str(scans / "fixed.nrrd"),
        str(scans / "moving.nrrd"),
        out,
        report=False,
        keep_state=True,
        options=Options(**QUICK),
    )
    outputs = ["forward", "warped_moving"]
    worker.send({"id": "1", "command": "register", "job": json.loads(job.to_json()), "outputs": outputs, "live": True})
    levels, last = [], {}
    while last.get("event") not in ("result", "error"):
        last = worker.next()
        if last["event"] == "level":
            levels.append((last["level"], last["levels"], sitk.ReadImage(last["image"]).GetSize()))
    assert last["event"] == "result" and [entry[0] for entry in levels] == [1, 2, 3] and levels[0][1] == 3
    worker.send({"id": "2", "command": "enough"})
    assert worker.next() == {"id": "2", "event": "result", "result": {"running": False}}
    worker.send({"id": "3", "command": "undo", "folder": out})
    answer = worker.next()
    assert answer["event"] == "error" and "nothing to undo" in answer["message"]
    worker.send({"id": "4", "command": "history", "folder": out})
    assert worker.next()["result"]["current"] == 1


def test_continue_goes_on_as_update_and_repair_do_and_refuses_what_is_not_known(worker, scans, tmp_path):
    out = str(tmp_path / "out")
    paths = [str(scans / f"{side}.nrrd") for side in ("fixed", "moving")]
    job = Job(*paths, out, report=False, keep_state=True, options=Options(**QUICK))
    worker.send({"id": "1", "command": "register", "job": json.loads(job.to_json()), "outputs": ["forward"]})

    def answer():
        event = worker.next()
        while event["event"] == "progress":
            event = worker.next()
        return event

    first = answer()
    assert first["event"] == "result", first
    assert first["result"]["verdict"]["conclusion"] in ("PASS", "WARN", "FAIL")
    assert isinstance(first["result"]["verdict"]["registered"], bool)
    send = {"command": "continue", "folder": out, "outputs": ["forward"]}
    for wrong, said in (
        ({"changes": {"nonsense": 1}}, "unknown field 'nonsense' in the changes"),
        ({"options": {"nonsense": 1}}, "unknown field 'nonsense' in the options"),
        ({"options": [1]}, "must be objects"),
        ({"options": {"stiffness": 99}}, "stiffness"),
    ):
        worker.send({"id": "2", **send, **wrong})
        told = answer()
        assert told["event"] == "error" and said in told["message"], told
    worker.send({"id": "3", **send, "options": {"stiffness": 2.0}})
    assert answer()["result"]["job"]["options"]["stiffness"] == 2.0
    worker.send({"id": "4", "command": "history", "folder": out})
    assert [step["step"] for step in answer()["result"]["steps"]] == ["register", "update"]
