"""The rules of the package's architecture: floors, circles, and sizes in lines of code."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

from floors import FLOORS, PACKAGE, floor_of, imported_names, imports, modules
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

import horsehuman

#: Lines of code; see :func:`code_lines`.
MODULE_BUDGET, PACKAGE_BUDGET = 320, 5700

FUNCTION_BUDGET = 45

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and node.body and ast.get_docstring(node) is not None:
            yield node.body[0]


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold code: no docstrings, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in docstrings(ast.parse(text)):
        lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_every_module_is_on_a_floor() -> None:
    assert {floor_of(module) for module in modules()} == set(FLOORS)


def test_no_module_imports_from_a_floor_above() -> None:
    for module, imported in imports().items():
        level = FLOORS.index(floor_of(module))
        above = {other for other in imported if FLOORS.index(floor_of(other)) > level}
        assert not above, f"{module} imports {above}"


def test_training_does_not_import_inference() -> None:
    for module, imported in imports().items():
        if floor_of(module) == "training":
            assert not {other for other in imported if floor_of(other) == "inference"}, module


def test_no_circle_of_imports() -> None:
    graph = imports()
    names = sorted(graph)
    edges = [[other in graph[name] for other in names] for name in names]
    count, _ = connected_components(csr_array(edges), directed=True, connection="strong")
    assert count == len(names)


def test_modules_import_from_where_a_name_is_defined() -> None:
    """Never through the public names of ``horsehuman/__init__.py``."""
    public = set(horsehuman.__all__) - {"__version__"}
    for module, path in modules().items():
        assert not imported_names(path) & public, module


def test_code_is_within_its_budget() -> None:
    sizes = {path: len(code_lines(path)) for path in PACKAGE.rglob("*.py")}
    assert sum(sizes.values()) <= PACKAGE_BUDGET
    assert not {path: size for path, size in sizes.items() if size > MODULE_BUDGET}


def test_functions_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        code = code_lines(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = len(code & set(range(node.lineno, node.end_lineno + 1)))
                assert size <= FUNCTION_BUDGET, f"{path}:{node.lineno} {node.name}"
