"""Expert weights in page-locked host memory, from where a GPU copies them without the CPU's help.

Ordinary memory is locked in place: PyTorch's pinned allocator rounds each size up to a power of two, which would double
what a model takes.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import KTAMXError
from .base import ExpertWeights


class HostWeights:
    """A layer's streamed experts: gate_up [E, 2I, H] and down [E, H, I] in bf16, contiguous, in host memory.

    They are locked as long as this object lives.

    Raises:
        KTAMXError: The system refuses to lock them.
    """

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up, down
        self._lock()

    def _lock(self) -> None:
        for tensor in (self.gate_up, self.down):
            if lock_pages(tensor):
                # The tensor goes along, so that its memory is unlocked before it is given back.
                weakref.finalize(self, unlock_pages, tensor).atexit = False

    @classmethod
    def copied(cls, weights: ExpertWeights, experts: Sequence[int]) -> HostWeights:
        """Some experts of a layer, in memory of their own."""
        made = [_own_pages((len(experts), *whole.shape[1:])) for whole in (weights.gate_up, weights.down)]
        for own, whole in zip(made, (weights.gate_up, weights.down), strict=True):
            for i, e in enumerate(experts):
                own[i].copy_(whole[e])
        return cls(*made)

    @classmethod
    def taken_over(cls, weights: ExpertWeights) -> HostWeights:
        """All experts of a layer where they are; copied only where that memory cannot be locked (a file's, a shared
        one) or is not as it has to be."""
        tensors = weights.gate_up.detach(), weights.down.detach()
        if all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors):
            try:
                return cls(*tensors)
            except KTAMXError:
                pass
        return cls.copied(weights, range(len(weights.gate_up)))


def lock_pages(tensor: Tensor) -> bool:
    """Page-lock a contiguous CPU tensor's memory; false where there is nothing to do, for want of a GPU for instance.

    Raises:
        KTAMXError: The system refuses, saying why.
    """
    if not torch.cuda.is_available() or tensor.nbytes == 0:
        return False
    torch.cuda.init()  # before that nothing looks pinned
    if tensor.is_pinned():
        return False
    code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    try:
        torch.cuda.check_error(code)
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError):  # CUDA would report it once more, at the next launch of anybody's
            torch.zeros(1, device="cuda")
        raise KTAMXError(
            f"{tensor.nbytes / 2**30:.2f} GiB of expert weights cannot be page-locked for streaming: {error}. A "
            "container may limit locked memory (ulimit -l, RLIMIT_MEMLOCK): raise the limit, or stream fewer experts "
            "(kt_expert_placement)."
        ) from None
    return True


def unlock_pages(tensor: Tensor) -> None:
    """The inverse of `lock_pages`, once no copy is under way."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def _own_pages(size: tuple[int, ...]) -> Tensor:
    """bf16 memory whose pages nobody else uses: a page cannot be locked twice."""
    count = torch.Size(size).numel()
    pages = mmap.mmap(-1, 2 * max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.bfloat16, count=max(count, 1))[:count].view(size)
