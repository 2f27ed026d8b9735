"""Weights on their way to the GPU, chunk after chunk, through a few buffers that all layers of a model share.

Copies go over a stream of their own, as far ahead of the products as there are buffers; an event tells the products
that a chunk is there, another the copies that a buffer is free. Nothing waits on the host.

When a layer is done, the first chunks of the one expected next are sent for, so that they travel while attention is
computed. What is expected is what came after the last two layers the time before (two, for where checkpointing computes
a layer's forward again, its backward follows and not the next layer's forward). A wrong guess costs its copies' time.

Weights of 8 bits travel as they are: half the bytes. They are made bf16 where they arrive, in memory of their own, and
leave their buffer at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runs import runs
from .pinned_weights import HostWeights

CHUNK_BYTES = 256 * 2**20
BUFFERS = 3


class Loaded(NamedTuple):
    """A chunk of weights in bf16 where they are computed: gate_up and down of `experts`, only of those with rows
    defined."""

    experts: slice
    gate_up: Tensor
    down: Tensor


class _Step(NamedTuple):
    """What a model's work is made of here: one direction of one layer. Compared by identity of the weights."""

    weights: int
    backward: bool


@dataclass
class _Buffer:
    memory: Tensor  # bytes
    ready: torch.cuda.Event | None
    free: torch.cuda.Event | None


@dataclass
class _Coming:
    """A chunk that is being copied: the buffer's slots are its experts', filled for those in `filled`. `views` are the
    buffer's parts as the weights' tensors are."""

    weights: HostWeights
    experts: slice
    buffer: _Buffer
    views: list[Tensor]
    filled: set[int]


