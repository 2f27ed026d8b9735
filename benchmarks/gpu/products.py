"""One layer's experts on the GPU: fused kernels on and off, the grouped product of kt_hf beside PyTorch's.

    python benchmarks/gpu products --csv gpu_products.csv
    python benchmarks/gpu products --only sweep                                   # block sizes of the product
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/gpu products --device cpu --shape tiny    # try it without a GPU

A Qwen3-30B and a DeepSeek-V2-Lite layer, LoRA on, tokens routed evenly over all experts. `PyTorch` is without Triton's
kernels, `fused` with them around PyTorch's grouped product, `own` with kt_hf's product too. `host` is how long the
launches take, `of_native` is against `fused`. Then the waits for the GPU that the profiler saw in a layer, and each
kernel beside the same in PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import free_memory, machine, write
from torch import Tensor

from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu import kernels
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.rows import Rows
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.warm_up import warm_up
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.shapes import ExpertShape

SHAPES = {"qwen3-30b": ExpertShape(128, 8, 2048, 768), "deepseek-v2-lite": ExpertShape(64, 6, 2048, 1408)}
TINY = {"tiny": ExpertShape(4, 2, 64, 32)}
WAYS = {"PyTorch": (False, True), "fused": (True, True), "own": (True, False)}  # Triton's kernels, PyTorch's product
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy DtoH", "LaunchKernel")
CANDIDATES = ("128,64,3,4", "128,64,4,4", "128,64,3,8", "128,32,4,4", "128,32,4,8", "256,64,3,8", "256,32,4,8")
PARTS = ("layers", "waits", "kernels", "sweep")


class Clock:
    """Times calls: medians of milliseconds on the device, and on the host for launching."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.cuda, self.rounds = device.type == "cuda", rounds

    def __call__(self, call: Callable[..., Any], *args: Any) -> tuple[float, float]:
        taken = [self._once(call, args) for _ in range(self.rounds + 2)][2:]
        there, host = zip(*taken, strict=True)
        return statistics.median(there), statistics.median(host)

    def _once(self, call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float]:
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        started = time.perf_counter()
        call(*args)
        host = (time.perf_counter() - started) * 1e3
        if not self.cuda:
            return host, host
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host


@contextlib.contextmanager
def computed(way: str) -> Iterator[None]:
    """Experts are computed that way, whatever the device would take."""
    kept, (fused, native) = (kernels.triton_runs, kernels.has_native_grouped_mm), WAYS[way]
    kernels.triton_runs = lambda device: fused  # type: ignore[assignment]
    kernels.has_native_grouped_mm = lambda device: native  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.triton_runs, kernels.has_native_grouped_mm = kept


def drawn(*size: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, scale)


