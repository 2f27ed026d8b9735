"""MXFP4's operators beside PyTorch, one layer of DeepSeek-V2-Lite's sizes, forward and backward.

Both compute the same MXFP4 weights, PyTorch widened to bf16, in one process and in turns, so that what else the machine
does meets both:

    python -m benchmarks.low_bit_cpu --threads 2 --tokens 1 64 512 2048

PyTorch needs minutes there for the longest. What matters is how many tokens an expert has: `--experts 4 --top-k 1` with
a quarter as many tokens has as many, and ends sooner.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kt_hf.backends import ExpertsBackend, ExpertShape, ExpertWeights, build_backend
from kt_hf.backends.packed import PackedExperts, PackedMatrices
from kt_hf.system.cpu import ThreadPlan

DEEPSEEK_V2_LITE = ExpertShape(num_experts=64, top_k=6, hidden_size=2048, intermediate_size=1408)
RANK = 8


def drawn(shape: ExpertShape) -> PackedExperts:
    """Random weights in MXFP4, about as large as a trained model's."""
    generator = torch.Generator().manual_seed(0)

    def stack(rows: int, columns: int) -> PackedMatrices:
        codes = torch.randint(0, 256, (shape.num_experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
        return PackedMatrices("e2m1", codes, torch.full((*codes.shape[:2], columns // 32), 120, dtype=torch.uint8))

    H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
    return PackedExperts(list(range(shape.num_experts)), stack(2 * I, H), stack(H, I))


def backends(shape: ExpertShape, threads: int, most: int) -> dict[str, ExpertsBackend]:
    """The same weights on both; as many workers as cores less one, as kt_hf plans them."""
    packed, plan = drawn(shape), ThreadPlan(((0, max(1, threads - 1)),))
    made = {}
    for name in ("torch", "MXFP4"):
        H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
        none = torch.empty(0, 2 * I, H, dtype=torch.bfloat16), torch.empty(0, H, I, dtype=torch.bfloat16)
        weights = ExpertWeights(*none, low_bit=packed)
        made[name] = build_backend(name, weights, shape, RANK, plan, most, False, False, "layer 0")
        made[name].set_lora(tuple(torch.randn(size).mul(0.02).bfloat16() for size in shape.lora_shapes(RANK)))
    return made


def seconds(call: Callable[[], object]) -> float:
    """One call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measured(one: ExpertsBackend, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    saved = []
    forward = seconds(lambda: saved.append(one.forward(x, ids, weights, save=True)[1]))
    return forward, seconds(lambda: one.backward(saved[0], x))


def main() -> None:
    """Print a row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512, 2048])
    parser.add_argument("--threads", type=int, default=2, help="cores for each: PyTorch's threads, or workers and one")
    parser.add_argument("--experts", type=int, default=DEEPSEEK_V2_LITE.num_experts)
    parser.add_argument("--top-k", type=int, default=DEEPSEEK_V2_LITE.top_k)
    parser.add_argument("--repeat", type=int, default=3, help="the least of so many is printed")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shape = replace(DEEPSEEK_V2_LITE, num_experts=asked.experts, top_k=asked.top_k)
    made = backends(shape, asked.threads, max(asked.tokens))
    print("| tokens | of an expert | torch, ms | MXFP4, ms | torch / MXFP4 |\n|---|---|---|---|---|")
    for T in asked.tokens:
        x = torch.randn(T, shape.hidden_size).bfloat16()
        ids = torch.rand(T, shape.num_experts).argsort(1)[:, : shape.top_k].contiguous()
        weights, least = torch.rand(T, shape.top_k), dict.fromkeys(made, (float("inf"),) * 2)
        for _ in range(asked.repeat):
            for name, one in made.items():
                torch.set_num_threads(one.torch_threads or asked.threads)
                least[name] = tuple(map(min, least[name], measured(one, x, ids, weights)))
        (tf, tb), (mf, mb) = least["torch"], least["MXFP4"]
        cells = f"{tf * 1e3:.0f}/{tb * 1e3:.0f} | {mf * 1e3:.0f}/{mb * 1e3:.0f} | {tf / mf:.2f}/{tb / mb:.2f}"
        print(f"| {T:,} | {T * shape.top_k / shape.num_experts:.3g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
