"""What a run takes of host and of GPU memory, part by part.

The GPU's parts are `placement.memory_model`'s, which the planner goes by as well. What is in host memory was fitted to
measured peaks (benchmarks/memory.py compares it again). All sizes are bytes. With a GPU, experts are streamed to it
from host memory, or computed there, and the rest moves; without one, all of it is in host memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends import OPERATORS, bytes_per_weight
from ..backends.quantizer import EXPERT_BITS
from ..errors import KTAMXError
from ..gates.gate import PLAIN, Gate
from ..placement.choice import all_streamed, is_worth_its_cpu
from ..placement.controller import RESERVE
from ..placement.expert_memory import shares_backward
from ..placement.kept_activations import keeping_activations
from ..placement.lora_device import choose_lora_device
from ..placement.memory_model import (
    MemoryBudget,
    fitting_chunk,
    gpu_memory,
    most_resident_layers,
)
from ..placement.planner import TierPlan, assumed_rates, expected, plan_tiers
from ..placement.tiers import Tiers, asked_for
from ..quantized.manifest import MANIFEST, read_manifest
from ..shapes import BF16, ExpertShape
from .activation_memory import expert_activations, other_activations
from .config.settings import BUILTIN_MODEL, TrainSettings
from .model_sizes import ModelSizes

GIB = 2**30
# Python, PyTorch, transformers, TRL and their libraries, with one optimizer step done.
PROGRAM = int(1.0 * GIB)
CUDA_CONTEXT = int(0.6 * GIB)
CUDA_ON_HOST = int(1.5 * GIB)  # its libraries, and small pinned buffers
ASSUMED_GPU = 80 * 10**9  # bytes, to plan for where there is none
_CHUNKED_ON_CPU = 31  # bytes of a logit of TRL's chunked loss without Triton, in a tile of 4,096 x 32,768 of them
_LAYERS_READ = 2.5  # in the model's dtype while experts are streamed and packed


@dataclass
class Estimate:
    """Bytes by part, in host and in GPU memory, and what can be done about them."""

    host: dict[str, int] = field(default_factory=dict)
    gpu: dict[str, int] = field(default_factory=dict)
    host_free: int | None = None
    gpu_free: int | None = None
    advice: list[str] = field(default_factory=list)
    sizes: ModelSizes | None = None
    tokens: int = 0
    shared_backward: bool = False
    host_total_otherwise: int | None = None  # with the other choice of kt_share_backward_weights, where it was free
    plan: TierPlan | None = None  # kt_expert_placement=auto, by assumed rates
    moment: str = ""  # of the GPU's peak
    budget: MemoryBudget = field(default_factory=MemoryBudget)  # the model outside of its experts, and its steps

    @property
    def ranks(self) -> int:
        """Processes of the run, of one of which this is."""
        return self.sizes.ranks if self.sizes else 1

    @property
    def host_total(self) -> int:
        """Bytes of host memory at the peak."""
        return sum(self.host.values())

    @property
    def gpu_total(self) -> int:
        """Bytes of GPU memory at the peak."""
        return sum(self.gpu.values())

    @property
    def fits(self) -> bool:
        """Whether both totals are within what is free; what is not known counts as enough."""
        host = self.host_free is None or self.host_total <= self.host_free
        return host and (self.gpu_free is None or self.gpu_total <= self.gpu_free)

    def as_json(self) -> dict[str, Any]:
        """For machines: bytes, whole numbers."""
        return {
            "host": self.host, "host_total": self.host_total, "host_free": self.host_free,
            "gpu": self.gpu, "gpu_total": self.gpu_total, "gpu_free": self.gpu_free, "gpu_peak": self.moment,
            "fits": self.fits, "advice": self.advice, "tokens_per_batch": self.tokens,
            "shared_backward_weights": self.shared_backward, "host_total_otherwise": self.host_total_otherwise,
            "assumed_plan": dataclasses.asdict(self.plan) if self.plan else None,
            "ranks": self.ranks, "hosts": self.sizes.hosts if self.sizes else 1,
            "host_total_of_all_ranks": (self.sizes.of_host if self.sizes else 1) * self.host_total,
        }  # fmt: skip


def _budget(s: TrainSettings, m: ModelSizes, tokens: int) -> MemoryBudget:
    """The model outside of its experts, and how the run trains it; where LoRA of the experts is remains open."""
    return MemoryBudget(
        tokens,
        m.rest_bytes(_width(s), s.run),
        m.layers,
        m.vocabulary,
        bits=expert_bits(s, m),
        computed_rank=s.run.lora_rank if m.lora_experts else 0,
        other_lora=m.lora_others,
        inner_bytes=m.inner_bytes,
        loss="chunked" if s.chunked_loss else "full",
        checkpointing=s.checkpointing,
        offloading=bool(s.trainer.get("activation_offloading")),
        accumulating=s.trainer.get("gradient_accumulation_steps", 1) > 1,
    )


@dataclass
class _Placed:
    """Where experts are, and their LoRA.

    Attributes:
        tiers: Of the experts.
        in_host_too: Layers of `tiers.resident_layers` whose weights are in host memory as well.
        lora_layers: Layers whose experts' LoRA is on the GPU.
    """

    tiers: Tiers = dataclasses.field(default_factory=Tiers)
    in_host_too: int = 0
    lora_layers: int = 0


def _placed(s: TrainSettings, m: ModelSizes, host_free: int | None, gpu_free: int | None, memory: Estimate) -> _Placed:
    """Where a run on a GPU has its experts; a plan by assumed rates is noted in `memory`."""
    shape, layers, T, free = shape_of(m), m.expert_layers, memory.tokens, ASSUMED_GPU if gpu_free is None else gpu_free
    lora, kept = s.kt.kt_moe_lora_device, s.kt.kt_expert_activations
    whole = dataclasses.replace(shape, num_experts=shape.num_experts * m.ranks, ranks=1)
    asked = asked_for(s.kt, [whole], has_gpu=True)
    tiers = all_streamed([shape]) if asked is None else asked.of_rank(m.ranks)
    budget = keeping_activations(kept, memory.budget, [shape] * layers, T, tiers, free - CUDA_CONTEXT)
    memory.budget = budget

    def on_gpu(tiers: Tiers) -> int:
        room = free - CUDA_CONTEXT
        return choose_lora_device(lora, s.run.lora_rank, [shape] * layers, tiers, budget, T, room).on_gpu

    if asked is not None:
        return _Placed(tiers, 0, on_gpu(tiers))
    with_lora = dataclasses.replace(budget, lora_rank=s.run.lora_rank if lora == "gpu" else 0)
    rates, room = assumed_rates(shape), with_lora.free_for_experts(free, T, shape)
    plan = plan_tiers(rates, shape, layers, T, room, bits=budget.bits)
    if is_worth_its_cpu(plan, rates, shape, layers, T, budget.bits):
        memory.plan = plan
        return _Placed(plan.tiers, 0, on_gpu(plan.tiers))
    # All are streamed to begin with, and layers stay on the GPU as there is room.
    host_room = None if host_free is None else host_free - PROGRAM - CUDA_ON_HOST
    begin = all_streamed([shape] * layers, host_room, budget.bits)
    placed = _Placed(begin, 0, on_gpu(begin))
    with_lora = dataclasses.replace(budget, lora_rank=s.run.lora_rank, lora_layers=placed.lora_layers)
    fitting = most_resident_layers(with_lora, shape, layers, T, free - CUDA_CONTEXT, RESERVE)
    placed.in_host_too = max(0, fitting - begin.resident_layers)
    placed.tiers = dataclasses.replace(begin, resident_layers=begin.resident_layers + placed.in_host_too)
    memory.plan = expected(rates, shape, layers, T, placed.tiers, budget.bits)
    return placed


def parts_of(
    s: TrainSettings, m: ModelSizes, kernel: bool, gpu: bool, host_free: int | None, gpu_free: int | None
) -> Estimate:
    """The parts of an `Estimate`; whether they fit, and what to do if not, is left open.

    Args:
        s: What is to be run.
        m: Sizes of its model.
        kernel: Whether kt-kernel's operators compute experts on the CPU, else PyTorch.
        gpu: Whether all but the experts is on a GPU.
        host_free: Memory the process may take; None leaves the question open, and backward weights unshared.
        gpu_free: Likewise of the GPU; None plans for one of 80 GB.
    """
    T = s.tokens_per_forward
    memory = Estimate(sizes=m, tokens=T, budget=_budget(s, m, T))
    memory.host["program"] = PROGRAM
    if gpu and s.run.use_kt:
        placed = _placed(s, m, host_free, gpu_free, memory)
        rank = s.run.lora_rank if m.lora_experts else 0
        budget = dataclasses.replace(memory.budget, lora_rank=rank, lora_layers=placed.lora_layers)
        free = ASSUMED_GPU if gpu_free is None else gpu_free
        # As a run chooses it: before layers are moved to the GPU, and LoRA, if nobody asks for its device.
        before = budget if s.kt.kt_moe_lora_device == "gpu" else memory.budget
        begin = dataclasses.replace(placed.tiers, resident_layers=placed.tiers.resident_layers - placed.in_host_too)
        chunk = fitting_chunk(before, shape_of(m), m.expert_layers, T, begin, free - CUDA_CONTEXT)
        peak = gpu_memory(budget, shape_of(m), m.expert_layers, T, placed.tiers, chunk)
        memory.moment, memory.gpu = peak.moment, {"CUDA": CUDA_CONTEXT} | peak.parts
        memory.host["CUDA"] = CUDA_ON_HOST
        _experts_in_host(memory, s, m, kernel, host_free, placed)
        if budget.offloading:
            memory.host["activations, moved from the GPU"] = (
                T * m.layers * (2 * m.hidden if budget.checkpointing else m.inner_bytes)
            )
        return memory
    if s.run.use_kt:
        _experts_in_host(memory, s, m, kernel, host_free, _Placed())
    _outside_experts(memory.gpu if gpu else memory.host, s, m, T, gpu)
    if gpu:
        memory.gpu["CUDA"], memory.host["CUDA"] = CUDA_CONTEXT, CUDA_ON_HOST
    _while_reading(memory.host, s, m)
    return memory


def _experts_in_host(
    memory: Estimate, s: TrainSettings, m: ModelSizes, kernel: bool, host_free: int | None, placed: _Placed
) -> None:
    """The experts' weights in host memory, and what they take there in training."""
    host, tiers, layers = memory.host, placed.tiers, m.expert_layers
    one = m.expert_parameters // (layers * m.experts)
    others = layers - tiers.resident_layers
    streamed = (min(tiers.streamed, m.experts) * others + m.experts * placed.in_host_too) * one
    on_cpu = tiers.on_cpu(m.experts) * others * one
    if streamed:
        host["experts streamed"] = int(streamed * expert_bits(s, m) / 8)
    if not kernel:
        host["experts"] = on_cpu * _width(s)
    else:
        packed, forced = int(on_cpu * bytes_per_weight(backend(s))), OPERATORS[backend(s)].shares_backward
        asked = _shares(s, packed, host_free, m.rest_bytes(_width(s), s.run))
        memory.shared_backward = asked if forced is None else forced
        host["experts packed"] = packed
        if memory.shared_backward:
            host["backward copies"] = packed // layers
        elif forced is None:
            host["backward copies"] = packed
        larger = on_cpu * _width(s) - packed - host.get("backward copies", 0)
        if not _streams(s) and larger > 0:  # as they were loaded, before the first is packed
            host["experts before packing"] = larger
    # The operators' copies (twice) and gradient, or the gradient as it comes from the GPU; then LoRA's master,
    # gradient and two moments.
    beside = (6 if kernel else 4) if on_cpu or not streamed else 2
    in_host = m.lora_experts * (layers - placed.lora_layers) // layers
    host["LoRA of experts and its optimizer"] = beside * (m.lora_experts if on_cpu else in_host) + 16 * in_host
    if on_cpu:
        work = expert_activations(s, m, memory.tokens, kernel)
        host["activations of experts"] = work * tiers.on_cpu(m.experts) // m.experts


