"""Where the experts of a run begin under `auto`: what needs no measurement, and what the log says of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ..backends.gpu.grouped_mm import aligned
from ..config import KTConfig
from ..ranks import Ranks, of_all_ranks
from ..shapes import BF16, ExpertShape, expert_bytes
from ..system.cpu import ThreadPlan
from ..system.memory import free_device_memory
from .calibration import copy_rate, measure_rates
from .memory_model import MemoryBudget
from .planner import MachineRates, TierPlan, assumed_rates, expected, plan_tiers, slowest_rates
from .tiers import Tiers, check_tiers, is_auto

logger = logging.getLogger(__name__)

_ASSUMED_WORKERS = 15  # of the machine whose rates are assumed
# How much faster than assumed the CPU's operators may be: if streaming is faster even so, the CPU is not measured.
_FASTER = 1.5
# A part on the CPU cannot be given back, and is in the way of layers that come to the GPU: it has to bring this much.
_WORTH = 0.7


@dataclass(frozen=True)
class Machine:
    """What can compute experts.

    Attributes:
        device: The GPU.
        threads: The CPU's operators' worker threads.
        backend: What computes experts on the CPU.
    """

    device: torch.device
    threads: ThreadPlan
    backend: str


@dataclass(frozen=True)
class Measured:
    """What a rank has before its experts are anywhere.

    Attributes:
        unsuitable: Why experts are not sent to its GPU without being asked to; None if they may be.
        free: Bytes that are free on the GPU.
        host_room: Bytes of host memory for experts; None if they are there already.
        bus: Bytes a second from host memory to the GPU; 0 if it was not measured.
        workers: Threads of the CPU's operators.
    """

    unsuitable: str | None
    free: int
    host_room: int | None
    bus: float
    workers: int

    @classmethod
    def least(cls, measured: Sequence[Measured]) -> Measured:
        """The least of what ranks have: at every layer all wait for the slowest, and all are placed alike.

        Args:
            measured: Of all ranks.
        """
        rooms = [one.host_room for one in measured if one.host_room is not None]
        return cls(
            next((one.unsuitable for one in measured if one.unsuitable), None),
            min(one.free for one in measured),
            min(rooms, default=None),
            min(one.bus for one in measured),
            min(one.workers for one in measured),
        )


def where_to_begin(
    machine: Machine,
    config: KTConfig,
    shapes: Sequence[ExpertShape],
    budget: MemoryBudget,
    popularity: Sequence[float] = (),
    host_room: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tiers, TierPlan | None]:
    """Where experts begin under `auto`: streamed to the GPU, or on the CPU as far as that is much faster by measuring.

    Where ranks divide the experts all of them measure, and each gets the same answer, by the least of what they have.

    Args:
        machine: What computes.
        config: The settings.
        shapes: Of the model's layers; of the experts that this process owns.
        budget: What must fit on the GPU beside experts; its tokens are known.
        popularity: Share of the routers' choices of each expert, the most used first; () if they are alike.
        host_room: Bytes of host memory for experts; None if they are there already.
        ranks: The processes that the experts are divided among; None in a run of one.

    Returns:
        The tiers; and the plan they are of, where the CPU was measured and has a part.

    Raises:
        KTAMXConfigError: Tiers that the settings or the layers do not allow.
        KTAMXError: Another rank has failed to measure, or has ended.
    """
    asked = config.kt_expert_placement is not None
    why = unsuitable(machine.device, budget.dtype, shapes)
    every = of_all_ranks(ranks, lambda: asdict(_measured(machine, why, asked, host_room)))
    have = Measured.least([Measured(**one) for one in every])
    reason = have.unsuitable
    if reason is not None and not asked:
        logger.info("kt_hf: experts are computed on the CPU, though there is a GPU: %s.", reason)
        return Tiers(), None
    tokens, streamed = budget.tokens or 0, all_streamed(shapes, have.host_room, budget.bits)
    if reason is None and not cpu_may_be_faster(shapes, tokens, have.bus, have.workers, machine.backend, budget.bits):
        logger.info(
            "kt_hf: experts are streamed to the GPU (%.0f GB/s), and stay there as the run leaves room.", have.bus / 1e9
        )
        return streamed, None
    shape = max(shapes, key=expert_bytes)
    shape = replace(shape, num_experts=min(other.num_experts for other in shapes))
    rates = _rates(machine, shape, tokens, ranks)
    streaming, for_experts = reason is None, budget.free_for_experts(have.free, tokens, shape)
    plan = plan_tiers(rates, shape, len(shapes), tokens, for_experts, popularity, streaming, budget.bits)
    if streaming and not is_worth_its_cpu(plan, rates, shape, len(shapes), tokens, budget.bits):
        logger.info("kt_hf: experts are streamed to the GPU: a part on the CPU would bring too little.")
        return streamed, None
    check_tiers(plan.tiers, config, shapes, machine.backend != "torch")
    logger.info("kt_hf: kt_expert_placement=auto, %d tokens a step: %s.", tokens, plan)
    return plan.tiers, plan


def _measured(machine: Machine, unsuitable: str | None, asked: bool, host_room: int | None) -> Measured:
    """What this rank has; the bus is not timed where nothing will cross it."""
    bus = copy_rate(machine.device) if unsuitable is None or asked else 0.0
    return Measured(unsuitable, free_device_memory(machine.device), host_room, bus, machine.threads.workers)


def _rates(machine: Machine, shape: ExpertShape, tokens: int, ranks: Ranks | None) -> MachineRates:
    """The machine's rates; of several ranks, which measure at the same time as they will compute, the slowest."""

    def measure() -> MachineRates:
        return measure_rates(shape, machine.device, machine.threads, machine.backend, tokens)

    return measure() if ranks is None else slowest_rates(of_all_ranks(ranks, lambda: asdict(measure())))


