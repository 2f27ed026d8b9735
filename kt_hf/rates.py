"""Measuring what the planner goes by: the bus, a layer's part on the CPU, and the GPU, on a few experts that are thrown
away."""

from __future__ import annotations

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
_LONG = 1.0  # seconds, after which a measurement is not repeated
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

    with CALL_LOCK, torch.no_grad():
        split = pack_split(_weights(small), small, resident, [], Streamer(device), torch.bfloat16, on_cpu)
        forward, backward = _lines(split, resident, tokens)
        del split
        on_gpu = gpu_backend(_moved(_weights(small), device), small)
        x, ids = _inputs(small, gpu_tokens, range(count))
        gpu_forward, gpu_backward = (
            gpu_tokens * shape.top_k / seconds for seconds in _times(on_gpu, x.to(on_gpu.dtype), ids)
        )
        rates = Rates(_copy_rate(device, copy_bytes), forward, backward, gpu_forward, gpu_backward)
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


def _lines(split: ExpertsBackend, resident: range, tokens: Sequence[int]) -> list[Line]:
    """The model of the part on the CPU, forward and backward, by least squares over lengths, numbers of experts used,
    and tokens that are for none of them."""
    shape, first = split.shape, len(resident)
    points, seconds = [], []
    few = range(first, first + shape.top_k)
    for T, used, idle in itertools.product(tokens, {range(first, shape.num_experts), few}, (0, 2)):
        x, ids = _inputs(shape, T, used)
        ids[: T * idle // 3] = -1
        seconds.append(_times(split, x.to(split.dtype), ids))
        points.append([1.0, float(T), float(len(used)), float((ids >= 0).sum())])
    return [fitted(points, [pair[direction] for pair in seconds]) for direction in (0, 1)]


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


def _times(backend: ExpertsBackend, x: Tensor, ids: Tensor) -> tuple[float, float]:
    """The best seconds of a forward and of a backward, of three at most."""
    x, ids, weights = (tensor.to(backend.device) for tensor in (x, ids, _even(ids)))
    backend.set_lora(tuple(torch.full(size, 0.01, device=x.device) for size in backend.shape.lora_shapes(_RANK)))
    done: Callable[[], None] = torch.cuda.synchronize if x.is_cuda else lambda: None
    found: list[tuple[float, float]] = []
    before = torch.get_num_threads()
    if backend.own_threads:  # as in training
        torch.set_num_threads(1)
    try:
        while len(found) < 3 and sum(map(sum, found)) < _LONG:
            done()
            begin = time.perf_counter()
            _, saved = backend.forward(x, ids, weights, save=True)
            done()
            middle = time.perf_counter()
            assert saved is not None
            backend.backward(saved, x)
            done()
            found.append((middle - begin, time.perf_counter() - middle))
    finally:
        torch.set_num_threads(before)
    return min(f for f, _ in found), min(b for _, b in found)


def _copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second from page-locked memory; 0 where memory cannot be locked."""
    source = torch.ones(size, dtype=torch.uint8, device="cpu")  # written to, so that its pages are there
    target = torch.empty(size, dtype=torch.uint8, device=device)
    done: Callable[[], None] = torch.cuda.synchronize if target.is_cuda else lambda: None
    try:
        locked = lock_pages(source)
    except KTAMXError as error:
        logger.warning("kt_hf: experts cannot be streamed, so none are planned to be: %s", error)
        return 0.0
    best = float("inf")
    try:
        for _ in range(3):
            done()
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            done()
            best = min(best, time.perf_counter() - begin)
    finally:
        if locked:
            unlock_pages(source)
    return size / best
