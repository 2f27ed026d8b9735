"""Which layers keep their experts' forward for the recompute of gradient checkpointing, and which compute it again.

What is kept of a layer takes 4 H bytes of a token and more; a layer that is computed again brings its streamed experts
to the GPU three times a step instead of twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..shapes import ExpertShape, expert_bytes
from .expert_memory import widest_chunk
from .memory_model import FRAGMENTS, MemoryBudget, gpu_memory
from .tiers import Tiers, spread

logger = logging.getLogger(__name__)

_CHUNKS = 16  # of a layer at most, where there is a choice: each is launched by itself


def keeping_activations(
    asked: str, budget: MemoryBudget, shapes: Sequence[ExpertShape], tokens: int, tiers: Tiers, free: int
) -> MemoryBudget:
    """The budget, with the number of layers whose experts' inputs and outputs are kept for the recompute.

    `auto` keeps those of as many as there is room for, beside buffers that are not too small. Beside experts on the CPU
    it keeps all, for there it is host memory that they take.

    Args:
        asked: `kt_expert_activations`: auto, retain or recompute.
        budget: The model outside of the experts, and how it is trained.
        shapes: Of the layers with experts.
        tokens: Of a forward.
        tiers: Where experts are.
        free: Bytes that are free on the GPU.
    """
    shape, layers = max(shapes, key=expert_bytes), len(shapes)
    if asked != "auto" or not budget.checkpointing or not tiers.need_gpu or tiers.on_cpu(shape.num_experts):
        return replace(budget, retained=0 if asked == "recompute" else None)
    chunk = min(widest_chunk(budget.bits), shape.num_experts * expert_bytes(shape) // _CHUNKS)

    def fits(retained: int) -> bool:
        kept = replace(budget, retained=retained)
        return gpu_memory(kept, shape, layers, tokens, tiers, chunk, FRAGMENTS).total <= free

    retained = next((n for n in range(layers, 0, -1) if fits(n)), 0)
    return replace(budget, retained=None if retained == layers else retained)


class KeptActivations:
    """The layers of a model that keep their experts' forward.

    Args:
        asked: `kt_expert_activations`: auto, retain or recompute.

    Attributes:
        asked: As it was given.
    """

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self._again: frozenset[int] = frozenset()
        self._layers = self._said = 0

    def decide(self, layers: Iterable[int], retained: int | None) -> None:
        """Choose the layers.

        Args:
            layers: Indices of the layers.
            retained: How many of them keep their forward; None for all.
        """
        indices = sorted(layers)
        kept = spread(len(indices) if retained is None else retained, len(indices))
        self._again, self._layers = frozenset(indices) - {indices[i] for i in kept}, len(indices)

    def say(self) -> None:
        """Log what `auto` has chosen, as training begins: until then a trainer may tell more of the run."""
        if self.asked == "auto" and len(self._again) != self._said:
            self._said = len(self._again)
            logger.info(
                "kt_hf: experts of %d of %d layers are computed again in backward: the GPU has no room to keep more "
                "(kt_expert_activations).", self._said, self._layers,
            )  # fmt: skip

    def keeps(self, layer_idx: int) -> bool:
        """Whether a layer keeps its forward."""
        return self.asked != "recompute" and layer_idx not in self._again
