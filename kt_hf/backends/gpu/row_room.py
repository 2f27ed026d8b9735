"""How many rows of all ranks' tokens are kept, before the host knows how many are of this rank's experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..transfer import to_host
from .rows import Rows

_FEW = 4096  # rows that are all kept: what computing them in vain takes is less than a wait
_MORE = 1.125  # times as large a part of a batch's rows as the batches before had is kept


class _Sorted(Protocol):
    rows: Rows


S = TypeVar("S", bound=_Sorted)


class RowRoom:
    """Room for the rows of a layer's experts, where ranks divide them and most rows are of other ranks' experts.

    A host that waits for their number stands still until the GPU has all ranks' tokens, and the GPU then waits for what
    the host launches. So the number is taken from the batches before, and looked at once the products are launched:
    where there was no room for all rows, these are computed again.

    Args:
        ranks: Processes that the layer's experts are divided among.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._part = 0.0  # of a batch's rows that are of this rank's experts

    def computed(
        self, total: int, sorted_rows: Callable[[int | None], S], compute: Callable[[S], Tensor]
    ) -> tuple[Tensor, S]:
        """The layer's output for a batch, and the sorted rows it was computed of, as many as are of an expert.

        Args:
            total: Rows of all ranks' experts, T*K.
            sorted_rows: Sorts them and keeps as many as it is given; with None all that are of an expert, for whose
                number it waits where ranks divide the experts.
            compute: Launches the layer's products.
        """
        if self._ranks == 1 or total <= _FEW:
            kept = sorted_rows(None if self._ranks == 1 else total)
            return compute(kept), kept
        room = min(total, math.ceil(self._part * _MORE * total)) if self._part else None
        kept = sorted_rows(room)
        number = to_host([kept.rows.ends[-1:]], [torch.int32])
        out = compute(kept)
        valid = int(number.wait()[0])
        # A batch of unlike routing is forgotten in time.
        self._part = max(valid / total, 0.9 * self._part)
        if valid > len(kept.rows.tokens):
            del kept, out  # before as much is needed once more
            kept = sorted_rows(valid)
            out = compute(kept)
        kept.rows = kept.rows.first(valid)
        return out, kept
