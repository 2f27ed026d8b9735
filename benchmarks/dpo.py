"""A DPO step on one patched model: what the reference pass costs the policy's backward, and whether the order matters.

    python benchmarks/dpo.py [--shape smol] [--layers 4] [--tokens 256]

The reference is the same model with its adapter off, under no_grad. The operators keep one saved forward a layer, so a
reference pass between the policy's forward and its backward makes backward compute the policy's forward again.

    reference first   reference, policy, backward: as TRL's DPOTrainer is asked to
    policy first      policy, reference, backward
    precomputed       policy and backward alone: what a dataset with reference log-probabilities leaves

Prints how often the operators ran in a step, by the backends' own calls, and seconds by part.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import torch_threads
from harness import append, cores, describe, parser, timed
from peft import LoraConfig, get_peft_model
from processes import Run, take_turns
from shapes import SIZES, Shape, fitting, random_model
from torch import Tensor, nn

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends import kernel_availability
from kt_hf.experts import kt_layers
from kt_hf.system.cpu import plan_threads

ORDERS = ("reference first", "policy first", "precomputed")
RANK, VOCAB = 8, 256


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    return -nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def count_calls(model: Any) -> dict[str, float]:
    """Calls of the backends' forward and backward from now on."""
    counts = {"forward": 0.0, "backward": 0.0}

    def counted(backend: Any, name: str) -> None:
        call = getattr(backend, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        setattr(backend, name, wrapper)

    for layer in kt_layers(model):
        for name in counts:
            counted(layer._runner.backend, name)
    return counts


def patched_model(shape: Shape, layers: int) -> Any:
    torch.manual_seed(0)
    model = apply_kt_moe(random_model(shape, layers, vocab=VOCAB, head_dim=64), KTConfig(kt_lora_rank=RANK))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)).train()
    for layer in kt_layers(model):
        layer.update_lora_pointers()
    return model


def build(shape: Shape, layers: int) -> dict[str, Run]:
    model = patched_model(shape, layers)
    threads = torch_threads(kt_layers(model)[0].backend)
    counts = count_calls(model)

    def step(order: str, tokens: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        model.zero_grad()
        ids = torch.randint(VOCAB, (2, tokens // 2), generator=torch.Generator().manual_seed(0))  # chosen, rejected
        found = {"reference": torch.zeros(2), "policy": torch.zeros(2)}

        def reference() -> None:
            with torch.no_grad(), model.disable_adapter():
                found["reference"] = log_probabilities(model, ids)

        def policy() -> None:
            found["policy"] = log_probabilities(model, ids)

        def backward() -> None:
            chosen, rejected = found["policy"] - found["reference"]
            (-nn.functional.logsigmoid(0.1 * (chosen - rejected))).backward()

        passes = {"reference": reference, "policy": policy}
        if order == "policy first":
            passes = {"policy": policy, "reference": reference}
        if order == "precomputed":
            del passes["reference"]
        return {name: timed(call) for name, call in passes.items()} | {"backward": timed(backward)}

    def calls(order: str, tokens: int) -> dict[str, float]:
        counts.update(forward=0.0, backward=0.0)
        step(order, tokens)
        return dict(counts)

    timed_runs = {order: lambda tokens, order=order: step(order, tokens) for order in ORDERS}
    return timed_runs | {f"{order}, calls": lambda tokens, order=order: calls(order, tokens) for order in ORDERS}


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--shape", choices=SIZES, default="smol")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[512], help="of the pair together")
    given = arguments.parse_args()
    print(describe())
    shape = fitting(given.shape, given.layers)
    label = f"{shape.label(RANK)} L={given.layers}"
    timings = take_turns({"dpo": lambda: build(shape, given.layers)}, given.tokens, given.runs, keep=True)
    threads = plan_threads().workers if kernel_availability().ok else cores()
    for tokens in given.tokens:
        found = {}
        for order in ORDERS:
            calls = timings[f"{order}, calls", tokens]
            ran = f"{calls.median('forward'):.0f} forwards, {calls.median('backward'):.0f} backwards"
            found[f"{order}: {ran}"] = timings[order, tokens]
        append("dpo", label, tokens, threads, found, given.save)
        print(f"{label}, T={tokens}")
        least = timings["precomputed", tokens].median()
        for name, timing in found.items():
            parts = "  ".join(f"{part} {timing.median(part) * 1e3:.1f}" for part in timing.parts)
            whole = timing.median()
            print(f"  {name:44s} {whole * 1e3:8.1f} ms ({parts}), {whole / least:.2f} of precomputed")


if __name__ == "__main__":
    main()
