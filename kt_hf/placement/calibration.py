"""Measures what the planner goes by: the bus, the CPU and the GPU, on a few experts that are thrown away."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import CALL_LOCK, KEPT, ExpertsBackend, ExpertWeights, build_backend, most_tokens
from ..backends.build_tiered import build_tiered
from ..backends.gpu.grouped_mm import aligned
from ..backends.gpu.pinned_weights import lock_pages, unlock_pages
from ..backends.gpu.resident import gpu_backend
from ..backends.gpu.warm_up import warm_up
from ..backends.gpu.weight_stream import Streamer
from ..errors import KTAMXError
from ..shapes import ExpertShape, expert_bytes
from ..system.cpu import ThreadPlan
from .machine_rates import LinearCost, MachineRates

logger = logging.getLogger(__name__)
_COPY_BYTES = 256 * 2**20
_RANK = 8
_LAYER_BYTES = 2**30  # of experts on the CPU: more than its cache, which would make them look faster than they are
_EXPERTS = 16  # at least on the CPU, if the layer has as many; at most on the GPU
_BESIDE = 2  # experts in each of the other tiers
_SHORT, _LEAST, _MOST = 128, 1024, 4096  # tokens of the calls that are timed: few, and as the run's within bounds
_GPU_TOKENS = 4096
_LONG = 1.0  # s; a slower call is timed once


def measure_rates(
    shape: ExpertShape,
    device: torch.device,
    plan: ThreadPlan,
    backend: str = "AMXBF16",
    tokens: int = _MOST,
    copy_bytes: int = _COPY_BYTES,
    gpu_tokens: int = _GPU_TOKENS,
) -> MachineRates:
    """Measure the machine's rates once, in a few seconds.

    Args:
        shape: Sizes of a layer of the model.
        device: The GPU.
        plan: Worker threads of the operators.
        backend: What computes experts on the CPU.
        tokens: Tokens of the run's forwards; no more than 4,096 are timed.
        copy_bytes: How many bytes are copied to the GPU to time the bus.
        gpu_tokens: Tokens of the calls that time the GPU.
    """
    K, H, I = shape.top_k, shape.hidden_size, shape.intermediate_size  # noqa: E741
    E, fitting = shape.num_experts, _LAYER_BYTES // expert_bytes(shape)
    count = max(2 * K, min(E, max(_EXPERTS, fitting)))
    alone, layer = (ExpertShape(n, K, H, I) for n in (count, count + 2 * _BESIDE))
    longest = min(max(tokens, _LEAST), _MOST, most_tokens(alone))  # the operators refuse more than memory holds
    lengths = min(_SHORT, longest), longest
    with CALL_LOCK, torch.no_grad():
        pcie = copy_rate(device, copy_bytes)
        warm_up(shape, device, _RANK)
        kept = KEPT.packed
        packed = build_backend(backend, _weights(alone), alone, _RANK, plan, max(lengths), False, True, "a measurement")
        KEPT.packed = kept  # a measurement is no model, of which a later one is warned

        def lines(resident: range, streamed: range, packed: ExpertsBackend = packed) -> tuple[LinearCost, LinearCost]:
            weights, streamer = _weights(layer), Streamer(device)
            tiered = build_tiered(weights, layer, resident, streamed, streamer, torch.bfloat16, lambda *_: packed)
            return _lines(tiered, range(2 * _BESIDE, layer.num_experts), streamed, lengths)

        quiet = lines(range(2 * _BESIDE), range(0))
        beside = lines(range(_BESIDE), range(_BESIDE, 2 * _BESIDE)) if pcie and aligned(shape) else quiet
        del lines, packed
        small = ExpertShape(max(K, min(E, _EXPERTS, fitting)), K, H, I)
        on_gpu = gpu_backend(_moved(_weights(small), device), small)
        ids = _ids(gpu_tokens, K, range(small.num_experts))
        seconds = _times(on_gpu, _random((gpu_tokens, H)), ids)
        forward, backward = (ids.numel() / each for each in seconds)
    rates = MachineRates(pcie, *quiet, *beside, forward, backward, gpu_bytes_per_s=memory_rate(device, copy_bytes))
    logger.info("kt_hf: measured %s", rates)
    return rates


def _weights(shape: ExpertShape) -> ExpertWeights:
    """Weights of random experts, all alike."""
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    gate_up, down = (_random(size).mul_(0.02).expand(E, *size).contiguous() for size in ((2 * I, H), (H, I)))
    return ExpertWeights(gate_up, down)


def _random(size: tuple[int, ...]) -> Tensor:
    """bf16 on the CPU. The process's own random numbers are left alone."""
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(0), device="cpu").bfloat16()


def _even(ids: Tensor) -> Tensor:
    """Routing weights [T, K] for these ids, all alike."""
    return torch.full(ids.shape, 1 / ids.shape[1], device="cpu")


