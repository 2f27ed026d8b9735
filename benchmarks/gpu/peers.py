"""Part `peer`: experts4bit-qlora's fastest setting on the same checkpoint and cap, if it can be imported.

Its experts are in NF4 in page-locked host memory, ours in bf16; LoRA of rank 16 on attention and experts, adapters in
bf16, checkpointing. Ours come from part `cells` of the same folder of results.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
from card import Card, Rows, read_rows
from checkpoints import make_checkpoint
from models import make_config
from sft import RANK, Tokens

STEPS = 4


def load(folder: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    """The peer's model, and what it trains."""
    from experts4bit_qlora import load_moe_4bit_streaming
    from experts4bit_qlora import train as peer
    from experts4bit_qlora.engines.fast import enable_fast_train

    model, _ = load_moe_4bit_streaming(
        str(folder), "cuda", torch.bfloat16, RANK, 2.0 * RANK, offload=True, pin=True, quant_type="nf4"
    )
    peer.add_attention_lora(model, RANK, 2.0 * RANK, torch.bfloat16)
    experts, attention = peer.trainable_lora_param_ids(model)
    trained = []
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in experts or id(parameter) in attention)
        trained += [parameter] if parameter.requires_grad else []
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    enable_fast_train(model, dgrad=True, absmax_dq=False)
    model.enable_input_require_grads()
    return model.train(), trained


def steps_of(model: Any, trained: list[Any], batch: int, length: int, card: Card) -> list[float]:
    optimizer, tokens = torch.optim.AdamW(trained, lr=1e-4, fused=True), Tokens(model.config.vocab_size, length)
    seconds = []
    for number in range(STEPS):
        inputs = {name: value.to(card.device) for name, value in tokens.batch(batch, length, number).items()}
        card.synchronize()
        begin = time.perf_counter()
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        card.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


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
    ours = {row["batch"]: row["tokens_per_second"] for row in read_rows(given.out, "cells")
            if row["family"] == "qwen3_30b" and row["case"] == "auto" and row.get("step")
            and row["bus"] == "1/1" and row["cap_gb"] == cap}  # fmt: skip
    model, trained = load(folder)
    for batch in given.batch or [1, 4, 8]:
        card.reset()
        row: dict[str, Any] = {"case": "experts4bit-qlora", "layers": given.layers, "batch": batch, "cap_gb": cap}
        try:
            step = statistics.median(steps_of(model, trained, batch, given.sequence, card))
        except torch.OutOfMemoryError as error:
            rows.add(**row, error=str(error).splitlines()[0][:120])
            continue
        rate = batch * given.sequence / step
        ratio = ours[batch] / rate if batch in ours else None
        rows.add(**row, step=step, tokens_per_second=rate, ours=ours.get(batch), ratio=ratio, **card.peak())
