"""Layers of gpt-oss-120b's shape, with its gate and biases and with plain SiLU: streamed and resident, bf16 and MXFP4.

    python benchmarks/gpu gated --csv gpu_gated.csv
    python benchmarks/gpu gated --only bf16 --tokens 8192
    python benchmarks/gpu gated --device cpu --shape tiny --tokens 64            # try the script without a GPU

Random weights, LoRA on, tokens routed evenly over all experts. A step is the forward of all layers and their backward
from the last to the first. `bound` is the larger of the time that the bus takes for the weights of both directions, at
the rate measured, and of the time of the same step with the weights in bf16 on the GPU; `of_bound` is the step against
it. What the gate costs, against silu(gate) * up without biases, is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from common import free_memory, machine, write
from products import Clock, drawn, inputs

from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.backends.packed import PackedExperts, PackedMatrices
from kt_hf.gates import Gate
from kt_hf.placement import calibration
from kt_hf.placement.expert_memory import widest_chunk
from kt_hf.shapes import ExpertShape

GATES = {"gpt-oss": (Gate(alpha=1.702, limit=7.0, up_offset=1.0), True), "plain": (Gate(), False)}
SIZES, TINY = (128, 4, 2880, 2880), (8, 2, 64, 32)  # experts, of a token, H, I
KINDS = {"bf16": 16.0, "mxfp4": 4.25}  # bits of a weight


def matrices(kind: str, rows: int, columns: int, experts: int, device: torch.device) -> Any:
    """A stack of random matrices on `device`: a tensor of bf16, or packed codes with a scale for each 32."""
    if kind == "bf16":
        return drawn(experts, rows, columns, device=device, scale=0.02)
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device)
    return PackedMatrices("e2m1", codes, torch.full((experts, rows, columns // 32), 121, dtype=torch.uint8, device=device))  # fmt: skip # noqa: E501


def layer(kind: str, place: str, shape: ExpertShape, streamer: Streamer, rank: int) -> Any:
    """The backend of a layer, with LoRA."""
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    device = streamer.device
    gate_up, down = (matrices(kind, *size, E, device) for size in ((2 * I, H), (H, I)))
    bias = drawn(E, 2 * I, device=device) if shape.biased else None
    if kind == "bf16" and place == "resident":
        made: Any = GroupedBackend(ExpertWeights(gate_up, down, gate_up_bias=bias), shape)
    else:
        if kind == "bf16":
            host = HostWeights.copied(ExpertWeights(gate_up.cpu(), down.cpu()), list(range(E)))
        elif place == "streamed":
            cpu = torch.device("cpu")
            host = HostWeights.of_packed(PackedExperts(list(range(E)), gate_up.to(cpu), down.to(cpu)))
        else:
            host = HostWeights.on_gpu(PackedExperts(list(range(E)), gate_up, down), device)
        made = StreamedBackend(host, shape, streamer, bias)
    made.set_lora(tuple(drawn(*size, device=device, scale=0.02) for size in shape.lora_shapes(rank)))
    return made


def step(layers: list[Any], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    saved = [one.forward(x, ids, weights, True)[1] for one in layers]
    for one, kept in reversed(list(zip(layers, saved, strict=True))):
        one.backward(kept, x)


def rows(given: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each kind, place, gate and number of tokens."""
    clock, sizes = Clock(device, given.rounds), TINY if given.shape == "tiny" else SIZES
    rate = calibration.copy_rate(device) if device.type == "cuda" else 1e10
    taken: dict[tuple[Any, ...], float] = {}
    cases = [(kind, place, name) for kind in KINDS for place in ("resident", "streamed") for name in GATES]
    for kind, place, name in cases:
        if given.only and given.only != kind and (kind, place) != ("bf16", "resident"):  # which the bound needs
            continue
        gate, biased = GATES[name]
        shape, streamer = ExpertShape(*sizes, gate, biased), Streamer(device, widest_chunk(KINDS[kind]))
        layers = [layer(kind, place, shape, streamer, given.rank) for _ in range(given.layers)]
        held = layers[0].weights
        stored = (held.gate_up.nbytes + held.down.nbytes) if isinstance(held, ExpertWeights) else held.nbytes
        bus = 2 * given.layers * stored / rate if place == "streamed" else 0.0
        for tokens in given.tokens:
            there, host = clock(step, layers, *inputs(shape, tokens, device))
            seconds = taken[kind, place, name, tokens] = there / 1e3
            row = {
                "kind": kind, "place": place, "gate": name, "layers": given.layers, "tokens": tokens,
                "step": seconds, "host": host / 1e3, "tokens_per_s_layer": tokens * given.layers / seconds,
                "gb_per_s": rate / 1e9, "layer_gb": stored / 1e9, "bus": bus,
                "bound": (bound := max(bus, taken["bf16", "resident", name, tokens])), "of_bound": seconds / bound,
            }  # fmt: skip
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
            yield row
            if name == "plain":
                cost = taken[kind, place, "gpt-oss", tokens] / seconds
                print(f"  {kind} {place}, {tokens} tokens: the gate takes {cost:.3f} of plain", flush=True)
        del layers
        free_memory(device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=tuple(KINDS))


def run(given: argparse.Namespace, device: torch.device) -> None:
    for row in rows(given, device):
        if given.csv:
            write(given.csv, machine(device) | row)
