"""The floor plan: which room may use which, the weight of an import, and the size of the rooms."""

import ast
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from conftest import LONGEST

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "SymRegistrationLib"

#: Every room with the rooms it may import from, at any depth and inside functions too. A room may always use its own
#: files. This is the only floor plan; it is acyclic, which a test checks.
# fmt: off
PLAN = {
    "__init__": {"job", "geometry", "pipeline"},
    "__main__": {"commands"},
    "job": set(),
    "console": {"job"},
    "files": {"job"},
    "fields": set(),
    "losses": {"fields"},
    "geometry": {"job", "fields"},
    "networks": {"job", "fields", "losses"},
    "registration": {"job", "files", "fields", "losses", "geometry", "networks"},
    "quality": {"console", "losses", "geometry"},
    "uncertainty": {"job", "fields", "losses", "geometry", "networks", "registration", "quality"},
    "pipeline": {"job", "fields", "geometry", "registration", "quality", "uncertainty"},
    "report": {"job", "console", "geometry", "quality"},
    "training": {"job", "console", "files", "fields", "losses", "geometry", "networks", "registration",
                 "quality", "report"},
    "jobs": {"job", "console", "files", "geometry", "networks", "registration", "quality", "pipeline", "report"},
    "cohort": {"job", "console", "files", "geometry", "registration", "quality", "pipeline", "report",
               "training", "jobs"},
    "commands": {"job", "console", "files", "geometry", "registration", "quality", "pipeline", "report",
                 "training", "jobs", "cohort"},
}
# fmt: on
#: What the Slicer module may import: it starts without torch and SimpleITK, and so do these.
FOR_SLICER = {
    "job",
    "geometry.grid",
    "geometry.itk_hdf5",
    "cohort.table",
    "quality.outputs",
    "registration.anatomies",
    "registration.catalogue",
    "registration.presets",
}
ALLOWED_OUTSIDE = {
    "torch",
    "numpy",
    "SimpleITK",
    "safetensors",
    "psutil",
    "matplotlib",
    "nibabel",
    "tqdm",
    "tensorboard",
    "distributed",
}
FORBIDDEN = {"slicer", "qt", "ctk", "vtk", "PySide6", "vtkmodules", "slicer_core", "pickle"}


@lru_cache
def files() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


@lru_cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, is it of the library?) of every import, relative ones made absolute below the library."""
    package = path.relative_to(LIBRARY).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, False))
        elif isinstance(node, ast.ImportFrom):
            parts = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            names = [".".join([*parts, alias.name]) for alias in node.names]
            found += [(name, True) for name in names if name != "__version__"]
    return found


def room(path: Path) -> str:
    parts = path.relative_to(LIBRARY).parts
    return parts[0] if len(parts) > 1 else path.stem


def test_every_room_is_in_the_plan():
    assert {room(path) for path in files()} == set(PLAN)
    assert len([p for p in LIBRARY.iterdir() if p.name != "__pycache__"]) <= 20


def test_the_plan_has_no_cycle():
    done, order = set(), []
    while len(done) < len(PLAN):
        ready = sorted(name for name, uses in PLAN.items() if name not in done and uses <= done)
        assert ready, f"a cycle among {sorted(set(PLAN) - done)}"
        order.append(ready)
        done.update(ready)


def test_rooms_import_only_what_the_plan_allows():
    wrong, used = [], {name: set() for name in PLAN}
    for path in files():
        here = room(path)
        for module, ours in imports(path):
            target = module.split(".")[0]
            if not ours or target == here:
                continue
            used[here].add(target)
            if target not in PLAN[here]:
                wrong.append(f"{path.relative_to(LIBRARY)} imports {module}")
    assert not wrong, "\n".join(wrong)
    unused = {name: PLAN[name] - used[name] for name in PLAN if name != "__init__" and PLAN[name] - used[name]}
    assert not unused, f"the plan allows what nobody uses: {unused}"


def test_networks_do_not_import_each_other():
    for path in (LIBRARY / "networks").glob("*.py"):
        siblings = [
            module
            for module, ours in imports(path)
            if ours and module.startswith("networks.") and path.stem != "__init__"
        ]
        assert all(module.split(".")[1].startswith("_") for module in siblings), path.name


def test_the_library_knows_no_slicer_and_few_packages():
    for path in files():
        for module, ours in imports(path):
            root = module.split(".")[0]
            assert ours or root not in FORBIDDEN, f"{path.name} imports {root}"
            assert ours or root in sys.stdlib_module_names or root in ALLOWED_OUTSIDE, f"{path.name} imports {root}"


def test_the_slicer_module_uses_only_what_needs_no_torch():
    for path in (ROOT / "SymRegistration").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            else:
                continue
            tops = {module.partition(".")[0] for module in modules}
            assert not tops & {"torch", "SimpleITK"}, f"{path.name} imports {modules}"
            inside = {module.partition(".")[2] for module in modules if module.startswith("SymRegistrationLib.")}
            assert not inside or inside & FOR_SLICER, f"{path.name} imports {modules}"


def test_importing_the_library_and_asking_for_help_loads_no_torch():
    modules = "".join(f", SymRegistrationLib.{name}" for name in sorted(FOR_SLICER))
    code = (
        f"import sys, SymRegistrationLib{modules}; from SymRegistrationLib.commands import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'SimpleITK'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_a_registration_loads_no_compiler_and_no_algebra():
    """torch.unravel_index, torch.optim and others load sympy or torch's compiler: up to a second in every process."""
    code = (
        "import sys; sys.path.insert(0, 'Testing'); from pairs import scan\n"
        "from SymRegistrationLib import Options, pipeline; from SymRegistrationLib.geometry.volumes import Volume\n"
        "pipeline.register(*(Volume(*scan((20, 22, 18), s, 5.0)) for s in (0.0, 6.0)), Options(preset='fast'))\n"
        "heavy = {'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_files_that_are_to_start_first_exist():
    assert set(LONGEST) <= {path.name for path in (ROOT / "Testing").rglob("test_*.py")}


def test_rooms_and_functions_stay_small():
    ours = [*files(), *(ROOT / "SymRegistration").rglob("*.py")]
    wrong = []
    for path in [*ours, *(ROOT / "Testing").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 450 and "Long because" not in (ast.get_docstring(ast.parse(text)) or ""):
            wrong.append(f"{path.name}: {len(text.splitlines())} lines")
    for path in ours:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 66:
                wrong.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not wrong, "\n".join(wrong)


def test_the_library_raises_and_asserts_nothing():
    """What a user can cause is an error in words; asserts are for tests, and vanish under ``python -O``."""
    found = [
        f"{path.relative_to(LIBRARY)}:{node.lineno}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_everything_public_says_what_it_is():
    wrong = []
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            wrong.append(path.name)
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                wrong.append(f"{path.name}: {node.name}")
    assert not wrong, "\n".join(wrong)
