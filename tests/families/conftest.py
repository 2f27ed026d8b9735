"""Fixtures of the family tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.models import FAMILIES, Family


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """These tensors are tiny: more threads only wait for each other, and bit-equality needs one order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
