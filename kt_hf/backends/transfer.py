"""Tensors on their way between a GPU and the CPU.

Copies go over page-locked ("pinned") memory of PyTorch's caching host allocator, on the current stream and without
blocking. The allocator gives memory to nobody else before the copies from and to it are done, so nothing is allocated
from the system after the first steps and nothing is overwritten in flight. A dtype is converted on the GPU, which is
faster there and halves what crosses the bus.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

_look_first: ContextVar[Callable[[], object] | None] = ContextVar("look_first", default=None)


def _in_memory(count: int) -> tuple[int, ...]:
    """How LoRA tensors lie in one memory: the A of all projections before the B, which are scaled in one pass."""
    return *range(0, count, 2), *range(1, count, 2)


def split_lora(flat: Tensor, sizes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """LoRA tensors of these sizes, as views of a flat one that has all of their elements.

    Args:
        flat: [the sum of all elements], of any dtype and device.
        sizes: The shapes of the six (four without a gate), in the order of `LORA_NAMES`.
    """
    order = _in_memory(len(sizes))
    pieces = flat.split([math.prod(sizes[i]) for i in order])
    views = {i: piece.view(tuple(sizes[i])) for i, piece in zip(order, pieces, strict=True)}
    return tuple(views[i] for i in range(len(sizes)))


def flat_lora(lora: Sequence[Tensor]) -> Tensor | None:
    """The flat tensor that all LoRA tensors are views of, as `split_lora` makes them; None if they are not."""
    first = lora[0]
    memory, at = first.untyped_storage().data_ptr(), first.storage_offset()
    for i in _in_memory(len(lora)):
        tensor = lora[i]
        if (
            tensor.storage_offset() != at
            or tensor.dtype != first.dtype
            or not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != memory
        ):
            return None
        at += tensor.numel()
    return first.as_strided((at - first.storage_offset(),), (1,))


def lora_b_part(flat: Tensor, lora: Sequence[Tensor]) -> Tensor:
    """The part of `flat` that holds the B of all projections; `lora` are the views that `split_lora` made of it."""
    return flat[sum(tensor.numel() for tensor in lora[::2]) :]


def host_empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of any values on the CPU, whatever torch.set_default_device says; pinned if this process uses a GPU."""
    return torch.empty(tuple(size), dtype=dtype, device="cpu", pin_memory=torch.cuda.is_initialized())


def pin(parameter: torch.nn.Parameter) -> None:
    """Move a parameter's values from the CPU's ordinary memory to pinned memory.

    Views, and memory that processes share, are left alone. Tensors made of `parameter.data` before keep the old memory.
    """
    data = parameter.data
    whole = data.device.type == "cpu" and data.nbytes == data.untyped_storage().nbytes() and not data.is_shared()
    if whole and not data.is_pinned():
        parameter.data = host_empty(data.shape, data.dtype).copy_(data)


@contextlib.contextmanager
def looking_first(look: Callable[[], object]) -> Iterator[None]:
    """While this is open, `look` is called before this thread waits for a GPU in `wait_for`, and may raise.

    What the GPU waits for itself may never come: rows of another process, which has ended or stands still.
    """
    token = _look_first.set(look)
    try:
        yield
    finally:
        _look_first.reset(token)


def wait_for(event: torch.cuda.Event) -> None:
    """Wait until a GPU has come to an event, after what `looking_first` was given."""
    look = _look_first.get()
    if look is not None and not event.query():
        look()
    event.synchronize()


