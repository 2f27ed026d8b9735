"""CPU memory that large tensors take turns in.

A page that is new to the process costs more than writing to it: a DeepSeek-V2-Lite layer with 2,048 tokens, computed by
PyTorch on two cores, took 220,000 new pages, and a seventh of its time for them. So blocks of memory are used again.
They are of huge pages (2 MB) where Linux gives these for the asking, because blocks are replaced where sizes vary. The
C library could be told to keep what is freed, but where lengths vary its heap grew to five times of what was in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

_SMALL = 2**20  # bytes: smaller tensors are left to the C library, which keeps blocks of their size


class BufferPool:
    """Blocks of memory, each of which comes back when no tensor refers to it any more.

    A tensor gets the smallest free block that holds it. If there is none, a new one takes the place of the largest
    free one: there are never more blocks than were in use at once, and none is larger than what was asked for.

    Not thread-safe: the caller holds `kt_hf.backends.CALL_LOCK`.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, with any values."""
        count = torch.Size(size).numel()
        needed = dtype.itemsize * count  # bytes
        if needed < _SMALL:
            return torch.empty(size, dtype=dtype, device="cpu")
        fitting = [block for block in self._free if len(block) >= needed]
        if fitting:
            block = min(fitting, key=len)
            self._free.remove(block)
        else:
            if self._free:
                self._free.remove(max(self._free, key=len))
            block = mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    block.madvise(mmap.MADV_HUGEPAGE)
        lease = (ctypes.c_char * needed).from_buffer(block)  # which the tensor's storage keeps
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=count).view(size)

    def release(self) -> None:
        """Give the blocks that no tensor refers to back to the system."""
        self._free.clear()


BUFFER_POOL = BufferPool()


def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with any values; on the CPU in memory of the `BUFFER_POOL`."""
    return BUFFER_POOL.empty(size, dtype) if device.type == "cpu" else torch.empty(size, dtype=dtype, device=device)


def empty_rows(rows: int, like: Tensor, columns: int | None = None) -> Tensor:
    """`empty` of the size [rows, columns], in the dtype and on the device of `like` [., columns]."""
    return empty((rows, like.shape[1] if columns is None else columns), like.dtype, like.device)
