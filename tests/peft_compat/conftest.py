"""PEFT's business with a model: names and structure, which each family has of its own; dtypes once are enough."""

from __future__ import annotations

import pytest

from tests.support.cases import CASES
from tests.support.models import FAMILIES

FAMILY_CASES = [
    pytest.param(family, *each.values, id=f"{name}-{each.id}", marks=each.marks)
    for name, family in FAMILIES.items()
    for each in (CASES if name == "mixtral" else CASES[:1])
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"family", "case"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("family", "case"), FAMILY_CASES)
