"""Benchmarks with one GPU: `python benchmarks/gpu COMMAND --help`.

    train   training steps, experts on the CPU, on the GPU or on both; stock and the peer beside them
    tiers   the planner's choice against a sweep over all ways to split a layer's experts
    fp8     experts streamed in FP8 against the same in bf16
    lora    what LoRA of streamed experts costs on the CPU, by part of a step
    products one layer: fused kernels on and off, the grouped product of kt_hf beside PyTorch
    placements  `auto` against other placements, stock and a peer, in parts
    gated   layers of gpt-oss-120b's shape with its gate and biases, bf16 and MXFP4, beside plain ones
    decoding one stream of tokens, experts resident, streamed and moved by `auto`, in bf16 and int4; stock beside them
    folding gradient accumulation folded into larger batches, where experts are streamed

Each can be tried without a GPU by `--device cpu --shape tiny`.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from pathlib import Path

# This folder as well, for `python -m benchmarks.gpu`; harness.py and its neighbours.
sys.path[:0] = [str(Path(__file__).parent)]
sys.path.append(str(Path(__file__).parents[1]))

import decoding
import folding
import fp8
import gated
import lora
import placements
import products
import tiers
import train
from common import prepare

COMMANDS = {
    "train": train,
    "tiers": tiers,
    "fp8": fp8,
    "lora": lora,
    "placements": placements,
    "products": products,
    "decoding": decoding,
    "folding": folding,
    "gated": gated,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--shape", choices=("deepseek-v2-lite", "tiny"), default="deepseek-v2-lite")
        command.add_argument("--sequence", type=int, default=2048, help="tokens of a row")
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        command.add_argument("--csv", type=Path, help="file to append rows to")
        module.add_arguments(command)
    given = parser.parse_args()
    if getattr(given, "tiny", False):
        given.device, given.shape, given.sequence = "cpu", "tiny", 32
    COMMANDS[given.command].run(given, prepare(given.device))


if __name__ == "__main__":
    main()
