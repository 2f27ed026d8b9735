"""How many experts of each layer should be in which tier: the plan whose slowest tier is the fastest.

The three tiers work at the same time: weights cross the bus, the GPU computes what has arrived, the operators compute
the rest. Where the CPU has a part, a layer takes as long as the slowest of them, forward and backward, and a step as
long as its layers. (What the CPU computed comes back over the same bus, behind the weights.)

Where it has none, layers follow each other without a wait: as many weights as the buffers hold cross the bus while the
GPU computes attention, and whole layers that it holds. So a step takes as long as the bus is busy, or the GPU.

Choosing is a pure function of rates, sizes and memory; `calibration` measures the rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from ..shapes import BF16, ExpertShape, expert_bytes
from .expert_memory import buffer_bytes, chunk_bytes, resident_bytes, resident_extra
from .machine_rates import MachineRates
from .tiers import Tiers

# Seconds of a layer besides its experts, forward and backward (with a checkpoint's recompute): what Python needs to
# launch a DeepSeek-V2-Lite layer with LoRA (H200, Xeon). More work takes longer.
ATTENTION_SECONDS = 5e-3, 10e-3

# A plan with experts on the CPU has to be a tenth faster than one without: what the tiers cost each other makes it up
# to a fifth slower than it looks.
_MARGIN = 0.9
# Where more of a layer's experts than this have tokens, it matters little which: whole layers are resident then.
_ALL = 0.95


@dataclass(frozen=True)
class TierPlan:
    """How many experts of each layer are in which tier, and how long a step's experts should take.

    Attributes:
        resident: Experts in the GPU's memory, of a layer that is not resident whole.
        streamed: Experts of such a layer that are copied to the GPU each time.
        cpu: Experts of such a layer that the CPU computes.
        seconds: Of all layers' experts in a step, attention not counted.
        stream_seconds: That the bus is busy in a step.
        cpu_seconds: That the CPU computes experts in a step.
        gpu_seconds: That the GPU computes experts in a step.
        resident_layers: Layers that are resident whole.
        chunk_bytes: Of a chunk of streamed experts, in bf16.
    """

    resident: int
    streamed: int
    cpu: int
    seconds: float
    stream_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    resident_layers: int = 0
    chunk_bytes: int = CHUNK_BYTES

    @property
    def tiers(self) -> Tiers:
        """The plan's numbers alone."""
        return Tiers(self.resident, self.streamed, self.resident_layers)

    def __str__(self) -> str:
        whole = self.resident_layers
        where = f"{whole} whole layer{'s' if whole > 1 else ''} on the GPU; of each other layer " if whole else ""
        each = "" if whole else " of each layer"
        return (
            f"{where}{self.resident} experts{each} on the GPU, {self.streamed} streamed, {self.cpu} on the CPU: a "
            f"step should take {self.seconds:.3g} s for its experts (GPU {self.gpu_seconds:.3g} and CPU "
            f"{self.cpu_seconds:.3g} at the same time; the bus {self.stream_seconds:.3g}, also while attention is "
            "computed)"
        )


