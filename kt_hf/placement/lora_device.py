"""On which device the experts' trainable LoRA is, with its gradients and the moments of the optimizer: layer by layer.

A layer's LoRA on the CPU costs time in each step (its gradients cross the bus, the CPU clips them and makes the
optimizer's step, and what has become of the values crosses the bus again), on the GPU it costs memory. That of the
first layers is on the GPU, as far as there is room: the gradients of the last ones arrive first, and what has become of
them is needed last.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..shapes import ExpertShape, expert_bytes
from .expert_memory import lora_parameters
from .memory_model import MemoryBudget, fragments, gpu_memory, room_for
from .tiers import Tiers

logger = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 16  # in fp32: itself, its gradient and the two moments of Adam


@dataclass(frozen=True)
class LoraDevice:
    """Where the LoRA of all experts is.

    Attributes:
        on_gpu: Layers whose LoRA is on the GPU, the first ones; that of the others is on the CPU.
        layers: How many there are.
        parameters: How many all layers' LoRA has at the rank that it was decided for.
        needed: Bytes that a step takes of the GPU's memory with it; None where the device was no question.
        room: Bytes of that memory there are to be had; None likewise.
    """

    on_gpu: int
    layers: int
    parameters: int
    needed: int | None = None
    room: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the parameters, their gradients and moments."""
        return BYTES_PER_PARAMETER * self.parameters

    def __str__(self) -> str:
        some = f" of {self.on_gpu} of {self.layers} layers" if 0 < self.on_gpu < self.layers else ""
        text = (
            f"LoRA{some} on the {'GPU' if self.on_gpu else 'CPU'}: {self.parameters / 1e6:,.1f} M parameters"
            f"{' in all' if some else ''}, {self.size / 1e9:.1f} GB with gradients and moments"
        )
        if self.needed is None or self.room is None:
            return text
        return f"{text}; a step then takes about {self.needed / 1e9:.1f} GB of the GPU's {self.room / 1e9:.1f}"


def choose_lora_device(
    asked: str,
    rank: int,
    shapes: Sequence[ExpertShape],
    tiers: Tiers,
    budget: MemoryBudget,
    tokens: int,
    free: int | None,
) -> LoraDevice:
    """Where LoRA of this rank should be: `auto` has that of as many layers on the GPU as it has room for.

    All or none, if nobody has said how long a step is, or batches are accumulated, for they may yet be made one. Beside
    experts on the CPU LoRA stays there, where the operators read it.

    Args:
        asked: `kt_moe_lora_device`: auto, cpu or gpu.
        rank: LoRA rank of all three projections.
        shapes: Of the model's layers.
        tiers: Where their experts are.
        budget: What must fit on the GPU beside experts; `tokens` of it is None if unknown, and of more than
            `lora_layers` LoRA is not put there.
        tokens: Of a forward.
        free: Bytes that are free on the GPU, before experts are put there; None if there is no GPU.
    """
    layers, parameters = len(shapes), sum(lora_parameters(shape, rank) for shape in shapes)
    if asked != "auto" or free is None or not shapes or any(tiers.on_cpu(shape.num_experts) for shape in shapes):
        return LoraDevice(layers if asked == "gpu" else 0, layers, parameters)
    largest, room = max(shapes, key=expert_bytes), room_for(free)

    def needed(count: int) -> int:
        with_lora = replace(budget, lora_rank=rank, computed_rank=rank, lora_layers=count)
        return gpu_memory(with_lora, largest, layers, tokens, tiers, fragments=fragments()).total

    most = layers if budget.lora_layers is None else min(budget.lora_layers, layers)
    some = budget.tokens is not None and not budget.accumulating
    on_gpu = next((n for n in range(most, 0, -1 if some else -max(1, most)) if needed(n) <= room), 0)
    return LoraDevice(on_gpu, layers, parameters, needed(on_gpu), room)


class LoraPlace:
    """Where the LoRA of a model's experts is: chosen at the first adapter, and by `settle_step` once more.

    Args:
        asked: `kt_moe_lora_device`: auto, cpu or gpu.

    Attributes:
        chosen: The choice; None before the first adapter.
        budget: What must fit on the GPU beside experts, as far as is known.
        settled: By what a trainer's choice was made: another trainer like it chooses nothing anew.
    """

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.chosen: LoraDevice | None = None
        self.budget = MemoryBudget()
        self.settled: tuple[object, ...] | None = None
        self._shapes: dict[int, ExpertShape] = {}
        self._tiers = Tiers()
        self._tokens = 0
        self._free: int | None = None

    def learn(
        self, layers: Mapping[int, ExpertShape], tiers: Tiers, budget: MemoryBudget, tokens: int, free: int
    ) -> None:
        """Take note of experts that a GPU computes; until then all are on the CPU.

        Args:
            layers: Shape by layer index.
            tiers: Where their experts will be.
            budget: What must fit on the GPU beside them.
            tokens: Of a forward.
            free: Bytes that are free on the GPU before experts are put there.
        """
        self._shapes, self._tiers = dict(sorted(layers.items())), tiers
        self.budget, self._tokens, self._free = budget, tokens, free

    @property
    def open(self) -> bool:
        """Whether `auto` has chosen between two devices, and may choose again by what is known later."""
        return self.asked == "auto" and self.chosen is not None and self.chosen.room is not None

    def choose(self, rank: int) -> LoraDevice:
        """Choose, and log what `auto` has chosen.

        Args:
            rank: Of the adapter whose tensors are made.
        """
        before, shapes = self.chosen, list(self._shapes.values())
        self.chosen = choose_lora_device(
            self.asked, rank, shapes, self._tiers, self.budget, self._tokens, self._free
        )  # fmt: skip
        if self.chosen.room is not None and (before is None or before.on_gpu != self.chosen.on_gpu):
            logger.info("kt_hf: kt_moe_lora_device=auto: %s.", self.chosen)
        return self.chosen

    def on_gpu(self, rank: int, layer_idx: int) -> bool:
        """Whether the LoRA of a layer is on the GPU.

        Args:
            rank: Of the adapter whose tensors are made.
            layer_idx: Index of the layer.
        """
        chosen = self.chosen or self.choose(rank)
        if not self._shapes:  # `learn` was not called: no GPU computes experts
            return self.asked == "gpu"
        return layer_idx in list(self._shapes)[: chosen.on_gpu]
