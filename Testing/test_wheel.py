"""The wheel that pip builds holds the whole library: code, data and weights, and works away from the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tracked source, as from a fresh checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "SymRegistrationLib").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("symregistration-*.whl"))


def test_everything_of_the_library_is_in_the_wheel(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "SymRegistrationLib").rglob("*")
        if path.suffix in (".py", ".json", ".safetensors")
    }
    assert wanted <= there, sorted(wanted - there)
    assert any(name.endswith(".safetensors") for name in wanted)


def test_the_wheel_works_away_from_its_source(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import pathlib, SymRegistrationLib\nfrom SymRegistrationLib import Options, read_volume, register\n"
        "from SymRegistrationLib.registration import methods, weights\n"
        "print(pathlib.Path(SymRegistrationLib.__file__).parent)\n"
        "print(*(name for name in methods.names() if methods.is_learned(name) and not "
        "weights.shipped(name)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    where, without = done.stdout.splitlines()
    assert where == str(tmp_path / "site/SymRegistrationLib") and not without, done.stderr
