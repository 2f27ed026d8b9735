"""The layer with each arithmetic."""

from __future__ import annotations

import pytest

from tests.support.cases import ALL_CASES, Case


@pytest.fixture(params=ALL_CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Backend, model dtype and tolerances together: here also backend torch in bf16."""
    return request.param
