"""The GPU that experts may use. Tests that have none put the CPU in its place by replacing `experts_device`."""

from __future__ import annotations

import torch


def experts_device() -> torch.device | None:
    """The current CUDA device, for experts resident on it or streamed to it; None on a machine without one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
