"""What several unit tests share: one family, and backends whose calls are counted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from tests.support.models import FAMILIES

MIXTRAL = FAMILIES["mixtral"]


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
