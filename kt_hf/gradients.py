"""Gradients of the LoRA parameters, from those a backend gives for its padded, scaled tensors."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

from .backends.transfer import apart, joined


class Recycled:
    """Memory on the CPU that comes back when no tensor refers to it any more.

    Gradients are new tensors at every step, and the pages of new memory cost more than what is written to them: 5
    million values take 15 ms to widen into fresh pages and 1.5 ms into these (one core of an AVX512 machine).
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # by bytes

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with any values."""
        count = dtype.itemsize * torch.Size(size).numel()
        if not count:
            return torch.empty(size, dtype=dtype, device="cpu")
        if count not in self._free:  # LoRA of another rank, for instance: what the one before used is not kept
            self.release()
        free = self._free.setdefault(count, [])
        try:
            pages = free.pop()
        except IndexError:
            pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        lease = (ctypes.c_char * count).from_buffer(pages)  # which the tensor's storage keeps
        weakref.finalize(lease, free.append, pages).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(size)

    def release(self) -> None:
        """Give what no tensor refers to back to the system."""
        for pages in self._free.values():
            pages.clear()


def parameter_gradients(
    gradients: tuple[Tensor, ...],
    parts: list[tuple[int, int, int, float]],
    free: bool = False,
    memory: Recycled | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Gradients of A and B of each part, in memory of their own, from the six of the padded backend tensors.

    They are in fp32, unless the six are of the parameters' dtype: nothing is to be gained then, for the scaling is
    multiplied in fp32 anyway and rounded.

    Args:
        gradients: Six tensors [E, r, in] and [E, out, r], which the backend may overwrite later.
        parts: Of each adapter and projection: index of A among the six, first row, rank, scaling (folded into B).
        free: The six are memory that nobody else uses: what is in the right dtype need not be copied.
        memory: For gradients on the CPU.
        dtype: Of the parameters.
    """
    target = dtype if gradients[0].dtype == dtype else torch.float32
    held = joined(gradients)
    whole = len(parts) == 3 and all(rank == gradients[index].shape[1] for index, _, rank, _ in parts)
    if held is not gradients and whole and not (free and held[0].dtype == target):  # in one pass
        if memory is not None and held[0].device.type == "cpu":
            flat = memory.empty(tuple(held[0].shape), target).copy_(held[0])
        else:
            flat = held[0].to(target, copy=True)
        gradients, free = apart(flat, [tensor.shape for tensor in gradients]), True
    made: list[Tensor] = []
    for index, offset, rank, scaling in parts:
        for narrow in (gradients[index][:, offset : offset + rank], gradients[index + 1][:, :, offset : offset + rank]):
            if free and narrow.dtype == target and narrow.is_contiguous():
                made.append(narrow)
            elif memory is not None and narrow.device.type == "cpu":
                made.append(memory.empty(tuple(narrow.shape), target).copy_(narrow))
            else:
                made.append(narrow.to(target, copy=True).contiguous())
        if scaling != 1.0:
            made[-1].mul_(scaling)
    return made
