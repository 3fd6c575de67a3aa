"""The stairs between the rooms go one way: every import is read, lazy and type-only ones too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ttt_lib"
# A room imports from rooms left of it; `models` and `views` stand beside each other.
STAIRS = [["core"], ["geometry"], ["data"], ["models", "views"], ["adaptation"], ["evaluation"], ["runs"], ["report"]]
LEVEL = {room: level for level, rooms in enumerate(STAIRS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the whole package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in full}
    return found & known.keys()


MODULES = modules()
GRAPH = {name: imports(path, MODULES) - {name} for name, path in MODULES.items()}


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") and name.split(".")[1] in LEVEL else ""


def test_the_rooms_are_the_folders():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(LEVEL) and len(LEVEL) <= 9


@pytest.mark.parametrize("name", [name for name in GRAPH if room(name)])
def test_no_import_goes_up_or_sideways(name):
    for target in GRAPH[name] - {"ttt_lib"}:
        assert room(target), f"{name} imports {target}, which stands above all rooms"
        lower = LEVEL[room(target)] < LEVEL[room(name)]
        assert lower or room(target) == room(name), f"{name} imports {target}: the stairs go the other way"


def test_no_circle_of_files():
    """Files without imports are taken away until none is left; what stays is a circle."""
    left = {name: targets - {"ttt_lib"} for name, targets in GRAPH.items() if name != "ttt_lib"}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_each_room_says_what_it_is():
    for name in LEVEL:
        text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert 5 <= len(text.splitlines()) <= 20 and "Comes in" in text and "Goes out" in text, name
        assert "Start reading" in text, name


LINES, FUNCTION_LINES = 300, 60  # a reason to be longer is a sentence in the docstring that begins with "Long:"


def test_files_and_functions_are_short_or_say_why():
    too_long = {}
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        lengths = [(name, len(text.splitlines()), LINES, tree)]
        lengths += [(f"{name}.{f.name}", f.end_lineno - f.lineno + 1, FUNCTION_LINES, f) for f in functions]
        too_long |= {
            what: n for what, n, most, node in lengths if n > most and "Long:" not in (ast.get_docstring(node) or "")
        }
    assert not too_long, f"split or shorten: {too_long}"
