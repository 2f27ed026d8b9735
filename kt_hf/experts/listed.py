"""`ListedExperts`: `KTExperts` that a block calls one by one, as the `ModuleList` that was in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ..forms.listed_block import ExpertCalls
from .layer import KTExperts


class ListedExperts(KTExperts):
    """`KTExperts` with items: item e computes rows [..., H] by expert e.

    While the block around it is computed as `kt_hf.forms.listed_block` does it, all items' rows are computed together.

    Args:
        *args: As `KTExperts` takes them.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = ExpertCalls(self.shape.num_experts, self.__call__)

    def __len__(self) -> int:
        return self.shape.num_experts

    def __getitem__(self, e: Any) -> Callable[[Tensor], Tensor]:
        return self.calls[e]

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return iter(self.calls)
