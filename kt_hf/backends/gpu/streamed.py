"""Experts that come to the products chunk by chunk: copied from host memory each time, or widened from low bits.

The mathematics is that of `grouped_mm`, over the rows of one chunk of experts at a time. The host has to know how many
rows each expert has: a chunk's rows are then an exact slice, and an expert without any is not copied. `TieredBackend`
copies the counts to the host along with the inputs of its part on the CPU; in backward they are known. A layer that is
one chunk needs no counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shapes import ExpertShape
from ..base import Gradients, SavedForward
from ..one_token import all_different
from ..transfer import to_host
from . import grouped_mm as grouped
from .grouped_mm import GroupedExperts, Lora
from .pinned_weights import HostWeights
from .resident import resident_gradients, resident_output
from .rows import Addends, Rows
from .weight_stream import Loaded, Streamer

# Rows of an expert on average, from which on each is taken to have some (none is 1e-7 then, if routing is even), and
# so to be copied: waiting for their numbers costs more than copying one too many.
_SURE = 16


@dataclass
class _StreamedForward(SavedForward):
    rows: Rows
    counts: list[int] | None  # None if nobody had to know
    x: Tensor  # [T, H]
    lora: Lora | None


class StreamedBackend(GroupedExperts):
    """Experts computed in bf16 on a GPU, chunk by chunk; the only wait is that for the row counts.

    Args:
        weights: The weights, in host memory or, of low bits, resident on the GPU; taken over.
        shape: The layer's sizes; H and I must be multiples of 8.
        streamer: The model's streamer; its device computes the experts and holds their LoRA.
        bias: Of gate and up, [E, 2I], kept on that device: too little to be streamed; None without.

    Raises:
        KTAMXConfigError: Other sizes.
    """

    def __init__(
        self, weights: HostWeights, shape: ExpertShape, streamer: Streamer, bias: Tensor | None = None
    ) -> None:
        super().__init__(shape, streamer.device, bias)
        self.weights = weights
        self.name = "streamed" if weights.resident is None else "resident"
        self._streamer = streamer

    def _at_once(self, rows: int, counts: list[int] | None) -> bool:
        """Whether the layer is computed as a whole, for which nobody has to know how many rows each expert has.

        Args:
            rows: Of all ranks' experts.
            counts: Of each expert here, if they are known.
        """
        weights = self.weights
        if weights.resident is not None:
            return not weights.packed or self._streamer.in_one_chunk(weights)
        if not self._streamer.in_one_chunk(weights):
            return False
        return all(counts) if counts else rows >= _SURE * self.shape.num_experts * self.shape.ranks

    def _whole(self, backward: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """gate_up and down of all experts, once, as they are multiplied; let them go before the next is asked for."""
        resident = self.weights.resident
        if resident is not None and not self.weights.packed:
            self._streamer.passed(self.weights, [], backward)
            yield self.weights.products_of(resident)
            return
        for chunk in self._streamer.chunks(self.weights, [1] * self.shape.num_experts, backward):
            yield chunk.gate_up, chunk.down

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether `saved` is of this backend: a saved forward stays good."""
        return isinstance(saved, _StreamedForward)

    def row_counts(self, ids: Tensor) -> Tensor:
        """The rows of each expert in ids [T, K]: [E], int64, on `device`."""
        flat = ids.reshape(-1) + 1
        return flat.new_zeros(self.shape.num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[1:]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Wait for the row counts, then compute as `forward_counted`; without a wait where the layer is one chunk.

        One token without `save` is computed by its experts alone: streamed ones wait for their numbers, and of low bits
        in the GPU's memory those are widened, not the layer.
        """
        if len(ids) == 1 and not save and self.shape.ranks == 1:
            out = self._one_token(x, ids[0], weights[0])
            if out is not None:
                return out, None
        return self.forward_counted(x, ids, weights, save, self._counts(ids))

    def _one_token(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """The output [1, H] of x [1, H] by the experts ids [K]; None where the general way is to be taken."""
        held = self.weights
        if held.resident is not None:
            if not held.packed:  # the products read the layer's memory as it is
                return None
            none = ids < 0  # zero times another expert's finite output, from a hidden state of zeros
            ids, x = ids.clamp(min=0), x.expand(len(ids), -1).masked_fill(none.unsqueeze(1), 0)
            return self._of_chosen(x, ids, weights.masked_fill(none, 0), *held.chosen(ids))
        if len(ids) > self._streamer.most_chosen(held):
            return None
        experts = to_host([ids], [torch.int64]).wait()[0].tolist()
        if not all_different(experts):
            return None
        with self._streamer.chosen(held, experts) as (gate_up, down):
            return self._of_chosen(x.expand(len(ids), -1).contiguous(), ids, weights, gate_up, down)

    def _of_chosen(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """The output [1, H] of x [K, H], a row for each of the experts ids [K], whose weights are stacks of K."""
        rows, lora = Rows.of_one_token(ids, weights), self._lora.chosen(ids) if self._lora else None
        outputs = grouped.outputs_of_rows(x, gate_up, down, lora, rows, self._gating)
        return rows.sum_by_token(outputs, weighted=True)

    def _counts(self, ids: Tensor) -> list[int] | None:
        if self._at_once(ids.numel(), None):
            return None
        (counts,) = to_host([self.row_counts(ids)], [torch.int64]).wait()
        return counts.tolist()

    def saved_of(
        self, x: Tensor, ids: Tensor, weights: Tensor, known: int | list[int] | None = None
    ) -> _StreamedForward:
        """The inputs as `forward` keeps them, rows sorted by expert; it waits as that does if nothing is known."""
        return self._saved(x, ids, weights, self._counts(ids) if known is None else known)

    def known_rows(self, saved: SavedForward) -> int | list[int]:
        """The rows of each expert, or where nobody had to know them, how many rows were kept."""
        assert isinstance(saved, _StreamedForward)
        return len(saved.rows.tokens) if saved.counts is None else saved.counts

    def _saved(self, x: Tensor, ids: Tensor, weights: Tensor, known: int | list[int] | None) -> _StreamedForward:
        counts, valid = (known, sum(known)) if isinstance(known, list) else (None, known)
        rows = Rows.by_expert(ids, weights, self._numbers, self.shape.ranks, valid)
        return _StreamedForward(rows, counts, x, self._lora)

    def forward_counted(
        self, x: Tensor, ids: Tensor, weights: Tensor, save: bool, counts: list[int] | None
    ) -> tuple[Tensor, SavedForward | None]:
        """Launch the copies and products, without a wait.

        Args:
            x: Hidden states [T, H], bf16 on `device`, as are `ids` and `weights`.
            ids: [T, K] int64, -1 for no expert.
            weights: Routing weights [T, K], fp32.
            save: Whether to keep the inputs for a backward.
            counts: The values of `row_counts(ids)`; None will do if the layer is computed as a whole.

        Returns:
            The output [T, H], bf16 on `device`; and with `save` what `backward` needs.
        """
        if self._at_once(ids.numel(), counts):
            out, kept = self._computed_whole(x, ids, weights, counts)
            return out, kept if save else None
        assert counts is not None, "row counts are needed to stream"
        kept = self._saved(x, ids, weights, counts)
        rows, lora, saved = kept.rows, kept.lora, kept if save else None
        everything = x.new_empty(len(rows.tokens), x.shape[1])
        for chunk, part in self._chunks(rows, counts, backward=False):
            chunk_lora = lora.part(chunk.experts) if lora else None
            outputs = grouped.outputs(x, chunk.gate_up, chunk.down, chunk_lora, part, self._gating)
            part.keep(outputs, True, everything)
            del chunk, outputs
        return rows.sum_by_token(Addends(everything, None), weighted=False), saved

    def _computed_whole(
        self, x: Tensor, ids: Tensor, weights: Tensor, counts: list[int] | None
    ) -> tuple[Tensor, _StreamedForward]:
        def compute(kept: _StreamedForward) -> Tensor:
            for gate_up, down in self._whole(backward=False):
                out = resident_output(x, gate_up, down, kept.lora, kept.rows, self._gating)
                del gate_up, down
            return out

        if counts is not None:
            kept = self._saved(x, ids, weights, counts)
            return compute(kept), kept
        return self._room.computed(ids.numel(), lambda rows: self._saved(x, ids, weights, rows), compute)

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Launch the copies and products of a backward; all gradients are new tensors on `device`, LoRA's in bf16."""
        assert isinstance(saved, _StreamedForward)
        rows, lora = saved.rows, saved.lora
        if self._at_once(len(rows.place), saved.counts):
            for gate_up, down in self._whole(backward=True):
                result = resident_gradients(saved.x, grad_output, gate_up, down, lora, rows, self._gating)
                del gate_up, down
            return result
        counts = saved.counts
        if counts is None:  # of a layer that was one chunk
            by_expert = torch.diff(rows.ends, prepend=rows.ends.new_zeros(1))
            counts = to_host([by_expert], [torch.int64]).wait()[0].tolist()
        everything = grad_output.new_empty(len(rows.tokens), grad_output.shape[1])
        by_row = torch.empty_like(rows.weights)
        whole = lora.zeros() if lora else None
        for chunk, part in self._chunks(rows, counts, backward=True):
            chunk_lora = lora.part(chunk.experts) if lora else None
            gradients = grouped.gradients(
                saved.x, grad_output, chunk.gate_up, chunk.down, chunk_lora, part, self._gating
            )
            part.keep(gradients.x, False, everything)
            by_row[part.span] = gradients.weights
            if whole and gradients.lora:
                for target, piece in zip(whole.part(chunk.experts).tensors, gradients.lora.tensors, strict=True):
                    target.copy_(piece)
            del chunk, gradients
        lora_gradients = whole.projections() if whole else ()
        grad_x = rows.sum_by_token(Addends(everything, None), weighted=False)
        return Gradients(grad_x, rows.by_choice(by_row), lora_gradients)

    def _chunks(self, rows: Rows, counts: list[int], backward: bool) -> Iterator[tuple[Loaded, Rows]]:
        """The weights and the rows of each chunk; let both go before the next is asked for."""
        ends = [0, *itertools.accumulate(counts)]
        for chunk in self._streamer.chunks(self.weights, counts, backward):
            span = slice(ends[chunk.experts.start], ends[chunk.experts.stop])
            part = rows.part(chunk.experts, span)
            yield chunk, part
            del chunk
