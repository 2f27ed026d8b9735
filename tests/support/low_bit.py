"""The operators in INT8 and INT4, on a Mixtral whose sizes they can split; a conftest imports the fixtures."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from tests.support.cases import Case
from tests.support.models import FAMILIES, Family

TINY = FAMILIES["mixtral"]
# INT8 is bit-deterministic with one worker; `same` is for sums in another order, and INT8 rounds differently then.
INT8 = Case("AMXInt8", torch.bfloat16, forward=0.03, grad=0.03, same=2e-2)
INT4 = Case("AMXInt4", torch.bfloat16, forward=0.3, grad=0.4, same=0.2)


def wide(hidden: int = 128, inner: int = 128) -> Family:
    """The tiny Mixtral with sizes that are multiples of 64 and 128."""

    def config() -> PreTrainedConfig:
        made = TINY.make_config()
        made.hidden_size, made.intermediate_size, made.head_dim = hidden, inner, hidden // made.num_attention_heads
        return made

    return replace(TINY, make_config=config, hidden=hidden, intermediate=inner)


@pytest.fixture
def family() -> Family:
    return wide()


@pytest.fixture(autouse=True)
def wide_everywhere(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    """Tests and helpers of other modules build `MIXTRAL`: here it is the wide one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tests.") and isinstance(getattr(module, "MIXTRAL", None), Family):
            monkeypatch.setattr(module, "MIXTRAL", family)


@pytest.fixture
def case(request: Any) -> Case:
    return getattr(request, "param", INT8)
