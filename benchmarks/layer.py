"""One expert layer with LoRA on every expert: kt_hf against the bare operators and against stock transformers + PEFT.

    python benchmarks/layer.py [--tokens 512 2048] [--rank 8] [--runs 7] [--threads N] [--shape deepseek-v2-lite]

Prints milliseconds and ratios of one run, and appends to results.csv. `bare` are kt-kernel's calls and nothing else;
`kt` is KTExperts as a training step calls it, gradients in fp32 included; `torch` the torch backend the same way;
`stock` is grouped_mm with PEFT's LoRA on fused experts (target_parameters).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import alternate, append, describe, timed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends import kernel_availability
from kt_hf.cpu import plan_threads

SHAPES = {  # experts, experts a token, hidden size, expert intermediate size
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "smol": (8, 2, 576, 1536),
    "tiny": (8, 2, 64, 96),
}


def one_layer(shape: str) -> Qwen3MoeForCausalLM:
    E, K, H, inner = SHAPES[shape]
    config = Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=inner, num_experts=E, num_experts_per_tok=K, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=32, intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=max(parameter.shape[-1], 1) ** -0.5)
    model.set_experts_implementation("grouped_mm")
    return model


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """LoRA on the experts through the ordinary names; B random, so that nothing is multiplied by zero."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.02)
    return model


def step(
    experts: nn.Module, parameters: list[nn.Parameter], batch: dict[str, Tensor], threads: int
) -> Callable[[], dict[str, float]]:
    """Forward and backward of a layer as training does them, gradients starting from None.

    threads: PyTorch's. One beside the operators, whose own threads they would compete with.
    """

    def run() -> dict[str, float]:
        torch.set_num_threads(threads)
        for parameter in parameters:
            parameter.grad = None
        x = batch["x"].clone().requires_grad_()
        weights = batch["weights"].clone().requires_grad_()
        out: list[Tensor] = []
        forward = timed(lambda: out.append(experts(x, batch["ids"], weights)))
        return {"forward": forward, "backward": timed(lambda: out[0].backward(batch["grad"]))}

    return run


def bare(backend: Any, batch: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """kt-kernel's two calls with pointers made ready before: what no wrapper can be faster than."""
    moe, K = backend._moe, backend.shape.top_k
    T, H = batch["x"].shape
    length, x, ids = torch.tensor([T], dtype=torch.int32), batch["x"], batch["ids"]
    out, grad_input = torch.empty(T, H, dtype=torch.bfloat16), torch.empty(T, H, dtype=torch.bfloat16)
    weights, grad_weights = batch["weights"].float().contiguous(), torch.empty(T, K)
    grads = [torch.empty(size, dtype=torch.bfloat16) for size in backend.shape.lora_shapes(backend.max_rank)]

    def run() -> dict[str, float]:
        torch.set_num_threads(1)
        forward = timed(lambda: moe.forward_sft(
            length.data_ptr(), K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), True
        ))  # fmt: skip
        backward = timed(lambda: moe.backward(
            batch["grad"].data_ptr(), grad_input.data_ptr(), *(g.data_ptr() for g in grads), grad_weights.data_ptr(),
            0, 0, 0, False, 1.0,
        ))  # fmt: skip
        backend._cache.holds = 0
        return {"forward": forward, "backward": backward}

    return run


def make_batch(shape: str, tokens: int) -> dict[str, Tensor]:
    E, K, H, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(tokens, H, generator=generator).bfloat16(),
        "ids": torch.rand(tokens, E, generator=generator).topk(K).indices,
        "weights": torch.rand(tokens, K, generator=generator).bfloat16(),
        "grad": torch.randn(tokens, H, generator=generator).bfloat16(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="deepseek-v2-lite")
    arguments.add_argument("--tokens", type=int, nargs="+", default=[512])
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--runs", type=int, default=7)
    arguments.add_argument("--threads", type=int, help="worker threads, and PyTorch's; default: the plan")
    arguments.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results.csv")
    given = arguments.parse_args()
    threads = given.threads or plan_threads().workers
    torch.set_num_threads(threads)
    print(describe())

    stock = adapted(one_layer(given.shape), given.rank)
    cases: dict[str, tuple[nn.Module, nn.Module]] = {}
    backends = ["torch"] + (["AMXBF16"] if kernel_availability().ok else [])
    for name in backends:
        model = apply_kt_moe(
            one_layer(given.shape),
            KTConfig(kt_backend=name, kt_num_threads=threads, kt_share_backward_weights=False),
        )
        model = adapted(model, given.rank)
        cases["kt" if name == "AMXBF16" else "torch"] = (model._kt_wrappers[0], model)
    cases["stock"] = (stock.base_model.model.model.layers[0].mlp.experts, stock)

    for tokens in given.tokens:
        batch = make_batch(given.shape, tokens)
        runs = {
            name: step(
                experts, [p for p in model.parameters() if p.requires_grad], batch, 1 if name == "kt" else threads
            )
            for name, (experts, model) in cases.items()
        }
        if "kt" in cases:
            runs["bare"] = bare(cases["kt"][0]._runner.backend, batch)
        timings = alternate(runs, given.runs)
        print(f"{given.shape}, T={tokens}, r={given.rank}, {threads} threads")
        for name, timing in timings.items():
            ratio = f"  {timings['stock'].median() / timing.median():5.2f} x stock's speed"
            if "bare" in timings:
                ratio += f"  {timing.median() / timings['bare'].median():5.3f} of bare"
            print(f"  {name:6s} forward {timing.median('forward') * 1e3:8.1f} ms  "
                  f"backward {timing.median('backward') * 1e3:8.1f} ms{ratio}")  # fmt: skip
        if given.save:
            append("layer", f"{given.shape} r={given.rank}", tokens, threads, timings)


if __name__ == "__main__":
    main()
