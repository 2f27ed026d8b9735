"""docs/families.md is of the families that the tests have, and of a run in which all passed."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families.test_files import NOT_IN_STOCK, NOT_STREAMED, SHARED
from tests.families.test_gates_and_layouts import FAMILIES as OTHER_GATES
from tests.support.families import CLASSES, REFUSED

PAGE = (Path(__file__).parents[2] / "docs/families.md").read_text()
TABLE, _, LEFT = PAGE.partition("## Refused")


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells if first in CLASSES}


def test_each_family_is_on_the_page() -> None:
    assert set(rows(TABLE)) == set(CLASSES) - set(REFUSED)
    assert {family: reason for family, (reason,) in rows(LEFT).items()} == REFUSED


def test_what_was_run_passed() -> None:
    heads = re.findall(r"^\| family \|(.*)\|$", TABLE, re.MULTILINE)[0].split("|")
    columns = [head.strip() for head in heads]
    refused = {"save, load, merge": SHARED, "stock PEFT": NOT_IN_STOCK, "load_kt_model": NOT_STREAMED}
    for family, cells in rows(TABLE).items():
        for column, cell in zip(columns, cells, strict=True):
            run = family in OTHER_GATES or column not in ("resident", "streamed")
            wanted = "refused" if family in refused.get(column, ()) else "yes" if run else ""
            assert cell == wanted, (family, column)
