"""The pages can be followed by copy and paste: every block is run, or says what it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.pages import DOCS, NEEDS, RUN, Reader, blocks

# Pages of which every block is run here: those that a reader follows from the top to the bottom.
ROUTES = {"start/trainer": "out-trainer", "start/trl": "out-trl", "start/yaml": "out-yaml", "start/ranks": "out-ranks"}
OTHERS = ("index", "reference/settings", "migrate/llama-factory", "migrate/unsloth", "migrate/experts4bit-qlora",
          "troubleshooting")  # fmt: skip
PAGES = ("start/index", *ROUTES, *OTHERS)
# A model that trains in seconds stands where the pages have one of minutes, or the hub's.
TINY = {
    "from kt_hf.builtin.smollm2_moe import save_model": "from pathlib import Path\nfrom tests.support.tiny import save_model",
    'save_model("smollm2-moe")': 'save_model(Path("smollm2-moe"))',
    "kt-hf chat": "kt-hf chat --max-new-tokens 4",
}


def test_what_is_not_run_says_what_it_needs() -> None:
    for page in PAGES:
        found = blocks(page)
        assert not [block for block in found if block.language in (*RUN, "console", "sh") and not block.runs
                    and not block.title and block.needs not in NEEDS], page  # fmt: skip
        assert not [block.needs for block in found if block.needs and block.needs not in NEEDS], page
        # A command in a block without a language would be neither run nor marked.
        assert not [block for block in found if re.search(r"^(kt-hf|python|torchrun|pip) ", block.text, re.MULTILINE)
                    and block.language not in RUN], page  # fmt: skip
    assert sum(block.runs for page in PAGES for block in blocks(page)) >= 12


def test_a_mark_without_a_block_is_noticed() -> None:
    """A mark that is misspelled, or parted from its block by an empty line, would do nothing."""
    for page in PAGES:
        marks = re.findall(r"<!-- needs: .*", (DOCS / f"{page}.md").read_text())
        assert len(marks) == sum(bool(block.needs) for block in blocks(page)), page


def test_pages_that_name_no_route_are_known() -> None:
    """Whoever adds a page to the quick start or the migrations adds it here too."""
    on_disk = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("*/*.md")}
    assert {page for page in on_disk if page.startswith(("start/", "migrate/"))} <= set(PAGES)


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_leads_to_an_adapter_that_answers(route: str, tmp_path: Path) -> None:
    reader = Reader(tmp_path, TINY)
    reader.follow("start/index")
    printed = reader.follow(route)
    adapter = tmp_path / ROUTES[route]
    assert (adapter / "adapter_model.safetensors").is_file()
    assert json.loads((adapter / "kt_adapter_manifest.json").read_text())
    assert printed[-1 if route != "start/ranks" else 0].strip()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_as_it_stands(route: str, tmp_path: Path) -> None:
    """The pages' own model learns the pages' own rows."""
    reader = Reader(tmp_path, {})
    reader.follow("start/index")
    printed = reader.follow(route)
    assert any("7077" in text for text in printed)


@pytest.mark.parametrize("page", OTHERS)
def test_blocks_of_other_pages_run(page: str, tmp_path: Path) -> None:
    Reader(tmp_path, TINY).follow(page)
