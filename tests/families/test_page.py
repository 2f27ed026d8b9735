"""docs/families.md is of the families that the tests have, and of one whole run in which all passed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.families.conftest import LIBRARIES
from tests.families.test_files import NOT_IN_STOCK, NOT_STREAMED, SHARED
from tests.families.test_gates_and_layouts import FAMILIES as GATES_AND_LAYOUTS
from tests.families.test_training import FAMILIES as TRAINED
from tests.support.families import CLASSES, REFUSED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/families.md").read_text()
HEAD, _, REST = PAGE.partition("\n| family |")
TABLE, _, LEFT = ("| family |" + REST).partition("## Refused")
COLUMNS = [head.strip() for head in TABLE.splitlines()[0].strip("|").split("|")][1:]
# Columns of tests that are for some families alone: those that the tests are parametrised with.
SOME = {"resident": set(GATES_AND_LAYOUTS), "streamed": set(GATES_AND_LAYOUTS), "SFT": set(TRAINED)}
REFUSALS = {"stock PEFT": set(NOT_IN_STOCK), "load_kt_model": set(NOT_STREAMED), "save, load, merge": SHARED}


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells if first in CLASSES}


def test_each_family_is_on_the_page() -> None:
    assert set(rows(TABLE)) == set(CLASSES) - set(REFUSED)
    assert {family: reason for family, (reason,) in rows(LEFT).items()} == REFUSED


def test_no_cell_is_empty_but_where_the_test_has_not_the_family() -> None:
    assert len(COLUMNS) == 9
    assert set(SOME) | set(REFUSALS) < set(COLUMNS)
    for family, cells in rows(TABLE).items():
        for column, cell in zip(COLUMNS, cells, strict=True):
            wanted = "refused" if family in REFUSALS.get(column, ()) else "yes"
            assert cell == ("" if family not in SOME.get(column, CLASSES) else wanted), (family, column)


def test_the_run_is_told() -> None:
    """One day, one command, how many tests, and with which libraries."""
    assert len(re.findall(r"\b20\d\d-\d\d-\d\d\b", PAGE)) == 1
    assert HEAD.count("`pytest ") == 1
    counts = re.search(r"(\d+)\s+tests\s+passed,\s+(\d+)\s+were\s+skipped,\s+none\s+failed", HEAD)
    shown = sum(bool(cell) for cells in rows(TABLE).values() for cell in cells) + len(REFUSED)
    assert counts
    assert int(counts[1]) >= shown
    for library in LIBRARIES:
        assert re.search(rf"\b{library} \d+\.\d+", HEAD)


CASE = '<testcase classname="tests.families.{file}" name="{name}">{inside}</testcase>'
PROPERTIES = "".join(f'<property name="{name}" value="1.0"/>' for name in LIBRARIES)
FAILED = "<failure message='a'/>"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/families_table.py"))


@pytest.mark.parametrize(
    ("properties", "case", "message"),
    [
        (PROPERTIES, ("test_files", "test_adapters[aria]", FAILED), r"1 tests failed \(test_adapters\[aria\]\)"),
        (PROPERTIES, ("test_files", "test_adapters[afmoe]", ""), r"not passed in this run: test_adapters\[aria\]"),
        (PROPERTIES, ("test_files", "test_adapters[afmoe]", "<skipped/>"), r"in this run: test_adapters\[afmoe\]"),
        (PROPERTIES, ("test_page", "test_old", FAILED), r"not passed in this run: test_adapters\[afmoe\]"),
        ("", ("test_files", "test_adapters[aria]", ""), "does not say the versions of peft, torch, .* pytest -n"),
    ],
)
def test_a_report_of_less_is_refused(
    properties: str, case: tuple[str, str, str], message: str, script: dict[str, Any], tmp_path: Path
) -> None:
    inside = CASE.format(**dict(zip(("file", "name", "inside"), case, strict=True)))
    suite = f'<testsuite timestamp="2026-01-01T"><properties>{properties}</properties>{inside}</testsuite>'
    (tmp_path / "a.xml").write_text(f"<testsuites>{suite}</testsuites>")
    with pytest.raises(script["Incomplete"], match=message):
        script["page"](script["read_run"](tmp_path / "a.xml"), REFUSED)
