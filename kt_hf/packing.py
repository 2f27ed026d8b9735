"""How a model's experts are handed to the backend: shared by all layers of a patched model."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .backends import ExpertsBackend, ExpertShape, ExpertWeights, pack
from .config import KTConfig
from .cpu import ThreadPlan

logger = logging.getLogger(__name__)
DEFAULT_MAX_LEN = 32_768


@dataclass
class Packer:
    """Builds the backend of each layer.

    Attributes:
        config: The user's settings.
        backend: The backend chosen for all layers, and `reason`, why.
        plan: Worker threads.
        expert_bytes: All layers' expert weights in bf16.
        layer_bytes: The largest layer's.
        streamed: The weights are read as they are packed; else they are in memory already.
    """

    config: KTConfig
    backend: str
    reason: str
    plan: ThreadPlan
    expert_bytes: int
    layer_bytes: int
    streamed: bool = False
    on_pack: Callable[[ExpertsBackend], None] | None = field(default=None, init=False, repr=False)
    told_dropout: bool = field(default=False, init=False)
    _share: bool | None = field(default=None, init=False)

    @property
    def retain(self) -> bool:
        return self.config.kt_expert_activations == "retain"

    def pack(self, weights: ExpertWeights, shape: ExpertShape, rank: int, label: str) -> ExpertsBackend:
        """Build a layer's backend; `weights` are taken over and released."""
        if self._share is None:
            self._share = self._share_backward()
        backend = weights.taken_by or pack(
            self.backend,
            weights,
            shape,
            rank,
            self.plan,
            self.config.kt_max_len or DEFAULT_MAX_LEN,
            self._share,
            share_cache=not self.retain,
            label=label,
        )
        if self.on_pack:
            self.on_pack(backend)
        if self.backend != "torch":
            _return_freed_memory()
        return backend

    def _share_backward(self) -> bool:
        """Whether layers share one buffer of backward weights: asked for, or by need (they cost as much again)."""
        if self.backend == "torch":
            return False
        if self.config.kt_share_backward_weights is not None:
            return self.config.kt_share_backward_weights
        # Source weights in memory are released layer by layer, so what is needed on top is one copy; without them two.
        free = available_memory() - (self.expert_bytes if self.streamed else 0)
        share = self.expert_bytes > 0.8 * free
        logger.info(
            "Backward weights of the experts: %s (%.1f GiB more, %.1f GiB free).",
            "one buffer for all layers, slower" if share else "one copy a layer",
            self.expert_bytes / 2**30,
            free / 2**30,
        )
        return share


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


def _return_freed_memory() -> None:
    """Give freed heap back to the system, where the C library keeps it otherwise (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