def inputs(shape: ExpertShape, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights; each token's experts by chance, as a balanced model's router spreads them."""
    K, E = shape.top_k, shape.num_experts
    ids = torch.rand(tokens, E, device=device).topk(K, dim=1).indices
    return drawn(tokens, shape.hidden_size, device=device), ids, torch.full((tokens, K), 1 / K, device=device)


def made(shape: ExpertShape, rank: int, device: torch.device) -> dict[str, Any]:
    """The layer resident and streamed, with LoRA."""
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    weights = ExpertWeights(drawn(E, 2 * I, H, device=device, scale=0.02), drawn(E, H, I, device=device, scale=0.02))
    host = HostWeights.copied(ExpertWeights(weights.gate_up.cpu(), weights.down.cpu()), list(range(E)))
    streamed = StreamedBackend(host, shape, Streamer(device))
    backends = {"resident": GroupedBackend(weights, shape), "streamed": streamed}
    lora = tuple(drawn(*size, device=device, scale=0.02) for size in shape.lora_shapes(rank))
    for one in backends.values():
        one.set_lora(lora)
    return backends


def layer_rows(shape: ExpertShape, tokens: int, backends: dict[str, Any], ways: list[str], clock: Clock) -> Iterator[dict[str, Any]]:  # fmt: skip # noqa: E501
    """A row for each place and way."""
    x, ids, weights = inputs(shape, tokens, backends["resident"].device)
    for place, one in backends.items():
        total: dict[str, float] = {}
        call, counts = one.forward, ()
        if place == "streamed":  # the counts are copied along with other things
            call, counts = one.forward_counted, (one.row_counts(ids).tolist(),)
        for way in ways:
            with computed(way):
                started = time.perf_counter()
                _, saved = call(x, ids, weights, True, *counts)
                one.backward(saved, x)
                compiled = time.perf_counter() - started
                forward, launched = clock(call, x, ids, weights, True, *counts)
                backward, launched_back = clock(one.backward, saved, x)
            total[way] = forward + backward
            yield {
                "tokens": tokens, "experts_touched": ids.unique().numel(), "place": place, "way": way,
                "forward_ms": forward, "backward_ms": backward, "host_forward_ms": launched,
                "host_backward_ms": launched_back, "of_pytorch": total[way] / total["PyTorch"],
                "of_native": total[way] / total.get("fused", total["PyTorch"]), "first_call_s": compiled,
            }  # fmt: skip


def waits(one: Any, x: tuple[Tensor, Tensor, Tensor]) -> dict[str, int]:
    """How often the host waited for the GPU, copied from it, and launched, in a layer's forward and backward."""
    from torch.profiler import ProfilerActivity, profile, record_function

    cuda = one.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")  # PyTorch's own waits are errors
        with record_function("the layer"):
            _, saved = one.forward(*x, save=True)
            one.backward(saved, x[0])
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    events = [(e.name, e.time_range.start, e.time_range.end) for e in seen.events()]
    begin, end = next((begin, end) for name, begin, end in events if name == "the layer")
    inside = [name for name, start, _ in events if begin <= start <= end]
    return {wait: sum(wait in name for name in inside) for wait in WAITS}


def sorted_rows(shape: ExpertShape, x: tuple[Tensor, Tensor, Tensor]) -> Rows:
    with computed("own"):
        numbers = torch.arange(shape.num_experts, dtype=torch.int16, device=x[0].device)
        return Rows.by_expert(x[1], x[2], numbers)


def fused_rows(shape: ExpertShape, tokens: int, device: torch.device, clock: Clock) -> Iterator[dict[str, Any]]:
    """Each fused kernel beside the same in PyTorch."""
    from kt_hf.backends.gpu import fused_kernels, torch_rows

    x = inputs(shape, tokens, device)
    rows, K = sorted_rows(shape, x), shape.top_k
    order, ends, w = x[1].reshape(-1).sort(stable=True).indices, rows.ends, rows.weights
    H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
    gu, h, y = (drawn(tokens * K, size, device=device) for size in (2 * I, I, H))
    calls: dict[str, tuple[Any, ...]] = {
        "indexed": (order, x[2].reshape(-1), K), "gathered": (x[0], rows.tokens, ends), "gated": (gu, gu, ends),
        "gate_gradients_": (gu, gu, h, h, w, ends), "weighted": (y, y, w, torch.empty_like(y)),
        "summed": (y, y, w, rows.place, ends, K),
    }  # fmt: skip
    for name, args in calls.items():
        ours, theirs = (clock(getattr(module, name), *args)[0] for module in (fused_kernels, torch_rows))
        yield {"tokens": tokens, "kernel": name, "ours_ms": ours, "pytorch_ms": theirs}


def product_rows(shape: ExpertShape, tokens: int, rank: int, device: torch.device, clock: Clock) -> Iterator[dict[str, Any]]:  # fmt: skip # noqa: E501
    """Each product beside PyTorch's grouped one."""
    from kt_hf.backends.gpu import grouped_product as own

    E, S, H, I = shape.num_experts, tokens * shape.top_k, shape.hidden_size, shape.intermediate_size  # noqa: E741
    rows = sorted_rows(shape, inputs(shape, tokens, device))
    tiles, native = own.tiles(rows.ends, S, rows.per_expert), torch._grouped_mm
    for name, (into, out) in {
        "gate_up": (H, 2 * I),
        "down": (I, H),
        "A": (H, 2 * rank),
        "B": (2 * rank, 2 * I),
    }.items():
        left, w = drawn(S, into, device=device), drawn(E, out, into, device=device).transpose(1, 2)
        for order, right in (("transposed", w), ("plain", w.contiguous())):
            ours, theirs = (
                clock(own.product, left, right, rows.ends, tiles)[0],
                clock(native, left, right, rows.ends)[0],
            )
            rates = {
                f"{who}_tflops": 2 * S * into * out / ms / 1e9 for who, ms in (("ours", ours), ("pytorch", theirs))
            }
            yield {"tokens": tokens, "kernel": f"{name}, {order}", "ours_ms": ours, "pytorch_ms": theirs} | rates
    thin, left = drawn(S, 2 * rank, device=device), drawn(S, H, device=device)
    ours, theirs = clock(own.outer, thin, left, rows.ends)[0], clock(native, thin.t(), left, rows.ends)[0]
    yield {"tokens": tokens, "kernel": "outer", "ours_ms": ours, "pytorch_ms": theirs}


def sweep_rows(shape: ExpertShape, tokens: int, blocks: list[str], device: torch.device, clock: Clock) -> Iterator[dict[str, Any]]:  # fmt: skip # noqa: E501
    """TFLOP/s of the larger products by block sizes."""
    from kt_hf.backends.gpu import grouped_product as own

    E, S, H, I = shape.num_experts, tokens * shape.top_k, shape.hidden_size, shape.intermediate_size  # noqa: E741
    ends, w = sorted_rows(shape, inputs(shape, tokens, device)).ends, drawn(E, 2 * I, H, device=device)
    tiles, operations = own.tiles(ends, S, S / len(ends)), 4 * S * H * I
    pairs = (drawn(S, H, device=device), w.transpose(1, 2)), (drawn(S, 2 * I, device=device), w)
    key = own._large(device), tiles[2]
    kept = own.PRODUCT[key]
    for text in dict.fromkeys((",".join(map(str, kept)), *blocks)):
        own.PRODUCT[key] = own.Blocks(*map(int, text.split(",")))
        row = {"tokens": tokens, "rows_of_tile": tiles[2], "blocks": text, "in_table": own.PRODUCT[key] == kept}
        try:
            up, back = (operations / clock(own.product, *pair, ends, tiles)[0] / 1e9 for pair in pairs)
            yield row | {"forward_tflops": up, "backward_tflops": back}
        except Exception as error:  # more shared memory or registers than there are
            yield row | {"error": type(error).__name__}
    own.PRODUCT[key] = kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS[:3], help="default: all but the sweep")
    parser.add_argument("--blocks", nargs="+", default=CANDIDATES, help="of the sweep: columns,depth,stages,warps")