def _outside_experts(other: dict[str, int], s: TrainSettings, m: ModelSizes, T: int, gpu: bool) -> None:
    """The model but for its experts where all of it is in one memory; with them, where they are not kt_hf's."""
    if not s.run.use_kt:
        source = m.expert_parameters * _width(s)
        other["experts"] = source
        other["LoRA of experts and its optimizer"] = m.lora_experts * 16 + source // m.expert_layers * 2
    other["attention, embeddings and the rest"] = m.rest_bytes(_width(s), s.run)
    other["LoRA of the rest and its optimizer"] = m.lora_others * 16
    other["activations"] = other_activations(s, m, T)
    other["keys and values"] = T * m.kv_width * 2 * (1 if s.checkpointing else m.layers)
    logits, chunked = T * m.vocabulary * 14, s.chunked_loss
    tile = min(T, 4096) * min(m.vocabulary, 32_768) * (2 if gpu else _CHUNKED_ON_CPU)
    other["logits and loss"] = tile + 8 * T * m.hidden if chunked else logits


def _while_reading(host: dict[str, int], s: TrainSettings, m: ModelSizes) -> None:
    """What training takes is not there yet while layers are read and packed: the larger of the two counts."""
    if "experts packed" not in host or not _streams(s):
        return
    later = ("LoRA of experts and its optimizer", "activations of experts", "LoRA of the rest and its optimizer",
             "activations", "keys and values", "logits and loss")  # fmt: skip
    reading = int(_LAYERS_READ * m.expert_parameters * _width(s) / m.expert_layers)
    more = reading - sum(host.get(part, 0) for part in later)
    if more > 0:
        host["reading and packing"] = more


