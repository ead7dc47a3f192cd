"""The dependency direction, the weight of an import, and the size of the rooms."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "SymRegistrationLib"
LEVELS = dict(enumerate([
    {"job", "geometry", "report_style", "__init__"},
    {"batch_table"},
    {"volumes", "fields", "devices", "console", "arguments", "topology"},
    {"losses", "preprocess", "points", "weights", "pictures", "report_numbers", "regions", "calibration"},
    {"alignment", "transforms", "synthetic"},
    {"networks", "optimise", "quality", "resampling"},
    {"inference", "dataset", "training_options", "report_pictures", "uncertainty", "catalogue", "apply", "evaluate"},
    {"pipeline", "report", "training"},
    {"outputs"},
    {"batch"},
    {"demo", "worker", "group"},
    {"cli"},
    {"__main__", "training_command", "batch_command"},
    {"group_command", "propagate_command"},
]))
LEVEL = {name: level for level, names in LEVELS.items() for name in names}


def level(room: str) -> int | None:
    """Of a room, or of the family before its underscore (``dataset_samples`` lies with ``dataset``)."""
    return LEVEL.get(room, LEVEL.get(room.split("_")[0]))


#: Doors that a room opens only when it is used; each is an import inside a function.
LAZY = {("__init__", "pipeline"), ("__init__", "outputs"), ("pipeline", "outputs")}
ALLOWED_OUTSIDE = {"torch", "numpy", "SimpleITK", "safetensors", "psutil", "nibabel", "tqdm", "tensorboard", "distributed"}
FORBIDDEN = {"slicer", "qt", "ctk", "vtk", "PySide6", "vtkmodules", "slicer_core", "pickle"}


def imports(path: Path):
    """(module, at the top level of the file?, relative level) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top, 0
        elif isinstance(node, ast.ImportFrom):
            if node.level and node.module is None:
                for alias in node.names:
                    yield alias.name, id(node) in top, node.level
            else:
                yield node.module, id(node) in top, node.level


def rooms():
    return [path for path in LIBRARY.rglob("*.py")]


def room_of(path: Path) -> str:
    return "networks" if path.parent.name == "networks" else path.stem


def test_every_room_has_a_level():
    unknown = {room_of(path) for path in rooms() if level(room_of(path)) is None}
    assert not unknown, f"give them a level in this test: {unknown}"


def test_imports_point_downward():
    wrong = []
    for path in rooms():
        here = room_of(path)
        for module, at_top, relative in imports(path):
            if not relative or module == "__version__":
                continue
            inside = path.parent.name == "networks" and relative == 1
            target = "networks" if inside else module.split(".")[0]
            if inside:
                name = module.split(".")[0]
                if path.stem not in ("__init__",) and not name.startswith("_"):
                    wrong.append(f"{path.name} imports its sibling {name}")
                continue
            if target == "networks" and here == "networks":
                continue
            same_room = target.split("_")[0] == here.split("_")[0]
            if (here, target) not in LAZY and not same_room and level(target) >= level(here):
                wrong.append(f"{here} (L{level(here)}) imports {target} (L{level(target)})")
    assert not wrong, "\n".join(wrong)


def test_the_library_knows_no_slicer_and_few_packages():
    for path in rooms():
        for module, _, relative in imports(path):
            root = module.split(".")[0]
            if relative or root in sys.stdlib_module_names:
                assert root not in FORBIDDEN, f"{path.name} imports {root}"
                continue
            assert root in ALLOWED_OUTSIDE, f"{path.name} imports {root}"


def test_the_slicer_module_uses_only_the_torch_free_bottom():
    for path in (ROOT / "SymRegistration").rglob("*.py"):
        for module, _, _ in imports(path):
            parts = (module or "").split(".")
            if parts[0] == "SymRegistrationLib" and len(parts) > 1:
                assert level(parts[1]) <= 1, f"{path.name} imports {module}"
            assert parts[0] != "torch", f"{path.name} imports torch"


def test_importing_the_library_and_asking_for_help_loads_no_torch():
    code = ("import sys, time; start = time.process_time(); import SymRegistrationLib; from SymRegistrationLib import cli\n"
            "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules, 'torch'; assert time.process_time() - start < 1, 'slow'")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_rooms_and_functions_stay_small():
    wrong = []
    for path in [*rooms(), *(ROOT / "SymRegistration").rglob("*.py")]:
        text = path.read_text()
        if len(text.splitlines()) > 500:
            wrong.append(f"{path.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 66:
                wrong.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not wrong, "\n".join(wrong)


def test_everything_public_says_what_it_is():
    wrong = []
    for path in rooms():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            wrong.append(path.name)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") \
                    and not ast.get_docstring(node):
                wrong.append(f"{path.name}: {node.name}")
    assert not wrong, "\n".join(wrong)
