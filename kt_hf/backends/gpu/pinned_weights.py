"""Expert weights in page-locked host memory, from where a GPU copies them without the CPU's help.

Ordinary memory is locked in place: PyTorch's pinned allocator rounds each size up to a power of two, which could double
the memory that a model takes.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import KTAMXError
from ..base import ExpertWeights
from ..packed import PackedExperts, PackedMatrices, picked

Matrices = Tensor | PackedMatrices


class HostWeights:
    """A layer's streamed experts in contiguous host memory, page-locked as long as this object lives.

    A GPU may hold them too, or instead: then nothing has to be copied when they are used.

    Args:
        gate_up: [E, 2I, H] on the CPU, bf16 or packed in low bits; taken over.
        down: [E, H, I], likewise.
        must_lock: Whether it is an error if the system refuses to lock them; else they stay as they are.
        resident: Whether they are in a GPU's memory, and nowhere else: nothing is locked then.

    Attributes:
        tensors: What is copied to the GPU: of gate_up, then of down; the first dimension is the experts'.
        one_expert: Bytes that one expert has of each of the tensors.
        all_experts: 0 … E-1.
        refusal: Why the system did not lock them; None if it did. Copies of such memory go through the CUDA driver's
            own small locked buffers, which is slower.
        resident: The `tensors` in a GPU's memory; None if they are in host memory alone.

    Raises:
        KTAMXError: The system refuses to lock them.
    """

    def __init__(self, gate_up: Matrices, down: Matrices, must_lock: bool = True, resident: bool = False) -> None:
        self.gate_up, self.down = gate_up, down
        self.tensors: tuple[Tensor, ...] = (*_tensors(gate_up), *_tensors(down))
        self.one_expert = [tensor[:1].nbytes for tensor in self.tensors]
        self.all_experts = list(range(len(self.tensors[0])))
        self.refusal: str | None = None
        self.resident: tuple[Tensor, ...] | None = self.tensors if resident else None
        try:
            if not resident:
                self._lock()
        except KTAMXError as error:
            if must_lock:
                raise
            self.refusal = str(error)

    def _lock(self) -> None:
        for tensor in self.tensors:
            if lock_pages(tensor):
                # The tensor goes along, so that its memory is unlocked before it is given back.
                weakref.finalize(self, unlock_pages, tensor).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in host memory or on a GPU."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_gpu(self, device: torch.device) -> None:
        """Copy the tensors to a GPU's memory as well, without waiting for the copies.

        Args:
            device: The GPU. On the CPU (tests have no GPU) the copies are real ones too.

        Raises:
            torch.OutOfMemoryError: The GPU has no room; nothing is kept there then.
        """
        if self.resident is None:
            targets = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in self.tensors]
            for target, source in zip(targets, self.tensors, strict=True):
                target.copy_(source, non_blocking=True)
            self.resident = tuple(targets)

    def to_host(self) -> None:
        """Let the GPU's copy go: what was launched on the current stream still reads it."""
        self.resident = None

    @property
    def packed(self) -> bool:
        """Whether the weights are of low bits, so that copies must be widened before they are multiplied."""
        return isinstance(self.down, PackedMatrices)

    @functools.cached_property
    def num_experts(self) -> int:
        """How many experts these are."""
        return len(self.all_experts)

    @functools.cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights in bf16."""
        return 2 * sum(torch.Size(part.shape[1:]).numel() for part in (self.gate_up, self.down))

    def products_of(self, copied: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """gate_up and down in bf16, on the device of `copied`: the `tensors` of some experts, or copies of these."""
        count = len(_tensors(self.gate_up))
        return _wide(self.gate_up, copied[:count]), _wide(self.down, copied[count:])

    def chosen(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """gate_up [n, 2I, H] and down [n, H, I] of some experts in bf16, copied where they are.

        Args:
            experts: Their numbers, [n] integers on the device of the GPU's tensors, or else on the CPU.
        """
        return self.products_of(picked(self.resident or self.tensors, experts))

    @classmethod
    def copied(cls, weights: ExpertWeights, experts: Sequence[int], must_lock: bool = True) -> HostWeights:
        """Some experts of a layer, copied to new memory in bf16."""
        copies = [own_pages((len(experts), *whole.shape[1:])) for whole in (weights.gate_up, weights.down)]
        for copy, whole in zip(copies, (weights.gate_up, weights.down), strict=True):
            for i, e in enumerate(experts):
                copy[i].copy_(whole[e])
        return cls(copies[0], copies[1], must_lock=must_lock)

    @classmethod
    def taken_over(cls, weights: ExpertWeights, must_lock: bool = True) -> HostWeights:
        """All experts of a layer, in the memory where they are.

        They are copied only if that memory cannot be locked (a file's, or shared), or is not contiguous bf16 on a CPU.
        """
        tensors = weights.gate_up.detach(), weights.down.detach()
        if all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors):
            try:
                return cls(*tensors)
            except KTAMXError:
                pass
        return cls.copied(weights, range(len(weights.gate_up)), must_lock)

    @classmethod
    def of_packed(cls, experts: PackedExperts, must_lock: bool = True) -> HostWeights:
        """Experts of low bits; what is not in pages of its own (`own_pages`) is copied to such."""
        gate_up, down = (
            part.with_tensors([_in_own_pages(tensor) for tensor in part.tensors])
            for part in (experts.gate_up, experts.down)
        )
        return cls(gate_up, down, must_lock)

    @classmethod
    def on_gpu(cls, experts: PackedExperts, device: torch.device) -> HostWeights:
        """Experts of low bits that are resident on a GPU (on the CPU, where tests have none), and nowhere else."""
        return cls(experts.gate_up.to(device), experts.down.to(device), resident=True)


def lock_pages(tensor: Tensor) -> bool:
    """Page-lock a contiguous CPU tensor's memory; False where nothing is to be locked, for want of a GPU for instance.

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


def own_pages(size: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A CPU tensor of any values in pages that no other tensor shares, for a page cannot be locked twice."""
    count = torch.Size(size).numel()
    pages = mmap.mmap(-1, dtype.itemsize * max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=max(count, 1))[:count].view(size)


def _tensors(matrices: Matrices) -> tuple[Tensor, ...]:
    return matrices.tensors if isinstance(matrices, PackedMatrices) else (matrices,)


def _wide(matrices: Matrices, copied: Sequence[Tensor]) -> Tensor:
    """Copies of the tensors of `matrices` in bf16."""
    if isinstance(matrices, PackedMatrices):
        return matrices.with_tensors(copied).dequantized(torch.bfloat16)
    return copied[0]


def _in_own_pages(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not begin with a page, or is not contiguous on the CPU."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.data_ptr() % mmap.PAGESIZE == 0:
        return tensor
    return own_pages(tuple(tensor.shape), tensor.dtype).copy_(tensor)
