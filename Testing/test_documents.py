"""Texts that lead somewhere: cross references of docstrings, links, anchors and files of the documents, citations."""

import ast
import importlib
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
from test_architecture import PLAN

from SymRegistrationLib.commands import arguments

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "SymRegistrationLib"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(p for top in ("Resources", "SymRegistration", "Testing") for p in (ROOT / top).rglob("*.md")),
    ]
)
MATHEMATICS = ROOT / "Resources" / "Documentation" / "mathematics.md"
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data):`~?([^`]+)`")
#: Upper-case documents that are cited but are no files of this repository.
STRANGERS = re.compile(r"\b(METHODS|FEASIBILITY|DESIGN|HOUSE|STYLE|NETWORKS|SLICER)(\.md\b| \d)")


def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(source(path))


@lru_cache
def sources() -> list[Path]:
    return sorted(p for top in ("SymRegistrationLib", "SymRegistration", "Testing") for p in (ROOT / top).rglob("*.py"))


# ---------------------------------------------------------------------------------------------- docstrings


def _dotted(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] in ("SymRegistration", "Testing") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _assigned(node: ast.AST) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = []
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Name):
                names.append(part.id)
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                names.append(part.attr)
    return names


@lru_cache
def names_of(path: Path) -> frozenset[str]:
    """What a file defines: functions, classes, ``Class.member``, variables."""
    found = set()
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                own = [inner.name] if isinstance(inner, ast.FunctionDef) else _assigned(inner)
                found.update(f"{node.name}.{name}" for name in own)
        found.update(_assigned(node))
    return frozenset(found)


@lru_cache
def modules() -> dict[str, Path]:
    return {_dotted(path): path for path in sources()}


def resolves(target: str, path: Path) -> bool:
    """Whether ``target`` of a docstring in ``path`` exists: a module or a name, from here or from anywhere."""
    here = _dotted(path)
    package = here if path.stem == "__init__" else here.rpartition(".")[0]
    candidates = [package + target] if target.startswith(".") else [target, f"{package}.{target}"]
    if any(name in modules() or (ROOT / name.replace(".", "/")).is_dir() for name in candidates):
        return True
    for name in candidates:
        parts = name.split(".")
        for k in range(1, len(parts)):
            owner = modules().get(".".join(parts[:k]))
            if owner is not None and ".".join(parts[k:]) in names_of(owner):
                return True
    if target.startswith("."):
        return False
    known = names_of(path)
    if target in known or any(name.partition(".")[2] == target for name in known):
        return True
    first, *rest = target.split(".")
    owner, name = _imported(path).get(first, (None, ""))  # what this file imports from ours
    return owner is not None and ".".join(filter(None, [name, *rest])) in names_of(owner)


@lru_cache
def _imported(path: Path) -> dict[str, tuple[Path, str]]:
    parts, found = _dotted(path).split("."), {}
    package = parts if path.stem == "__init__" else parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                whole, owner = modules().get(f"{parent}.{alias.name}"), modules().get(parent)
                if whole or owner:
                    found[alias.asname or alias.name] = (whole, "") if whole else (owner, alias.name)
    return found


def test_cross_references_resolve():
    wrong = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in sources()
        for target in ROLE.findall(source(path))
        if path != Path(__file__) and not resolves(target.removesuffix("()"), path)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_text_cites_a_document_that_is_not_here():
    texts = [*sources(), *DOCUMENTS, *(ROOT / "SymRegistration").rglob("*.ui")]
    wrong = [
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in texts
        if path != Path(__file__)
        for found in STRANGERS.finditer(source(path))
        if not (ROOT / f"{found.group(1)}.md").is_file()
    ]
    assert not wrong, "\n".join(wrong)


def test_cited_sections_of_the_mathematics_exist():
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?) ", source(MATHEMATICS), re.M))
    assert len(sections) > 50
    cited = [
        (path, number)
        for path in [*sources(), *DOCUMENTS]
        for first, second in re.findall(r"mathematics\.md, (\d+(?:\.\d+)?)(?: and (\d+(?:\.\d+)?))?", source(path))
        for number in (first, second)
        if number
    ]
    assert len(cited) > 10
    assert not [f"{path.name}: {number}" for path, number in cited if number not in sections]


# ---------------------------------------------------------------------------------------------- documents


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a document."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", _prose(source(path)), re.M):
        plain = re.sub(r"[`*_]|\]\([^)]*\)|\[", "", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


def _prose(text: str) -> str:
    """Without fenced code, whose comments look like headings."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(path):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(source(path))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong, f"{path.name}: {wrong}"


#: What a document may name without it being in the repository: what runs write, and what a user has.
WRITTEN = re.compile(
    r"(^|/)(derivatives|sourcedata|out|result|run|RUNS|ID|demo|cohort|scans?|pairs|label_maps|tiny)(/|$)|NAME|METHOD|SIZE|\*|FOLDER"
)


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_that_documents_name_exist(path):
    """Names in backquotes that look like paths of ours; what changed may name what is gone."""
    tops = [path.parent, ROOT, LIBRARY, ROOT / "SymRegistration", ROOT / "SymRegistration" / "SymRegistrationGui"]
    tops += [ROOT / "Testing" / "benchmarks", *(p for p in LIBRARY.iterdir() if p.is_dir())]
    wrong = []
    for name in re.findall(r"`([\w./*-]+)`", _prose(source(path))):
        ours = name.endswith((".py", ".ui", "/")) or re.match(r"(Testing|Resources|SymRegistration\w*)/", name)
        if ours and not WRITTEN.search(name) and not any((top / name).exists() for top in tops):
            wrong.append(name)
    assert not wrong, f"{path.name}: {wrong}"


def _commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        lines = re.findall(r"^ {4}(symreg .*)$", _prose(source(path)), re.M) + re.findall(
            r"`(symreg \w+ [^`]+)`", source(path)
        )
        found += [
            (path.name, part.strip()) for line in lines for part in re.split(r" {3,}|&&", line)[:2] if "symreg" in part
        ]
    return found


@pytest.mark.parametrize("document, command", _commands())
def test_commands_in_documents_are_understood(document, command):
    """By the parsers: names of commands, options and choices are those that exist."""
    name, *words = shlex.split(command, comments=True)[1:]
    if "--help" in words:
        words = []
    elif name in arguments.SUBCOMMANDS:
        file = "train_pool" if name == "train" and "--pool" in words else arguments.SUBCOMMANDS[name][0]
        module = importlib.import_module(f"SymRegistrationLib.commands.{file}")
        module.build_parser().parse_args(words)
        return
    if name == "evaluate" and not words:
        return
    arguments.build_parser().parse_args([name, *words])


def test_the_picture_of_the_rooms_is_the_floor_plan():
    """Every room is drawn, and imports lead down or to the right."""
    drawn = {}
    picture = source(MATHEMATICS.with_name("architecture.svg"))
    for x, y, names in re.findall(r'<text x="(\d+)" y="(\d+)" class="code">([^<]+)</text>', picture):
        for place, name in enumerate(names.split()):
            drawn[name.rstrip("/")] = int(y), int(x), place
    plan = {name: set(uses) for name, uses in PLAN.items() if not name.startswith("__")}
    assert set(plan) <= set(drawn)
    assert not [f"{name} -> {other}" for name, uses in plan.items() for other in uses if drawn[other] <= drawn[name]]


def test_the_readme_keeps_its_two_one_line_commands():
    lines = re.findall(r"^    (python3 -m venv .*)$", source(ROOT / "README.md"), re.M)
    assert len(lines) == 2 and "symreg demo" in lines[0] and " -m pytest -n 3" in lines[1]
    assert "Research use only" in source(ROOT / "README.md")
