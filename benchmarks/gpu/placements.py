r"""Where experts are by themselves (`auto`) against everywhere they could be: parts that each can run alone.

    python -m benchmarks.gpu placements --part cells --out results        # auto against the best placement, by cap
    python -m benchmarks.gpu placements --part full --out results         # 48 layers on 24 GB
    python -m benchmarks.gpu placements --part large --out results        # layers of 235B and 671B, streamed and held
    python -m benchmarks.gpu placements --part resident --out results     # everything on the GPU against stock
    python -m benchmarks.gpu placements --part safety --out results       # what comes between steps, memory by step
    python -m benchmarks.gpu placements --part losses --out results       # losses of each placement
    python -m benchmarks.gpu placements --part peer --out results         # experts4bit-qlora beside it
    python -m benchmarks.gpu placements --part estimate --out results     # estimated against measured memory
    python -m benchmarks.gpu placements --part low-bit --out results      # int4 beside bf16 and stock; the same with:
    python -m benchmarks.gpu placements --part widening --out results     # the kernels alone
    python -m benchmarks.gpu placements --part formats --layers 6 --out results     # memory of each low-bit format
    python -m benchmarks.gpu placements --part drawn --layers 48 --where resident --out results
    python -m benchmarks.gpu placements --part drawn --family qwen3_235b --layers 94 --rest 4 --out results \
        --cells 24/4 48/4 48/16/offload
    python -m benchmarks.gpu placements --part drawn --family deepseek_v3 --layers 30 --cells 48/4 --out results
    python -m benchmarks.gpu placements --part cells --tiny --out results # try the script without a GPU

Stock SFTTrainer trains Qwen3-30B-A3B's layers (random weights, routing spread as a trained model spreads it) with LoRA
of rank 16 on attention and every expert, in bf16 with gradient checkpointing. PyTorch's memory is capped. A part writes
`PART.jsonl` to --out, a row as soon as it is measured.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from card import Card, Rows

PARTS = {
    "cells": "cells", "full": "full", "resident": "full", "safety": "safety", "losses": "losses",
    "estimate": "estimated", "peer": "peers", "low-bit": "low_bit", "widening": "low_bit", "drawn": "low_bit",
    "large": "large", "formats": "formats",
}  # fmt: skip
FAMILIES = ("qwen3_30b", "deepseek_v2", "qwen3_235b", "deepseek_v3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, PART.jsonl")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to try the script")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--cells",
        nargs="+",
        help="GB/BATCH; of part cells also GB/BATCH/BUS, copies made BUS times; of part drawn also GB/BATCH/offload",
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, help="of parts cells, large and drawn")
    parser.add_argument("--batch", type=int, nargs="+", help="rows of a batch; default: each part's")
    parser.add_argument("--caps", type=float, nargs="+", help="GB that PyTorch may have; default: each part's")
    parser.add_argument("--loss", nargs="+", choices=("SFT", "DPO"), default=["SFT", "DPO"], help="of part losses")
    parser.add_argument("--steps", type=int, help="of the optimizer, of parts safety, losses and drawn")
    parser.add_argument("--dtypes", nargs="+", default=["int4", "bf16"], help="kt_expert_dtype, of part low-bit")
    parser.add_argument("--where", choices=("streamed", "resident"), default="streamed", help="of part drawn")
    parser.add_argument("--rank", type=int, default=8, help="of part drawn")
    parser.add_argument("--lora", choices=("cpu", "gpu", "auto"), default="cpu", help="where LoRA is, of part drawn")
    parser.add_argument("--rest", type=int, choices=(4, 16), default=16, help="bits of linear layers, of part drawn")
    parser.add_argument("--offload", action="store_true", help="activation_offloading, of part drawn")
    checkpoint = Path(tempfile.gettempdir()) / "placements-checkpoints"
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="folder for checkpoints, kept for reuse")


def run(given: argparse.Namespace, device: torch.device) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    card = Card(device)
    rows = Rows(given.out, given.part, card)
    module: Any = importlib.import_module(PARTS[given.part])
    run_part = getattr(module, f"run_{given.part}", module.run)
    run_part(given, card, rows)
