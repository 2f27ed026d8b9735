"""Measuring what the planner goes by: the bus, a layer's part on the CPU, and the GPU, on a few experts that are thrown
away."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backends import CALL_LOCK, ExpertsBackend, ExpertShape, ExpertWeights, pack
from .backends.host_weights import lock_pages, unlock_pages
from .backends.split_pack import pack_split
from .backends.streamer import Streamer
from .backends.torch_cuda import gpu_backend
from .cpu import ThreadPlan
from .errors import KTAMXError
from .planner import Line, Rates

logger = logging.getLogger(__name__)
_COPY_BYTES = 256 * 2**20
_RANK = 8
_EXPERTS = 16  # of the small layer, more where tokens are sent to more
_TOKENS = (128, 2048)
_LONG, _FIRST = 1.0, 0.1  # seconds: a measurement of so many is not repeated; how long the first may take
_GPU_TOKENS = 4096


def measure_rates(
    shape: ExpertShape,
    device: torch.device,
    plan: ThreadPlan,
    backend: str = "AMXBF16",
    tokens: Sequence[int] = _TOKENS,
    copy_bytes: int = _COPY_BYTES,
    gpu_tokens: int = _GPU_TOKENS,
) -> Rates:
    """Measure once, in a few seconds.

    Args:
        shape: Of a layer of the model.
        device: The GPU.
        plan: Worker threads of the operators.
        backend: What computes experts on the CPU.
        tokens: Of the calls that are timed.
        copy_bytes: That are copied to the GPU.
        gpu_tokens: Of the GPU's calls.
    """
    count = min(shape.num_experts, max(_EXPERTS, 2 * shape.top_k))
    small = ExpertShape(count, shape.top_k, shape.hidden_size, shape.intermediate_size)
    resident = range(count - max(shape.top_k, count // 2))  # the others on the CPU, of which a token needs so many

    def on_cpu(weights: ExpertWeights, shape: ExpertShape) -> ExpertsBackend:
        return pack(backend, weights, shape, _RANK, plan, max(tokens), False, True, "a measurement")

    with CALL_LOCK, torch.no_grad(), _Bus(device, copy_bytes) as bus:
        split = pack_split(_weights(small), small, resident, [], Streamer(device), torch.bfloat16, on_cpu)
        quiet = _lines(split, resident, tokens, None)
        busy = _lines(split, resident, tokens, bus) if bus.bytes_per_s else quiet
        del split
        on_gpu = gpu_backend(_moved(_weights(small), device), small)
        x, ids = _inputs(small, gpu_tokens, range(count))
        forward, backward = (gpu_tokens * shape.top_k / took for took in _times(on_gpu, x.to(on_gpu.dtype), ids, None))
        rates = Rates(bus.bytes_per_s, *quiet, *busy, forward, backward)
    logger.info("kt_hf: measured %s", rates)
    return rates


def _weights(shape: ExpertShape) -> ExpertWeights:
    """One random expert, as often as asked."""
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    gate_up, down = (_random(size).mul_(0.02).expand(E, *size).contiguous() for size in ((2 * I, H), (H, I)))
    return ExpertWeights(gate_up, down)


def _random(size: tuple[int, ...]) -> Tensor:
    """bf16 on the CPU. The process's own random numbers are left alone."""
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(0), device="cpu").bfloat16()


def _even(ids: Tensor) -> Tensor:
    """Routing weights for them, all alike."""
    return torch.full(ids.shape, 1 / ids.shape[1], device="cpu")


