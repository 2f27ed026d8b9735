"""Quantized experts of the up-cycled SmolLM2 (8 experts, hidden size 576, intermediate size 1536): error and memory.

    python benchmarks/quantized.py errors [--layers 0 10 20 29] [--write docs/quantized_errors.csv]
    python benchmarks/quantized.py memory [--write docs/quantized_memory.csv]
    python benchmarks/curves.py --cases AMXBF16 AMXInt8 --steps 30      (the losses)

errors: real layers against the same in fp32 with the original weights, mean|a - b| / mean|b| of the output and the
worst of the gradients; once on normally distributed hidden states and output gradients, once on those of a real text.
Real hidden states have a few channels ten times as large as the rest, and a token's row is quantized by its largest
value, so errors are twice as large there. 576 is no multiple of 128: INT4 is shown on a layer of random weights
(--shape), with the other two.

memory: what packing all 30 layers adds to the resident memory of a process, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_hf.backends import ExpertWeights, build_backend
from kt_hf.shapes import LORA_NAMES, ExpertShape
from kt_hf.system.cpu import plan_threads
from tests.support.reference import BaseWeights, experts_forward_backward, relative_error

ROOT = Path(__file__).parents[1]
RANK = 8
MEMORY = [(backend, share) for share in (True, False) for backend in ("AMXBF16", "AMXInt8")]
TEXT = (
    "A mixture of experts sends every token to a few small networks. Which ones it needs is decided by a router, and "
    "most of the weights rest at any time. That is why they can live in the memory of the host: reading them is cheap "
    "there, and a processor with matrix instructions computes them fast enough. "
)


def errors_of(
    backend: str, weights: ExpertWeights, x: Tensor, ids: Tensor, routing: Tensor, grad: Tensor, rank: int = RANK
) -> dict[str, float]:
    """Relative errors of the output and of each gradient, by name. The weights are left as they are.

    Args:
        weights: bf16, [E, 2I, H] and [E, H, I].
        x, ids, routing, grad: [T, H] bf16, [T, K], [T, K] fp32, [T, H] bf16.
    """
    E, H, I = weights.down.shape  # noqa: E741
    shape = ExpertShape(E, ids.shape[1], H, I)
    draw = torch.Generator().manual_seed(0)
    lora = [torch.randn(size, generator=draw) * 0.02 for size in shape.lora_shapes(rank)]
    lora = [tensor.bfloat16().float() for tensor in lora]
    gate, up = weights.gate_up.float().chunk(2, dim=1)
    base = BaseWeights(gate, up, weights.down.float())
    wanted = experts_forward_backward(x, ids, routing, grad, base, dict(zip(LORA_NAMES, lora, strict=True)))
    copy = ExpertWeights(weights.gate_up.clone(), weights.down.clone())
    layer = build_backend(backend, copy, shape, rank, plan_threads(), len(x), False, False, "benchmark")
    layer.set_lora(tuple(lora))
    out, saved = layer.forward(x, ids, routing, save=True)
    assert saved is not None
    found = layer.backward(saved, grad)
    gradients = {"hidden": found.hidden_states, "weights": found.top_k_weights}
    gradients |= dict(zip(LORA_NAMES, found.lora, strict=True))
    return {"output": relative_error(out, wanted.output)} | {
        name: relative_error(gradient, wanted.grads[name]) for name, gradient in gradients.items()
    }


def real_layers(layers: list[int]) -> dict[int, tuple[ExpertWeights, Tensor, Tensor, Tensor, Tensor]]:
    """Weights, hidden states, ids, routing weights and output gradients of these layers, for a text and its loss."""
    from kt_hf.builtin.smollm2_moe import upcycle

    model, tokenizer = upcycle(num_layers=max(layers) + 1)
    model.set_experts_implementation("grouped_mm")
    seen: dict[int, list[Tensor]] = {}
    gradients: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[index] = [t.detach() for t in inputs]
            output.register_hook(lambda grad: gradients.__setitem__(index, grad))

        return hook

    for index in layers:
        model.model.layers[index].mlp.experts.register_forward_hook(watch(index))
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    ids = tokenizer(TEXT * 4, return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for index in layers:
        experts, (x, chosen, routing) = model.model.layers[index].mlp.experts, seen[index]
        weights = ExpertWeights(experts.gate_up_proj.detach(), experts.down_proj.detach())
        hidden, grad = (t.reshape(-1, x.shape[-1]).bfloat16().contiguous() for t in (x, gradients[index]))
        # A scale that bf16's smallest numbers are far from; gradients are linear in it.
        grad = (grad.float() / grad.float().abs().mean()).bfloat16()
        found[index] = weights, hidden, chosen.long().contiguous(), routing.float().contiguous(), grad
    return found


def normal(data: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same layer and routing with normally distributed hidden states and output gradients."""
    weights, x, ids, routing, grad = data
    draw = torch.Generator().manual_seed(0)
    other = [torch.randn(t.shape, generator=draw).bfloat16() for t in (x, grad)]
    return weights, other[0], ids, routing, other[1]