def _moved(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    return ExpertWeights(weights.gate_up.to(device), weights.down.to(device))


def _ids(tokens: int, top_k: int, used: range) -> Tensor:
    """[T, K]: each token's own experts, by chance."""
    chance = torch.rand(tokens, len(used), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return used.start + chance.topk(top_k, dim=1).indices


def _lines(
    tiered: ExpertsBackend, on_cpu: range, streamed: range, tokens: Sequence[int]
) -> tuple[LinearCost, LinearCost]:
    """The cost of the experts on the CPU, forward and backward, by least squares.

    Over lengths, numbers of experts used, and tokens that no expert gets. With `streamed` every second choice is one of
    these experts.
    """
    K = tiered.shape.top_k
    points, seconds = [], []
    few = on_cpu[: max(K, len(on_cpu) // 4)]
    for T, used, idle in itertools.product(tokens, (on_cpu, few), (0, 2)):
        ids = _ids(T, K, used)
        if streamed:
            ids.view(-1)[1::2] = streamed.start + torch.arange(ids.numel() // 2, device="cpu") % len(streamed)
        ids[: T * idle // 3] = -1
        seconds.append(_times(tiered, _random((T, tiered.shape.hidden_size)), ids))
        cpu_ids = ids[ids >= on_cpu.start]
        points.append([1.0, float(T), float(cpu_ids.unique().numel()), float(cpu_ids.numel())])
    forward, backward = zip(*seconds, strict=True)
    return fitted(points, forward), fitted(points, backward)


def fitted(points: Sequence[Sequence[float]], seconds: Sequence[float]) -> LinearCost:
    """The linear cost through measured points, without negative terms: what would be one is left out.

    Args:
        points: (1, tokens, experts, rows) of each measurement.
        seconds: What each took.
    """
    kept = [0, 1, 2, 3]
    a, b = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (points, seconds))
    while True:
        scale = a[:, kept].amax(0)
        terms = torch.linalg.lstsq(a[:, kept] / scale, b.unsqueeze(1), driver="gelsd").solution[:, 0] / scale
        if len(kept) == 1 or bool((terms >= 0).all()):
            break
        kept.pop(int(terms.argmin()))
    by_index = dict(zip(kept, terms.clamp(min=0).tolist(), strict=True))
    return LinearCost(*(by_index.get(i, 0.0) for i in range(4)))


def _times(backend: ExpertsBackend, x: Tensor, ids: Tensor) -> tuple[float, float]:
    """The median seconds of a forward and of a backward, of three at most."""
    x, ids, weights = (tensor.to(backend.device) for tensor in (x.to(backend.dtype), ids, _even(ids)))
    backend.set_lora(tuple(torch.full(size, 0.01, device=x.device) for size in backend.shape.lora_shapes(_RANK)))
    seconds: list[tuple[float, float]] = []
    before = torch.get_num_threads()
    if backend.torch_threads is not None:  # as in training
        torch.set_num_threads(min(before, backend.torch_threads))
    try:
        while len(seconds) < 3 and sum(map(sum, seconds)) < _LONG:
            seconds.append(timed_once(backend, x, ids, weights, x))
    finally:
        torch.set_num_threads(before)
    forward, backward = zip(*seconds, strict=True)
    return statistics.median(forward), statistics.median(backward)


def timed_once(
    backend: ExpertsBackend, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor
) -> tuple[float, float]:
    """Seconds of a forward and of its backward, with what they launched on a GPU.

    Args:
        backend: What computes.
        x: [T, H], in the backend's dtype and on its device, as the others are.
        ids: [T, K] integers.
        weights: [T, K], float32.
        grad_output: [T, H].
    """
    done: Callable[[], None] = torch.cuda.synchronize if x.is_cuda else lambda: None
    done()
    begin = time.perf_counter()
    _, saved = backend.forward(x, ids, weights, save=True)
    done()
    middle = time.perf_counter()
    assert saved is not None
    backend.backward(saved, grad_output)
    done()
    return middle - begin, time.perf_counter() - middle


def copy_rate(device: torch.device, size: int = _COPY_BYTES) -> float:
    """Bytes a second to a GPU from page-locked memory; from ordinary memory where the system refuses to lock it.

    Args:
        device: The GPU.
        size: Bytes that are copied, three times.
    """
    source = torch.ones(size, dtype=torch.uint8, device="cpu")  # written to, so that its pages are there
    target = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        locked = lock_pages(source)
    except KTAMXError:  # layers will meet with the same, which is logged then
        locked = False
    try:
        return size / min(_copy_seconds(source, target) for _ in range(3))
    finally:
        if locked:
            unlock_pages(source)


def memory_rate(device: torch.device, size: int = _COPY_BYTES) -> float:
    """Bytes a second of a copy within a GPU's memory, those that are read and those that are written.

    Args:
        device: The GPU.
        size: Bytes that are copied, three times.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_copy_seconds(source, target) for _ in range(3))


def _copy_seconds(source: Tensor, target: Tensor) -> float:
    done: Callable[[], None] = torch.cuda.synchronize if target.is_cuda else lambda: None
    done()
    begin = time.perf_counter()
    target.copy_(source, non_blocking=True)
    done()
    return time.perf_counter() - begin
