"""Tests of this folder need a CUDA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kt_hf.backends.finite_checks import DOUBTS
from tests.families.layers import LayerInputs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_doubts_left() -> Iterator[None]:
    """A test's results that are not finite are not the next test's business."""
    yield
    DOUBTS._open.clear()


def on_gpu(x: LayerInputs) -> LayerInputs:
    return LayerInputs(*(value.cuda() for value in x))
