"""How many experts of each layer should be in which tier: the plan whose slowest tier is the fastest.

The three tiers work at the same time: weights cross the bus, the GPU computes what has arrived, the operators compute
the rest. So a layer takes as long as the slowest of them, forward and backward, and a step as long as its layers.
Where the CPU has no part, weights have a start: as many as the buffers hold cross the bus while the GPU computes
attention. (What the CPU computed comes back over the same bus, behind them.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from ..shapes import ExpertShape, expert_bytes
from .tiers import Tiers

# Seconds of a layer besides its experts, forward and backward (with a checkpoint's recompute): what Python needs to
# launch a DeepSeek-V2-Lite layer with LoRA (H200, Xeon). More work takes longer.
ATTENTION_SECONDS = 5e-3, 10e-3


# A plan with experts on the CPU has to be a tenth faster than one without: what the tiers cost each other makes it up
# to a fifth slower than it looks.
_MARGIN = 0.9


@dataclass(frozen=True)
class LinearCost:
    """Seconds that the CPU takes for its experts of a layer, forward or backward, as a linear function.

    Copies from and to the GPU are in it.

    Attributes:
        fixed: Seconds of a call.
        per_token: Seconds of a token, whether or not one of the CPU's experts gets it.
        per_expert: Seconds of an expert that gets any token.
        per_row: Seconds of a token at one expert.
    """

    fixed: float
    per_token: float
    per_expert: float
    per_row: float

    def seconds(self, tokens: float, experts: float, rows: float) -> float:
        """Seconds of a call.

        Args:
            tokens: Of the call.
            experts: On the CPU, that get any of them.
            rows: Tokens of these experts, counted once an expert.
        """
        return self.fixed + self.per_token * tokens + self.per_expert * experts + self.per_row * rows


@dataclass(frozen=True)
class MachineRates:
    """How fast a machine computes experts of one shape.

    Attributes:
        pcie_bytes_per_s: Bytes a second from page-locked memory to the GPU; 0 if memory cannot be page-locked.
        forward: Seconds of the CPU's forward.
        backward: Seconds of the CPU's backward.
        beside_forward: Seconds of the CPU's forward while experts are streamed, which the host has to launch.
        beside_backward: Seconds of the CPU's backward while experts are streamed.
        gpu_forward_rows_per_s: Rows a second of the GPU's forward, weights in its memory; a row is a token at one
            expert.
        gpu_backward_rows_per_s: Rows a second of the GPU's backward.
        assumed: Whether these rates are assumed, and were not measured.
    """

    pcie_bytes_per_s: float
    forward: LinearCost
    backward: LinearCost
    beside_forward: LinearCost
    beside_backward: LinearCost
    gpu_forward_rows_per_s: float
    gpu_backward_rows_per_s: float
    assumed: bool = False


@dataclass(frozen=True)
class TierPlan:
    """How many experts of each layer are in which tier, and how long a step's experts should take.

    Attributes:
        resident: Experts of a layer in the GPU's memory.
        streamed: Experts of a layer that are copied to the GPU each time.
        cpu: Experts of a layer that the CPU computes.
        seconds: Of all layers' experts in a step: of each layer and direction its slowest tier.
        stream_seconds: That the bus is busy in a step.
        cpu_seconds: That the CPU computes experts in a step.
        gpu_seconds: That the GPU computes experts in a step.
    """

    resident: int
    streamed: int
    cpu: int
    seconds: float
    stream_seconds: float
    cpu_seconds: float
    gpu_seconds: float

    @property
    def tiers(self) -> Tiers:
        """The plan's numbers alone."""
        return Tiers(self.resident, self.streamed)

    def __str__(self) -> str:
        return (
            f"{self.resident} experts of each layer on the GPU, {self.streamed} streamed, {self.cpu} on the CPU: a "
            f"step should take {self.seconds:.3g} s for its experts (GPU {self.gpu_seconds:.3g} and CPU "
            f"{self.cpu_seconds:.3g} at the same time; the bus {self.stream_seconds:.3g}, also while attention is "
            "computed)"
        )