def random_layer(E: int, K: int, H: int, inner: int, tokens: int = 256) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(tokens, H, generator=draw).bfloat16() for _ in range(2))
    gate_up = (torch.randn(E, 2 * inner, H, generator=draw) * H**-0.5).bfloat16()
    down = (torch.randn(E, H, inner, generator=draw) * inner**-0.5).bfloat16()
    ids = torch.rand(tokens, E, generator=draw).topk(K).indices
    return ExpertWeights(gate_up, down), x, ids, torch.rand(tokens, K, generator=draw), grad


def errors(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    cases = []
    for index, data in real_layers(given.layers).items():
        cases.append((f"SmolLM2 layer {index}, random inputs", normal(data), ("AMXBF16", "AMXInt8")))
        cases.append((f"SmolLM2 layer {index}, real inputs", data, ("AMXBF16", "AMXInt8")))
    shape = tuple(int(n) for n in given.shape.split(","))
    cases.append((f"random {given.shape}", random_layer(*shape), ("AMXBF16", "AMXInt8", "AMXInt4")))
    for case, data, backends in cases:
        for backend in backends:
            found = errors_of(backend, *data)
            output = found.pop("output")
            name, worst = max(found.items(), key=lambda item: item[1])
            rows.append({"case": case, "backend": backend, "output": f"{output:.4f}", "worst_gradient": f"{worst:.4f}",
                         "of": name, "tokens": len(data[1])})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def resident() -> int:
    """Bytes of this process's own memory: anonymous pages, for those of mapped files may go at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon")


def measure_memory(backend: str, share: bool, layers: int) -> int:
    """Bytes that all layers take once packed and used, one forward and backward each."""
    E, K, H, inner, T = 8, 2, 576, 1536, 32
    shape, plan = ExpertShape(E, K, H, inner), plan_threads()
    torch.set_num_threads(1)
    held = []

    def step(layer: Any) -> None:
        ids = torch.rand(T, E).topk(K).indices
        _, saved = layer.forward(torch.randn(T, H).bfloat16(), ids, torch.rand(T, K), save=True)
        layer.backward(saved, torch.randn(T, H).bfloat16())

    def build() -> Any:
        weights = ExpertWeights(
            torch.randn(E, 2 * inner, H).mul_(0.02).bfloat16(), torch.randn(E, H, inner).mul_(0.02).bfloat16()
        )
        return build_backend(backend, weights, shape, 0, plan, 1024, share, True, "benchmark")

    from kt_hf.system.memory import return_freed_memory

    # Scratch memory is the process's, not the layers': made by a small layer first.
    zeros = ExpertWeights(torch.zeros(E, 2 * inner, 128).bfloat16(), torch.zeros(E, 128, inner).bfloat16())
    tiny = build_backend(backend, zeros, ExpertShape(E, K, 128, inner), 0, plan, 1024, False, True, "first")
    tiny_x = torch.randn(T, 128).bfloat16()
    _, saved = tiny.forward(tiny_x, torch.rand(T, E).topk(K).indices, torch.rand(T, K), save=True)
    assert saved is not None
    tiny.backward(saved, tiny_x)
    gc.collect()
    return_freed_memory()
    before = resident()
    for _ in range(layers):
        held.append(build())
        return_freed_memory()
    for layer in held:
        step(layer)
    gc.collect()
    return_freed_memory()
    return resident() - before


def memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    weights = 3 * 8 * 576 * 1536 * 2 * given.count
    rows: list[dict[str, Any]] = []
    for backend, share in MEMORY:
        command = [sys.executable, __file__, "one", backend, str(int(share)), str(given.count)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        size = json.loads(done.stdout.splitlines()[-1])
        first = next((int(row["bytes"]) for row in rows if row["shared_backward"] == share), size)
        rows.append({
            "backend": backend, "shared_backward": share, "layers": given.count, "bytes": size,
            "mib": f"{size / 2**20:.0f}", "of_bf16_weights": f"{size / weights:.3f}",
            "of_bf16_packed": f"{size / first:.3f}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measure_memory(sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "memory"))
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--shape", default="16,4,2048,1408", help="experts, a token, hidden, intermediate size")
    parser.add_argument("--count", type=int, default=30, help="layers held in memory")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    rows = errors(given) if given.what == "errors" else memory(given)
    if given.write:
        with given.write.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
