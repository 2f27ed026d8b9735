"""Short files, short functions, and a docstring on every public definition."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kt_hf

PACKAGE = Path(kt_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES_OF_MODULE, MOST_LINES_OF_FUNCTION = 350, 60
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(node: ast.AST, name: str = "", public: bool = True) -> Iterator[tuple[str, Definition, bool]]:
    """Name, node, and whether it is public, of all definitions below a node; what a function defines never is."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            full = f"{name}.{child.name}".lstrip(".")
            visible = public and not child.name.startswith("_")
            yield full, child, visible
            yield from definitions(child, full, visible and isinstance(child, ast.ClassDef))
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from definitions(child, name, public)


def too_long(source: str) -> list[str]:
    """What is longer than it may be, a function with its docstring."""
    lines = len(source.splitlines())
    problems = [f"{lines} lines"] if lines > MOST_LINES_OF_MODULE else []
    for name, node, _ in definitions(ast.parse(source)):
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        if not isinstance(node, ast.ClassDef) and lines > MOST_LINES_OF_FUNCTION:
            problems.append(f"{name}: {lines} lines")
    return problems


def without_docstring(source: str) -> list[str]:
    """The public definitions, and the module itself, that say nothing."""
    tree = ast.parse(source)
    names = [] if ast.get_docstring(tree) else ["the module"]
    return names + [name for name, node, public in definitions(tree) if public and not ast.get_docstring(node)]


def problems_of_package(check: Callable[[str], list[str]]) -> list[str]:
    return [f"{file.relative_to(PACKAGE)}: {problem}" for file in FILES for problem in check(file.read_text())]


def test_modules_and_functions_are_short() -> None:
    assert problems_of_package(too_long) == []


def test_public_definitions_have_docstrings() -> None:
    assert problems_of_package(without_docstring) == []


BODY = "    x = 1\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n" * 350, []),
        ("x = 1\n" * 351, ["351 lines"]),
        (f"def f():\n{BODY * 59}", []),
        (f"def f():\n{BODY * 60}", ["f: 61 lines"]),
        (f"class C:\n{BODY * 61}", []),
        ("class C:\n    async def _f(self):\n" + f"    {BODY}" * 60, ["C._f: 61 lines"]),
        ("if True:\n    def f():\n" + f"    {BODY}" * 60, ["f: 61 lines"]),
    ],
)
def test_what_is_too_long_is_seen(source: str, expected: list[str]) -> None:
    assert too_long(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""M."""\ndef f():\n    """F."""\n    def g(): ...\n', []),
        ("x = 1\n", ["the module"]),
        ('"""M."""\ndef f(): ...\ndef _f(): ...\n', ["f"]),
        ('"""M."""\nclass C:\n    def f(self): ...\n    def __len__(self): ...\n', ["C", "C.f"]),
        ('"""M."""\nclass _C:\n    def f(self): ...\n', []),
        ('"""M."""\nif x:\n    def f(): ...\n', ["f"]),
    ],
)
def test_what_says_nothing_is_seen(source: str, expected: list[str]) -> None:
    assert without_docstring(source) == expected
