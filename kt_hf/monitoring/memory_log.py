"""What a run takes of memory, and how many layers are on the GPU: values to log."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from ..placement import packer_of

_GIB = 2**30


def memory_and_placement(model: Any) -> dict[str, float]:
    """Values to log of a patched model, as they are now.

    `host_memory_gib`: memory of this process (resident set).
    `gpu_memory_gib`: the most that PyTorch's allocator has held on the GPU, where one is used.
    `layers_on_gpu`: layers whose expert weights a planned placement holds there.
    """
    values: dict[str, float] = {"host_memory_gib": round(psutil.Process().memory_info().rss / _GIB, 3)}
    if torch.cuda.is_initialized():
        values["gpu_memory_gib"] = round(torch.cuda.max_memory_reserved() / _GIB, 3)
    packer = packer_of(model)
    if packer and packer.promotion:
        values["layers_on_gpu"] = len(packer.promotion.held)
    return values
