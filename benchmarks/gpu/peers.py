"""Part `peer`: experts4bit-qlora's fast settings on the same checkpoint and cap, if it can be imported.

Its experts are in NF4: on the GPU, in page-locked host memory, and there with a batch's rows as micro-batches that pass
layer by layer together. LoRA of rank 16 on attention and experts, adapters in bf16, checkpointing, routing spread like
ours. Ours come from parts `cells` (bf16, auto) and `low-bit` (int4, the faster of streamed and resident) of the same
folder of results, by SFTTrainer; and int4 experts on the GPU in the peer's own bare loop, adapters in bf16, both with
and without checkpointing at one row, where a step is what the host takes to launch it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from typing import Any

import torch
from card import Card, Rows, read_rows
from checkpoints import make_checkpoint
from models import make_config
from peft import get_peft_model
from routing import Spread
from sft import RANK, Tokens, lora

from kt_hf import KTConfig, load_kt_model

STEPS = 4
WAYS = {
    "offloaded": ("checkpointing", "layer-major"),
    "resident": ("checkpointing", "no checkpointing"),
    "ours": ("checkpointing", "no checkpointing"),
}


def load(folder: Any, offload: bool) -> tuple[Any, list[torch.nn.Parameter]]:
    """The peer's model, and what it trains."""
    from experts4bit_qlora import load_moe_4bit_streaming
    from experts4bit_qlora import train as peer
    from experts4bit_qlora.engines.fast import enable_fast_train

    model, _ = load_moe_4bit_streaming(
        str(folder), "cuda", torch.bfloat16, RANK, 2.0 * RANK, offload=offload, pin=True, quant_type="nf4"
    )
    model = model if offload else model.to("cuda")
    peer.add_attention_lora(model, RANK, 2.0 * RANK, torch.bfloat16)
    experts, attention = peer.trainable_lora_param_ids(model)
    trained = []
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in experts or id(parameter) in attention)
        trained += [parameter] if parameter.requires_grad else []
    model.config.use_cache = False
    checkpoint(model, True)
    enable_fast_train(model, dgrad=True, absmax_dq=False)
    model.enable_input_require_grads()
    return model.train(), trained


def load_ours(folder: Any, layers: int, tokens: int) -> tuple[Any, list[torch.nn.Parameter]]:
    """The same layers by kt_hf, int4 experts on the GPU, with what it trains, in bf16 as the peer's."""
    settings = KTConfig(
        kt_lora_rank=RANK, kt_expert_placement={"resident_layers": layers}, kt_expert_dtype="int4",
        kt_moe_lora_device="gpu",
    )  # fmt: skip
    model = load_kt_model(folder, settings, tokens_per_step=tokens)
    model.config.use_cache = False
    model = get_peft_model(model.to("cuda:0"), lora(model, True), autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    return model.train(), [parameter for parameter in model.parameters() if parameter.requires_grad]


def checkpoint(model: Any, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def steps_of(model: Any, trained: list[Any], batch: int, length: int, card: Card, layer_major: bool) -> list[float]:
    from experts4bit_qlora.engines.layer_major import layer_major_step

    optimizer, tokens = torch.optim.AdamW(trained, lr=1e-4, fused=True), Tokens(model.config.vocab_size, length)
    seconds = []
    for number in range(STEPS):
        inputs = {name: value.to(card.device) for name, value in tokens.batch(batch, length, number).items()}
        card.synchronize()
        begin = time.perf_counter()
        if layer_major:
            rows = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(batch)]
            layer_major_step(model, rows, [1 / batch] * batch)
        else:
            model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        card.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def ours(given: argparse.Namespace, cap: float) -> dict[str, dict[int, float]]:
    """Our tokens/s in the same cap by batch, with bf16 and with int4 experts."""
    cells = [r for r in read_rows(given.out, "cells") if r["family"] == "qwen3_30b" and r["case"] == "auto"]
    low = [r for r in read_rows(given.out, "low-bit") if r.get("dtype") == "int4"]
    found: dict[str, dict[int, float]] = {"bf16": {}, "int4": {}}
    for name, some in (("bf16", [r for r in cells if r["bus"] == "1/1"]), ("int4", low)):
        for row in some:
            if row.get("step") and row["cap_gb"] == cap:
                rate = row["tokens_per_second"]
                found[name][row["batch"]] = max(rate, found[name].get(row["batch"], 0.0))
    return found


def run(given: argparse.Namespace, card: Card, rows: Rows) -> None:
    os.environ.setdefault("FAST_TRAIN", "1")
    try:
        import experts4bit_qlora  # noqa: F401
    except ImportError as error:
        rows.add(case="experts4bit-qlora", error=f"left out: {error}")
        return
    config = make_config("qwen3_30b", given.shape, given.layers)
    folder = given.checkpoint / f"qwen3_30b-{given.shape}-{given.layers}"
    make_checkpoint(config, folder, card.device)
    cap = (given.caps or [24.0])[0]
    card.limit(cap)
    batches, best = given.batch or [1, 4, 8], dict[int, float]()
    common: dict[str, Any] = {"layers": given.layers, "cap_gb": cap}
    for where in ("offloaded", "resident", "ours"):
        card.clear()
        tokens = max(batches) * given.sequence
        model, trained = (
            load_ours(folder, given.layers, tokens) if where == "ours" else load(folder, where != "resident")
        )
        spread = Spread(model)
        for batch, way in itertools.product(batches, WAYS[where]):
            if batch == 1 if way == "layer-major" else batch > 1 and way == "no checkpointing":
                continue
            checkpoint(model, way != "no checkpointing")
            card.reset()
            row = common | {"case": "kt_hf" if where == "ours" else "experts4bit-qlora", "batch": batch}
            row |= {"where": "resident" if where == "ours" else where, "way": way}
            try:
                step = statistics.median(steps_of(model, trained, batch, given.sequence, card, way == "layer-major"))
            except (RuntimeError, ValueError) as error:  # no room for it, for one
                rows.add(**row, error=str(error).splitlines()[0][:200])
                for parameter in trained:
                    parameter.grad = None
                continue
            rate = batch * given.sequence / step
            if where != "ours":
                best[batch] = max(rate, best.get(batch, 0.0))
            rows.add(**row, step=step, tokens_per_second=rate, **card.peak(), touched=spread.describe())
        del model, trained
    for dtype, rates in ours(given, cap).items():
        for batch in sorted(rates.keys() & best.keys()):
            found = {"dtype": dtype, "batch": batch, "ours": rates[batch], "peer": best[batch]}
            rows.add(case="verdict", **found, ratio=rates[batch] / best[batch])
