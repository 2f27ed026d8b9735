"""What this package never asks of the operators, read in its source: no run would show what is not asked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kt_hf.backends import kt_kernel

TREES = [ast.parse(file.read_text()) for file in sorted(Path(kt_kernel.__path__[0]).glob("*.py"))]
NODES = [node for tree in TREES for node in ast.walk(tree)]


@pytest.mark.parametrize("name", ["gpu_experts_mask", "num_gpu_experts", "submit_backward_repack", "swiglu_alpha"])
def test_what_is_never_named(name: str) -> None:
    """Rules 17, 19 and 15: ignored by the operators, to be waited for, honoured in forward alone."""
    assert not [node for node in NODES if isinstance(node, ast.Attribute) and node.attr == name]


@pytest.mark.parametrize(
    ("name", "values"), [("max_cache_depth", ["1"]), ("lora_dropout", ["0.0"]), ("swiglu_limit", ["NO_CLAMP", "0.0"])]
)
def test_what_is_set_to_one_value(name: str, values: list[str]) -> None:
    """Rules 6 and 15; MXFP4's operator alone demands a limit, and has one so large that nothing is clamped."""
    assert [
        ast.unparse(node.value)
        for node in NODES
        if isinstance(node, ast.Assign) and any(getattr(target, "attr", None) == name for target in node.targets)
    ] == values