@dataclass(frozen=True)
class MemoryBudget:
    """Everything but expert weights that must fit on the GPU.

    Attributes:
        tokens: Tokens of a forward in training; None if unknown.
        rest_bytes: Bytes of the model's weights outside the experts, as far as they are not on the GPU yet.
        layers: Decoder layers of the model, with experts or without.
        vocabulary: Logits of a token.
        dtype: The experts' dtype; None for bf16.
        lora_rank: Rank of the experts' LoRA if its parameters and their optimizer are on the GPU, else 0.
        keep_8bit: Whether streamed experts stay in 8 bits, as their checkpoint has them.
    """

    tokens: int | None = None
    rest_bytes: int = 0
    layers: int = 0
    vocabulary: int = 0
    dtype: torch.dtype | None = None
    lora_rank: int = 0
    keep_8bit: bool = False

    def free_for_experts(self, free: int, tokens: int, shape: ExpertShape) -> int:
        """Bytes that weights of experts may take on the GPU, with checkpointing.

        What is left by the rest of the model, hidden states between layers, one layer's activations, logits and their
        loss, LoRA on the GPU (fp32, its gradients and two moments), and a tenth of the free memory.

        Args:
            free: Bytes that are free on the GPU.
            tokens: Of a forward.
            shape: Sizes of a layer.
        """
        hidden = shape.hidden_size
        activations = tokens * (2 * hidden * self.layers + 100 * hidden + 14 * self.vocabulary)
        lora = self.layers * 16 * sum(a * b * c for a, b, c in shape.lora_shapes(self.lora_rank))
        return max(0, int(0.9 * free) - self.rest_bytes - activations - lora)


def plan_tiers(
    rates: MachineRates,
    shape: ExpertShape,
    layers: int,
    tokens: int,
    free_gpu_bytes: int,
    popularity: Sequence[float] = (),
    streaming: bool = True,
    keep_8bit: bool = False,
) -> TierPlan:
    """The plan whose experts take the least time in a step; of equals, the one with the fewest experts on the GPU.

    A plan without experts on the CPU is taken unless it is a tenth slower.

    Args:
        rates: For experts of `shape`.
        shape: Sizes of a layer.
        layers: How many layers have such experts.
        tokens: Tokens of a step's forward.
        free_gpu_bytes: For weights of all layers' resident experts, and for the buffers if any are streamed.
        popularity: Share of the routers' choices of each expert, the most used first; () if they are alike.
        streaming: Whether experts can be streamed.
        keep_8bit: Whether streamed experts stay in 8 bits (their scales are not counted).
    """
    streaming = streaming and rates.pcie_bytes_per_s > 0
    load = _Load.of(shape, tokens, popularity)
    size, E = expert_bytes(shape), shape.num_experts
    plans: list[TierPlan] = []
    for resident, streamed in itertools.product(range(E + 1), range(E + 1 if streaming else 1)):
        cpu = E - resident - streamed
        if cpu < 0 or 0 < cpu < shape.top_k:
            continue
        if resident * size * layers + buffer_bytes(shape, streamed, keep_8bit) > free_gpu_bytes and resident + streamed:
            continue
        plans.append(predicted(rates, shape, layers, load, resident, streamed, keep_8bit))

    def cost(plan: TierPlan) -> tuple[float, int, int]:
        return plan.seconds * (_MARGIN if plan.cpu == 0 else 1), plan.resident + plan.streamed, plan.resident

    return min(plans, key=cost)  # all on the CPU is always among them


@dataclass(frozen=True)
class _Load:
    """Tokens, and sums over the most used experts of a layer, from none to all: their rows, and how many have any."""

    tokens: int
    rows: list[float]
    touched: list[float]

    @classmethod
    def of(cls, shape: ExpertShape, tokens: int, popularity: Sequence[float]) -> _Load:
        E = shape.num_experts
        shares = list(popularity) if len(popularity) == E and sum(popularity) > 0 else [1.0] * E
        rows = [tokens * shape.top_k * share / sum(shares) for share in shares]
        # Tokens choose independently of each other: an expert that expects n of them has none with probability e^-n.
        touched = [1 - math.exp(-n) for n in rows]
        return cls(tokens, [0.0, *itertools.accumulate(rows)], [0.0, *itertools.accumulate(touched)])