def show(row: dict[str, Any]) -> None:
    values = (f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print("  ".join(values), flush=True)


def run(given: argparse.Namespace, device: torch.device) -> None:
    tiny, clock = given.shape == "tiny", Clock(device, given.rounds)
    lengths = [16] if tiny else given.tokens
    triton = kernels.triton_runs(device) or os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and triton:
        from tests.support.triton_interpreter import mend

        mend()
    ways = list(WAYS) if triton else ["PyTorch"]
    for name, shape in (TINY if tiny else SHAPES).items():
        if {"layers", "waits"} & set(given.only):
            backends = made(shape, given.rank, device)
            for way in ways[1:] if device.type == "cuda" else ():
                with computed(way):
                    started = time.perf_counter()
                    warm_up(shape, device, given.rank)
                    show({"layer": name, "way": way, "compiled in s": time.perf_counter() - started})
            for tokens in lengths if "layers" in given.only else ():
                for row in layer_rows(shape, tokens, backends, ways, clock):
                    show({"layer": name} | row)
                    if given.csv:
                        write(given.csv, machine(device) | {"layer": name} | row)
            for way in ways if "waits" in given.only else ():
                x = inputs(shape, lengths[0], device)
                with computed(way):
                    backends["resident"].backward(backends["resident"].forward(*x, save=True)[1], x[0])
                    show({"layer": name, "way": way, "seen in a resident layer": waits(backends["resident"], x)})
            del backends
        for tokens in lengths if triton else ():
            if "kernels" in given.only:
                for row in fused_rows(shape, tokens, device, clock):
                    show({"layer": name} | row)
                for row in product_rows(shape, tokens, given.rank, device, clock):
                    show({"layer": name} | row)
            if "sweep" in given.only:
                for row in sweep_rows(shape, tokens, given.blocks, device, clock):
                    show({"layer": name} | row)
            free_memory(device)
