"""`model._kt_moe_lora_params`: the parameters of all layers by index and name, as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .layer import KTExperts


class LoraParamsView(Mapping[int, dict[str, nn.Parameter]]):
    """`model._kt_moe_lora_params`: layer index -> name -> Parameter, following the adapters; {} before the first."""

    def __init__(self, layers: list[KTExperts]) -> None:
        self._layers = layers

    def _current(self) -> dict[int, dict[str, nn.Parameter]]:
        return {layer.layer_idx: params for layer in self._layers if (params := layer.lora_params)}

    def __getitem__(self, layer: int) -> dict[str, nn.Parameter]:
        return self._current()[layer]

    def __iter__(self) -> Any:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def __repr__(self) -> str:
        return repr(self._current())

    def __eq__(self, other: object) -> bool:
        return self._current() == other

    __hash__ = None  # type: ignore[assignment]
