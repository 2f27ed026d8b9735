"""docs/families.md from test runs: which family passed what, and on which backends.

pytest tests/families --junitxml=families.xml
python scripts/families_table.py families.xml > docs/families.md

Several reports may be given; a later one's results replace an earlier one's.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

# Test (and its other parameter) -> column.
TESTS = {
    "test_forward_and_gradients": "forward, gradients",
    "test_each_layer fp32": "each layer, fp32",
    "test_each_layer bf16": "each layer, bf16",
    "test_on_the_tiers_of_a_gpu resident": "resident",
    "test_on_the_tiers_of_a_gpu streamed": "streamed",
    "test_adapters": "save, load, merge",
    "test_in_stock_peft": "stock PEFT",
    "test_load_kt_model": "load_kt_model",
}
REFUSAL = "test_refused"
HEAD = """# Families

Made by `scripts/families_table.py` from a run of `tests/families`: a tiny random model of each family of transformers
that has experts, on backend torch (on the CPU), beside transformers' own.

- forward, gradients: logits as transformers' (2e-6), with LoRA as with merged weights; gradients of LoRA and all other
  parameters.
- each layer: output (1e-6; bf16 2 %) and gradients (1e-5; bf16 2 %) of every layer of experts, on the inputs it has in
  the model.
- resident, streamed: the first layer on a GPU's tiers, a CPU standing for the GPU; families of each gate and layout.
- save, load, merge: an adapter, and the base checkpoint with it.
- stock PEFT: the export computes the same there, and is read back.
- load_kt_model: streamed from a checkpoint as transformers writes the family's.

Empty: not a family of this test. `refused`: in words that name another way, which is from_pretrained and apply_kt_moe
for load_kt_model, merging for stock PEFT, and the adapter beside its base for merging.
"""


def results_of(reports: list[str], refused: dict[str, set[str]]) -> dict[str, dict[str, str]]:
    """Family -> test -> what to write of it.

    Args:
        reports: Files by pytest's --junitxml.
        refused: Test -> the families for which it shows that they are refused.
    """
    results: dict[str, dict[str, str]] = defaultdict(dict)
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        name = re.fullmatch(r"(\w+)\[(\w+)(?:-(\w+))?\]", case.get("name", ""))
        if name is None:
            continue
        family, test = name[2], " ".join(part for part in (name[1], name[3]) if part)
        if test in TESTS or test == REFUSAL:
            kinds = {child.tag for child in case}
            bad = kinds & {"failure", "error"}
            good = "refused" if family in refused.get(test, ()) else "yes"
            results[family][test] = "**no**" if bad else "skipped" if "skipped" in kinds else good
    return results


def page(results: dict[str, dict[str, str]], reasons: dict[str, str]) -> str:
    """The page."""
    trained = sorted(family for family in results if family not in reasons)
    rows = [f"| {family} | {' | '.join(results[family].get(test, '') for test in TESTS)} |" for family in trained]
    table = [f"| family | {' | '.join(TESTS.values())} |", f"|{'---|' * (len(TESTS) + 1)}", *rows]
    left = [f"| {family} | {reasons[family]} |" for family in sorted(reasons) if results[family].get(REFUSAL) == "yes"]
    return "\n".join([HEAD, *table, "", "## Refused", "", "| family | reason |", "|---|---|", *left])


if __name__ == "__main__":
    sys.path.insert(0, ".")
    from tests.families.test_files import NOT_IN_STOCK, NOT_STREAMED, SHARED
    from tests.support.families import REFUSED

    lists = {
        "test_adapters": SHARED,
        "test_in_stock_peft": set(NOT_IN_STOCK),
        "test_load_kt_model": set(NOT_STREAMED),
    }
    print(page(results_of(sys.argv[1:], lists), REFUSED))
