"""docs/families.md from a test run: which family passed what.

pytest tests/families -o junit_logging=no --junitxml=/tmp/families.xml
python scripts/families_table.py /tmp/families.xml > docs/families.md
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

TESTS = {
    "test_forward_and_gradients": "forward, gradients (fp32)",
    "test_in_bf16": "layers in bf16",
    "test_adapters": "save, load, merge",
    "test_in_stock_peft": "stock PEFT",
    "test_load_kt_model": "load_kt_model",
    "test_refused": "refused",
}


def main(report: str) -> None:
    results: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        name = re.fullmatch(r"(\w+)\[(\w+)\]", case.get("name", ""))
        if name and name[1] in TESTS:
            kinds = {child.tag for child in case}
            bad = kinds & {"failure", "error"}
            results[name[2]][name[1]] = "**no**" if bad else "skipped" if "skipped" in kinds else "yes"
    print(
        "# Families\n\nWhat the tests of `tests/families` showed for a tiny random model of each, on backend torch.\n"
    )
    print(f"| family | {' | '.join(TESTS.values())} |\n|{'---|' * (len(TESTS) + 1)}")
    for family in sorted(results):
        print(f"| {family} | {' | '.join(results[family].get(test, '') for test in TESTS)} |")


if __name__ == "__main__":
    main(sys.argv[1])
