"""What a Slicer user gets: the extension is really configured, built and installed, and compared with the sources."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder of the scripted modules, fields that CMake saw, ctest's list)."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("install")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        [cmake, "-S", ROOT, "-B", build, f"-DSlicer_DIR={ROOT / 'Testing/slicer_config'}", *generator],
        [cmake, "--build", build],
        [cmake, "--install", build, "--prefix", target],
    ):
        done = subprocess.run([str(part) for part in command], capture_output=True, check=False, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    tests = (build / "SymRegistration/CTestTestfile.cmake").read_text()
    fields = dict(line.split("=", 1) for line in (build / "extension.txt").read_text().splitlines())
    return target / "lib/Slicer-5.12/qt-scripted-modules", fields, tests


def _sources():
    """What a user needs, found on disk without CMake's help: every Python file, every resource, every weight."""
    module, library = ROOT / "SymRegistration", ROOT / "SymRegistrationLib"
    files = {path: path.relative_to(module) for path in module.rglob("*") if path.is_file()}
    files |= {path: path.relative_to(ROOT) for path in library.rglob("*") if path.is_file()}
    left_out = {"CMakeLists.txt", "README.md"}
    return {
        str(place)
        for path, place in files.items()
        if path.name not in left_out and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_everything_is_shipped_and_nothing_else(installed):
    folder, _, _ = installed
    shipped = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert shipped == _sources()


def test_the_installed_module_finds_its_library(installed):
    folder, _, _ = installed
    code = "import SymRegistrationLib, SymRegistrationLib.job; print(SymRegistrationLib.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=False, text=True)
    assert done.stdout.strip() == str(folder / "SymRegistrationLib/__init__.py"), done.stderr
    code = "import sys, SymRegistrationLib.commands.cli as c; sys.exit(c.main(['methods', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr


def test_the_self_test_is_registered_with_and_without_a_main_window(installed):
    names = re.findall(r'add_test\((?:\[=*\[)?"?(\w+)', installed[2])
    assert names == ["py_SymRegistration", "py_nomainwindow_SymRegistration"]
    lines = {
        name: next(line for line in installed[2].splitlines() if re.search(rf"\b{name}\b", line)) for name in names
    }
    assert ["--no-main-window" in lines[name] for name in names] == [False, True]


def test_the_cmake_that_slicer_5_10_asks_for_is_enough():
    """Slicer 5.10's template of an extension says 3.20.6...3.22.6; asking for more would keep its builds out."""
    low, high = re.search(
        r"cmake_minimum_required\(VERSION ([\d.]+?)\.\.\.([\d.]+)\)", (ROOT / "CMakeLists.txt").read_text()
    ).groups()
    numbers = [tuple(map(int, version.split("."))) for version in (low, high)]
    assert numbers[0] <= (3, 20, 6) and numbers[1] >= (3, 22, 6)


def test_the_owners_lines_agree_everywhere(installed):
    """about.py is the one place to fill in; this names the lines that have to follow."""
    import slicer_harness

    app = slicer_harness.start()
    from SymRegistrationGui import about

    _, fields, _ = installed
    entry = json.loads((ROOT / "Resources/SymRegistration.json").read_text(encoding="utf-8"))
    assert fields["HOMEPAGE"] == about.REPOSITORY, "CMakeLists.txt: EXTENSION_HOMEPAGE"
    assert entry["scm_url"] == f"{about.REPOSITORY}.git", "Resources/SymRegistration.json: scm_url"
    assert entry["scm_revision"] == about.BRANCH, "Resources/SymRegistration.json: scm_revision"
    assert fields["CONTRIBUTORS"] == ", ".join(about.CONTRIBUTORS), "CMakeLists.txt: EXTENSION_CONTRIBUTORS"
    raw = about.REPOSITORY.replace("github.com", "raw.githubusercontent.com") + f"/{about.BRANCH}/"
    for url in (fields["ICONURL"], *fields["SCREENSHOTURLS"].split()):
        assert url.startswith(raw), "CMakeLists.txt: EXTENSION_ICONURL, EXTENSION_SCREENSHOTURLS"
    readme = (ROOT / "SymRegistration/README.md").read_text(encoding="utf-8")
    assert about.CITATION in " ".join(readme.split()), "SymRegistration/README.md: How to cite"
    parent, _module = slicer_harness.loadModule(app)
    assert parent.contributors == list(about.CONTRIBUTORS) and about.CITATION in parent.acknowledgementText
    assert f'href="{about.documentation()}"' in parent.helpText, "the help links the documentation"
    assert (ROOT / about.documentation().split(f"/blob/{about.BRANCH}/")[1]).is_file()


def test_catalog_entry_agrees_with_cmake(installed):
    _, fields, _ = installed
    text = (ROOT / "Resources/SymRegistration.json").read_text(encoding="utf-8")
    entry = json.loads(text)
    assert "\r" not in text
    assert set(entry) <= {
        "$schema",
        "category",
        "scm_url",
        "scm_revision",
        "scm_type",
        "build_dependencies",
        "build_subdirectory",
        "enabled",
        "tier",
    }
    assert entry["category"] == "Registration"
    assert entry["build_dependencies"] == fields["DEPENDS"].split(";") == ["PyTorch"]
    assert fields["PROJECT"] == "SymRegistration" and not fields["PROJECT"].startswith("Slicer")
    assert entry["scm_url"].removesuffix(".git") == fields["HOMEPAGE"]
    assert 60 < len(fields["DESCRIPTION"]) < 400


def test_icon_and_screenshots_are_the_files_that_the_urls_name(installed):
    _, fields, _ = installed
    base = fields["HOMEPAGE"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    literal = re.findall(
        r'set\(EXTENSION_(?:ICONURL|SCREENSHOTURLS) "([^"$]+)"\)', (ROOT / "CMakeLists.txt").read_text()
    )
    urls = " ".join(literal).split()
    assert set(urls) == {fields["ICONURL"], *fields["SCREENSHOTURLS"].split()}
    for url in urls:
        assert url.startswith(base)
        assert (ROOT / url.removeprefix(base)).read_bytes()[:4] == b"\x89PNG"


def test_icons_exist_for_light_and_dark():
    icons = ROOT / "SymRegistration/Resources/Icons"
    light, dark = ((icons / f"SymRegistration{kind}.svg").read_text() for kind in ("", "Dark"))
    assert light.startswith("<svg") and dark.startswith("<svg") and light != dark


def test_only_nodes_knows_ras():
    """RAS axes appear as code in nodes.py alone; elsewhere only in its function names and in texts."""
    for path in (ROOT / "SymRegistration").rglob("*.py"):
        if path.name == "nodes.py":
            continue
        code = "\n".join(line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
        code = re.sub(r'"""[\s\S]*?"""', "", code).replace("rasFromLps", "")
        assert not re.search(r"\bRAS\b|IJKToRAS|\[-1\.?0?, -1", code), path.name


def test_files_stay_small():
    for folder in ("SymRegistration", "Testing/slicer_harness"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_every_data_file_of_the_library_is_installed():
    """Presets, calibrations and weights: what pip installs, Slicer installs too."""
    folder = ROOT / "SymRegistrationLib"
    patterns = re.findall(r'"([\w/]+/\*[\w.]*)"', (folder / "CMakeLists.txt").read_text(encoding="utf-8"))
    listed = {path for pattern in patterns for path in folder.glob(pattern)}
    present = {path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}
    assert present and present <= listed
    packed = re.search(r"SymRegistrationLib = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)
    assert set(patterns) <= set(re.findall(r'"(.*?)"', packed))
