"""Gradient accumulation of streamed experts, folded by `kt-hf train`, beside the same batch and the same micro-batches.

    python benchmarks/gpu folding --layers 12 --steps 20 --csv folding.csv
    python benchmarks/gpu folding --device cpu --shape tiny --layers 2 --sequence 64 --steps 4

Three runs of one checkpoint with random weights, by SFT on rows of full length: `folded` (1 x BATCH, as it is written),
`one batch` (BATCH x 1) and `accumulated` (1 x BATCH, not folded). Seconds a step are medians of all but the first
three steps; losses are compared with those of `accumulated`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from common import free_memory, machine, write
from models import QWEN, make_config, make_model
from rich.console import Console
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kt_hf.train import folding as rules
from kt_hf.train.config.read import read_arguments
from kt_hf.train.run import run as train

_SKIPPED = 3  # steps: the first ones make buffers, and layers come to the GPU
CASES = ("folded", "one batch", "accumulated")


def save_checkpoint(given: argparse.Namespace, folder: Path) -> None:
    """A Qwen3-MoE with random weights, and a tokenizer of bytes."""
    config = make_config("qwen3_moe", given.shape, given.layers)
    config.max_position_embeddings = max(given.sequence, 4096)
    # Drawn on the device: 13 GB of bf16 for twelve layers take the CPU minutes.
    make_model(config, torch.device(given.device), stock=False, own_memory=True).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(BPE(vocab={token: i for i, token in enumerate([*alphabet, "<end>"])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def one_run(given: argparse.Namespace, folder: Path, case: str) -> dict[str, Any]:
    """Seconds a step and losses of one of the cases."""
    batch, steps = (given.batch, 1) if case == "one batch" else (1, given.batch)
    settings = {
        "model_name_or_path": str(folder / "model"), "dataset": str(folder / "rows.jsonl"),
        "output_dir": str(folder / case.replace(" ", "-")), "max_steps": given.steps, "max_length": given.sequence,
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "router_aux_loss_coef": 0.0,
        "kt_expert_placement": given.placement, "kt_moe_lora_device": given.lora, "lora_rank": given.rank,
        "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-4, "report_to": "none",
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    limit, rules._PADDING = rules._PADDING, -1.0 if case == "accumulated" else rules._PADDING
    try:
        train(read_arguments(file), Console(width=200))
    finally:
        rules._PADDING = limit
    free_memory(torch.device(given.device))
    history = json.loads((folder / case.replace(" ", "-") / "trainer_state.json").read_text())["log_history"]
    rates = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    seconds = given.batch * given.sequence / statistics.median(rates[_SKIPPED:] or rates)
    return {"seconds": seconds, "losses": [row["loss"] for row in history if "loss" in row]}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--layers", type=int, default=12)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--batch", type=int, default=4, help="rows of a step")
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--lora", choices=("cpu", "gpu"), default="gpu")
    command.add_argument(
        "--placement", type=yaml.safe_load, help="kt_expert_placement, as YAML; all experts streamed without"
    )


def run(given: argparse.Namespace, device: torch.device) -> None:
    given.placement = given.placement or {"resident": 0, "streamed": QWEN["num_experts"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(given, folder / "model")
        rows = [{"text": f"{i:06d} " + "lorem ipsum dolor " * given.sequence} for i in range(given.batch * 8)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = {case: one_run(given, folder, case) for case in CASES}
    written = results["accumulated"]
    for case, result in results.items():
        apart = max(abs(a - b) for a, b in zip(result["losses"], written["losses"], strict=True))
        times = result["seconds"] / results["one batch"]["seconds"]
        row = {"case": case, "layers": given.layers, "batch": given.batch, "sequence": given.sequence,
               "seconds": result["seconds"], "of one batch": times, "losses apart": apart}  # fmt: skip
        print(row)
        if given.csv:
            write(given.csv, machine(device) | row)
