"""What several unit tests share: one family, one PyTorch thread, and backends whose calls are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.models import FAMILIES

MIXTRAL = FAMILIES["mixtral"]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """For a module that imports it: these tensors are tiny, and bit-equality needs one order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Calls:
    """How often each layer's backend was asked for a forward and for a backward, in layer order."""

    forward: list[int]
    backward: list[int]


def count_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Count from now on; the layers' backends must not be replaced (packed) after."""
    layers = model._kt_wrappers
    calls = Calls([0] * len(layers), [0] * len(layers))

    def watch(index: int, backend: object, name: str) -> None:
        original, counts = getattr(backend, name), getattr(calls, name)

        def counted(*args: object, **kwargs: object) -> object:
            counts[index] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(backend, name, counted)

    for index, layer in enumerate(layers):
        watch(index, layer._runner.backend, "forward")
        watch(index, layer._runner.backend, "backward")
    return calls
