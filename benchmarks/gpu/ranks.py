"""Experts divided among the GPUs of a host: stock SFTTrainer, a process a GPU, beside one process on one GPU.

    torchrun --nproc-per-node 4 benchmarks/gpu/ranks.py --csv ranks.jsonl     # all of it on 4 GPUs
    python benchmarks/gpu/ranks.py --gpus 1 2 4 8 --csv ranks.jsonl           # with each number, and the ratios
    python benchmarks/gpu/ranks.py --gpus 1 2 --tiers streamed --tokens 8192  # a part of it
    python benchmarks/gpu/ranks.py --gpus 1 2 --shape tiny --layers 2         # try it on CPUs, connected by gloo

Twelve layers of Qwen3-30B. Routing is spread (routing.py), weights are random, tokens of a rank are one row; steps are
of the same rows for any number of ranks, which one GPU takes one after the other. Every second step is watched, which
takes time: the host's seconds in headers and the exchanges' on the GPU, both with and without waiting for the other
ranks. Of the other steps there are the median seconds; of the run the bus's rate of each GPU while all copy, and the
memory that the processes have of the host and of their GPUs. Then the same with the rest of the model sharded by FSDP2,
with the last rank slowed in each layer, and with the last rank killed, after which all has to end with its name said
(by kt_hf or torchrun), which takes a run without torchrun. Each of these is a process of its own on each rank.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]
sys.path.append(str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from ranks_watch import Watch, bus_rate, dense_gb, memory, of_all

MARK = "RANKS-ROW "
TIERS = ("streamed", "resident")
TROUBLE = ("sharded", "slowed", "killed")


class Trouble:
    """What is done to the last rank: nothing, a pause in each layer's forward, or an end in the third step.

    Args:
        kind: `train`, `sharded`, `slowed` or `killed`.
        given: Options.
        last: Whether this is the last rank.
    """

    def __init__(self, kind: str, given: argparse.Namespace, last: bool) -> None:
        self.kind, self.last, self.pause, self.note = kind, last, given.pause, given.checkpoint / "killed"

    def install(self, model: Any) -> None:
        if self.kind == "slowed" and self.last:
            for layer in model._kt_wrappers:
                layer.register_forward_pre_hook(lambda *_: time.sleep(self.pause))

    def step_ends(self, step: int) -> None:
        if self.kind == "killed" and self.last and step == 2:
            self.note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def loaded(given: argparse.Namespace, tier: str, card: Any) -> tuple[Any, float, Any]:
    """The patched model, the seconds that loading took, and the spread of its routing."""
    from checkpoints import make_checkpoint
    from models import experts_of, make_config
    from routing import Spread

    from kt_hf import KTConfig, load_kt_model

    tiny = given.shape == "tiny"
    config = make_config("qwen3_30b", given.shape, given.layers)
    folder = given.checkpoint / f"qwen3_30b-{given.shape}-{given.layers}"
    if dist.get_rank() == 0:
        make_checkpoint(config, folder, card.device)
    dist.barrier()
    placement = None if tiny else {"resident": 0, "streamed": 0, tier: experts_of(config)}
    begin = time.perf_counter()
    model = load_kt_model(
        folder,
        KTConfig(
            kt_lora_rank=16, kt_backend="torch" if tiny else "auto", kt_expert_placement=placement,
            kt_expert_dtype="bf16" if tiny else given.dtype,
        ),
    )  # fmt: skip
    model.config.use_cache = False
    return model, time.perf_counter() - begin, Spread(model)


def train(given: argparse.Namespace, kind: str, tier: str) -> None:
    """The runs of a cell, in each of its processes; rank 0 prints their rows, or each that is left what it was told."""
    from card import Card

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tiny = given.shape == "tiny"
    if not tiny:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if tiny else "cpu:gloo,cuda:nccl")
    card = Card(torch.device("cpu") if tiny else torch.device("cuda"))
    rates = of_all(round(bus_rate(card.device), 1))
    model, loading, spread = loaded(given, tier, card)
    trouble, watch = Trouble(kind, given, rank == size - 1), Watch()
    trouble.install(model)
    if size > 1:
        watch.install()
    common = {
        "trouble": kind, "tier": tier, "dtype": given.dtype, "gpus": size, "layers": given.layers,
        "loading": round(loading, 1), "bus_gb_per_s": rates,
        "device": "CPU" if tiny else torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip
    for number, tokens in enumerate(given.tokens if kind == "train" else given.tokens[:1]):
        card.reset()
        row, model = run(given, card, model, watch, trouble, tokens, adapt=number == 0)
        if rank == 0:
            print(MARK + json.dumps(common | row | {"experts_touched": spread.describe()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run(
    given: argparse.Namespace, card: Any, model: Any, watch: Watch, trouble: Trouble, tokens: int, adapt: bool
) -> tuple[dict[str, Any], Any]:
    """One training run: its row, and the model with its adapter."""
    from sft import Tokens, summary, trainer_for
    from transformers import TrainerCallback

    rank, size, parts = dist.get_rank(), dist.get_world_size(), list[tuple[float, float, float, int]]()

    class Parts(TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            watch.on = state.global_step % 2 == 1

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            parts.append(watch.take())
            trouble.step_ends(state.global_step)

    class Rows(Tokens):
        """Batch n of rank r is batch n * size + r of one process."""

        def __call__(self, rows: Any) -> Any:
            self._count += 1
            return self.batch(len(rows), tokens, (self._count - 1) * size + rank)

    trainer = trainer_for(
        card, model, 1, Rows(model.config.vocab_size, tokens), given.steps * given.rows, callbacks=[Parts()],
        adapt=adapt, gradient_accumulation_steps=max(1, given.rows // size),
        **({"fsdp": True} if trouble.kind == "sharded" else {}),
    )  # fmt: skip
    trainer.args.max_steps = given.steps
    trainer.train()
    headers, rows, alone, sent = (sorted(values)[len(values) // 2] for values in zip(*parts[3::2], strict=True))
    result = summary(trainer.timer.steps[2::2], tokens * size * max(1, given.rows // size))
    return {
        "tokens_a_rank": tokens, "header_seconds": round(headers, 4), "rows_seconds": round(rows, 4),
        "gb_sent": round(sent / 1e9, 3), "exchange_share": round((headers + rows) / result["step"], 3),
        "exchange_seconds_without_waiting": round(alone, 4), "share_without_waiting": round(alone / result["step"], 3),
        "dense_gb": dense_gb(trainer.model), **memory(not card.tiny),
        "losses": [round(e["loss"], 4) for e in trainer.state.log_history if "loss" in e],
        "norms": [round(e["grad_norm"], 4) for e in trainer.state.log_history if "grad_norm" in e], **result,
    }, trainer.model  # fmt: skip


def cells(given: argparse.Namespace, size: int) -> list[tuple[str, str]]:
    """(what is done to the run, tier) of each cell."""
    kinds = [kind for kind in given.trouble if size > 1 and kind != "killed"]
    return [("train", tier) for tier in given.tiers] + [(kind, given.tiers[0]) for kind in kinds]


def worker(given: argparse.Namespace) -> int:
    """One of the processes that torchrun has started: runs its rank of each cell as a process of its own."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    failed = 0
    for cell in cells(given, size):
        port = of_all(free_port())[0]
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", *cell]
        environment = {**os.environ, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=given.limit, check=False
            )
            code, out, errors = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            code, out, errors = 1, "", f"more than {error.timeout} s"
        lines = [line for line in out.splitlines() if line.startswith(MARK)]
        every = of_all((code, lines, errors[-3000:]))
        wrong = [(r, e) for r, (c, _, e) in enumerate(every) if c]
        failed += bool(wrong)
        if rank == 0:
            print("\n".join(line for _, found, _ in every for line in found), flush=True)
            for number, text in wrong[:1]:
                print(f"{' '.join(map(str, cell))} failed on rank {number} of {size}:\n{text}", flush=True)
            append(given, [json.loads(line[len(MARK) :]) for _, found, _ in every for line in found])
    dist.barrier()
    dist.destroy_process_group()
    return failed if rank == 0 else 0


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def append(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if given.csv:
        with given.csv.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def killed(given: argparse.Namespace, size: int) -> dict[str, Any]:
    """The last rank killed under torchrun, as a user's run is: how long until all has ended, and who is named."""
    note = given.checkpoint / "killed"
    note.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size), "--standalone", __file__,
        *sys.argv[1:], "--cell", "killed", given.tiers[0],
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit, check=False)
        text, seconds = done.stdout + done.stderr, time.time() - float(note.read_text())
    except subprocess.TimeoutExpired:
        text, seconds = "", float("inf")
    row = {"trouble": "killed", "rank": size - 1, "seconds": round(seconds, 2)}
    by_kt_hf = f"rank {size - 1}, which has ended" in text
    return row | {"named": by_kt_hf or (f"local_rank: {size - 1}" in text and "-9" in text), "by_kt_hf": by_kt_hf}


