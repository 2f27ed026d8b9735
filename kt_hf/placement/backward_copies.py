"""Whether the layers on the CPU have a copy each of their weights for backward, or one buffer for all of them."""

from __future__ import annotations

import logging

from ..backends import OPERATORS, bytes_per_weight
from ..config import KTConfig
from ..quantized import PrequantizedExperts
from ..ranks import Ranks, least_of_all
from ..system.memory import available_memory
from .expert_memory import shares_backward

logger = logging.getLogger(__name__)


def share_backward(
    config: KTConfig,
    backend: str,
    saved: PrequantizedExperts | None,
    cpu_bytes: int,
    freed: int,
    ranks: Ranks | None = None,
) -> bool:
    """Whether layers share one buffer of backward weights: asked for, or by need (they cost as much again).

    Args:
        config: The settings.
        backend: What computes the experts on the CPU.
        saved: Packed weights on disk, if the layers are loaded from those.
        cpu_bytes: Of all layers' expert weights on the CPU, in bf16.
        freed: Bytes that packing frees, for source weights in memory are released layer by layer; negative for what
            it takes beside the packed weights.
        ranks: The processes that the experts are divided among, which do as the one with the least memory must.
    """
    if backend == "torch" or OPERATORS[backend].shares_backward is not None:
        return False
    if saved is not None and not saved.backward:  # nothing else can be: backward would compute with no weights
        logger.info("Backward weights of the experts: one buffer for all layers, for %s has none.", saved.path)
        return True
    if config.kt_share_backward_weights is not None:
        return config.kt_share_backward_weights
    copies = int(cpu_bytes * bytes_per_weight(backend) / 2)
    free = least_of_all(ranks, available_memory) - copies + freed  # when all is packed once
    share = shares_backward(copies, free)
    logger.info(
        "Backward weights of the experts: %s (%.1f GiB more, %.1f GiB free).",
        "one buffer for all layers, slower" if share else "one copy a layer",
        copies / 2**30,
        free / 2**30,
    )
    return share
