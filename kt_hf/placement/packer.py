"""How a model's experts are handed to the backend: shared by all layers of a patched model."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from ..backends import OPERATORS, ExpertsBackend, ExpertShape, ExpertWeights, SavedLayer, most_tokens, pack
from ..backends.build_tiered import pack_split
from ..backends.gpu.grouped_mm import aligned
from ..backends.gpu.weight_stream import Streamer
from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..system.cpu import ThreadPlan
from .calibration import measure_rates
from .planner import Room, Split, expert_bytes
from .planner import plan as make_plan
from .tiers import Tiers, asked_for, check_tiers, field_of

if TYPE_CHECKING:
    from ..quantized import SavedExperts
    from .order import Placement

logger = logging.getLogger(__name__)
DEFAULT_MAX_LEN = 32_768
# Of a step, and of a LoRA, where nobody says how many.
_TOKENS = 2_048
_RANK = 16


@dataclass
class Packer:
    """Builds the backend of each layer.

    Attributes:
        config: The user's settings.
        backend: The backend chosen for all layers, and `reason`, why.
        plan: Worker threads.
        expert_bytes: All layers' expert weights in bf16; once they are placed, of those on the CPU.
        layer_bytes: The largest layer's.
        streamed: The weights are read as they are packed; else they are in memory already.
        saved: Packed weights on disk (`kt_weight_path`), checked to fit the model and the settings.
        tiers: How many experts of each layer are resident on the GPU and streamed to it; None before that is planned.
        placement: Which of them; None for the first.
        planned: What was expected of the tiers, where they were planned.
        of_8_bits: Whether streamed experts stay of 8 bits, as their checkpoint has them.
    """

    config: KTConfig
    backend: str
    reason: str
    plan: ThreadPlan
    expert_bytes: int
    layer_bytes: int
    streamed: bool = False
    saved: SavedExperts | None = None
    tiers: Tiers | None = field(default_factory=Tiers)
    placement: Placement | None = field(default=None, init=False, repr=False)
    planned: Split | None = field(default=None, init=False)
    of_8_bits: bool = field(default=False, init=False)
    on_pack: Callable[[ExpertsBackend], None] | None = field(default=None, init=False, repr=False)
    told_dropout: bool = field(default=False, init=False)
    _streamer: Streamer | None = field(default=None, init=False, repr=False)
    _share: bool | None = field(default=None, init=False)
    _locked: int = field(default=0, init=False)  # bytes of host memory that streamed experts take

    @property
    def retain(self) -> bool:
        return self.config.kt_expert_activations == "retain"

    @property
    def streamer(self) -> Streamer:
        """What brings streamed experts to the GPU, for all layers; the GPU is its device."""
        if self._streamer is None:
            self._streamer = Streamer(gpu_device())
        return self._streamer

    def place(self, layers: Mapping[int, ExpertShape], placement: Placement | None, room: Room | None = None) -> None:
        """Decide which experts of these layers go to the GPU, or are streamed to it.

        Args:
            layers: Shape by layer index.
            placement: Which of them go first; None for the first ones.
            room: What a planned placement goes by.

        Raises:
            KTAMXConfigError: The placement is another model's.
        """
        self.check_placement(layers, placement)
        room = room or Room()
        if self.tiers is None:
            self.tiers = self._planned(list(layers.values()), placement, room)
        tiers, self.of_8_bits = self.tiers, room.of_8_bits
        sizes = [expert_bytes(shape) * tiers.on_cpu(shape.num_experts) for shape in layers.values()]
        self.expert_bytes, self.layer_bytes = sum(sizes), max(sizes)
        self._locked = sum(expert_bytes(shape, self.of_8_bits) * tiers.streamed for shape in layers.values())
        if not tiers.on_gpu:
            return
        self.placement = placement
        told = placement.source if placement else "their numbers: placement=count_experts(...) takes the most used"
        logger.info("kt_hf: %s (%s), by %s.", tiers, gpu_device(), told)

    def check_placement(self, layers: Mapping[int, ExpertShape], placement: Placement | None) -> None:
        """Refuse another model's placement, if it would be used.

        Raises:
            KTAMXConfigError: It is another model's.
        """
        if placement is not None and (self.tiers is None or self.tiers.on_gpu):
            for layer, shape in layers.items():
                placement.check(layer, shape.num_experts)

    def _planned(self, shapes: list[ExpertShape], placement: Placement | None, room: Room) -> Tiers:
        """By the machine's rates, measured now."""
        shape, device = max(shapes, key=expert_bytes), gpu_device()
        shape = replace(shape, num_experts=min(one.num_experts for one in shapes))
        tokens = room.tokens or self.config.kt_max_len or _TOKENS
        free = _free_on(device)
        streaming = all(aligned(one) for one in shapes) and (
            self.backend != "torch" or room.dtype in (None, torch.bfloat16)
        )
        rates = measure_rates(shape, device, self.plan, self.backend, tokens)
        if self.config.kt_moe_lora_device == "gpu":
            room = replace(room, lora_rank=self.config.kt_lora_rank or _RANK)
        left = room.free_for_experts(free, tokens, shape)
        popularity = placement.share if placement else ()
        split = make_plan(rates, shape, len(shapes), tokens, left, popularity, streaming, room.of_8_bits)
        check_tiers(split.tiers, self.config, shapes, self.backend != "torch")
        logger.info("kt_hf: kt_expert_placement=auto, %d tokens a step: %s.", tokens, split)
        self.planned = split
        return split.tiers

    def pack(
        self, weights: ExpertWeights | SavedLayer, shape: ExpertShape, rank: int, label: str, layer: int = 0
    ) -> ExpertsBackend:
        """Build the backend of layer number `layer`; `weights` are taken over and released, those on disk loaded."""
        if self._share is None:
            self._share = self._share_backward()

        def on_cpu(weights: ExpertWeights | SavedLayer, shape: ExpertShape) -> ExpertsBackend:
            return pack(
                self.backend,
                weights,
                shape,
                rank,
                self.plan,
                self.config.kt_max_len or min(DEFAULT_MAX_LEN, most_tokens(shape)),
                bool(self._share),
                share_cache=not self.retain,
                label=label,
            )

        if isinstance(weights, SavedLayer):
            backend = on_cpu(weights, shape)
        elif weights.taken_by is not None:
            backend = weights.taken_by
        elif self.tiers is None or not self.tiers.on_gpu:
            backend = on_cpu(weights, shape)
        else:
            resident, streamed = self._on_gpu(shape, layer)
            dtype = weights.gate_up.dtype if self.backend == "torch" else torch.bfloat16
            backend = pack_split(weights, shape, resident, streamed, self.streamer, dtype, on_cpu)
        if self.on_pack:
            self.on_pack(backend)
        if self.backend != "torch":
            return_freed_memory()
        return backend

    def _on_gpu(self, shape: ExpertShape, layer: int) -> tuple[Sequence[int], Sequence[int]]:
        """Ids of a layer's resident and of its streamed experts."""
        order = self.placement.order[layer] if self.placement else tuple(range(shape.num_experts))
        tiers = self.tiers or Tiers()
        return order[: tiers.resident], order[tiers.resident : tiers.on_gpu]

    def read_scaled(self, shape: ExpertShape, layer: int) -> Sequence[int]:
        """Ids of the experts of a layer that are to be left as their checkpoint has them, of 8 bits."""
        return self._on_gpu(shape, layer)[1] if self.of_8_bits else ()

    def _share_backward(self) -> bool:
        """Whether layers share one buffer of backward weights: asked for, or by need (they cost as much again)."""
        if self.backend == "torch":
            return False
        saved = self.saved
        if saved is not None and not saved.backward:  # nothing else can be: backward would compute with no weights
            logger.info("Backward weights of the experts: one buffer for all layers, for %s has none.", saved.path)
            return True
        if self.config.kt_share_backward_weights is not None:
            return self.config.kt_share_backward_weights
        copy = int(self.expert_bytes * OPERATORS[self.backend].bytes_per_weight / 2)
        # When all is packed once: source weights in memory are released layer by layer.
        free = available_memory() - copy + (-self._locked if self.streamed else self.expert_bytes)
        share = copy > 0.8 * free
        logger.info(
            "Backward weights of the experts: %s (%.1f GiB more, %.1f GiB free).",
            "one buffer for all layers, slower" if share else "one copy a layer",
            copy / 2**30,
            free / 2**30,
        )
        return share