def series(given: argparse.Namespace) -> int:
    """Each number of GPUs by torchrun, and a table of what came out."""
    results, failed = [], 0
    for gpus in given.gpus:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(gpus), "--standalone", __file__,
            *sys.argv[1:], "--rows", str(given.rows),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        failed += done.returncode != 0
        print(done.stdout, end="", flush=True)
        results += [json.loads(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK)]
        if gpus > 1 and "killed" in given.trouble:
            results.append(killed(given, gpus))
            append(given, results[-1:])
    for row in results:
        if row["trouble"] == "killed":
            print(f"rank {row['rank']} was killed: all had ended after {row['seconds']} s, it is named: {row['named']}")
            continue
        one = next((r for r in results if r.get("gpus") == 1 and same(r, row)), None)
        ratio = row["tokens_per_second"] / one["tokens_per_second"] if one else float("nan")
        apart = abs(row["losses"][-1] - one["losses"][-1]) if one else float("nan")
        print(
            f"{row['tier']:9} {row['trouble']:7} {row['gpus']} GPU(s) {row['tokens_a_rank']:6} tokens a rank "
            f"{row['tokens_per_second']:9.0f} tokens/s  x{ratio:.2f}  exchange {row['share_without_waiting']:.1%}, "
            f"with waiting {row['exchange_share']:.1%}  "
            f"bus {min(row['bus_gb_per_s']):.0f} GB/s  host {row['host_gb_in_all']:.1f} GB  "
            f"dense {row['dense_gb']} GB  last loss apart {apart:.4f}"
        )
    return failed


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other[key] for key in ("tier", "dtype", "tokens_a_rank"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="without torchrun, which says it itself")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["streamed", "resident"])
    parser.add_argument("--dtype", choices=("bf16", "int4", "int8", "fp8"), default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, help="rows of a step, of all ranks together; default: as many as GPUs")
    parser.add_argument("--trouble", nargs="*", choices=TROUBLE, default=list(TROUBLE))
    parser.add_argument("--pause", type=float, default=0.02, help="seconds that the slowed rank waits in each layer")
    parser.add_argument("--shape", choices=("real", "tiny"), default="real")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "kt_hf_ranks")
    parser.add_argument("--csv", type=Path, help="file that rows are appended to, one JSON object a line")
    parser.add_argument("--limit", type=float, default=500, help="seconds that a cell may take")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = int(os.environ.get("WORLD_SIZE", 0))
    given.rows = given.rows or size or max(given.gpus)
    given.checkpoint.mkdir(parents=True, exist_ok=True)
    if given.cell:
        train(given, *given.cell)
        return 0
    return worker(given) if size else series(given)


if __name__ == "__main__":
    sys.exit(main())
