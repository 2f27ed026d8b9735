"""`Packer`: builds the backend of each layer of a patched model, and knows which expert goes where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..backends import (
    CALL_LOCK,
    OPERATORS,
    ExpertsBackend,
    ExpertWeights,
    PackedLayerFiles,
    build_backend,
    most_tokens,
)
from ..backends.build_tiered import build_tiered
from ..backends.finite_checks import DeferredChecks
from ..backends.gpu.streamed import StreamedBackend
from ..backends.gpu.weight_stream import CHUNK_BYTES, Streamer
from ..backends.quantizer import quantized_experts
from ..config import KTConfig
from ..experts.lora_tensors import optimizer_steps
from ..quantized import PrequantizedExperts
from ..ranks import Ranks, least_of_all
from ..shapes import BF16, ExpertShape, expert_bytes
from ..system.cpu import ThreadPlan
from ..system.memory import available_memory, free_device_memory, return_freed_memory
from .backward_copies import share_backward
from .choice import Machine, all_streamed, where_to_begin
from .kept_activations import KeptActivations, keeping_activations
from .lora_device import LoraPlace
from .memory_model import MemoryBudget, fitting_chunk
from .order import Placement, placement_of_first
from .planner import TierPlan
from .promotion import Promotion
from .tiers import Tiers, spread

logger = logging.getLogger(__name__)
DEFAULT_MAX_LEN = 32_768
# Of a step, and of a LoRA, where nobody says how many.
_TOKENS = 2_048
_RANK = 16
_NO_GPU = Tiers()


class Packer:
    """Builds the backend of each layer of a model: the `BackendFactory` of its `KTExperts`.

    Args:
        config: The user's settings.
        backend: The backend chosen for all layers.
        reason: Why, in words.
        threads: The operators' worker threads.
        cpu_bytes: Of all layers' expert weights in bf16; once they are placed, of those on the CPU.
        tiers: How many experts of each layer are resident on the GPU and streamed to it; None if `place` is to plan
            that, and layers are to be moved as the run leaves room.
        streamed: Whether weights are read as they are packed; else they are in memory already.
        saved: Packed weights on disk (`kt_weight_path`), checked to fit the model and the settings.
        gpu: The device of resident and streamed experts; None without one.

    Attributes:
        placement: Which experts go to the GPU first; None for the first ones by number.
        planned: What was expected of the tiers, where they were planned.
        lora: Where the experts' LoRA is.
        tokens: Of a forward in training, as far as is known.
        bits: Of a weight of experts on the GPU as it is stored, scales included.
        keeps_on_cpu: Whether the CPU computes experts as their checkpoint stores them, in low bits.
        stored_as: What all experts' weights are, in words, for an adapter's manifest.
        activations: Which layers keep their forward for a recompute in backward.
        promotion: What moves whole layers to the GPU and back; None if they stay where they are.
        checks: Where results on a GPU are left to be checked, for all layers.
        on_build: Called with each backend that is built.
        ranks: The processes that the layers' experts are divided among; None in a run of one. Shapes and weights that
            the packer is given are then of the experts that this process owns.
    """

    def __init__(
        self,
        config: KTConfig,
        backend: str,
        reason: str,
        threads: ThreadPlan,
        cpu_bytes: int,
        tiers: Tiers | None = _NO_GPU,
        streamed: bool = False,
        saved: PrequantizedExperts | None = None,
        gpu: torch.device | None = None,
    ) -> None:
        self.config, self.backend, self.reason, self.threads = config, backend, reason, threads
        self.tiers, self.streamed, self.saved, self.gpu = tiers, streamed, saved, gpu
        self.placement: Placement | None = None
        self.planned: TierPlan | None = None
        self.promotion: Promotion | None = None
        self.lora = LoraPlace(config.kt_moe_lora_device)
        self.tokens, self.bits, self.stored_as = _TOKENS, BF16, config.kt_expert_dtype
        self.activations = KeptActivations(config.kt_expert_activations)
        self.keeps_on_cpu, self.checks = False, DeferredChecks()
        self.on_build: Callable[[ExpertsBackend], None] | None = None
        self.ranks: Ranks | None = None
        self.cpu_bytes = cpu_bytes
        self._locked_bytes = 0  # of host memory that streamed experts take
        self._resident_layers: frozenset[int] = frozenset()
        self._warned_unlocked = self._warned_dropout = False
        self._streamer: Streamer | None = None
        self._chunk_bytes = CHUNK_BYTES
        self._share: bool | None = None

    @property
    def rank(self) -> int | None:
        """LoRA rank that the operators are built for; None takes the first adapter's."""
        return self.config.kt_lora_rank

    @property
    def max_rank(self) -> int | None:
        """The largest rank of an adapter on layers that are not packed yet; None if there is no limit."""
        only = OPERATORS[self.backend].rank if self.backend in OPERATORS else None
        return None if self.backend == "torch" else self.config.kt_lora_rank or only

    def lora_on_gpu(self, rank: int, layer_idx: int) -> bool:
        """Whether a layer's LoRA parameters, of an adapter of this rank if it is the first, move to a GPU with it."""
        return self.lora.on_gpu(rank, layer_idx)

    def warn_dropout(self, dropout: float) -> None:
        """Say once that experts train without LoRA dropout."""
        if not self._warned_dropout:
            self._warned_dropout = True
            logger.warning("lora_dropout=%s applies to linear layers only: experts train without it.", dropout)

    @property
    def gpu_device(self) -> torch.device:
        """The device of experts on the GPU, where there are any; once it is asked for it stays."""
        assert self.gpu is not None, "experts on the GPU are refused where there is none"
        if self.gpu.type == "cuda" and self.gpu.index is None:
            self.gpu = torch.device("cuda", torch.cuda.current_device())
        return self.gpu

    @property
    def streamer(self) -> Streamer:
        """What brings streamed experts to the GPU, for all layers; the GPU is its device."""
        if self._streamer is None:
            self._streamer = Streamer(self.gpu_device, self._chunk_bytes)
        return self._streamer

    def place(
        self, layers: Mapping[int, ExpertShape], placement: Placement | None, budget: MemoryBudget | None = None
    ) -> None:
        """Decide which experts of these layers go to the GPU, or are streamed to it.

        Args:
            layers: Shape by layer index.
            placement: Which experts go first; None for the first ones by id. Of several ranks, the first one's counts.
            budget: What must fit on the GPU beside them, where the numbers are planned.

        Raises:
            KTAMXConfigError: The placement is another model's.
            KTAMXError: Another rank has failed, or has ended.
        """
        if self.tiers is None or self.tiers.need_gpu:
            placement = placement_of_first(self.ranks, placement)
        self.check_placement(layers, placement)
        budget = budget or MemoryBudget()
        if self.tiers is None:
            shapes, popularity = list(layers.values()), placement.share if placement else ()
            machine = Machine(self.gpu_device, self.threads, self.backend)
            host_room = available_memory() if self.streamed else None
            tokens = budget.tokens or self.config.kt_max_len or _TOKENS
            budget_ = self._budget(replace(budget, tokens=tokens), shapes, tokens, all_streamed(shapes), self._free())
            self.tiers, self.planned = where_to_begin(
                machine, self.config, shapes, budget_, popularity, host_room, self.ranks
            )
            if self.tiers.streamed:
                self.promotion = Promotion(self.gpu_device, budget.vocabulary, ranks=self.ranks)
        tiers, self.bits = self.tiers, budget.bits
        indices = sorted(layers)
        self._resident_layers = frozenset(indices[i] for i in spread(tiers.resident_layers, len(indices)))
        others = [shape for layer, shape in layers.items() if layer not in self._resident_layers]
        self.cpu_bytes = sum(expert_bytes(shape) * tiers.on_cpu(shape.num_experts) for shape in others)
        self._locked_bytes = sum(
            expert_bytes(shape, self.bits) * min(tiers.streamed, shape.num_experts) for shape in others
        )
        if not tiers.need_gpu:
            return
        self.placement, self.tokens = placement, budget.tokens or self.config.kt_max_len or _TOKENS
        shapes, free = list(layers.values()), self._free()
        budget = self._budget(budget, shapes, self.tokens, tiers, free)
        self.activations.decide(layers, budget.retained)
        self._chunk_bytes = fitting_chunk(budget, max(shapes, key=expert_bytes), len(shapes), self.tokens, tiers, free)
        self.lora.learn(layers, tiers, budget, self.tokens, free)
        source = placement.source if placement else "their numbers: placement=count_experts(...) takes the most used"
        split = tiers.resident or any(tiers.on_cpu(shape.num_experts) for shape in others)
        logger.info("kt_hf: %s (%s)%s.", tiers, self.gpu_device, f", by {source}" if split else "")

    def choose_again(self, layers: Mapping[int, ExpertShape], budget: MemoryBudget, rank: int, present: int) -> None:
        """Choose once more, by another budget, what `auto` has decided but for the tiers; see `settle_step`.

        Args:
            layers: Shape by layer index.
            budget: What must fit on the GPU beside experts.
            rank: LoRA rank.
            present: Bytes of LoRA and of experts that are on the GPU already.
        """
        tokens, free, tiers = max(budget.tokens or 0, self.tokens), self._free(present), self.tiers or _NO_GPU
        budget = self._budget(budget, list(layers.values()), tokens, tiers, free)
        self.activations.decide(layers, budget.retained)
        if self.lora.open:
            self.lora.learn(layers, tiers, budget, tokens, free)
            self.lora.choose(rank)

    def _free(self, present: int = 0) -> int:
        """Bytes that are free on the GPU, `present` of experts counted as free; of the rank that has least."""
        return least_of_all(self.ranks, lambda: free_device_memory(self.gpu_device) + present)

    def check_placement(self, layers: Mapping[int, ExpertShape], placement: Placement | None) -> None:
        """Refuse another model's placement, if it would be used.

        Args:
            layers: Shape by layer index.
            placement: Which experts go to the GPU first; None passes.

        Raises:
            KTAMXConfigError: It is another model's.
        """
        if placement is not None and (self.tiers is None or self.tiers.need_gpu):
            for layer, shape in layers.items():
                placement.check(layer, shape.num_experts * shape.ranks)

    def _budget(
        self, budget: MemoryBudget, shapes: Sequence[ExpertShape], tokens: int, tiers: Tiers, free: int
    ) -> MemoryBudget:
        """The budget with the experts' LoRA, of the rank that is expected, and the layers that keep their forward."""
        rank = self.config.kt_lora_rank or _RANK
        budget = replace(budget, computed_rank=rank, lora_rank=rank if self.config.kt_moe_lora_device == "gpu" else 0)
        return keeping_activations(self.activations.asked, budget, shapes, tokens, tiers, free)

    def retains(self, layer_idx: int) -> bool:
        """Whether a layer's first forward is kept for a recompute in backward."""
        return self.activations.keeps(layer_idx)

    def build(
        self, weights: ExpertWeights | PackedLayerFiles, shape: ExpertShape, rank: int, label: str, layer_idx: int = 0
    ) -> ExpertsBackend:
        """Build the backend of a layer; `weights` are taken over and released, those on disk loaded.

        Args:
            weights: The layer's; emptied as they are copied.
            shape: Sizes of the layer.
            rank: LoRA rank to build for; 0 for inference.
            label: The layer's name in the model, for messages.
            layer_idx: Its index, by which the placement knows it.

        Raises:
            KTAMXConfigError: Experts that cannot be streamed.
            KTAMXError: The system refuses to page-lock memory, or a packed file does not load.
        """
        if self._share is None:
            freed = -self._locked_bytes if self.streamed else self.cpu_bytes
            self._share = share_backward(self.config, self.backend, self.saved, self.cpu_bytes, freed, self.ranks)

        def on_cpu(weights: ExpertWeights | PackedLayerFiles, shape: ExpertShape) -> ExpertsBackend:
            longest = self.config.kt_max_len or min(DEFAULT_MAX_LEN, most_tokens(shape))
            return build_backend(
                self.backend, weights, shape, rank, self.threads, longest, bool(self._share),
                share_cache=self.activations.asked == "recompute", label=label,
            )  # fmt: skip

        if isinstance(weights, PackedLayerFiles):
            backend = on_cpu(weights, shape)
        elif weights.packed_as is not None:
            backend = weights.packed_as
        elif self.tiers is None or not self.tiers.need_gpu:
            backend = on_cpu(weights, shape)
        else:
            resident, streamed = self._on_gpu(shape, layer_idx)
            dtype = weights.gate_up.dtype if self.backend == "torch" else torch.bfloat16
            must_lock = self.promotion is None  # under `auto` no refusal of the system is an error
            backend = build_tiered(weights, shape, resident, streamed, self.streamer, dtype, on_cpu, must_lock)
            self._note_streamed(backend, label, layer_idx)
        if self.on_build:
            self.on_build(backend)
        if self.backend != "torch":
            return_freed_memory()
        return backend

    def _note_streamed(self, backend: ExpertsBackend, label: str, layer_idx: int) -> None:
        """A layer that is streamed as a whole can be moved; memory that was not locked is logged once."""
        if not isinstance(backend, StreamedBackend) or backend.weights.resident is not None:
            return
        if self.promotion is not None:
            self.promotion.add(layer_idx, backend)
        if backend.weights.refusal and not self._warned_unlocked:
            self._warned_unlocked = True
            logger.warning(
                "kt_hf: %s, and other layers perhaps, is streamed from memory that is not page-locked: this is slower. "
                "%s", label, backend.weights.refusal,
            )  # fmt: skip

    def begins(self, layer_idx: int, tokens: int, gradients: bool, training: bool) -> None:
        """A layer's forward begins: with the model's first layer, layers are moved to the GPU or back.

        Args:
            layer_idx: Of the layer.
            tokens: Of the forward.
            gradients: Whether a backward may follow.
            training: Whether the layer is in training mode.
        """
        if training:
            self.activations.say()
        if self.promotion is not None:
            with CALL_LOCK:
                self.promotion.begins(layer_idx, tokens, gradients, training, optimizer_steps())

    def make_room(self, label: str) -> bool:
        """Have layers that the run has brought to the GPU give their memory to `label`; whether there were any."""
        return self.promotion is not None and self.promotion.ran_out(label)

    def _on_gpu(self, shape: ExpertShape, layer: int) -> tuple[Sequence[int], Sequence[int]]:
        """Ids of a layer's resident and of its streamed experts."""
        order: Sequence[int] = self.placement.order[layer] if self.placement else range(shape.num_experts)
        if self.placement and self.ranks:  # it is of all experts, whatever the number of ranks
            first = self.ranks.owners.index * shape.num_experts
            order = [expert - first for expert in order if 0 <= expert - first < shape.num_experts]
        if layer in self._resident_layers:
            return order, ()
        tiers = self.tiers or Tiers()
        return order[: tiers.resident], order[tiers.resident : tiers.on_gpu]

    def low_bit_experts(self, shape: ExpertShape, layer: int) -> Sequence[int]:
        """Ids of the experts of a layer that stay in low bits, as their checkpoint has them, on the GPU or the CPU.

        Args:
            shape: Sizes of the layer.
            layer: Its index, by which the placement knows it.
        """
        if self.config.kt_expert_dtype != "bf16":
            return ()
        on_gpu = [e for part in self._on_gpu(shape, layer) for e in part]
        kept = on_gpu if self.bits < BF16 else []
        return kept + sorted(set(range(shape.num_experts)) - set(on_gpu)) if self.keeps_on_cpu else kept

    def stored(self, weights: ExpertWeights | PackedLayerFiles) -> ExpertWeights | PackedLayerFiles:
        """A layer's weights in `kt_expert_dtype`: as they are, or quantized, and then `weights` are emptied."""
        if isinstance(weights, PackedLayerFiles) or self.config.kt_expert_dtype == "bf16":
            return weights
        return quantized_experts(weights, self.config.kt_expert_dtype, self.gpu)
