"""The workflows of GitHub name targets, paths and inputs that exist; make lint compares their form with the schemas."""

from __future__ import annotations

import itertools
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kt_hf import __version__
from kt_hf.builtin.smollm2_moe import INSTALL_HINT
from tests.support.archives import NEEDS_CLONE, ROOT, tracked

pytestmark = NEEDS_CLONE

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
TARGETS = set(
    itertools.chain.from_iterable(
        match.split() for match in re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
)


def load(path: Path) -> dict[str, Any]:
    """A workflow; its `on` is there as "on", which YAML reads as true."""
    content = yaml.safe_load(path.read_text())
    content["on"] = content.pop(True)
    return content


def calls(path: Path) -> Iterator[dict[str, Any]]:
    """What each job that calls suite.yml hands over, for each cell of its matrix."""
    for job in load(path)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for cell in itertools.product(*matrix.values()):
            values = {f"matrix.{key}": value for key, value in zip(matrix, cell, strict=True)}
            if job.get("uses") == "./.github/workflows/suite.yml":
                yield {
                    key: EXPRESSION.sub(lambda match, values=values: values.get(match[1], match[0]), value)
                    for key, value in job["with"].items()
                }


def commands(path: Path) -> list[str]:
    """What its steps run; of suite.yml with every value that callers hand over."""
    steps = [step for job in load(path)["jobs"].values() for step in job.get("steps", [])]
    lines = [line for step in steps for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    if path.name != "suite.yml":
        return lines
    return [
        EXPRESSION.sub(lambda match, inputs=inputs: inputs.get(match[1].removeprefix("inputs."), ""), line)
        for line in lines
        for caller in WORKFLOWS
        for inputs in calls(caller)
    ]


def targets(lines: list[str]) -> set[str]:
    return {word for line in lines for word in re.findall(r"\bmake ([\w-]+)", line)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_target_of_make_exists(path: Path) -> None:
    assert targets(commands(path)) <= TARGETS
    assert targets(["cd x && make no-such-target A=b"]) - TARGETS == {"no-such-target"}


def test_each_kind_of_run_is_there() -> None:
    names = {path.stem: targets(commands(path)) for path in WORKFLOWS}
    assert names == {
        "ci": {"lint"}, "suite": {"test-oldest", "test-newest"}, "nightly": {"test-all"},
        "release": {"wheel", "test-release"},
    }  # fmt: skip


def test_targets_are_what_make_knows() -> None:
    """`make -n` fails on a target that .PHONY names and no rule makes."""
    for target in sorted(TARGETS):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_whole_matrix_is_run() -> None:
    cells = {(call["python"], call["packages"], call["cpu"]) for call in calls(ROOT / ".github/workflows/ci.yml")}
    assert cells == set(itertools.product(("3.11", "3.12"), ("oldest", "newest"), ("avx2", "no-kernel", "kernel")))
    nightly = list(calls(ROOT / ".github/workflows/nightly.yml"))
    assert {call["main_branch_of"] for call in nightly} == {"transformers", "peft"}


@pytest.mark.parametrize("folder", [".venv-oldest", ".venv-newest", ".venv-oldest-no-kernel", ".venv-newest-no-kernel"])
def test_the_environments_have_rules_and_are_ignored(folder: str) -> None:
    """suite.yml puts their names together from its inputs."""
    kernel = "KERNEL=no" if folder.endswith("no-kernel") else "KERNEL=yes"
    done = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", f"{folder}/ready", kernel],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"--resolution {'lowest-direct' if 'oldest' in folder else 'highest'}" in done.stdout
    assert ("echo \"kt-kernel; python_version < '3'\"" in done.stdout) == (kernel == "KERNEL=no")
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/ready"], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_path_exists_and_every_input_is_declared(path: Path) -> None:
    for job in load(path)["jobs"].values():
        uses = [job.get("uses", ""), *(step.get("uses", "") for step in job.get("steps", []))]
        assert not [name for name in uses if name.startswith("./") and not (ROOT / name).is_file()]
        assert all(re.search(r"@v\d+$", name) for name in uses if name and not name.startswith("./"))
    named = re.findall(r"[\w./-]+\.(?:toml|md|yml|py|cff)\b", path.read_text())
    assert not [name for name in named if not any(file.endswith(name.removeprefix("./")) for file in tracked())]
    declared = load(ROOT / ".github/workflows/suite.yml")["on"]["workflow_call"]["inputs"]
    for call in calls(path):
        assert set(call) <= set(declared)
        assert {name for name, entry in declared.items() if entry.get("required")} <= set(call)


def test_the_pythons_are_those_of_the_package() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    minors = {text.rpartition(" ")[2] for text in classifiers if ":: Python :: 3." in text}
    assert {call["python"] for call in calls(ROOT / ".github/workflows/ci.yml")} == minors


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_report_asks_for_the_doctors_block(path: Path) -> None:
    """By the words that the doctor prints."""
    fields = {field["id"]: field for field in yaml.safe_load(path.read_text())["body"]}
    assert "kt-hf doctor" in fields["doctor"]["attributes"]["label"]
    printed = re.search(r"(For a bug report, copy this)", (ROOT / "kt_hf/cli/doctor.py").read_text())
    assert printed
    assert printed[1] in " ".join(fields["doctor"]["attributes"]["description"].split())


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"\n## {__version__} — {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_pages_install_the_wheel_of_this_version() -> None:
    """And the demo's model as the package names it, wherever a reader begins."""
    pages = {path.name: path.read_text() for path in (ROOT / "docs/install.md", ROOT / "docs/start/index.md")}
    for name, page in pages.items():
        wheels = set(re.findall(r"kt_hf-([\w.]+?)-py3-none-any\.whl", page))
        assert wheels == {__version__}, name
        assert set(re.findall(r"pip install --no-deps \S+", page)) == {INSTALL_HINT}, name
