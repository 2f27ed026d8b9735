"""The T*K rows of a batch (a token and one of its experts), sorted by expert, those of no expert at the end.

Nothing here waits for a GPU, unless ranks divide the experts: how many rows an expert has is known there alone. Where
they do, most rows are of other ranks' experts, and are left out (`RowRoom`). Grouped products leave the rows after
the last expert's end undefined (NaN, perhaps) and never read them for another row or a weight's gradient; they count as
zero where rows are summed by token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...gates import PLAIN, Gate
from ..transfer import to_host
from . import kernels


class Gating(NamedTuple):
    """What becomes of gate and up.

    Attributes:
        gate: How they become the input of the down projection.
        bias: Added to them before, [E, 2I] bf16 of all the layer's experts; None without.
    """

    gate: Gate
    bias: Tensor | None


PLAINLY = Gating(PLAIN, None)


class Addends(NamedTuple):
    """The two parts of rows whose sum has not been computed yet.

    Attributes:
        base: What the frozen weights give, [S, H] bf16.
        lora: What LoRA adds, [S, H] bf16; None without.
    """

    base: Tensor
    lora: Tensor | None


@dataclass
class Rows:
    """All rows sorted by expert, or S consecutive ones of them; those of no expert may have been left out.

    Attributes:
        tokens: [S] integers: row i is of token `tokens[i]`.
        ends: [E] int32: the row after each expert's last.
        experts: [S] integers: row i is of expert `experts[i]` of all; an id that no expert has for rows of none.
        weights: [S] fp32: the routing weights.
        place: [T*K] integers: the sorted row of each unsorted one, of all rows, those left out among them.
        span: These rows among all.
        K: Number of experts of a token.
        per_expert: Rows of an expert on average, among all rows.
    """

    tokens: Tensor
    ends: Tensor
    experts: Tensor
    weights: Tensor
    place: Tensor
    span: slice
    K: int
    per_expert: float

    @classmethod
    def by_expert(cls, ids: Tensor, weights: Tensor, numbers: Tensor, ranks: int = 1, valid: int | None = None) -> Rows:
        """Sort the rows of a batch.

        Args:
            ids: [T, K] int64, -1 for no expert.
            weights: Routing weights, [T, K] fp32.
            numbers: 0 to E - 1, int16 or wider, on the device of both: few bits are sorted fast.
            ranks: Processes that the layer's experts are divided among: with several the rows of no expert are left
                out, which are all but one in so many.
            valid: Rows to keep, as many as are of an expert or more; without it, with several ranks, the host waits for
                their number.
        """
        flat, K = ids.reshape(-1), ids.shape[1]
        key = flat.masked_fill(flat < 0, len(numbers)).to(numbers.dtype)  # torch.where would wait for its scalar's copy
        key, order = key.sort(stable=True)
        ends = torch.searchsorted(key, numbers, right=True, out_int32=True)
        operations = kernels.row_operations(ids.device)
        tokens, by_row, place = operations.indexed(order, weights.reshape(-1), K)
        if valid is None and ranks > 1:
            valid = int(to_host([ends[-1:]], [torch.int32]).wait()[0]) if len(ends) else 0
        rows = len(order) if valid is None else min(len(order), max(1, valid))  # one at least, as products want it
        # Not by the number of valid rows: resident and streamed layers have the same bits, and only the latter know it.
        per_expert = len(order) / ranks / max(1, len(numbers))
        return cls(tokens[:rows], ends, key[:rows], by_row[:rows], place, slice(0, rows), K, per_expert)

    @classmethod
    def of_one_token(cls, experts: Tensor, weights: Tensor) -> Rows:
        """A token's rows in the order of its choices, each of an expert that is a group of its own.

        Args:
            experts: [K] integers.
            weights: Routing weights, [K] fp32.
        """
        K, place, ends = len(experts), *_counted(len(experts), experts.device)
        return cls(place, ends, experts, weights, place, slice(0, K), K, 1.0)

    def part(self, experts: slice, span: slice) -> Rows:
        """The rows `span` of all of these, which must be exactly those of `experts`."""
        ends = self.ends[experts] - span.start
        tokens, numbers, weights = (values[span] for values in (self.tokens, self.experts, self.weights))
        return Rows(tokens, ends, numbers, weights, self.place, span, self.K, self.per_expert)

    def first(self, valid: int) -> Rows:
        """These without the rows of no expert; `valid` are of one."""
        rows = max(1, valid)
        if rows >= len(self.tokens):
            return self
        tokens, numbers, weights = (values[:rows] for values in (self.tokens, self.experts, self.weights))
        return replace(self, tokens=tokens, experts=numbers, weights=weights, span=slice(0, rows))

    @functools.cached_property
    def idle(self) -> Tensor:
        """The experts without rows: [E, 1, 1] bool."""
        return (torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0)[:, None, None]

    @functools.cached_property
    def tiles(self) -> tuple[Tensor, Tensor, int]:
        """As `grouped_product` cuts these rows, where that computes.

        By the average of all rows, so that a layer computes the same bits at once and in chunks.
        """
        product = kernels.own_product(self.ends.device)
        assert product
        return product.tiles(self.ends, len(self.tokens), self.per_expert)

    def of_tokens(self, x: Tensor) -> Tensor:
        """The rows of x [T, H]: [S, H]."""
        return self._operations.gathered(x, self.tokens, self.ends)

    def gated(self, gu: Addends, gating: Gating) -> Tensor:
        """The gated product of gate and up: [S, 2I] -> [S, I]; it may overwrite gu."""
        return self._operations.gated(*gu, self.ends, *gating, self.experts)

    def gate_gradients_(self, gu: Addends, q: Addends, gating: Gating) -> Tensor:
        """The backward of `gated` and of the routing weights; see `fused_kernels.gate_gradients_`.

        Args:
            gu: Gate and up, [S, 2I]; `base` is overwritten by their gradients.
            q: The gradient of `gated` before the routing weight, [S, I]; with LoRA, `base` is overwritten by `gated`
                times the routing weight.
            gating: What `gated` was given.

        Returns:
            Gradients of the routing weights, [S] fp32.
        """
        return self._operations.gate_gradients_(*gu, *q, self.weights, self.ends, *gating, self.experts)

    def keep(self, rows: Addends, weighted: bool, everything: Tensor) -> None:
        """Write these rows, times their routing weights if `weighted`, to where they are among all rows [T*K, H]."""
        self._operations.weighted(*rows, self.weights if weighted else None, everything[self.span])

    def sum_by_token(self, rows: Addends, weighted: bool) -> Tensor:
        """Sum over each token's experts, in fp32 and in a fixed order: all rows [T*K, H] -> [T, H] bf16.

        Rows that `keep` wrote, piece by piece, give the same as all at once, to the bit.

        Args:
            rows: All rows; the memory may be overwritten.
            weighted: Whether they are to be multiplied by their routing weights.
        """
        return self._operations.summed(*rows, self.weights if weighted else None, self.place, self.ends, self.K)

    def by_choice(self, values: Tensor) -> Tensor:
        """A value for each of all rows, [T*K] -> for each choice of a token, [T, K]; zero where it is no expert."""
        place = self.place if len(values) == len(self.place) else self.place.clamp(max=len(values) - 1)
        values = values.index_select(0, place)
        return values.masked_fill_(self.place >= self.ends[-1], 0).view(-1, self.K)

    @property
    def _operations(self) -> ModuleType:
        return kernels.row_operations(self.ends.device)


@functools.cache
def _counted(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0 to count - 1, and 1 to count, int32: made once, for a launch takes as long as a small product."""
    with torch.inference_mode(False):
        numbers = torch.arange(count, dtype=torch.int32, device=device)
        return numbers, numbers + 1
