"""Messages on the page of troubleshooting are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import kt_hf
import kt_hf.errors

PAGE = Path(__file__).parents[2] / "docs/troubleshooting.md"
OTHERS = ("You are trying to modify a model with PEFT for a second time", "CUDA out of memory")  # libraries'


def texts() -> list[str]:
    """Every text in the code of kt_hf; of those with values in between, each part."""
    files = Path(kt_hf.__file__).parent.rglob("*.py")
    trees = [ast.parse(file.read_text()) for file in files]
    return [
        node.value for tree in trees for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]  # fmt: skip


def messages() -> list[str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_each_message_is_one_of_the_codes() -> None:
    known = [*texts(), *OTHERS]
    strange = []
    for message in messages():
        parts = [part for part in re.split(r"…", message) if len(part.strip(" =,.:")) > 2]
        assert parts or message == "…=… is not one of …", message
        strange += [message for part in parts if not any(part.strip() in text for text in known)]
    assert len(messages()) > 70
    assert not strange


def test_a_message_that_nobody_writes_is_noticed() -> None:
    assert not any("no such message, ever" in text for text in texts())


def test_each_class_is_named() -> None:
    classes = [name for name in vars(kt_hf.errors) if name.startswith("KTAMX")]
    reference = (PAGE.parent / "reference/api.md").read_text()
    assert classes
    assert not [name for name in classes if f"::: kt_hf.{name}\n" not in reference]
