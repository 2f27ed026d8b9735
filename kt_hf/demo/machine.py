"""Facts about the machine and the installation that a report of a run needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import sys
from typing import Any

import psutil


def versions() -> dict[str, Any]:
    """Python, the packages that matter, and PyTorch's threads."""
    import peft
    import torch
    import transformers
    import trl

    packages = {module.__name__: str(module.__version__) for module in (torch, transformers, peft, trl)}
    return {"python": platform.python_version(), "packages": packages, "torch_threads": torch.get_num_threads()}


def release_memory() -> None:
    """Free what nobody uses any more, and give it back to the system where the C library would keep it (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """How much memory this process and those it starts need together. Make it before starting them.

    Attributes:
        start_gb: What this process held when the object was made, in GB (10^9 bytes).
    """

    def __init__(self) -> None:
        self.start_gb = psutil.Process().memory_info().rss / 1e9

    def peak_gb(self) -> float | None:
        """The most so far, in GB (10^9 bytes); None where the system does not tell.

        Either this process' own peak, or what it held when this object was made and the largest child's peak.
        """
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        process, children = (
            resource.getrusage(who).ru_maxrss * unit / 1e9 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return round(max(process, self.start_gb + children), 2)
