"""How much memory a run will take, from its configuration alone.

The parts and what they are made of were fitted to measured peaks (benchmarks/memory.py compares them again). All sizes
are bytes. With a GPU, experts stay in host memory (but for those that settings send to the GPU) and the rest moves;
without one, all of it is in host memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends import OPERATORS, shape_problem
from ..backends.gpu.weight_stream import BUFFERS, CHUNK_BYTES
from ..errors import KTAMXError
from ..placement.packer import shares_backward
from ..placement.planner import MemoryBudget, TierPlan, assumed_rates, plan_tiers
from ..placement.tiers import Tiers, asked_for
from ..quantized.manifest import MANIFEST, read_manifest
from ..shapes import ExpertShape
from .config.settings import BUILTIN_MODEL, TrainSettings
from .model_sizes import ModelSizes

GIB = 2**30
# Python, PyTorch, transformers, TRL and their libraries, with one optimizer step done.
PROGRAM = int(1.0 * GIB)
CUDA_CONTEXT = int(0.6 * GIB)
ASSUMED_GPU = 80 * 10**9  # bytes, to plan for where there is none
_ROWS_PER_EXPERT = 20  # the operators pad each expert's rows
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
            "gpu": self.gpu, "gpu_total": self.gpu_total, "gpu_free": self.gpu_free,
            "fits": self.fits, "advice": self.advice, "tokens_per_batch": self.tokens,
            "shared_backward_weights": self.shared_backward, "host_total_otherwise": self.host_total_otherwise,
            "assumed_plan": dataclasses.asdict(self.plan) if self.plan else None,
        }  # fmt: skip


def estimate(
    settings: TrainSettings, sizes: ModelSizes, kernel: bool, gpu: bool, host_free: int | None, gpu_free: int | None
) -> Estimate:
    """The memory of a training run at its peak.

    Args:
        settings: What is to be run.
        sizes: Of its model.
        kernel: Whether kt-kernel's operators compute the experts, else PyTorch.
        gpu: Whether all but the experts is on a GPU.
        host_free: Memory the process may take; None leaves the question open, and backward weights unshared.
        gpu_free: Likewise of the GPU.
    """
    memory = _parts(settings, sizes, kernel, gpu, host_free, gpu_free)
    memory.host_free, memory.gpu_free = host_free, gpu_free if gpu else None
    memory.host_total_otherwise = _otherwise(settings, sizes, kernel, gpu, gpu_free, memory)
    memory.advice = [] if memory.fits else _advice(settings, memory, kernel)
    return memory


def _otherwise(
    s: TrainSettings, m: ModelSizes, kernel: bool, gpu: bool, gpu_free: int | None, memory: Estimate
) -> int | None:
    """Host memory with the other choice of kt_share_backward_weights; None where there is none."""
    free = s.kt.kt_share_backward_weights is None and not _saved_without_backward(s)
    if not free or not memory.host.get("backward copies"):
        return None
    kt = dataclasses.replace(s.kt, kt_share_backward_weights=not memory.shared_backward)
    return _parts(dataclasses.replace(s, kt=kt), m, kernel, gpu, None, gpu_free).host_total


def in_words(memory: Estimate) -> str:
    """One line: what is needed at most, and what is free."""
    host = f"{memory.host_total / GIB:.1f} GiB of host memory"
    free = f", {memory.host_free / GIB:.1f} free" if memory.host_free is not None else ""
    gpu = f"; {memory.gpu_total / GIB:.1f} GiB on the GPU" if memory.gpu else ""
    gpu_free = f", {memory.gpu_free / GIB:.1f} free" if memory.gpu_free is not None else ""
    return f"at most {host}{free}{gpu}{gpu_free}"


def _tiers(s: TrainSettings, m: ModelSizes, gpu: bool, gpu_free: int | None, memory: Estimate) -> Tiers:
    """How many experts of each layer are where; a plan by assumed rates is noted in `memory`."""
    if not gpu or not s.run.use_kt:
        return Tiers()
    shape = ExpertShape(m.experts, m.top_k, m.hidden, m.intermediate)
    asked = asked_for(s.kt, [shape], has_gpu=True)
    if asked is not None:
        return asked
    room = MemoryBudget(memory.tokens, m.other_parameters * 2, m.layers, m.vocabulary)
    free = ASSUMED_GPU if gpu_free is None else gpu_free
    left = room.free_for_experts(free, memory.tokens, shape)
    rates = assumed_rates(shape)
    memory.plan = plan_tiers(rates, shape, m.expert_layers, memory.tokens, left, keep_8bit=_streamed_width(s, m) == 1)
    return memory.plan.tiers


def _parts(
    s: TrainSettings, m: ModelSizes, kernel: bool, gpu: bool, host_free: int | None, gpu_free: int | None
) -> Estimate:
    width = 4 if s.run.torch_dtype == "float32" else 2
    T = _tokens(s)
    memory = Estimate(sizes=m, tokens=T)
    tiers = _tiers(s, m, gpu, gpu_free, memory)
    resident, streamed = (
        m.expert_parameters * min(n, m.experts) // m.experts for n in (tiers.resident, tiers.streamed)
    )
    moved = resident + streamed
    source = m.expert_parameters * width
    rest = m.other_parameters * width
    host, other = memory.host, memory.gpu if gpu else memory.host
    host["program"] = PROGRAM
    if not s.run.use_kt:
        other["experts"] = source
    elif not kernel:
        host["experts"] = source - moved * width
    else:
        packed = int((m.expert_parameters - moved) * OPERATORS[_backend(s)].bytes_per_weight)
        memory.shared_backward = _shares(s, packed, host_free, rest)
        host["experts packed"] = packed
        host["backward copies"] = packed // m.expert_layers if memory.shared_backward else packed
        larger = source - packed - host["backward copies"]
        if not _streams(s) and larger > 0:  # as they were loaded, before the first is packed
            host["experts before packing"] = larger
    # Master, kernel copies (twice), kernel gradient, gradient, two Adam moments.
    host_lora = m.lora_experts * (4 + (6 if kernel else 4) + 4 + 8)
    if s.run.use_kt:
        host["LoRA of experts and its optimizer"] = host_lora
        host["activations of experts"] = _expert_activations(s, m, T, kernel) * tiers.on_cpu(m.experts) // m.experts
    else:
        other["LoRA of experts and its optimizer"] = m.lora_experts * 16 + source // m.expert_layers * 2
    if gpu:
        memory.gpu["CUDA"] = CUDA_CONTEXT
        if resident:
            memory.gpu["experts"] = resident * 2
        if moved:  # inputs and outputs of layers; the rest is computed again
            memory.gpu["activations of experts"] = 3 * T * m.hidden * 2 * m.expert_layers
        if streamed:
            chunks = BUFFERS + (2 if _streamed_width(s, m) == 1 else 0)  # and one in bf16
            memory.gpu["buffers of streamed experts"] = chunks * CHUNK_BYTES
            host["experts streamed"] = streamed * _streamed_width(s, m)
    other["attention, embeddings and the rest"] = rest
    other["LoRA of the rest and its optimizer"] = m.lora_others * 16
    other["activations"] = _other_activations(s, m, T)
    other["keys and values"] = T * m.kv_width * 2 * (1 if s.checkpointing else m.layers)
    other["logits and loss"] = T * m.vocabulary * 14
    if "experts packed" in host and _streams(s):
        # What training takes is not there yet while layers are read: the larger of the two counts.
        later = ("LoRA of experts and its optimizer", "activations of experts", "LoRA of the rest and its optimizer",
                 "activations", "keys and values", "logits and loss")  # fmt: skip
        reading = int(_LAYERS_READ * source / m.expert_layers)
        more = reading - sum(host.get(part, 0) for part in later)
        if more > 0:
            host["reading and packing"] = more
    return memory


def _streamed_width(s: TrainSettings, m: ModelSizes) -> int:
    """Bytes of a weight of a streamed expert."""
    return 1 if m.keep_8bit and _streams(s) else 2


def _backend(s: TrainSettings) -> str:
    """Which operators compute, if operators do."""
    return s.kt.kt_backend if s.kt.kt_backend in OPERATORS else "AMXBF16"


def _streams(s: TrainSettings) -> bool:
    """Whether experts are read layer by layer; the built-in model is made whole."""
    return not s.run.model_name_or_path.startswith(BUILTIN_MODEL)


def _tokens(s: TrainSettings) -> int:
    """Tokens of one forward at most."""
    length = s.trainer.get("max_length", 1024) or 1024
    batch = s.trainer.get("per_device_train_batch_size", 8)
    return int(batch * length * (2 if s.run.stage == "dpo" else 1))


def _shares(s: TrainSettings, copy: int, host_free: int | None, rest: int) -> bool:
    """What `Packer` will decide when the rest of the model has been loaded."""
    if _saved_without_backward(s):
        return True
    if s.kt.kt_share_backward_weights is not None:
        return s.kt.kt_share_backward_weights
    return shares_backward(copy, None if host_free is None else host_free - PROGRAM - rest - copy)


def _saved_without_backward(s: TrainSettings) -> bool:
    path = s.kt.kt_weight_path
    try:
        return path is not None and not read_manifest(Path(path) / MANIFEST).backward
    except (OSError, KTAMXError):
        return False  # on another machine, or refused when the run starts


def _expert_activations(s: TrainSettings, m: ModelSizes, T: int, kernel: bool) -> int:
    """What layers keep for backward, and the memory the operators work in (shared by all layers)."""
    if s.kt.kt_max_len:
        T = min(T, s.kt.kt_max_len)
    rows = T * m.top_k
    kept_layers = m.expert_layers if s.kt.kt_expert_activations == "retain" or not s.checkpointing else 1
    kept = rows * (3 * m.intermediate + m.hidden) * 2 + T * m.hidden * 2
    if s.checkpointing and s.kt.kt_expert_activations == "retain":
        kept += 2 * T * m.hidden * 2  # input and output, for the recompute
    if not kernel:
        work = rows * (4 * m.hidden + 6 * m.intermediate) * 2
        return kept_layers * kept + work
    padded = rows + _ROWS_PER_EXPERT * m.experts
    work = padded * (8 * m.hidden + 12 * m.intermediate) * 2
    work += m.lora_experts // m.expert_layers * 4 + rows * s.run.lora_rank * 240
    return kept_layers * kept + work


def _other_activations(s: TrainSettings, m: ModelSizes, T: int) -> int:
    """Hidden states between layers, and inside of layers where nothing is computed again."""
    inside = T * (12 * m.hidden + 6 * m.attention_width) * 2
    between = T * m.hidden * 2 * m.layers
    return between + inside * (1 if s.checkpointing else m.layers)


def _quantized_advice(s: TrainSettings, e: Estimate) -> str | None:
    if e.sizes is None or _backend(s) != "AMXBF16" or not e.host["experts packed"]:
        return None
    shape = ExpertShape(e.sizes.experts, e.sizes.top_k, e.sizes.hidden, e.sizes.intermediate)
    if shape_problem(shape, backend="AMXInt8"):
        return None
    saved = (e.host["experts packed"] + e.host["backward copies"]) // 2
    return f"kt_backend: AMXInt8 saves {saved / GIB:.1f} GiB of host memory (experts quantised, a few percent of error)"


def _advice(s: TrainSettings, e: Estimate, kernel: bool) -> list[str]:
    """Settings that would save memory where it is short, the most harmless first."""
    advice = []
    host_short = e.host_free is not None and e.host_total > e.host_free
    if host_short and kernel and s.run.use_kt:
        if not e.shared_backward and e.host["backward copies"]:
            saved = e.host["backward copies"] * (1 - 1 / e.sizes.expert_layers if e.sizes else 0)
            advice.append(
                f"kt_share_backward_weights: true saves {saved / GIB:.1f} GiB of host memory (slower backward)"
            )
        quantized = _quantized_advice(s, e)
        if quantized:
            advice.append(quantized)
        if s.kt.kt_expert_activations == "retain" and s.checkpointing and e.sizes:
            less = _expert_activations(s, e.sizes, e.tokens, kernel) * (1 - 1 / e.sizes.expert_layers)
            advice.append(f"kt_expert_activations: recompute saves up to {less / GIB:.1f} GiB of host memory")
    if not s.checkpointing:
        advice.append("gradient checkpointing (leave out disable_gradient_checkpointing) saves activations")
    batch = s.trainer.get("per_device_train_batch_size", 8)
    if batch > 1:
        advice.append(f"per_device_train_batch_size: 1, gradient_accumulation_steps: {batch} times as many")
    advice.append("a smaller cutoff_len saves activations and logits, a smaller lora_rank the optimizer")
    if host_short and s.run.use_kt and e.host_free is not None:
        need = e.host["experts packed"] if "experts packed" in e.host else e.host["experts"]
        if need > e.host_free:
            smaller = [line for line in advice if "AMXInt8" in line and need / 2 <= e.host_free]
            advice = smaller or [
                f"the experts alone need {need / GIB:.0f} GiB of host memory: take a larger machine or a smaller model"
            ]
    return advice
