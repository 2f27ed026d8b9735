"""On which device the experts' trainable LoRA is, with its gradients and the moments of the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..shapes import BF16, ExpertShape, expert_bytes
from .expert_memory import buffer_bytes
from .memory_model import MemoryBudget
from .tiers import Tiers, spread

logger = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 16  # in fp32: itself, its gradient and the two moments of Adam


@dataclass(frozen=True)
class LoraDevice:
    """Where the LoRA of all experts is.

    Attributes:
        on_gpu: Whether it is on the GPU, else on the CPU.
        parameters: How many there are at the rank that it was decided for.
        free: Bytes of the GPU's memory that are left for them beside everything else; None where that was no question.
    """

    on_gpu: bool
    parameters: int
    free: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the parameters, their gradients and moments."""
        return BYTES_PER_PARAMETER * self.parameters

    def __str__(self) -> str:
        count, size = f"{self.parameters / 1e6:,.1f} M parameters", f"{self.size / 1e9:.1f} GB"
        text = f"LoRA on the {'GPU' if self.on_gpu else 'CPU'}: {count}, {size} with gradients and moments"
        return text if self.free is None else f"{text}; the GPU has {self.free / 1e9:.1f} GB beside everything else"


def choose_lora_device(
    asked: str, rank: int, shapes: Sequence[ExpertShape], tiers: Tiers, free: int | None, bits: float = BF16
) -> LoraDevice:
    """Where LoRA of this rank should be: `auto` takes the GPU if it computes all experts and has room for it.

    Beside experts on the CPU LoRA stays there, where the operators read it.

    Args:
        asked: `kt_moe_lora_device`: auto, cpu or gpu.
        rank: LoRA rank of all three projections.
        shapes: Of the model's layers.
        tiers: Where their experts are.
        free: Bytes that experts' weights may take on the GPU (`MemoryBudget.free_for_experts`, LoRA not counted); None
            if that is unknown, or there is no GPU.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    parameters = sum(a * b * c for shape in shapes for a, b, c in shape.lora_shapes(rank))
    if asked != "auto" or free is None or not shapes or any(tiers.on_cpu(shape.num_experts) for shape in shapes):
        return LoraDevice(asked == "gpu", parameters)
    left = free - resident_bytes(tiers, shapes, bits)
    left -= max(buffer_bytes(s, tiers.streamed, bits, resident=tiers.need_gpu) for s in shapes)
    return LoraDevice(left > BYTES_PER_PARAMETER * parameters, parameters, max(0, left))


class LoraPlace:
    """Where the LoRA of a model's experts is: chosen once, at the first adapter, for optimizers are made afterwards.

    Args:
        asked: `kt_moe_lora_device`: auto, cpu or gpu.

    Attributes:
        chosen: The choice; None before the first adapter. Set before that, it is taken as it is.
    """

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.chosen: LoraDevice | None = None
        self._shapes: list[ExpertShape] = []
        self._tiers = Tiers()
        self._budget = MemoryBudget()
        self._free: int | None = None

    def learn(self, shapes: Sequence[ExpertShape], tiers: Tiers, budget: MemoryBudget, tokens: int, free: int) -> None:
        """Take note of experts that a GPU computes; until then all are on the CPU.

        Args:
            shapes: Of the model's layers.
            tiers: Where their experts will be.
            budget: What must fit on the GPU beside them.
            tokens: Of a forward.
            free: Bytes that are free on the GPU before experts are put there.
        """
        self._shapes, self._tiers, self._budget = list(shapes), tiers, budget
        self._free = budget.free_for_experts(free, tokens, max(shapes, key=expert_bytes))

    @property
    def left_on_cpu(self) -> bool:
        """Whether `auto` has left it on the CPU for want of room on the GPU."""
        chosen = self.chosen
        return self.asked == "auto" and chosen is not None and chosen.free is not None and not chosen.on_gpu

    def on_gpu(self, rank: int) -> bool:
        """Whether LoRA is on the GPU; what `auto` chose is logged once.

        Args:
            rank: Of the adapter whose tensors are made.
        """
        if self.chosen is None:
            bits = self._budget.bits
            self.chosen = choose_lora_device(self.asked, rank, self._shapes, self._tiers, self._free, bits)
            if self.chosen.free is not None:
                logger.info("kt_hf: kt_moe_lora_device=auto: %s.", self.chosen)
        return self.chosen.on_gpu


def resident_bytes(tiers: Tiers, shapes: Sequence[ExpertShape], bits: float = BF16) -> int:
    """Bytes of the experts of these layers that are in the GPU's memory."""
    whole = spread(tiers.resident_layers, len(shapes))
    counts = [s.num_experts if i in whole else min(tiers.resident, s.num_experts) for i, s in enumerate(shapes)]
    return sum(count * expert_bytes(shape, bits) for count, shape in zip(counts, shapes, strict=True))