class Streamer:
    """Brings chunks of experts to a device, in any order of layers.

    Args:
        device: A GPU; or the CPU, where the weights are used in place.
        chunk_bytes: Size of a chunk as it is copied, of one expert at least.
        buffers: Chunks on the device at a time.
        copies: Whether weights are copied to buffers; None where the device is a GPU.
    """

    def __init__(
        self, device: torch.device, chunk_bytes: int = CHUNK_BYTES, buffers: int = BUFFERS, copies: bool | None = None
    ) -> None:
        self.device = device
        self._chunk_bytes, self._count = chunk_bytes, buffers
        self._copies = device.type == "cuda" if copies is None else copies
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[_Buffer] = []
        self._idle: deque[_Buffer] = deque()
        self._ahead: deque[_Coming] = deque()  # sent for before they were asked for
        self._known: dict[_Step, tuple[HostWeights, list[int]]] = {}  # the weights, and experts that had rows last time
        self._next: dict[tuple[_Step | None, _Step], _Step] = {}  # after the last two steps
        self._last: tuple[_Step | None, _Step] | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    def chunks(self, weights: HostWeights, rows: Sequence[int], backward: bool) -> Iterator[Loaded]:
        """The experts that have rows, a chunk at a time: used on the current stream, and let go, before the next is
        asked for.

        Args:
            weights: Of a layer.
            rows: How many each of its experts has.
            backward: The direction, for what is expected next.
        """
        active = [e for e, count in enumerate(rows) if count]
        step = _Step(id(weights), backward)
        self._known[step] = weights, active
        if self._last:
            self._next[self._last] = step
        self._last = (self._last[1] if self._last else None), step
        if not self._copies:
            for experts, _ in self._split(weights, active):
                yield Loaded(experts, *weights.products_of([tensor[experts] for tensor in weights.tensors]))
            return
        self._make_buffers(weights)
        yield from self._through_buffers(weights, active)
        self._send_ahead()

    def _through_buffers(self, weights: HostWeights, active: list[int]) -> Iterator[Loaded]:
        wanted = deque(self._split(weights, active))
        here: dict[int, _Coming] = {}
        for coming in self._ahead:
            if coming.weights is weights and any(coming.experts == experts for experts, _ in wanted):
                here[coming.experts.start] = coming
            else:
                self._idle.append(coming.buffer)
        self._ahead.clear()
        pending: deque[_Coming] = deque()

        def send_for_more() -> None:
            while wanted and (wanted[0][0].start in here or self._idle):
                experts, numbers = wanted.popleft()
                at = experts.start
                coming = here.pop(at) if at in here else self._taken(weights, experts)
                pending.append(coming)
                self._fill(coming, numbers)

        try:
            while wanted or pending:
                if not (pending or self._idle or wanted[0][0].start in here):
                    self._idle.append(here.popitem()[1].buffer)  # sent for too early
                send_for_more()
                loaded = self._arrived(pending[0])
                if weights.scaled:  # the buffer is free before the products
                    self._give_back(pending.popleft())
                    send_for_more()
                    yield loaded
                else:
                    yield loaded
                    self._give_back(pending.popleft())
                del loaded  # before the next is made bf16: there is room for one
        finally:  # an error of whoever computes leaves the buffers to the next
            for coming in (*pending, *here.values()):
                self._give_back(coming)

    def _send_ahead(self) -> None:
        """Begin to copy what is expected next."""
        step = self._next.get(self._last) if self._last else None
        if step is None:
            return
        weights, active = self._known[step]
        for experts, numbers in self._split(weights, active):
            if not self._idle:
                break
            coming = self._taken(weights, experts)
            self._ahead.append(coming)
            self._fill(coming, numbers)

    def _split(self, weights: HostWeights, active: list[int]) -> list[tuple[slice, list[int]]]:
        """(experts of a chunk, those of them that have rows), of chunks where any has; always cut alike."""
        size, found = self._experts_in_a_chunk(weights), dict[int, list[int]]()
        for e in active:
            found.setdefault(e // size * size, []).append(e)
        return [(slice(first, min(first + size, len(weights.down))), found[first]) for first in sorted(found)]

    def _experts_in_a_chunk(self, weights: HostWeights) -> int:
        one = weights.expert_elements * weights.down.element_size()
        return min(max(1, self._chunk_bytes // one), len(weights.down))

    def _make_buffers(self, weights: HostWeights) -> None:
        needed = self._places(weights, self._experts_in_a_chunk(weights))[-1].stop
        if self._buffers and self._buffers[0].memory.numel() >= needed:
            return
        if self._buffers and self._stream:
            self._stream.synchronize()  # the old ones go; once a model, where layers are of different sizes
        # Anew even after running out of memory half-way.
        self._ahead.clear()
        self._idle.clear()
        self._buffers = []
        made: list[_Buffer] = []
        for _ in range(self._count):
            memory = torch.empty(needed, dtype=torch.uint8, device=self.device)
            buffer = _Buffer(memory, None, None)
            if self._stream:
                memory.record_stream(self._stream)  # a copy may be under way when the model is deleted
                buffer.ready, buffer.free = torch.cuda.Event(), torch.cuda.Event()
            self._now_free(buffer)
            made.append(buffer)
        self._buffers, self._idle = made, deque(made)

    def _taken(self, weights: HostWeights, experts: slice) -> _Coming:
        buffer = self._idle.popleft()
        if self._stream:
            assert buffer.free
            self._stream.wait_event(buffer.free)
        return _Coming(weights, experts, buffer, self._views(weights, experts, buffer), set())

    def _fill(self, coming: _Coming, numbers: list[int]) -> None:
        """Copy those of the experts that are not in the buffer yet."""
        missing = [e for e in numbers if e not in coming.filled]
        if not missing:
            return
        coming.filled.update(missing)
        begin = self._mark()
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for first, last, _ in runs(missing):
                for source, target in zip(coming.weights.tensors, coming.views, strict=True):
                    at = slice(first - coming.experts.start, last - coming.experts.start)
                    self._copy(source[first:last], target[at])
        end = self._mark()
        if begin and end and self._spans is not None:
            self._spans.append((begin, end))
        if self._stream:
            assert coming.buffer.ready
            coming.buffer.ready.record(self._stream)

    def watch(self) -> None:
        """Time the copies from now on."""
        self._spans = []

    def watched(self) -> float:
        """Seconds that copies took since `watch`, which ends; 0 where there are none. Waits for them."""
        if self._stream:
            self._stream.synchronize()
        spans, self._spans = self._spans or [], None
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    def _mark(self) -> torch.cuda.Event | None:
        if self._spans is None or self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def _places(self, weights: HostWeights, count: int) -> list[slice]:
        """The bytes of a buffer that each of the tensors takes, of so many experts; each begins where any dtype may."""
        found, end = [], 0
        for tensor in weights.tensors:
            size = count * tensor[0].nbytes
            found.append(slice(end, end + size))
            end += -(-size // 16) * 16
        return found

    def _views(self, weights: HostWeights, experts: slice, buffer: _Buffer) -> list[Tensor]:
        count = experts.stop - experts.start
        places = zip(weights.tensors, self._places(weights, count), strict=True)
        return [buffer.memory[at].view(one.dtype).view(count, *one.shape[1:]) for one, at in places]

    def _arrived(self, coming: _Coming) -> Loaded:
        if coming.buffer.ready:
            torch.cuda.current_stream(self.device).wait_event(coming.buffer.ready)
        return Loaded(coming.experts, *coming.weights.products_of(coming.views))

    def _give_back(self, coming: _Coming) -> None:
        self._now_free(coming.buffer)
        self._idle.append(coming.buffer)

    def _now_free(self, buffer: _Buffer) -> None:
        if buffer.free:
            buffer.free.record(torch.cuda.current_stream(self.device))
