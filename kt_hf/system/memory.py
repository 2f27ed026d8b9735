"""The memory that this process can still take, of the host and of a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

from ..ranks import current_world


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that the process can still take: by the system, and by its control group (version 2).

    Where several processes of this host train one model, a process's part of them.
    """
    return _available(root) // current_world().local_size


def _available(root: Path) -> int:
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


def free_device_memory(device: torch.device) -> int:
    """Bytes that PyTorch can still allocate on a device; for the CPU, `available_memory()`.

    They include memory that PyTorch keeps from earlier allocations, and are no more than
    `torch.cuda.set_per_process_memory_fraction` allows.
    """
    if device.type != "cuda":
        return available_memory()
    used = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - used
    return max(0, int(min(free + torch.cuda.memory_reserved(device) - used, allowed)))


class DeviceMemory:
    """What PyTorch takes of a device's memory, in bytes. Of the CPU nothing is known: nothing seems to fit.

    Args:
        device: A GPU, or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """Taken by tensors now."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def peak(self) -> int:
        """The most that PyTorch's allocator had taken since `reset_peak`, fragments included."""
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else 0

    def reset_peak(self) -> None:
        """The peak is what the allocator has taken now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def trim(self) -> None:
        """Have the allocator give back what no tensor uses. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def limit(self) -> int:
        """What the allocator could take in all."""
        return self.allocated() + free_device_memory(self._device) if self._device.type == "cuda" else 0


def return_freed_memory() -> None:
    """Give freed heap memory back to the system, which the C library (glibc) would keep."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
