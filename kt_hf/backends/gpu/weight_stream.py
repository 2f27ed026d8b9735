"""Weights on their way to the GPU, chunk after chunk, through a few buffers that all layers of a model share.

Copies are launched on a CUDA stream for copies alone, as far ahead of the products as there are buffers. One event
makes the products wait until a chunk has arrived, another makes the copies wait until a buffer is free. The host waits
for neither.

When a layer is done, the copies of the first chunks of the layers expected next begin, so that they travel while
attention is computed, and layers whose weights the GPU holds already. Expected is the step that came after the last two
steps the time before. (Two, because after a layer's forward that checkpointing computes again comes its backward, and
not the next layer's forward.) A wrong guess costs the time of its copies.

Weights of 4 and 8 bits are copied as they are: a quarter or half of the bytes. They are widened to bf16 on the GPU,
into new memory, and their buffer is free at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..transfer import runs
from .pinned_weights import HostWeights

CHUNK_BYTES = 256 * 2**20  # of a chunk of bf16
BUFFERS = 3  # chunks on the device at a time


class Loaded(NamedTuple):
    """A chunk of a layer's weights on the device that computes, in bf16.

    Attributes:
        experts: The consecutive experts of the chunk, n of them.
        gate_up: [n, 2I, H]; undefined for experts without rows.
        down: [n, H, I]; likewise.
    """

    experts: slice
    gate_up: Tensor
    down: Tensor


class _Step(NamedTuple):
    """One direction of one layer: the unit of work whose order is remembered."""

    weights: int  # id() of the layer's HostWeights
    backward: bool


@dataclass
class _Buffer:
    memory: Tensor  # bytes
    ready: torch.cuda.Event | None
    free: torch.cuda.Event | None


@dataclass
class _Coming:
    """A chunk that is being copied to a buffer.

    Attributes:
        weights: The layer's weights.
        experts: The consecutive experts that the buffer has room for.
        buffer: The buffer.
        views: Its parts, each of the dtype and sizes of one of `weights.tensors`.
        filled: The experts whose copies have been launched.
    """

    weights: HostWeights
    experts: slice
    buffer: _Buffer
    views: list[Tensor]
    filled: set[int]


class Streamer:
    """Copies chunks of experts' weights to a device, in any order of layers. One for all layers of a model.

    Args:
        device: A GPU; or the CPU, where the weights are used in place.
        chunk_bytes: Size in bytes of a chunk as it is multiplied, in bf16; a chunk has one expert at least.
        buffers: Chunks on the device at a time.
        copies: Whether weights are copied to buffers; None means if the device is a GPU.
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
        """The weights of a layer's experts that have rows, a chunk at a time.

        A chunk must be used on the current CUDA stream, and let go, before the next is asked for.

        Args:
            weights: The layer's weights in host memory.
            rows: The number of rows of each of its experts.
            backward: The direction, by which the next step is guessed.
        """
        active = weights.all_experts if all(rows) else [e for e, count in enumerate(rows) if count]
        self.passed(weights, active, backward)
        if weights.resident is not None or not self._copies:
            tensors = weights.resident or weights.tensors
            for experts, _ in self._split(weights, active):
                yield Loaded(experts, *weights.products_of([tensor[experts] for tensor in tensors]))
            return
        self._make_buffers(weights)
        yield from self._through_buffers(weights, active)
        if sum(rows) >= weights.num_experts:  # fewer rows, of a decoded token, will be of other experts next time
            self._send_ahead()

    @contextlib.contextmanager
    def chosen(self, weights: HostWeights, experts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """gate_up [n, 2I, H] and down [n, H, I] of n experts in bf16, for use in this context on the current stream.

        For a token alone, from which nothing can be guessed: what comes next is remembered of longer passes only.

        Args:
            weights: The layer's weights in host memory.
            experts: In the order of the result; not more than `most_chosen`.
        """
        if not self._copies:
            yield weights.chosen(torch.tensor(experts, device="cpu"))
            return
        self._make_buffers(weights)
        self._sent_for(weights, ())  # what was sent ahead is not what a token needs: its buffers are free
        coming = self._taken(weights, slice(0, len(experts)))
        try:
            self._launch(coming, [(e, e + 1, i) for i, e in enumerate(experts)])
            loaded = self._arrived(coming)
            yield loaded.gate_up, loaded.down
        finally:
            self._give_back(coming)

    def most_chosen(self, weights: HostWeights) -> int:
        """How many experts of a layer a buffer has room for."""
        return self._experts_in_a_chunk(weights)

    def passed(self, weights: HostWeights, active: list[int], backward: bool) -> None:
        """Remember the order of steps, those of layers that need no copies among them.

        Args:
            weights: Of the layer that is computed now.
            active: Its experts that have rows; [] if that is not known.
            backward: The direction.
        """
        step = _Step(id(weights), backward)
        self._known[step] = weights, active or self._known.get(step, (weights, active))[1]
        if self._last:
            self._next[self._last] = step
        self._last = (self._last[1] if self._last else None), step

    def _through_buffers(self, weights: HostWeights, active: list[int]) -> Iterator[Loaded]:
        chunks = deque(self._split(weights, active))
        sent = self._sent_for(weights, chunks)
        pending: deque[_Coming] = deque()

        def send_for_more() -> None:
            while chunks and (chunks[0][0].start in sent or self._idle):
                experts, numbers = chunks.popleft()
                at = experts.start
                coming = sent.pop(at) if at in sent else self._taken(weights, experts)
                pending.append(coming)
                self._fill(coming, numbers)

        try:
            while chunks or pending:
                if not (pending or self._idle or chunks[0][0].start in sent):
                    early = self._ahead.pop() if self._ahead else sent.popitem()[1]
                    self._idle.append(early.buffer)
                send_for_more()
                loaded = self._arrived(pending[0])
                if weights.packed:  # the buffer is free before the products
                    self._give_back(pending.popleft())
                    send_for_more()
                    yield loaded
                else:
                    yield loaded
                    self._give_back(pending.popleft())
                del loaded  # before the next is made bf16: there is room for one
        finally:  # an error of whoever computes leaves the buffers to the next
            for coming in (*pending, *sent.values()):
                self._give_back(coming)

    def _sent_for(self, weights: HostWeights, chunks: Iterable[tuple[slice, list[int]]]) -> dict[int, _Coming]:
        """Chunks of this layer that were sent for ahead, by their first expert.

        Those of other layers stay ahead if the guess was right so far; else their buffers are idle again.
        """
        wanted = [experts for experts, _ in chunks]
        sent = {c.experts.start: c for c in self._ahead if c.weights is weights and c.experts in wanted}
        others = [c for c in self._ahead if sent.get(c.experts.start) is not c]
        self._ahead.clear()
        for coming in others:
            if sent and coming.weights is not weights and coming.weights.resident is None:
                self._ahead.append(coming)
            else:
                self._idle.append(coming.buffer)
        return sent

    def _send_ahead(self) -> None:
        """Begin to copy what is expected next, past layers that the GPU holds, as far as there are buffers."""
        last, begun = self._last, {(id(coming.weights), coming.experts.start) for coming in self._ahead}
        for _ in self._known:
            step = self._next.get(last) if last else None
            if step is None or not self._idle:
                return
            weights, active = self._known[step]
            last = last and (last[1], step)
            for experts, numbers in self._split(weights, active) if weights.resident is None else ():
                if not self._idle:
                    return
                if (step.weights, experts.start) in begun:
                    continue
                begun.add((step.weights, experts.start))
                coming = self._taken(weights, experts)
                self._ahead.append(coming)
                self._fill(coming, numbers)

    def _split(self, weights: HostWeights, active: list[int]) -> list[tuple[slice, list[int]]]:
        """(experts of a chunk, those of them that have rows), of chunks where any expert has rows.

        Which experts make a chunk depends on the layer's sizes alone.
        """
        size, count, chunks = self._experts_in_a_chunk(weights), weights.num_experts, dict[int, list[int]]()
        if len(active) == count:  # the usual case, as fast as can be: the GPU may be waiting
            return [(slice(at, min(at + size, count)), active[at : at + size]) for at in range(0, count, size)]
        for e in active:
            chunks.setdefault(e // size * size, []).append(e)
        return [(slice(first, min(first + size, count)), chunks[first]) for first in sorted(chunks)]

    def in_one_chunk(self, weights: HostWeights) -> bool:
        """Whether all experts of a layer are one chunk."""
        return self._experts_in_a_chunk(weights) == weights.num_experts

    def _experts_in_a_chunk(self, weights: HostWeights) -> int:
        return min(max(1, self._chunk_bytes // weights.expert_bytes), weights.num_experts)

    def _make_buffers(self, weights: HostWeights) -> None:
        needed = self._spans_of(weights, self._experts_in_a_chunk(weights))[-1].stop
        if self._buffers and self._buffers[0].memory.numel() >= needed:
            return
        if self._buffers and self._stream:
            self._stream.synchronize()  # the old ones go; once a model, where layers are of different sizes
        # Anew even after running out of memory half-way.
        self._ahead.clear()
        self._idle.clear()
        self._buffers = []
        buffers: list[_Buffer] = []
        for _ in range(self._count):
            memory = torch.empty(needed, dtype=torch.uint8, device=self.device)
            buffer = _Buffer(memory, None, None)
            if self._stream:
                memory.record_stream(self._stream)  # a copy may be under way when the model is deleted
                buffer.ready, buffer.free = torch.cuda.Event(), torch.cuda.Event()
            self._now_free(buffer)
            buffers.append(buffer)
        self._buffers, self._idle = buffers, deque(buffers)

    def _taken(self, weights: HostWeights, experts: slice) -> _Coming:
        buffer = self._idle.popleft()
        if self._stream:
            assert buffer.free
            self._stream.wait_event(buffer.free)
        return _Coming(weights, experts, buffer, self._views(weights, experts, buffer), set())

    def _fill(self, coming: _Coming, numbers: list[int]) -> None:
        """Launch the copies of those of the experts `numbers` that are not in the buffer yet."""
        missing = [e for e in numbers if e not in coming.filled] if coming.filled else numbers
        if not missing:
            return
        coming.filled.update(missing)
        self._launch(coming, [(first, last, first - coming.experts.start) for first, last, _ in runs(missing)])

    def _launch(self, coming: _Coming, pieces: Iterable[tuple[int, int, int]]) -> None:
        """Launch copies: (first expert, the one after the last, where the first goes in the buffer) of each piece."""
        begin = self._mark()
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for first, last, at in pieces:
                for source, target in zip(coming.weights.tensors, coming.views, strict=True):
                    self._copy(source[first:last], target[at : at + last - first])
        end = self._mark()
        if begin and end and self._spans is not None:
            self._spans.append((begin, end))
        if self._stream:
            assert coming.buffer.ready
            coming.buffer.ready.record(self._stream)

    def watch(self) -> None:
        """Begin to measure the time that copies take, for `watched`."""
        self._spans = []

    def watched(self) -> float:
        """Seconds that copies took since `watch`, 0 if there were none. Waits for them, and ends the measurement."""
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

    def _spans_of(self, weights: HostWeights, count: int) -> list[slice]:
        """The bytes of a buffer that `count` experts of each tensor take; each span begins at a multiple of 16."""
        spans, end = [], 0
        for one in weights.one_expert:
            spans.append(slice(end, end + count * one))
            end += -(-count * one // 16) * 16
        return spans

    def _views(self, weights: HostWeights, experts: slice, buffer: _Buffer) -> list[Tensor]:
        count = experts.stop - experts.start
        spans = zip(weights.tensors, self._spans_of(weights, count), strict=True)
        return [buffer.memory[at].view(tensor.dtype).view(count, *tensor.shape[1:]) for tensor, at in spans]

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
