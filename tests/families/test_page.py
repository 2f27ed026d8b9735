"""docs/families.md is of the families that the tests have, and of a run in which all passed."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families.test_files import NOT_IN_STOCK, NOT_STREAMED
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
    for family, cells in rows(TABLE).items():
        found = dict(zip(columns, cells, strict=True))
        assert set(cells) <= {"yes", "refused", ""}, family
        assert found["forward, gradients"] == found["each layer, fp32"] == "yes", family
        assert (found["stock PEFT"] == "refused") <= (family in NOT_IN_STOCK)
        assert (found["load_kt_model"] == "refused") == (family in NOT_STREAMED)
