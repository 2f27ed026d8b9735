"""The table of promises is whole, and each of its tests exists."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.promises import CONTRACT, DECISIONS, FAILURES, PAGES, Tests

TESTS = Path(__file__).parent
NAMES = {
    "meta-device", "gpu-experts-none", "threads-none", "load-order", "safe-open-close", "header-too-large",
    "device-mismatch", "routing-modified", "lora-no-effect", "int8-segfault", "router-shape", "cache-overflow",
    "cache-underflow", "grad-on-gpu", "rank-lost", "trainer-signature", "empty-experts-nan", "fp32-upcast",
    "bf16-range", "cuda-graph", "stale-active-experts", "stale-pointers",
}  # fmt: skip
PROMISES: dict[str, Tests] = {
    **{f"failure {name}": tests for name, tests in FAILURES.items()},
    **{f"rule {number}": tests for number, tests in CONTRACT.items()},
    **{f"decision {number}": tests for number, (_, tests) in DECISIONS.items()},
    **{f"{page}: {words}": tests for page, promises in PAGES.items() for words, tests in promises.items()},
}


@functools.cache
def defined(file: str) -> tuple[set[str], set[object]]:
    """The tests that a file defines, and the constants in it, of which cases are named."""
    nodes = list(ast.walk(ast.parse((TESTS / file).read_text())))
    return (
        {node.name for node in nodes if isinstance(node, ast.FunctionDef)},
        {node.value for node in nodes if isinstance(node, ast.Constant)},
    )


def missing(test: str) -> bool:
    """Whether there is no such test, or no such case of it."""
    file, _, rest = test.partition("::")
    name, _, case = rest.rstrip("]").partition("[")
    if not (TESTS / file).is_file():
        return True
    functions, constants = defined(file)
    return name not in functions or bool(case and case not in constants)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_has_tests_that_exist(promise: str) -> None:
    assert PROMISES[promise], "no test would fail"
    assert [test for test in PROMISES[promise] if missing(test)] == []


def test_the_lists_are_whole() -> None:
    assert set(FAILURES) == NAMES
    assert list(CONTRACT) == [*range(1, 21)]
    assert list(DECISIONS) == [*range(1, 16)]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_promises_stands_there(page: str) -> None:
    """Whoever changes the words looks at what they promise."""
    text = " ".join((TESTS.parent / page).read_text().split())
    assert [words for words in PAGES[page] if words not in text] == []


def test_a_test_that_is_not_there_is_noticed() -> None:
    assert not missing("test_promises.py::test_the_lists_are_whole")
    assert missing("test_promises.py::test_of_nothing")
    assert missing("test_nowhere.py::test_the_lists_are_whole")
    assert missing("test_promises.py::test_the_lists_are_whole[" + "no such case]")
