"""Streamed experts as an FP8 checkpoint has them against the same in bf16: training steps of two models in turn.

    python benchmarks/gpu fp8 --csv gpu_fp8.csv
    python benchmarks/gpu fp8 --device cpu --shape tiny --layers 3 --batch 1 --sequence 64    # try the script

Both are of DeepSeek-V2-Lite's shape with checkpointing, LoRA on the GPU and `--resident` experts of each layer there;
one is loaded from a checkpoint of random FP8 weights, the other made in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import free_memory, machine, write
from models import adapted, experts_of, make_config, make_fp8_checkpoint, make_model, set_checkpointing, start_again
from tiers import rounds

from kt_hf import KTConfig, apply_kt_moe, load_kt_model
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.tiered import TieredBackend


def made(source: str, given: argparse.Namespace, device: torch.device) -> tuple[Any, float]:
    """A model, and the seconds its loading took."""
    config = make_config("deepseek_v2", given.shape, given.layers)
    tiers = {"resident": given.resident, "streamed": experts_of(config) - given.resident}
    settings = KTConfig(kt_lora_rank=8, kt_expert_placement=tiers, kt_moe_lora_device="gpu")
    with tempfile.TemporaryDirectory() as folder:
        if source == "fp8":
            make_fp8_checkpoint(config, Path(folder))
            begin = time.perf_counter()
            model = load_kt_model(folder, settings)
        else:
            whole = make_model(config, device, stock=False, own_memory=True)
            begin = time.perf_counter()
            model = apply_kt_moe(whole, settings)
        seconds = time.perf_counter() - begin
    model.config.use_cache = False
    model = adapted(model, 8, device)
    set_checkpointing(model, True)
    start_again(model, "gpu", device)
    return model, seconds


def streamed_bytes(model: Any) -> int:
    """Of host memory, in streamed experts."""
    backends = [layer._runner.backend for layer in model._kt_wrappers]
    parts = [p.backend for b in backends if isinstance(b, TieredBackend) for p in b.parts] + backends
    return sum(t.nbytes for p in parts if isinstance(p, StreamedBackend) for t in p.weights.tensors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--resident", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)


def run(given: argparse.Namespace, device: torch.device) -> None:
    models = {source: made(source, given, device) for source in ("fp8", "bf16")}
    for batch in given.batch:
        steps = rounds({source: model for source, (model, _) in models.items()}, given, batch * given.sequence, None)
        taken = {source: [seconds for seconds, _ in found] for source, found in steps.items()}
        for source, (model, loading) in models.items():
            step = statistics.median(taken[source])
            row = {
                "source": source, "layers": given.layers, "batch": batch, "sequence": given.sequence,
                "resident": given.resident, "step": step, "fastest_step": min(taken[source]),
                "tokens_per_second": batch * given.sequence / step, "streamed_gb": streamed_bytes(model) / 1e9,
                "loading": loading,
            }  # fmt: skip
            print("  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in row.items()), flush=True)  # fmt: skip
            if given.csv:
                write(given.csv, machine(device) | row)
        free_memory(device)
