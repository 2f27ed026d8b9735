"""docs/families.md from one test run: which family passed what, and on which backends.

pytest tests/families --junitxml=families.xml
python scripts/families_table.py families.xml > docs/families.md

All of `tests/families` in one run, the slow tests too, and all passed: anything less is refused. Only `test_page`
may fail, which read the page of before.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

if __name__ == "__main__":
    sys.path.insert(0, ".")
from tests.families.conftest import LIBRARIES
from tests.families.test_families import FAMILIES
from tests.families.test_files import NOT_IN_STOCK, NOT_STREAMED, SHARED
from tests.families.test_gates_and_layouts import FAMILIES as GATES_AND_LAYOUTS
from tests.families.test_training import FAMILIES as TRAINED
from tests.support.families import REFUSED

# Test (and its other parameter) -> column.
COLUMNS = {
    "test_forward_and_gradients": "forward, gradients",
    "test_each_layer fp32": "each layer, fp32",
    "test_each_layer bf16": "each layer, bf16",
    "test_on_the_tiers_of_a_gpu resident": "resident",
    "test_on_the_tiers_of_a_gpu streamed": "streamed",
    "test_adapters": "save, load, merge",
    "test_in_stock_peft": "stock PEFT",
    "test_load_kt_model": "load_kt_model",
    "test_sft_beside_stock_peft": "SFT",
}
# Columns of tests that are for some families alone, and those. The others are for all.
SOME = {
    "test_on_the_tiers_of_a_gpu resident": set(GATES_AND_LAYOUTS),
    "test_on_the_tiers_of_a_gpu streamed": set(GATES_AND_LAYOUTS),
    "test_sft_beside_stock_peft": set(TRAINED),
}
# Test -> the families for which it shows that they are refused.
SHOWN_TO_BE_REFUSED = {
    "test_adapters": SHARED,
    "test_in_stock_peft": set(NOT_IN_STOCK),
    "test_load_kt_model": set(NOT_STREAMED),
}
REFUSAL, UNTOLD = "test_refused", "tests.families.test_page"
HEAD = """# Families

Made by `scripts/families_table.py` from one run of {date}, `pytest tests/families --junitxml=families.xml`: {passed}
tests passed, {skipped} were skipped, none failed; with {versions}.

A tiny random model of each family of transformers that has experts, on backend torch (on the CPU), beside
transformers' own. kt-kernel's operators are not in it: they need AVX512-BF16 or AMX, which the machine of this run does
not have (AVX2). Tests marked `kernel`, in the other folders, hold them to the torch backend.

- forward, gradients: logits as transformers' (2e-6), with LoRA as with merged weights; gradients of LoRA and all other
  parameters.
- each layer: output (1e-6; bf16 2 %) and gradients (1e-5; bf16 2 %) of every layer of experts, on the inputs it has in
  the model.
- resident, streamed: the first layer on a GPU's tiers, a CPU standing for the GPU; families of each gate and layout.
- save, load, merge: an adapter, and the base checkpoint with it.
- stock PEFT: the export computes the same there, and is read back.
- load_kt_model: streamed from a checkpoint as transformers writes the family's.
- SFT: twenty steps beside stock PEFT, losses within 0.02; families whose experts stock PEFT holds otherwise.

Empty: the column's test has not this family. `refused`: in words that name another way, which is from_pretrained and
apply_kt_moe for load_kt_model, merging for stock PEFT, and the adapter beside its base for merging.
"""


class Incomplete(Exception):
    """A report that the page cannot be made of, and why."""


@dataclass
class Run:
    """What a report says.

    Attributes:
        date: Of its beginning, as 2026-11-29.
        versions: Library -> version.
        outcomes: passed, skipped, failed -> how many tests.
        results: Family -> test -> passed, skipped or failed.
    """

    date: str
    versions: dict[str, str]
    outcomes: Counter[str] = field(default_factory=Counter)
    results: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))


def read_run(report: str) -> Run:
    """The run of a file by pytest's --junitxml.

    Raises:
        Incomplete: Tests failed, or the report does not say with which libraries they ran.
    """
    suites = list(ElementTree.parse(report).iter("testsuite"))
    if len(suites) != 1:
        raise Incomplete(f"{report} has {len(suites)} test suites: give the report of one run")
    properties = {entry.get("name", ""): entry.get("value", "") for entry in suites[0].findall("properties/property")}
    if missing := set(LIBRARIES) - set(properties):
        raise Incomplete(f"{report} does not say the versions of {', '.join(sorted(missing))}: run without pytest -n")
    run = Run(suites[0].get("timestamp", "")[:10], {name: properties[name] for name in LIBRARIES})
    failed: list[str] = []
    for case in suites[0].iter("testcase"):
        if case.get("classname") == UNTOLD:
            continue
        kinds, full = {child.tag for child in case}, case.get("name", "")
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        run.outcomes[outcome] += 1
        failed += [full] if outcome == "failed" else []
        if name := re.fullmatch(r"(\w+)\[(\w+)(?:-(\w+))?\]", full):
            run.results[name[2]][" ".join(part for part in (name[1], name[3]) if part)] = outcome
    if failed:
        raise Incomplete(f"{report}: {len(failed)} tests failed ({', '.join(failed[:5])})")
    return run


def page(run: Run, reasons: Mapping[str, str]) -> str:
    """The page.

    Args:
        run: The run.
        reasons: Family that is refused -> why.

    Raises:
        Incomplete: A test was not run, or skipped.
    """
    wanted = {(family, test) for test in COLUMNS for family in SOME.get(test, FAMILIES)}
    wanted |= {(family, REFUSAL) for family in reasons}
    gaps = sorted(f"{test}[{family}]" for family, test in wanted if run.results[family].get(test) != "passed")
    if gaps:
        raise Incomplete(f"{len(gaps)} tests have not passed in this run: {', '.join(gaps[:5])}")
    rows = [f"| {family} | {' | '.join(_cell(run, family, test) for test in COLUMNS)} |" for family in sorted(FAMILIES)]
    table = [f"| family | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (len(COLUMNS) + 1)}", *rows]
    left = [f"| {family} | {reasons[family]} |" for family in sorted(reasons)]
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    head = HEAD.format(date=run.date, versions=versions, **{name: run.outcomes[name] for name in ("passed", "skipped")})
    return "\n".join([head, *table, "", "## Refused", "", "| family | reason |", "|---|---|", *left])


def _cell(run: Run, family: str, test: str) -> str:
    if test not in run.results[family]:
        return ""
    return "refused" if family in SHOWN_TO_BE_REFUSED.get(test, ()) else "yes"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(page(read_run(sys.argv[1]), REFUSED))
    except Incomplete as error:
        sys.exit(f"families_table: {error}.")
