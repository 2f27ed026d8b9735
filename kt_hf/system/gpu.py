"""The GPU that experts may use. Tests that have none put the CPU in its place by replacing `experts_device`."""

from __future__ import annotations

import os
import sys

import torch

from ..ranks import current_world

# What PyTorch's allocator of GPU memory is set by: who has set it keeps what was set.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROW = "expandable_segments:True"


def experts_device() -> torch.device | None:
    """The device of experts resident on the GPU or streamed to it; None on a machine without one.

    The device has no index, which only a process that uses CUDA can know: this function must not start CUDA, for a run
    may leave every expert on the CPU, or fork workers. Where several processes of this host train one model it has that
    of the GPU which Trainer and accelerate will give to the process, perhaps after the model is patched.
    """
    if not torch.cuda.is_available():
        return None
    world = current_world()
    return (
        torch.device("cuda") if world.size == 1 else torch.device("cuda", world.local_rank % torch.cuda.device_count())
    )


def let_segments_grow(device: torch.device) -> None:
    """Have PyTorch's allocator extend the memory it has, instead of taking pieces that it cannot join.

    Chunks of experts, gathered rows and logits come and go in unlike sizes: a step of Qwen3-235B (94 layers, 8,192
    tokens) held 3.7 GiB in fragments on an H200 and ran out of 24 GB, and 0.2 GiB this way. It does not start CUDA, and
    leaves alone what the environment sets, and AMD's GPUs.

    Args:
        device: Of experts resident on it or streamed to it.
    """
    if device.type != "cuda" or not _can_grow() or _settings():
        return
    try:
        torch.cuda.memory._set_allocator_settings(_GROW)
    except (AttributeError, RuntimeError):  # not public: without it there are fragments as before
        let_segments_grow.refused = True  # type: ignore[attr-defined]


def segments_grow() -> bool:
    """Whether PyTorch's allocator extends the memory it has, by `let_segments_grow` or by the environment."""
    asked = _settings()
    if not _can_grow() or getattr(let_segments_grow, "refused", False):
        return False
    return _GROW in asked and "cudaMallocAsync" not in asked if asked else True


def _can_grow() -> bool:
    known = hasattr(torch.cuda.memory, "_set_allocator_settings")
    return known and torch.version.hip is None and sys.platform == "linux"


def _settings() -> str:
    """Of the allocator, by the environment: the first of its names that is set, as PyTorch reads them."""
    return next((words.replace(" ", "") for name in _ALLOCATOR if (words := os.environ.get(name))), "")
