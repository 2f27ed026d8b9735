"""What low bits of the base cost: held-out loss before LoRA and after, of bf16's, int8's and int4's experts.

    python -m benchmarks.low_bit_accuracy [--steps 40] [--tokens 128] [--experts 8] [--bases bf16 int4 int8]

The model is the demo's (SmolLM2-135M-Instruct up-cycled to a mixture of experts), the data the standard library's
docstrings. Experts are quantized as `kt_expert_dtype` does, and widened to what is multiplied. Everything is computed
in fp32, so that the bases' weights are all that differs; LoRA of rank 8 is on attention and experts and begins alike.
40 steps of 96 tokens and 4 experts took 16 minutes on two busy cores. Ends with status 1 if int4's loss after training
is more than 0.06 above bf16's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.curves import batches
from kt_hf import KTConfig, apply_kt_moe, kt_lora_config
from kt_hf.backends.quantizer import quantized
from kt_hf.builtin.smollm2_moe import load_dense, upcycle_model

HELD_OUT = 5  # batches
RANK, LEARNING_RATE, MOST = 8, 1e-3, 0.06


@torch.no_grad()
def based_on(base: str, dense: Any, experts: int, layers: int | None) -> Any:
    """The model with its experts' weights as this base has them, in fp32."""
    model = upcycle_model(dense, num_experts=experts, num_layers=layers, dtype="bfloat16").float()
    for name, parameter in model.named_parameters():
        if base != "bf16" and ".experts." in name:
            parameter.copy_(quantized(parameter, base).dequantized(torch.bfloat16))
    return model


@torch.no_grad()
def mean_loss(model: Any, held_out: Sequence[torch.Tensor]) -> float:
    model.eval()
    return sum(float(model(input_ids=ids, labels=ids).loss) for ids in held_out) / len(held_out)


def trained(base: str, dense: Any, data: Sequence[torch.Tensor], asked: argparse.Namespace) -> tuple[float, float]:
    """Losses on what is held out, before and after."""
    torch.manual_seed(0)
    model = apply_kt_moe(based_on(base, dense, asked.experts, asked.layers), KTConfig(kt_backend="torch"))
    model = get_peft_model(model, kt_lora_config(model, lora_rank=RANK, lora_alpha=2 * RANK))
    held_out, train = data[:HELD_OUT], data[HELD_OUT:]
    before = mean_loss(model, held_out)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    model.train()
    for ids in train:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, mean_loss(model, held_out)


def main() -> None:
    """Print a row for each base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128, help="of a step, and of each held-out batch")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, help="only the first so many, to try the script")
    parser.add_argument("--bases", nargs="+", default=["bf16", "int4", "int8"])
    asked = parser.parse_args()
    dense, tokenizer = load_dense()
    data = batches(tokenizer, asked.tokens, HELD_OUT + asked.steps)
    print("| experts of | before | after | seconds |\n|---|---|---|---|", flush=True)
    after = {}
    for base in asked.bases:
        begin = time.perf_counter()
        before, after[base] = trained(base, dense, data, asked)
        print(f"| {base} | {before:.3f} | {after[base]:.3f} | {time.perf_counter() - begin:.0f} |", flush=True)
    worse = after.get("int4", 0.0) - after.get("bf16", float("inf"))
    sys.exit(f"int4 ends {worse:.3f} above bf16, more than {MOST}" if worse > MOST else 0)


if __name__ == "__main__":
    main()
