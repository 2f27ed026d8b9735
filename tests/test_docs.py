"""The pages say what is so: files and names exist, links lead somewhere, every setting is in every list of them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from kt_hf import KTConfig
from kt_hf.config import BACKENDS

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "AGENTS")),
]
FOLDERS = ("kt_hf", "tests", "benchmarks", "configs", "scripts", "docs")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIELDS = [field.name for field in dataclasses.fields(KTConfig)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def paths(text: str) -> list[str]:
    """What a page names as a file or folder of the repository."""
    words = [word.rstrip(".,;:") for code in CODE.findall(text) for word in code.split()]
    fenced = [word.rstrip(".,;:") for block in re.findall(r"```.*?```", text, re.DOTALL) for word in block.split()]
    return [word for word in words + fenced if re.match(rf"({'|'.join(FOLDERS)})/[\w./*-]*$", word)]


def python_files(text: str) -> list[str]:
    """Names of modules, with or without their folder."""
    return [code for code in CODE.findall(text) if re.fullmatch(r"[\w/]+\.py", code)]


def exists(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    assert not [path for path in paths(text) if not exists(path)]
    # A page may leave the folder out, where the sentence names it.
    history = ("growth.py", "optimizer.py", "roofline.py")  # performance.md says that they are gone
    assert not [name for name in python_files(text) if name not in history and not any(ROOT.glob(f"**/{name}"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def table_rows(page: Path, heading: str) -> list[str]:
    section = page.read_text().split(f"## {heading}")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize(("heading", "least"), [("Where do I change …?", 10), ("Global state", 10)])
def test_names_in_the_tables_are_in_the_files_of_their_row(heading: str, least: int) -> None:
    """A function that was renamed would send the reader searching."""
    rows = table_rows(ROOT / "docs/architecture.md", heading)
    assert len(rows) >= least
    for row in rows:
        files = [ROOT / path for path in paths(row) if (ROOT / path).is_file()]
        source = set(re.findall(r"\w+", "\n".join(file.read_text() for file in files)))
        assert files, row
        names = [code for code in CODE.findall(row) if re.fullmatch(r"[A-Za-z_]\w+", code)]
        assert not [name for name in names if name not in source and name not in dir(KTConfig)], row


def test_the_pages_have_every_module_that_a_newcomer_meets_first() -> None:
    """The lives of a token and of a gradient name each module of the layer."""
    text = (ROOT / "docs/architecture.md").read_text()
    for file in (ROOT / "kt_hf/experts").glob("*.py"):
        if file.name not in ("__init__.py", "projections.py"):
            assert f"`kt_hf/experts/{file.name}`" in text
    for folder in (path for path in (ROOT / "kt_hf").iterdir() if (path / "__init__.py").exists()):
        assert f"{folder.name}/" in text, f"the picture leaves out {folder.name}/"


def test_readme_links_the_architecture_in_its_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:25])
    assert "(docs/architecture.md)" in first
    assert "(CONTRIBUTING.md)" in first


def test_numbers_in_readmes_table_were_measured() -> None:
    """Tokens/s of each row, and the GPU's peak beside them, are those of a row of the benchmark."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/gpu_placements.jsonl").read_text().splitlines()]
    measured: dict[str, set[int]] = {}
    for row in rows:
        if row.get("tokens_per_second"):
            peaks = measured.setdefault(f"{row['tokens_per_second']:,.0f}", set())
            peaks.add(round(row["allocated_gb"]))
    table = (ROOT / "README.md").read_text().split("| tokens a step |")[1].split("\n\n")[0]
    cells = re.findall(r"\| ([\d,]+)(?: to ([\d,]+))? \((\d+)\)", table)
    assert len(cells) == 15
    for least, most, peak in cells:
        assert int(peak) == max(max(measured[number]) for number in filter(None, (least, most)))


def test_every_setting_is_in_every_list_of_them() -> None:
    full = (ROOT / "configs/full.yaml").read_text()
    arguments = re.findall(r"^        (kt_\w+):", str(KTConfig.__doc__), re.MULTILINE)
    keys = [key for key in yaml.safe_load(full) if key.startswith("kt_")]
    assert set(keys) == set(FIELDS)
    assert set(arguments) == {*FIELDS, "kt_max_cache_depth"}
    line = next(line for line in full.splitlines() if line.startswith("kt_backend:"))
    assert not [backend for backend in BACKENDS if backend not in line]


def test_defaults_in_full_yaml_are_those_of_the_class() -> None:
    values = yaml.safe_load((ROOT / "configs/full.yaml").read_text())
    config = KTConfig()
    assert {name: values[name] for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}


def test_pictures_are_small() -> None:
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg", ".jpg")]
    assert pictures
    assert not [path.name for path in pictures if path.stat().st_size > 60_000]


def test_one_spelling() -> None:
    """quantize, recognize: as the command line and PyTorch have it."""
    british = re.compile(r"\b(quantis|recognis|initialis|optimis|synchronis)\w*", re.IGNORECASE)
    for page in [*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "configs").glob("*.yaml")]:
        text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", page.read_text())  # names of code are not ours to spell here
        assert not [match[0] for match in british.finditer(text)], page.name
