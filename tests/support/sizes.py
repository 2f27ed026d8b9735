"""Which families are tested with which arithmetic, for `pytestmark`: a module's tests take `family` and `case`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cases import ALL_CASES, CASES, KERNEL_BF16, KERNEL_MARKS
from tests.support.models import FAMILIES


def _pairs(names: list[str], cases: list[Any]) -> list[Any]:
    return [
        pytest.param(FAMILIES[name], *each.values, id=f"{name}-{each.id}", marks=each.marks)
        for name in names
        for each in cases
    ]


_OTHERS = [name for name in FAMILIES if name != "mixtral"]
_KERNEL = [pytest.param(KERNEL_BF16, id=str(KERNEL_BF16), marks=KERNEL_MARKS)]
# Below KTExperts a family is five numbers: Mixtral, and on the operators that of the oddest ones (three experts a
# token, an expert a third as wide as the hidden size).
LAYER_SIZES = pytest.mark.parametrize(
    ("family", "case"), [*_pairs(["mixtral"], ALL_CASES), *_pairs(["deepseek_v3"], _KERNEL)]
)
# PEFT's business with a model is names and structure, which each family has of its own; dtypes once are enough.
FAMILY_STRUCTURES = pytest.mark.parametrize(
    ("family", "case"), [*_pairs(["mixtral"], CASES), *_pairs(_OTHERS, CASES[:1])]
)
