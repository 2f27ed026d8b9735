"""Experts divided among processes of a CPU, beside one process on the same cores: seconds of a training step.

    python benchmarks/ranks_cpu.py [--processes 2] [--backend torch] [--tokens 1024] [--rounds 3]

Ranks share the memory's bandwidth and the cores, and exchange tokens: on a CPU they can only lose. This says how much.
One process takes the rows of all ranks at once, on as many threads as there are ranks. Runs alternate; of each round
the median step, of all rounds the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

MARK = "RANKS-CPU "


def train(given: argparse.Namespace) -> None:
    """The steps of one process, or of one of several; the first prints the median."""
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from kt_hf import KTConfig, apply_kt_moe, kt_lora_config
    from kt_hf.experts import clip_grad_norm_

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(given.processes // ranks)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=512, moe_intermediate_size=256, intermediate_size=512, num_hidden_layers=4, num_experts=32,
        num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=4096,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).bfloat16()
    threads = given.processes // ranks if given.backend != "torch" else None
    model = apply_kt_moe(model, KTConfig(kt_backend=given.backend, kt_lora_rank=8, kt_num_threads=threads))
    model = get_peft_model(model, kt_lora_config(model, 8))
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rank, seconds = int(os.environ.get("RANK", 0)), []
    for step in range(given.steps):
        rng = torch.Generator().manual_seed(step)
        ids = torch.randint(4096, (given.processes, given.tokens // given.processes), generator=rng)
        ids = ids[rank::ranks]
        begin = time.perf_counter()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        print(MARK + json.dumps(statistics.median(seconds[2:])), flush=True)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(given)
        return
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(given.processes)]
    every: dict[str, list[float]] = {"one process": [], f"{given.processes} ranks": []}
    for _ in range(given.rounds):
        for name, how in zip(every, ([], launch), strict=True):
            # torchrun gives each process one thread; one process gets as many as all of them have.
            threads = {"OMP_NUM_THREADS": str(given.processes if not how else 1)}
            done = subprocess.run(
                [sys.executable, *how, __file__, *sys.argv[1:], "--train"], env=os.environ | threads, check=True,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            row = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
            every[name].append(json.loads(row.removeprefix(MARK)))
    for name, seconds in every.items():
        rates = [given.tokens / one for one in seconds]
        print(f"{name}: {min(seconds):.3f} to {max(seconds):.3f} s, {min(rates):.0f} to {max(rates):.0f} tokens/s")


if __name__ == "__main__":
    main()