class Arriving:
    """Tensors that are being copied to the CPU: not to be read before `wait`.

    Args:
        tensors: The copies, on the CPU.
        event: Recorded after the last of the copies; None if nothing is under way.
    """

    def __init__(self, tensors: tuple[Tensor, ...], event: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._event = event

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        event = self._event
        return event is None or event.query()

    @property
    def coming(self) -> tuple[Tensor, ...]:
        """The tensors, which may not be read before `wait`."""
        return self._tensors

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, contiguous, once all of them have arrived. Several threads may wait."""
        event = self._event
        if event is not None:
            wait_for(event)
            self._event = None
        return self._tensors


def to_host(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], into: Sequence[Tensor] = (), beside: bool = False
) -> Arriving:
    """Start copying tensors to the CPU, each in a new dtype: one wait for all, and none if no tensor is on a GPU.

    Args:
        tensors: Tensors of one GPU, some or all of them on the CPU already.
        dtypes: The dtype of each copy.
        into: Contiguous CPU tensors of these sizes and dtypes to copy to; () for new memory.
        beside: Copy on a stream for such copies alone, while the current one goes on with what it is given next: for
            large tensors that nobody waits for at once.
    """
    arrived: list[Tensor] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        source = tensor.detach()
        if not source.is_cuda:
            arrived.append(into[i].copy_(source) if into else source.to("cpu", dtype).contiguous())
            continue
        source = source.to(dtype).contiguous()
        target = into[i] if into else torch.empty(source.shape, dtype=dtype, device="cpu", pin_memory=True)
        arrived.append(target)
        copies.append((target, source))
    return Arriving(tuple(arrived), _begin(copies, beside) if copies else None)


def _begin(copies: Sequence[tuple[Tensor, Tensor]], beside: bool) -> torch.cuda.Event:
    """Begin to copy each target's source, of one GPU, to the CPU; the event is recorded after the last copy."""
    device = copies[0][1].device
    current = torch.cuda.current_stream(device)
    stream = _stream_beside(device) if beside else current
    if beside:
        stream.wait_stream(current)
    # The host allocator notes a copy's stream by what is current.
    with torch.cuda.stream(stream) if beside else contextlib.nullcontext():
        for target, source in copies:
            target.copy_(source, non_blocking=True)
            if beside:
                source.record_stream(stream)
        # A thread that waits beside others which compute should sleep.
        event = torch.cuda.Event(blocking=beside)
        event.record(stream)
    return event


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device` in `dtype` (None keeps the tensor's); to a GPU without waiting for the copy.

    An owner of pinned memory who will write to it again calls `track_reads` before and `wait_for_reads` afterwards.
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
        _note_read((tensor,), device)
    return moved.to(dtype)


def lora_to_device(lora: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Copy six LoRA tensors of one dtype from the CPU into one memory on a GPU, without waiting for the copies.

    Args:
        lora: The six tensors, in the order of `LORA_NAMES`.
        device: The GPU.

    Returns:
        Views of one flat tensor on `device`, as `split_lora` makes them.
    """
    sizes, dtype = [tensor.shape for tensor in lora], lora[0].dtype
    count = sum(map(math.prod, sizes))
    if not all(tensor.is_pinned() for tensor in lora):  # a copy from pageable memory would block
        source = host_empty((count,), dtype)
        for target, tensor in zip(split_lora(source, sizes), lora, strict=True):
            target.copy_(tensor)
        return split_lora(source.to(device, non_blocking=True), sizes)
    targets = split_lora(torch.empty(count, dtype=dtype, device=device), sizes)
    for target, tensor in zip(targets, lora, strict=True):
        target.copy_(tensor, non_blocking=True)
    _note_read(lora, device)
    return targets


def track_reads(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Note from now on the copies to a GPU from these very tensors, for `wait_for_reads`; returns the tensors."""
    for tensor in tensors:
        tensor._kt_read = None  # type: ignore[attr-defined]
    return tensors


def _note_read(tensors: Sequence[Tensor], device: torch.device) -> None:
    noted = [tensor for tensor in tensors if hasattr(tensor, "_kt_read")]
    if noted:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        for tensor in noted:
            tensor._kt_read = event


def wait_for_reads(tensors: Sequence[Tensor]) -> None:
    """Wait for the copies to a GPU that have begun from these very tensors, which `track_reads` was given."""
    for tensor in tensors:
        event = getattr(tensor, "_kt_read", None)
        if event is not None:
            wait_for(event)
            tensor._kt_read = None  # type: ignore[attr-defined]


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive numbers, to copy several experts at a time.

    Args:
        numbers: Ascending.

    Yields:
        Of each run: its first number, one past its last, and the index of its first in `numbers`.
    """
    if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:  # mostly; a loop would take its time
        yield numbers[0], numbers[-1] + 1, 0
        return
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], numbers[i - 1] + 1, begin
            begin = i
