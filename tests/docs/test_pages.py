"""The pages can be followed by copy and paste: every block is run, or says what it needs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.pages import DOCS, NEEDS, RUN, Reader, blocks

# Pages of a user's way from nothing to an adapter, which lie in a folder made by `start/index`.
ROUTES = {"start/trainer": "out-trainer", "start/trl": "out-trl", "start/yaml": "out-yaml", "start/ranks": "out-ranks"}
MIGRATIONS = ("migrate/llama-factory", "migrate/unsloth", "migrate/experts4bit-qlora")
OTHERS = ("index", "loading", "reference/settings", "troubleshooting")
PAGES = ("start/index", *ROUTES, *MIGRATIONS, *OTHERS)
# A model that trains in seconds stands where the pages have one of minutes, or the hub's.
TINY = {
    "from kt_hf.builtin.smollm2_moe import": "from pathlib import Path\nfrom tests.support.tiny import",
    'save_model("smollm2-moe")': 'save_model(Path("smollm2-moe"))',
    "kt-hf chat": "kt-hf chat --max-new-tokens 4",
    "max_steps: 12": "max_steps: 2",
    "max_steps=12": "max_steps=2",
    "Qwen/Qwen3-30B-A3B": "smollm2-moe",
}
# Each process of a page takes ten seconds to import its libraries: one route is left to every run of the tests.
FAST = ("start/trl",)


def test_what_is_not_run_says_what_it_needs() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.needs in ("", *NEEDS), page
            assert block.runs or block.title or block.needs or block.language not in (*RUN, "console", "sh"), page
            # A command in a block without a language would be neither run nor marked.
            command = re.search(r"^(kt-hf|python|torchrun|accelerate|pip|make) ", block.text, re.MULTILINE)
            assert not command or block.language in RUN, page
    assert sum(block.runs for page in PAGES for block in blocks(page)) >= 15


def test_a_mark_without_a_block_is_noticed() -> None:
    """A mark that is misspelled, or parted from its block by an empty line, would do nothing."""
    for page in PAGES:
        marks = re.findall(r"<!-- needs: .*", (DOCS / f"{page}.md").read_text())
        assert len(marks) == sum(bool(block.needs) for block in blocks(page)), page


def test_every_page_with_code_is_known() -> None:
    """Whoever adds a page to a folder adds it here too."""
    on_disk = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("*/*.md")}
    with_code = {page for page in on_disk if any(block.language in RUN for block in blocks(page))}
    assert with_code <= set(PAGES)
    assert {page for page in on_disk if page.startswith(("start/", "migrate/"))} <= set(PAGES)


def test_a_block_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text("```bash\ntrue\n```\n\n```bash\nfalse\necho done\n```\n")
    monkeypatch.setattr("tests.support.pages.DOCS", tmp_path)
    with pytest.raises(AssertionError, match="false"):
        Reader(tmp_path, {}).follow("page")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a reader has after `start/index`, with a tiny model."""
    folder = tmp_path_factory.mktemp("begun")
    Reader(folder, TINY | {"kt-hf doctor": "true"}).follow("start/index")
    return folder


def on(begun: Path, folder: Path) -> Reader:
    """A reader whose folder is a copy."""
    for name in ("conversations.jsonl", "smollm2-moe"):
        copy = shutil.copytree if (begun / name).is_dir() else shutil.copy
        copy(begun / name, folder / name)
    return Reader(folder, TINY)


@pytest.mark.timeout(3600)  # several processes, each of which imports everything
@pytest.mark.parametrize("route", [pytest.param(r, marks=[] if r in FAST else pytest.mark.slow) for r in ROUTES])
def test_a_route_leads_to_an_adapter_that_answers(route: str, begun: Path, tmp_path: Path) -> None:
    printed = on(begun, tmp_path).follow(route)
    adapter = tmp_path / ROUTES[route]
    assert (adapter / "adapter_model.safetensors").is_file()
    assert json.loads((adapter / "kt_adapter_manifest.json").read_text())
    assert printed[0].strip()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", MIGRATIONS)
def test_a_migration_runs(page: str, begun: Path, tmp_path: Path) -> None:
    on(begun, tmp_path).follow(page)
    assert list(tmp_path.rglob("adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", OTHERS)
def test_blocks_of_another_page_run(page: str, begun: Path, tmp_path: Path) -> None:
    on(begun, tmp_path).follow(page)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_as_it_stands(route: str, tmp_path: Path) -> None:
    """The page's own model learns the page's own rows."""
    reader = Reader(tmp_path, {})
    reader.follow("start/index")
    assert any("7077" in text for text in reader.follow(route))
