"""The GPU that experts may use. Tests that have none put the CPU in its place by replacing `experts_device`."""

from __future__ import annotations

import torch


def experts_device() -> torch.device | None:
    """The device of experts resident on the GPU or streamed to it; None on a machine without one.

    The device has no index, which only a process that uses CUDA can know: this function must not start CUDA, for a run
    may leave every expert on the CPU, or fork workers.
    """
    return torch.device("cuda") if torch.cuda.is_available() else None