# Where the GPU's experts are computed instead of on the GPU: tests put the CPU here.
_TIER: torch.device | None = None


def has_gpu_tier() -> bool:
    """Whether there is a GPU for experts."""
    return _TIER is not None or torch.cuda.is_available()


def gpu_device() -> torch.device:
    """The GPU for experts."""
    return _TIER or torch.device("cuda", torch.cuda.current_device())


def chosen_tiers(config: KTConfig, shapes: Sequence[ExpertShape], backend: str) -> Tiers | None:
    """How many experts of each of these layers are in which tier, the CPU's computed by `backend`; None if that is to
    be planned.

    Raises:
        KTAMXConfigError: There is no GPU for them, or the numbers do not fit the layers or the other settings.
    """
    tiers = asked_for(config, shapes, has_gpu_tier())
    if tiers is None or not tiers.on_gpu:
        return tiers
    field = field_of(config)
    nothing = "set it to 0" if config.kt_expert_placement is None else "set it to auto"
    if config.kt_weight_path is not None:
        raise KTAMXConfigError(
            f"{field} does not go together with kt_weight_path: saved experts are packed for the CPU. Leave one out."
        )
    if not has_gpu_tier():
        raise KTAMXConfigError(f"{field} needs a CUDA GPU, and there is none here: leave it out, or {nothing}.")
    check_tiers(tiers, config, shapes, backend != "torch")
    return tiers


def _free_on(device: torch.device) -> int:
    """Bytes that PyTorch can still allocate there: those it keeps from earlier allocations among them, and no more than
    `torch.cuda.set_per_process_memory_fraction` leaves it."""
    if device.type != "cuda":
        return available_memory()
    used = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - used
    return max(0, int(min(free + torch.cuda.memory_reserved(device) - used, allowed)))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory the process can still take: the system's, or what its control group (version 2) leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        group = (root / "proc/self/cgroup").read_text().split("::", 1)[1].split("\n", 1)[0].lstrip("/")
    except (OSError, IndexError):
        return free
    for part in [Path(group), *Path(group).parents]:
        folder = root / "sys/fs/cgroup" / part
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            free = min(free, max(0, int(limit) - used))
    return free


def return_freed_memory() -> None:
    """Give freed heap back to the system, where the C library keeps it otherwise (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