def plan_tiers(
    rates: MachineRates,
    shape: ExpertShape,
    layers: int,
    tokens: int,
    free_gpu_bytes: int,
    popularity: Sequence[float] = (),
    streaming: bool = True,
    bits: float = BF16,
) -> TierPlan:
    """The plan whose experts take the least time in a step; of equals, that which takes the least GPU memory.

    A plan without experts on the CPU is taken unless it is a tenth slower. Streaming is never given up for lack of
    memory: its buffers may be as small as it takes.

    Args:
        rates: For experts of `shape`.
        shape: Sizes of a layer.
        layers: How many layers have such experts.
        tokens: Tokens of a step's forward.
        free_gpu_bytes: For weights of all layers' resident experts, and for the buffers if any are streamed.
        popularity: Share of the routers' choices of each expert, the most used first; () if they are alike.
        streaming: Whether experts can be streamed.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    load = _Load.of(shape, tokens, popularity)
    plans: list[TierPlan] = []
    for tiers in _choices(shape, layers, load, streaming and rates.pcie_bytes_per_s > 0):
        streamed = tiers.streamed if tiers.resident_layers < layers else 0
        left = free_gpu_bytes - resident_bytes(shape, tiers, layers, bits)
        if tiers.resident or tiers.resident_layers:
            left -= resident_extra(shape, tokens, bits)
            least = chunk_bytes(0, shape, streamed, bits)
            if left < buffer_bytes(shape, streamed, bits, least):
                continue
        chunk = chunk_bytes(left, shape, streamed, bits)
        plans.append(predicted(rates, shape, layers, load, tiers, bits, chunk))

    def cost(plan: TierPlan) -> tuple[float, int, int, int]:
        seconds = plan.seconds * (_MARGIN if plan.cpu == 0 else 1)
        return seconds, plan.resident_layers, plan.resident + plan.streamed, plan.resident

    return min(plans, key=cost)  # all on the CPU is always among them


def _choices(shape: ExpertShape, layers: int, load: _Load, streaming: bool) -> Iterator[Tiers]:
    """The tiers that are worth a look: whole layers, and parts of layers if that may bring anything."""
    E = shape.num_experts
    if streaming:
        yield from (Tiers(0, E, whole) for whole in range(layers))
    few_have_tokens = load.touched[E] < _ALL * E
    for resident in range(E + 1):
        for streamed in range(E - resident + 1 if streaming else 1):
            cpu = E - resident - streamed
            if cpu >= shape.top_k or (cpu == 0 and (resident == E or (resident and few_have_tokens))):
                yield Tiers(resident, streamed)


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


def expected(
    rates: MachineRates,
    shape: ExpertShape,
    layers: int,
    tokens: int,
    tiers: Tiers,
    bits: float = BF16,
    again: float = 0.0,
) -> TierPlan:
    """What tiers that were chosen by other means should take, if no expert is more popular than another.

    Args:
        rates: For experts of `shape`.
        shape: Sizes of a layer.
        layers: How many layers have such experts.
        tokens: Tokens of a step's forward.
        tiers: How many experts of a layer are where, and how many layers are resident whole.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        again: The part of the layers whose forward is computed once more in backward.
    """
    return predicted(rates, shape, layers, _Load.of(shape, tokens, ()), tiers, bits, again=again)


def predicted(
    rates: MachineRates,
    shape: ExpertShape,
    layers: int,
    load: _Load,
    tiers: Tiers,
    bits: float = BF16,
    chunk_bytes: int = CHUNK_BYTES,
    again: float = 0.0,
) -> TierPlan:
    """The plan of one choice of tiers: how long each tier should take.

    Args:
        rates: For experts of `shape`.
        shape: Sizes of a layer.
        layers: How many layers have such experts.
        load: Tokens by expert.
        tiers: How many experts of a layer are where, and how many layers are resident whole.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        chunk_bytes: Of a chunk of streamed experts, in bf16.
        again: The part of the layers whose forward is computed once more in backward.
    """
    E, resident, on_gpu, whole = shape.num_experts, tiers.resident, tiers.on_gpu, tiers.resident_layers
    others, streamed = layers - whole, tiers.streamed if whole < layers else 0
    stream = ahead = 0.0
    if streamed:
        moved = (load.touched[on_gpu] - load.touched[resident]) * expert_bytes(shape, bits)
        stream, ahead = (size / rates.pcie_bytes_per_s for size in (moved, BUFFERS * chunk_bytes * bits / BF16))
    cpu_rows, cpu_touched = load.rows[E] - load.rows[on_gpu], load.touched[E] - load.touched[on_gpu]
    total = cpu_total = gpu_total = 0.0
    cost = (rates.beside_forward, rates.beside_backward) if streamed else (rates.forward, rates.backward)
    on_the_gpu = rates.gpu_forward_rows_per_s, rates.gpu_backward_rows_per_s
    for line, gpu_rate, rest, times in zip(cost, on_the_gpu, ATTENTION_SECONDS, (1 + again, 1), strict=True):
        cpu = line.seconds(load.tokens, cpu_touched, cpu_rows) if on_gpu < E else 0.0
        gpu, of_whole = (
            load.rows[n] / gpu_rate + rates.widening_seconds(load.touched[n] * shape.num_weights / E, bits)
            for n in (on_gpu, E)
        )
        if on_gpu < E:
            total += times * (others * max(stream, cpu, gpu) + whole * of_whole)
        else:
            bus = _bus_seconds(stream, ahead, rest, of_whole, others, whole) if streamed else 0.0
            total += times * max(bus - layers * rest, layers * of_whole)
        cpu_total += times * others * cpu
        gpu_total += times * (others * gpu + whole * of_whole)
    return TierPlan(
        resident,
        tiers.streamed,
        E - on_gpu,
        total,
        (2 + again) * others * stream,
        cpu_total,
        gpu_total,
        whole,
        chunk_bytes,
    )


def _bus_seconds(stream: float, ahead: float, rest: float, compute: float, streamed: int, whole: int) -> float:
    """Seconds of all layers in one direction if the bus is what they wait for: it is busy, or the buffers are full.

    They are while the GPU computes attention, and resident layers in a row, for longer than it takes to fill them.

    Args:
        stream: Seconds that the weights of a streamed layer take to cross the bus.
        ahead: Seconds that the weights take which the buffers hold.
        rest: Seconds of a layer besides its experts.
        compute: Seconds of a resident layer's experts on the GPU.
        streamed: How many layers are streamed.
        whole: How many are resident, spread evenly between them.
    """
    runs = min(whole, streamed)  # of resident layers in a row
    between = rest + whole / runs * (rest + compute) if runs else 0.0
    return streamed * stream + (streamed - runs) * max(0.0, rest - ahead) + runs * max(0.0, between - ahead)