def predicted(
    rates: MachineRates,
    shape: ExpertShape,
    layers: int,
    load: _Load,
    resident: int,
    streamed: int,
    keep_8bit: bool = False,
) -> TierPlan:
    """The plan of one choice of tiers: how long each tier should take.

    Args:
        rates: For experts of `shape`.
        shape: Sizes of a layer.
        layers: How many layers have such experts.
        load: Tokens by expert.
        resident: Experts of a layer in the GPU's memory.
        streamed: Experts of a layer that are copied to the GPU each time.
        keep_8bit: Whether streamed experts stay in 8 bits.
    """
    on_gpu, E = resident + streamed, shape.num_experts
    moved = (load.touched[on_gpu] - load.touched[resident]) * expert_bytes(shape, keep_8bit)
    stream = moved / rates.pcie_bytes_per_s if streamed else 0.0
    ahead = _ahead_bytes(shape, streamed, keep_8bit) / rates.pcie_bytes_per_s if streamed and on_gpu == E else 0.0
    cpu_rows, cpu_touched = load.rows[E] - load.rows[on_gpu], load.touched[E] - load.touched[on_gpu]
    total = cpu_total = gpu_total = 0.0
    for line, gpu_rate, rest in (
        (rates.beside_forward if streamed else rates.forward, rates.gpu_forward_rows_per_s, ATTENTION_SECONDS[0]),
        (rates.beside_backward if streamed else rates.backward, rates.gpu_backward_rows_per_s, ATTENTION_SECONDS[1]),
    ):
        cpu = line.seconds(load.tokens, cpu_touched, cpu_rows) if on_gpu < E else 0.0
        gpu = load.rows[on_gpu] / gpu_rate
        total += max(stream - min(rest, ahead, stream), cpu, gpu)
        cpu_total, gpu_total = cpu_total + cpu, gpu_total + gpu
    return TierPlan(
        resident, streamed, E - on_gpu, layers * total, 2 * layers * stream, layers * cpu_total, layers * gpu_total
    )


def buffer_bytes(shape: ExpertShape, streamed: int, keep_8bit: bool = False) -> int:
    """Bytes of the GPU's buffers for streamed experts.

    Args:
        shape: Sizes of a layer.
        streamed: Experts of a layer that are streamed.
        keep_8bit: Whether they stay in 8 bits; the buffers then include two chunks in bf16.
    """
    ahead = _ahead_bytes(shape, streamed, keep_8bit)
    return ahead + 2 * ahead // BUFFERS if keep_8bit else ahead


def _ahead_bytes(shape: ExpertShape, streamed: int, keep_8bit: bool) -> int:
    """Bytes of weights that the buffers hold, read ahead of their use."""
    size = expert_bytes(shape, keep_8bit)
    return BUFFERS * max(size, min(CHUNK_BYTES, streamed * size)) if streamed else 0


def assumed_rates(shape: ExpertShape) -> MachineRates:
    """The rates of an H200 on PCIe 5 and 16 AMX cores, measured on experts of 2,048 x 1,408 and scaled by size."""
    scale = shape.hidden_size * shape.intermediate_size / (2048 * 1408)
    return MachineRates(
        pcie_bytes_per_s=55e9,
        forward=LinearCost(2.5e-3, 1.2e-6, 40e-6 * scale, 2.8e-6 * scale),
        backward=LinearCost(4e-3, 2.5e-6, 40e-6 * scale, 4.6e-6 * scale),
        beside_forward=LinearCost(4e-3, 1.5e-6, 60e-6 * scale, 3e-6 * scale),
        beside_backward=LinearCost(7e-3, 3e-6, 60e-6 * scale, 5e-6 * scale),
        gpu_forward_rows_per_s=12e6 / scale,
        gpu_backward_rows_per_s=4e6 / scale,
        assumed=True,
    )
