"""Experts whose weights are in host memory and are copied to the GPU each time they are used, chunk by chunk.

The mathematics is `grouped`'s, over the rows of one chunk of experts at a time. The host has to know how many rows each
expert has: a chunk's rows are then an exact slice, and an expert without any is not copied. `TieredBackend` brings the
counts with what its part on the CPU waits for; in backward they are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shapes import ExpertShape
from ..base import Gradients, SavedForward
from ..transfer import to_host
from . import grouped_mm as grouped
from .grouped_mm import GroupedExperts, Lora, Rows
from .pinned_weights import HostWeights
from .weight_stream import Loaded, Streamer


@dataclass
class _StreamedForward(SavedForward):
    rows: Rows
    counts: list[int]
    x: Tensor  # [T, H]
    lora: Lora | None


class StreamedBackend(GroupedExperts):
    """Experts in bf16, weights in host memory, computed on a GPU without a wait but that for the rows' counts.

    Args:
        weights: Taken over.
        shape: Sizes; H and I multiples of 8.
        streamer: Of the model; its device is where experts are computed, and where their LoRA is.
    """

    name = "streamed"

    def __init__(self, weights: HostWeights, shape: ExpertShape, streamer: Streamer) -> None:
        super().__init__(shape, streamer.device)
        self.weights = weights
        self._streamer = streamer

    def can_backward(self, saved: SavedForward) -> bool:
        return isinstance(saved, _StreamedForward)

    def row_counts(self, ids: Tensor) -> Tensor:
        """[E] int64 on `device`: the rows of each expert in ids [T, K]."""
        flat = ids.reshape(-1) + 1
        return flat.new_zeros(self.shape.num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[1:]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        (counts,) = to_host([self.row_counts(ids)], [torch.int64]).wait()
        return self.forward_counted(x, ids, weights, save, counts.tolist())

    def forward_counted(
        self, x: Tensor, ids: Tensor, weights: Tensor, save: bool, counts: list[int]
    ) -> tuple[Tensor, SavedForward | None]:
        rows, lora = Rows.by_expert(ids, weights, self._numbers), self._lora
        spread = x.new_zeros(rows.T * rows.K, x.shape[1])
        for chunk, part in self._chunks(rows, counts, backward=False):
            own = lora.part(chunk.experts) if lora else None
            y = grouped.outputs(x.index_select(0, part.tokens), chunk.gate_up, chunk.down, own, part)
            spread.index_copy_(0, part.order, y)
            del chunk
        return rows.sum_by_token(spread), _StreamedForward(rows, counts, x, lora) if save else None

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        assert isinstance(saved, _StreamedForward)
        rows, lora = saved.rows, saved.lora
        spread = grad_output.new_zeros(rows.T * rows.K, grad_output.shape[1])
        grad_weights = spread.new_zeros(rows.T * rows.K, dtype=torch.float32)
        whole = lora.zeros() if lora else None
        for chunk, part in self._chunks(rows, saved.counts, backward=True):
            own = lora.part(chunk.experts) if lora else None
            x, d = (t.index_select(0, part.tokens) for t in (saved.x, grad_output))
            found = grouped.gradients(x, d, chunk.gate_up, chunk.down, own, part)
            spread.index_copy_(0, part.order, found.x)
            grad_weights.index_copy_(0, part.order, found.weights)
            if whole and found.lora:
                for target, piece in zip(whole.part(chunk.experts).tensors, found.lora.tensors, strict=True):
                    target.copy_(piece)
            del chunk
        gradients = whole.six() if whole else ()
        return Gradients(rows.sum_by_token(spread), grad_weights.view(rows.T, rows.K), gradients)

    def _chunks(self, rows: Rows, counts: list[int], backward: bool) -> Iterator[tuple[Loaded, Rows]]:
        """Each chunk's weights and rows."""
        ends = [0, *itertools.accumulate(counts)]
        for chunk in self._streamer.chunks(self.weights, counts, backward):
            span = slice(ends[chunk.experts.start], ends[chunk.experts.stop])
            part = rows.part(chunk.experts, span)
            yield chunk, part
            del chunk
