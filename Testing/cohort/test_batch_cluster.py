"""Batches on a real Dask cluster of separate processes: the same results as on one machine, also when a
worker is killed."""

import json
import os
import signal
import sys
import threading
import time

import psutil
import pytest
from distributed import LocalCluster
from test_batch import QUICK, ROOT, command, hashes, images, summary

from SymRegistrationLib.cohort import cluster as batch_cluster
from SymRegistrationLib.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pairs."""
    folder = tmp_path_factory.mktemp("cluster")
    images(folder)
    lines = ["fixed,moving,id"] + [f"Köpf {a}.nii.gz,Köpf {b}.nii.gz,p{a}{b}" for a, b in ((0, 1), (0, 2), (2, 3))]
    (folder / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cluster():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as made:
        yield made
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def children():
    """Command lines of all processes below this one, by process number."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found[process.pid] = process.cmdline()
        except psutil.Error:
            continue
    return found


def test_a_worker_killed_in_mid_run_and_the_result_is_that_of_one_machine(folder, cluster, tmp_path, capsys):
    assert main([*command(folder, "--workers", 1), "-q"]) == 0
    alone = hashes(folder / "out")
    out = tmp_path / "far"
    killed = []

    def kill():
        """Kill one Dask worker process, with its nanny's child, as soon as it has begun a pair."""
        until = time.monotonic() + 600
        while not killed and time.monotonic() < until:
            for partial in out.glob("*"):
                if partial.is_dir():
                    worker = next(iter(cluster.workers.values()))
                    killed.append(worker.pid)
                    os.kill(worker.pid, signal.SIGKILL)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    code = main(
        ["batch", str(folder / "pairs.csv"), "-o", str(out), *QUICK, "--scheduler", cluster.scheduler_address, "--json"]
    )
    thread.join()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]
    assert killed and code == 0 and result["done"] == 3, result
    assert hashes(out) == alone
    assert (
        main(["batch", str(folder / "pairs.csv"), "-o", str(out), *QUICK, "--scheduler", cluster.scheduler_address])
        == 0
    )
    assert "3 pairs are finished already" in capsys.readouterr().err


def test_a_child_that_dies_is_replaced_and_errors_come_back_in_words(folder, cluster, tmp_path, capsys):
    workers = [pid for pid, line in children().items() if line[-1:] == ["worker"] and "SymRegistrationLib" in line]
    assert workers, "the Dask workers keep theirs warm"
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    (folder / "bad.csv").write_text(
        "fixed,moving,id\nKöpf 0.nii.gz,Köpf 1.nii.gz,good\nKöpf 0.nii.gz,flat.nii.gz,flat\n", encoding="utf-8"
    )
    import numpy as np
    import SimpleITK as sitk

    sitk.WriteImage(sitk.GetImageFromArray(np.full((20, 20, 20), 3, np.int16)), str(folder / "flat.nii.gz"))
    out = tmp_path / "out"
    assert (
        main(["batch", str(folder / "bad.csv"), "-o", str(out), *QUICK, "--scheduler", cluster.scheduler_address]) == 1
    )
    assert "flat failed: moving image" in capsys.readouterr().err
    rows = summary(tmp_path)
    assert (
        rows["good"]["status"] == "done"
        and rows["good"]["attempts"] in ("1", "2")
        and "constant" in rows["flat"]["reason"]
    )


def test_other_versions_are_refused_and_missing_dask_is_told(folder, tmp_path, capsys, monkeypatch):
    assert "has SymRegistration" in batch_cluster.pair_on_worker({}, 1.0, "0.0.0")["error"]
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert (
        main(["batch", str(folder / "pairs.csv"), "-o", str(tmp_path / "o"), "--scheduler", "tcp://127.0.0.1:1"]) == 2
    )
    assert "symregistration[cluster]" in capsys.readouterr().err and not (tmp_path / "o").exists()