def _moved(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    return ExpertWeights(weights.gate_up.to(device), weights.down.to(device))


def _inputs(shape: ExpertShape, tokens: int, used: range) -> tuple[Tensor, Tensor]:
    """Hidden states, and ids that use these experts evenly."""
    ids = used.start + torch.arange(tokens * shape.top_k, device="cpu") % len(used)
    return _random((tokens, shape.hidden_size)), ids.view(tokens, shape.top_k)


def _lines(split: ExpertsBackend, resident: range, tokens: Sequence[int], bus: _Bus | None) -> tuple[Line, Line]:
    """The model of the part on the CPU, forward and backward, by least squares over lengths, numbers of experts used,
    and tokens that are for none of them; with `bus` while that is busy."""
    shape, first = split.shape, len(resident)
    points, seconds = [], []
    few = range(first, first + shape.top_k)
    for T, used, idle in itertools.product(tokens, {range(first, shape.num_experts), few}, (0, 2)):
        x, ids = _inputs(shape, T, used)
        ids[: T * idle // 3] = -1
        seconds.append(_times(split, x.to(split.dtype), ids, bus))
        points.append([1.0, float(T), float(len(used)), float((ids >= 0).sum())])
    forward, backward = zip(*seconds, strict=True)
    return fitted(points, forward), fitted(points, backward)


def fitted(points: Sequence[Sequence[float]], seconds: Sequence[float]) -> Line:
    """The line through measured points (1, tokens, experts, rows), without negative terms: what would be one is left
    out."""
    kept = [0, 1, 2, 3]
    a, b = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (points, seconds))
    while True:
        scale = a[:, kept].amax(0)
        found = torch.linalg.lstsq(a[:, kept] / scale, b.unsqueeze(1), driver="gelsd").solution[:, 0] / scale
        if len(kept) == 1 or bool((found >= 0).all()):
            break
        kept.pop(int(found.argmin()))
    terms = dict(zip(kept, found.clamp(min=0).tolist(), strict=True))
    return Line(*(terms.get(i, 0.0) for i in range(4)))


def _times(backend: ExpertsBackend, x: Tensor, ids: Tensor, bus: _Bus | None) -> tuple[float, float]:
    """The best seconds of a forward and of a backward, of three at most."""
    x, ids, weights = (tensor.to(backend.device) for tensor in (x, ids, _even(ids)))
    backend.set_lora(tuple(torch.full(size, 0.01, device=x.device) for size in backend.shape.lora_shapes(_RANK)))
    done: Callable[[], None] = torch.cuda.current_stream(x.device).synchronize if x.is_cuda else lambda: None
    found: list[tuple[float, float]] = []
    before = torch.get_num_threads()
    if backend.own_threads:  # as in training
        torch.set_num_threads(1)
    try:
        while len(found) < 3 and sum(map(sum, found)) < _LONG:
            if bus:
                bus.keep_busy(sum(found[-1]) if found else _FIRST)
            done()
            begin = time.perf_counter()
            _, saved = backend.forward(x, ids, weights, save=True)
            done()
            middle = time.perf_counter()
            assert saved is not None
            backend.backward(saved, x)
            done()
            found.append((middle - begin, time.perf_counter() - middle))
            if bus:
                bus.wait()
    finally:
        torch.set_num_threads(before)
    return min(f for f, _ in found), min(b for _, b in found)


class _Bus:
    """Copies from page-locked memory to the GPU, beside its other work.

    Attributes:
        bytes_per_s: Measured; 0 where memory cannot be locked.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._source = torch.ones(size, dtype=torch.uint8, device="cpu")  # written to, so that its pages are there
        self._target = torch.empty(size, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._locked = False
        self.bytes_per_s = 0.0

    def __enter__(self) -> _Bus:
        try:
            self._locked = lock_pages(self._source)
        except KTAMXError as error:
            logger.warning("kt_hf: experts cannot be streamed, so none are planned to be: %s", error)
            return self
        self.bytes_per_s = self._measured()
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._locked:
            unlock_pages(self._source)

    def _measured(self) -> float:
        best = float("inf")
        for _ in range(3):
            self.wait()
            begin = time.perf_counter()
            self._copy()
            self.wait()
            best = min(best, time.perf_counter() - begin)
        return self._source.nbytes / best

    def keep_busy(self, seconds: float) -> None:
        """Copy for about so long; nothing waits for it."""
        for _ in range(1 + int(seconds * self.bytes_per_s / self._source.nbytes)):
            self._copy()

    def wait(self) -> None:
        if self._stream:
            self._stream.synchronize()

    def _copy(self) -> None:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            self._target.copy_(self._source, non_blocking=True)
