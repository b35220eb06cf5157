"""The table of floors in CONTRIBUTING.md is how the package is built."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import horsehuman

ROOT = Path(horsehuman.__file__).parent
TABLE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
FLOORS = ("bottom", "data", "models", "package", "to be seen", "top")


def floor_of_each() -> dict[str, str]:
    found = {}
    for floor in FLOORS:
        (row,) = re.findall(rf"^\| {floor} \| (.*?) \|", TABLE, re.MULTILINE)
        folder = f"{floor}/" if floor in ("data", "models") else ""
        for name in re.findall(r"`(\w+)`", row):
            found[f"{folder}{name}"] = floor
    return found


def modules() -> dict[str, Path]:
    paths = (path for path in ROOT.rglob("*.py") if not path.name.startswith("__"))
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in paths}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "horsehuman":
            found |= {name.name for name in node.names if name.name in modules()}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("horsehuman."):
            found.add(str(node.module).removeprefix("horsehuman.").replace(".", "/"))
    return found


def test_every_file_stands_on_one_floor() -> None:
    assert sorted(floor_of_each()) == sorted(modules())


def test_nothing_imports_what_stands_above_it() -> None:
    floor = floor_of_each()
    for name, path in modules().items():
        for other in imports(path):
            here, there = floor[name], floor[other]
            assert FLOORS.index(there) <= FLOORS.index(here), f"{name} imports {other}"
            assert (here, there) != ("models", "data"), f"{name} imports {other}"