def unsuitable(device: torch.device, dtype: torch.dtype | None, shapes: Sequence[ExpertShape]) -> str | None:
    """Why experts of a model are not sent to a GPU without being asked to; None if they may be.

    Args:
        device: The GPU.
        dtype: The experts'; None for bf16.
        shapes: Of the layers.
    """
    if dtype not in (None, torch.bfloat16):
        return f"the model is {str(dtype).removeprefix('torch.')}, and experts are streamed in bfloat16"
    if not all(map(aligned, shapes)):
        return "hidden and intermediate sizes that are no multiples of 8 cannot be streamed"
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "it is an AMD GPU (ROCm), where streaming has not been tried"
    if sys.platform != "linux":
        return f"on {sys.platform} streaming has not been tried"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its compute capability is {major}.{minor}, and bfloat16 takes 8.0 (Ampere) or more"
    return None


def all_streamed(shapes: Sequence[ExpertShape], host_room: int | None = None, bits: float = BF16) -> Tiers:
    """All experts streamed, but for as many whole layers as host memory has no room for, which are resident.

    Args:
        shapes: Of the layers.
        host_room: Bytes of host memory for experts; None if they are there already.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    sizes = [expert_bytes(shape, bits) * shape.num_experts for shape in shapes]
    lacking = sum(sizes) - host_room if host_room is not None else 0
    resident = min(len(sizes), -(-lacking // max(sizes))) if lacking > 0 else 0
    return Tiers(0, max(shape.num_experts for shape in shapes), resident)


def cpu_may_be_faster(
    shapes: Sequence[ExpertShape],
    tokens: int,
    bytes_per_s: float,
    workers: int,
    backend: str,
    bits: float = BF16,
) -> bool:
    """Whether it is worth measuring the CPU: it might compute experts faster than the bus brings them.

    Args:
        shapes: Of the layers.
        tokens: Of a forward in training.
        bytes_per_s: From host memory to the GPU, measured.
        workers: Threads of the CPU's operators.
        backend: What computes experts on the CPU.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    shape = max(shapes, key=expert_bytes)
    rates = replace(assumed_rates(shape), pcie_bytes_per_s=bytes_per_s)
    cpu, streamed = _seconds(rates, shape, len(shapes), tokens, bits)
    faster = _FASTER * max(1.0, workers / _ASSUMED_WORKERS) if backend != "torch" else 1.0
    return cpu / faster < streamed


def is_worth_its_cpu(
    plan: TierPlan, rates: MachineRates, shape: ExpertShape, layers: int, tokens: int, bits: float = BF16
) -> bool:
    """Whether a plan with a part on the CPU is that much faster than streaming everything.

    Args:
        plan: The plan.
        rates: Measured.
        shape: Of a layer.
        layers: How many there are.
        tokens: Of a forward in training.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
    """
    return plan.cpu > 0 and plan.seconds < _WORTH * _seconds(rates, shape, layers, tokens, bits)[1]


def hint(config: KTConfig, shapes: Sequence[ExpertShape], tokens: int) -> str | None:
    """What `auto` is expected to bring where the CPU was asked for though there is a GPU; None if it brings nothing.

    Args:
        config: The settings.
        shapes: Of the layers.
        tokens: Of a forward in training.
    """
    asked = (
        f"kt_expert_placement={config.kt_expert_placement!r}" if config.kt_expert_placement is not None
        else f"kt_num_gpu_experts={config.kt_num_gpu_experts}" if config.kt_num_gpu_experts is not None
        else f"kt_backend={config.kt_backend}"
    )  # fmt: skip
    shape, count = max(shapes, key=expert_bytes), len(shapes)
    cpu, streamed = _seconds(assumed_rates(shape), shape, count, tokens)
    if is_auto(config) or config.kt_weight_path is not None or streamed >= cpu:
        return None
    return (
        f"{asked} computes all experts on the CPU: about {cpu:.2g} s for {tokens} tokens on 16 AMX cores. Streamed to "
        f"the GPU they take about {streamed:.2g} s over PCIe 5: kt_expert_placement: auto does that"
    )


def _seconds(
    rates: MachineRates, shape: ExpertShape, layers: int, tokens: int, bits: float = BF16
) -> tuple[float, float]:
    """Seconds of a step if the CPU computes all experts; of the bus, if all that have tokens are streamed."""
    rates = replace(rates, pcie_bytes_per_s=max(rates.pcie_bytes_per_s, 1.0))
    cpu = expected(rates, shape, layers, tokens, Tiers())
    streamed = expected(rates, shape, layers, tokens, Tiers(0, shape.num_experts), bits)
    return cpu.seconds, streamed.stream_seconds
