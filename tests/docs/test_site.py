"""The site builds without a warning, and documents every public name."""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kt_hf
from kt_hf.cli import VERBS
from kt_hf.config import KTConfig
from kt_hf.train.config.settings import RunKeys

ROOT = Path(__file__).parents[2]
PACKAGES = ("", "adapters", "placement", "experts", "checkpoint", "quantized", "backends")
MODULES = [importlib.import_module(f"kt_hf.{name}".rstrip(".")) for name in PACKAGES]
PUBLIC = [(module, name) for module in MODULES for name in module.__all__]

with_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="needs the extra docs",
)


def test_public_packages_are_those_of_the_root() -> None:
    """Those of `_PACKAGES` that say what is public; the others have no `__all__`."""
    known = {name for name in kt_hf._PACKAGES if hasattr(importlib.import_module(f"kt_hf.{name}"), "__all__")}
    assert known == {*PACKAGES} - {""}


def defined_in(module: ModuleType, name: str) -> tuple[Path, str]:
    """The file that defines what a package's `__init__` re-exports, and its name there."""
    file = Path(str(module.__file__))
    for node in ast.walk(ast.parse(file.read_text())):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                assert isinstance(node, ast.ImportFrom)
                origin = importlib.import_module("." * node.level + (node.module or ""), module.__name__)
                return Path(str(origin.__file__)), alias.name
    raise LookupError(name)


def docstring_of(module: ModuleType, name: str) -> str:
    """Of a class or function its own; of a constant the text below it in the module that defines it."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return inspect.getdoc(value) or ""
    file, constant = defined_in(module, name)
    body = ast.parse(file.read_text()).body
    for node, text in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == constant for target in targets):
            return str(text.value.value) if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else ""
    return ""


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{m.__name__}.{n}" for m, n in PUBLIC])
def test_a_public_name_is_described(module: ModuleType, name: str) -> None:
    text = docstring_of(module, name)
    assert len(text.split()) >= 5, text
    value = getattr(module, name)
    if inspect.isfunction(value):
        names = [p.name for p in inspect.signature(value).parameters.values() if not p.name.startswith("_")]
        lacking = [n for n in names if not re.search(rf"\b{n}\b", text)]
        assert not lacking, f"its docstring does not name {lacking}"
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        assert not [n for n in fields if not re.search(rf"\b{n}\b", text)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"),
         "--site-dir", str(folder)], cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@with_mkdocs
def test_the_site_documents_every_public_name(site: Path) -> None:
    data = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(data[data.index(b"zlib.\n") + 6 :]).decode().splitlines()
    objects = {line.split()[0] for line in lines}
    pages = [file.read_text() for file in (ROOT / "docs/reference").glob("*.md")]
    old = {name for page in pages for name in re.findall(r"^\| `(kt_hf[\w.]+)`", page, re.MULTILINE)}
    names = {f"{module.__name__}.{name}" for module, name in PUBLIC}
    # Where a function has the name of its module, the function is meant.
    lacking = {name for name in names if name not in old and not {name, f"{name}.{name.rpartition('.')[2]}"} & objects}
    assert not lacking


def text_of(page: Path) -> str:
    article = re.search(r"<article.*?</article>", page.read_text(), re.S)
    assert article
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<pre.*?</pre>", "", article[0], flags=re.S)))


@with_mkdocs
def test_pages_made_of_the_code_are_whole(site: Path) -> None:
    parts: dict[str, list[str]] = {
        "settings": [field.name for field in dataclasses.fields(KTConfig)],
        "train-keys": [field.name for field in dataclasses.fields(RunKeys)],
        "verbs": [f"kt-hf {verb}" for verb in VERBS],
    }
    for page, names in parts.items():
        text = text_of(site / "reference" / page / "index.html")
        assert not [name for name in names if name not in text], page


@with_mkdocs
def test_no_markdown_is_left_in_a_page(site: Path) -> None:
    """A table or list that is no such thing for the site's Markdown stays text, without a warning."""
    pages = sorted(site.rglob("index.html"))
    assert len(pages) > 25
    wrong = re.compile(r"^\s*\|[ :-]*---|^\s*\| .* \|$|\]\(\S+\)|^```|<!--", re.MULTILINE)
    assert not [(page.parent.name, found[0]) for page in pages if (found := wrong.search(text_of(page)))]


@with_mkdocs
def test_a_link_that_leaves_the_documentation_becomes_a_path() -> None:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts/site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert hooks.outside("gpu.md", "../benchmarks/gpu_train.csv") == "benchmarks/gpu_train.csv"
    assert hooks.outside("start/trl.md", "../gpu.md") is None
    assert hooks.outside("start/trl.md", "../../configs/full.yaml") == "configs/full.yaml"
