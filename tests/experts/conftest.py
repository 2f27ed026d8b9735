"""The layer with each arithmetic; below `KTExperts` a model family is five numbers, so two of them are enough."""

from __future__ import annotations

import pytest

from tests.support.cases import ALL_CASES, KERNEL_BF16, KERNEL_MARKS, Case
from tests.support.models import FAMILIES

# Mixtral, and the family of the oddest sizes: three experts a token, an expert narrower than the hidden size by three.
SIZES = [
    *(pytest.param(FAMILIES["mixtral"], *each.values, id=f"mixtral-{each.id}", marks=each.marks) for each in ALL_CASES),
    pytest.param(FAMILIES["deepseek_v3"], KERNEL_BF16, id=f"deepseek_v3-{KERNEL_BF16}", marks=KERNEL_MARKS),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"family", "case"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("family", "case"), SIZES)


@pytest.fixture(params=ALL_CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Backend, model dtype and tolerances together: here also backend torch in bf16."""
    return request.param