def shape_of(m: ModelSizes) -> ExpertShape:
    """Sizes of a layer's experts.

    Args:
        m: Of the model.
    """
    gate = PLAIN if m.gated else Gate("relu2", gated=False)
    return ExpertShape(m.experts, m.top_k, m.hidden, m.intermediate, gate, ranks=m.ranks)


def _width(s: TrainSettings) -> int:
    """Bytes of a weight of the model."""
    return 4 if s.run.torch_dtype == "float32" else 2


def expert_bits(s: TrainSettings, m: ModelSizes) -> float:
    """Of a weight of experts on the GPU, as it is stored there."""
    if s.kt.kt_expert_dtype != "bf16" and _width(s) == 2:
        return EXPERT_BITS[s.kt.kt_expert_dtype]
    return m.bits if _streams(s) else BF16


def backend(s: TrainSettings) -> str:
    """Which operators compute, if operators do.

    Args:
        s: What is to be run.
    """
    return s.kt.kt_backend if s.kt.kt_backend in OPERATORS else "AMXBF16"


def _streams(s: TrainSettings) -> bool:
    """Whether experts are read layer by layer; the built-in model is made whole."""
    return not s.run.model_name_or_path.startswith(BUILTIN_MODEL)


def _shares(s: TrainSettings, copy: int, host_free: int | None, rest: int) -> bool:
    """What `Packer` will decide when the rest of the model has been loaded."""
    if saved_without_backward(s):
        return True
    if s.kt.kt_share_backward_weights is not None:
        return s.kt.kt_share_backward_weights
    return shares_backward(copy, None if host_free is None else host_free - PROGRAM - rest - copy)


def saved_without_backward(s: TrainSettings) -> bool:
    """Whether the run takes packed experts from disk that have no weights for backward.

    Args:
        s: What is to be run.
    """
    path = s.kt.kt_weight_path
    try:
        return path is not None and not read_manifest(Path(path) / MANIFEST).backward
    except (OSError, KTAMXError):
        return False  # on another machine, or refused when the run starts
