"""The GPU that experts may use. Tests that have none put the CPU in its place by replacing `experts_device`."""

from __future__ import annotations

import torch

from ..ranks import current_world


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
