"""What a rank has to do for the tokens of all ranks, against one process with as many rows: time and weights.

    python benchmarks/ranks_layer.py [--shape qwen3-30b-a3b] [--ranks 8] [--tokens 128] [--backends torch AMXBF16]

A rank of N owns E/N experts and gets N times its own tokens, of whose choices one in N is of its experts: as many rows
to compute as T tokens whose K choices are all of these experts. One layer forward and backward, without the exchange,
the two in turn; prints the ratio of their medians, and the weights' bytes on a rank times N over those of the whole
layer. Appends to results.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from cases import adapted
from harness import alternate, append, describe, parser, timed
from shapes import SIZES, Shape, fitting, random_model
from torch import Tensor

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends import CALL_LOCK, ExpertsBackend, ExpertWeights
from kt_hf.backends.gpu.resident import GroupedBackend

BACKENDS = ("torch", "grouped", "AMXBF16")


def main() -> None:
    arguments = parser(__doc__, runs=7)
    arguments.add_argument("--shape", choices=SIZES, default="qwen3-30b-a3b")
    arguments.add_argument("--ranks", type=int, default=8)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    arguments.add_argument("--backends", nargs="+", choices=BACKENDS, default=["torch"])
    given = arguments.parse_args()
    print(describe())
    whole = fitting(given.shape)
    if whole.E % given.ranks:
        arguments.error(f"--ranks {given.ranks}: the layer has {whole.E} experts")
    shape = replace(whole, E=whole.E // given.ranks)
    for name in given.backends:
        compare(given, shape, whole, name)


def compare(given: argparse.Namespace, shape: Shape, whole: Shape, name: str) -> None:
    """One backend with a rank's experts, and both kinds of batch."""
    alone, among = backend_of(name, shape, 1), backend_of(name, shape, given.ranks)
    share = weight_bytes(among) * given.ranks / whole.bytes if name != "AMXBF16" else float("nan")
    label = f"{whole.label(8)} N={given.ranks}"
    for tokens in given.tokens:
        cases = {
            f"{name} own tokens": case(alone, batch(shape, tokens, 1)),
            f"{name} all ranks' tokens": case(among, batch(shape, tokens, given.ranks)),
        }
        timings = alternate(cases, given.runs)
        own, of_all = (timings[key].median() for key in cases)
        append("ranks_layer", label, tokens, torch.get_num_threads(), timings, given.save)
        print(
            f"{label} {name} T={tokens}: {own * 1e3:.1f} ms, with {given.ranks} ranks' tokens {of_all * 1e3:.1f} ms: "
            f"{of_all / own:.3f}; weights x N / all {share:.3f}"
        )


def backend_of(name: str, shape: Shape, ranks: int) -> ExpertsBackend:
    """A backend that holds a rank's experts, with LoRA of rank 8."""
    model = random_model(shape)
    backend = "AMXBF16" if name == "AMXBF16" else "torch"
    layers = adapted(apply_kt_moe(model, KTConfig(kt_backend=backend, kt_lora_rank=8)), 8)._kt_wrappers
    layer = layers[0]
    layer.update_lora_pointers()
    if name != "grouped":
        return layer.backend
    held: ExpertWeights = layer.backend.weights
    grouped = GroupedBackend(held, replace(layer.shape, ranks=ranks))
    grouped.set_lora(layer.backend.lora_copy())
    return grouped


def weight_bytes(backend: ExpertsBackend) -> int:
    held = backend.weights  # type: ignore[attr-defined]
    return held.gate_up.nbytes + held.down.nbytes


def batch(shape: Shape, tokens: int, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, ids, weights and the output's gradient: N times the tokens, with as many rows of the E/N experts in all."""
    generator = torch.Generator().manual_seed(1)
    count = tokens * ranks
    ids = torch.rand(count, shape.E, generator=generator).argsort(dim=1)[:, : shape.K]
    if ranks > 1:
        kept = torch.randperm(count * shape.K, generator=generator)[: tokens * shape.K]
        few = torch.full((count * shape.K,), -1)
        few[kept] = ids.reshape(-1)[kept]
        ids = few.view(count, shape.K)
    x, grad = (torch.randn(count, shape.H, generator=generator).bfloat16() for _ in range(2))
    return x, ids, torch.rand(count, shape.K, generator=generator), grad


def case(backend: ExpertsBackend, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], dict[str, float]]:
    x, ids, weights, grad = given

    def run() -> dict[str, float]:
        saved = []
        with CALL_LOCK, torch.no_grad():
            forward = timed(lambda: saved.append(backend.forward(x, ids, weights, save=True)[1]))
            backward = timed(lambda: backend.backward(saved[0], grad))
        return {"forward": forward, "backward": backward}

    return run


if __name__ == "__main__":
    main()
