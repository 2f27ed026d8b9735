"""Tensors on their way between a GPU and the CPU.

Copies go over page-locked ("pinned") memory of PyTorch's caching host allocator, on the current stream and without
blocking. The allocator gives memory to nobody else before the copies from and to it are done, so nothing is allocated
from the system after the first steps and nothing is overwritten in flight. A dtype is converted on the GPU, which is
faster there and halves what crosses the bus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """One flat tensor of them all, if they lie one after the other in one memory; else they themselves."""
    first, at = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        if (
            tensor.storage_offset() != at
            or tensor.dtype != first.dtype
            or not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return tensors
        at += tensor.numel()
    return (first.as_strided((at - first.storage_offset(),), (1,)),)


def apart(flat: Tensor, sizes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Views of a flat tensor, one after the other, of these sizes."""
    pieces = flat.split([math.prod(size) for size in sizes])
    return tuple(piece.view(tuple(size)) for piece, size in zip(pieces, sizes, strict=True))


def host_empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """CPU memory, pinned where this process uses a GPU: on the CPU whatever torch.set_default_device says."""
    return torch.empty(tuple(size), dtype=dtype, device="cpu", pin_memory=torch.cuda.is_initialized())


def pin(parameter: torch.nn.Parameter) -> None:
    """Move a parameter's values from the CPU's ordinary memory to pinned memory. Views and memory that processes share
    are left alone; tensors made of `parameter.data` before keep the old memory."""
    data = parameter.data
    whole = data.device.type == "cpu" and data.nbytes == data.untyped_storage().nbytes() and not data.is_shared()
    if whole and not data.is_pinned():
        parameter.data = host_empty(data.shape, data.dtype).copy_(data)


class Arriving:
    """Tensors that are being copied to the CPU: not to be read before `wait`."""

    def __init__(self, tensors: tuple[Tensor, ...], event: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._event = event

    @property
    def here(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, contiguous, once all of them have arrived."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors


def to_host(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], into: Sequence[Tensor] = ()) -> Arriving:
    """Start copying tensors to the CPU, each in its new dtype: one wait for all, and none if they are there already.

    Args:
        tensors: Of one device, or some of them on the CPU.
        dtypes: Of each.
        into: Contiguous tensors of these sizes and dtypes that they are copied to, in place of new memory.
    """
    arrived: list[Tensor] = []
    device: torch.device | None = None
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        source = tensor.detach()
        if not source.is_cuda:
            arrived.append(into[i].copy_(source) if into else source.to("cpu", dtype).contiguous())
            continue
        device = source.device
        source = source.to(dtype).contiguous()
        there = into[i] if into else torch.empty(source.shape, dtype=dtype, device="cpu", pin_memory=True)
        arrived.append(there.copy_(source, non_blocking=True))
    event = None
    if device is not None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    return Arriving(tuple(arrived), event)


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device` in `dtype` (None keeps its own); to a GPU without waiting for the copy.

    From pinned memory that its owner writes to again, `wait_until_read` tells the owner when it may.
    """
    dtype = dtype or tensor.dtype
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, dtype)
    source = tensor
    if not tensor.is_pinned():  # a copy from pageable memory would block
        narrow = dtype if dtype.itemsize < tensor.dtype.itemsize else tensor.dtype
        source = torch.empty(tensor.shape, dtype=narrow, device="cpu", pin_memory=True).copy_(tensor)
    moved = source.to(device, non_blocking=True)
    if source is tensor:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        tensor._kt_read = event  # type: ignore[attr-defined]
    return moved.to(dtype)


def wait_until_read(tensors: Sequence[Tensor]) -> None:
    """Wait for the copies that `to_device` has begun from these very tensors."""
    for tensor in tensors:
        event = getattr(tensor, "_kt_read", None)
        if event is not None:
            event.synchronize()
            tensor._kt_read = None  # type: ignore[attr-defined]
