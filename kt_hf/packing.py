"""How a model's experts are handed to the backend: shared by all layers of a patched model."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from .backends import OPERATORS, ExpertsBackend, ExpertShape, ExpertWeights, SavedLayer, pack
from .backends.split_pack import pack_split
from .config import KTConfig
from .cpu import ThreadPlan
from .errors import KTAMXConfigError

if TYPE_CHECKING:
    from .placement import Placement
    from .quantized import SavedExperts

logger = logging.getLogger(__name__)
DEFAULT_MAX_LEN = 32_768


@dataclass
class Packer:
    """Builds the backend of each layer.

    Attributes:
        config: The user's settings.
        backend: The backend chosen for all layers, and `reason`, why.
        plan: Worker threads.
        expert_bytes: All layers' expert weights in bf16, those of the GPU not counted.
        layer_bytes: The largest layer's.
        streamed: The weights are read as they are packed; else they are in memory already.
        saved: Packed weights on disk (`kt_weight_path`), checked to fit the model and the settings.
        gpu: Where `kt_num_gpu_experts` of each layer are computed; None without.
        placement: Which of them; None for the first.
    """

    config: KTConfig
    backend: str
    reason: str
    plan: ThreadPlan
    expert_bytes: int
    layer_bytes: int
    streamed: bool = False
    saved: SavedExperts | None = None
    gpu: torch.device | None = None
    placement: Placement | None = field(default=None, init=False, repr=False)
    on_pack: Callable[[ExpertsBackend], None] | None = field(default=None, init=False, repr=False)
    told_dropout: bool = field(default=False, init=False)
    _share: bool | None = field(default=None, init=False)

    @property
    def retain(self) -> bool:
        return self.config.kt_expert_activations == "retain"

    def place(self, layers: Mapping[int, ExpertShape], placement: Placement | None) -> None:
        """Decide which experts of these layers go to the GPU; nothing without `kt_num_gpu_experts`.

        Raises:
            KTAMXConfigError: The placement is another model's.
        """
        count = self.config.kt_num_gpu_experts or 0
        if not count:
            return
        if placement is not None:
            for layer, shape in layers.items():
                placement.experts(layer, count, shape.num_experts)
            self.placement = placement
        told = placement.source if placement else "their numbers: placement=count_experts(...) takes the most used"
        logger.info("kt_hf: %d experts of each layer on %s, by %s.", count, self.gpu, told)

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
                self.config.kt_max_len or DEFAULT_MAX_LEN,
                bool(self._share),
                share_cache=not self.retain,
                label=label,
            )

        if isinstance(weights, SavedLayer):
            backend = on_cpu(weights, shape)
        elif weights.taken_by is not None:
            backend = weights.taken_by
        elif self.gpu is None:
            backend = on_cpu(weights, shape)
        else:
            count = self.config.kt_num_gpu_experts or 0
            placement = self.placement
            experts = placement.experts(layer, count, shape.num_experts) if placement else range(count)
            dtype = weights.gate_up.dtype if self.backend == "torch" else torch.bfloat16
            backend = pack_split(weights, shape, experts, self.gpu, dtype, on_cpu)
        if self.on_pack:
            self.on_pack(backend)
        if self.backend != "torch":
            return_freed_memory()
        return backend

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
        free = available_memory() - copy + (0 if self.streamed else self.expert_bytes)
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


def gpu_tier(count: int, shapes: list[ExpertShape], backend: str) -> torch.device:
    """The device for `count` experts of each of these layers, the others being computed by `backend`.

    Raises:
        KTAMXConfigError: There is no GPU, or there are not so many experts, or too few are left for the operators.
    """
    field = f"kt_num_gpu_experts={count}"
    if not has_gpu_tier():
        raise KTAMXConfigError(f"{field} needs a CUDA GPU, and there is none here: leave it out, or set it to 0.")
    for shape in shapes:
        E, K = shape.num_experts, shape.top_k
        if count > E:
            raise KTAMXConfigError(f"{field}: a layer has {E} experts. Set it to {E} or less.")
        if backend != "torch" and E - K < count < E:
            raise KTAMXConfigError(
                f"{field} of {E} leaves {E - count} on the CPU, and the operators need {K} (those a token is sent "
                f"to). Set it to {E}, or to {E - K} or less."
            )
    return _TIER or torch.device("cuda", torch.cuda.current_device())


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
