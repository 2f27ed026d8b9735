"""Experts divided among the GPUs of a host: stock SFTTrainer, a process a GPU, beside one process on one GPU.

    python benchmarks/gpu/ranks.py --gpus 1 2 --csv gpu_ranks.jsonl            # all of it: 12 layers of Qwen3-30B
    python benchmarks/gpu/ranks.py --gpus 1 2 --tiers streamed --tokens 8192   # a part of it
    python benchmarks/gpu/ranks.py --gpus 1 2 --shape tiny --layers 2          # try it on CPUs, connected by gloo

Each cell is a run of its own by torchrun. Routing is spread (routing.py), weights are random, tokens of a rank are one
row; steps are of the same rows for any number of ranks, which one GPU takes one after the other. Of a step: its median
seconds, the host's seconds in headers (waiting for the other ranks included), and the exchanges' seconds on the GPU.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]
sys.path.append(str(Path(__file__).parents[1]))

import torch

MARK = "RANKS-ROW "
PLACEMENTS = {"streamed": {"resident": 0}, "resident": {"streamed": 0}}


class Watch:
    """Seconds of the exchanges: of headers on the host, of rows on the GPU (or, without one, on the host)."""

    def __init__(self) -> None:
        self.headers = self.rows = 0.0
        self.bytes = 0
        self._events: list[tuple[Any, Any]] = []

    def install(self) -> None:
        from kt_hf.ranks import Ranks

        agree, exchange = Ranks.agree, Ranks._exchange

        def timed_agree(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return agree(*args, **kwargs)
            finally:
                self.headers += time.perf_counter() - begin

        def timed_exchange(ranks: Any, received: torch.Tensor, sent: torch.Tensor, *rest: Any) -> None:
            self.bytes += sent.nbytes
            if not sent.is_cuda:
                begin = time.perf_counter()
                exchange(ranks, received, sent, *rest)
                self.rows += time.perf_counter() - begin
                return
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            exchange(ranks, received, sent, *rest)
            events[1].record()
            self._events.append(events)

        Ranks.agree, Ranks._exchange = timed_agree, timed_exchange  # type: ignore[method-assign]

    def take(self) -> tuple[float, float, int]:
        """Headers' seconds, rows' seconds and bytes sent since the last call."""
        for begin, end in self._events:
            end.synchronize()
            self.rows += begin.elapsed_time(end) / 1000
        taken = self.headers, self.rows, self.bytes
        self.__init__()  # type: ignore[misc]
        return taken


def train(given: argparse.Namespace, tier: str, tokens: int) -> None:
    """One run, in each of the processes that torchrun has started; rank 0 prints its row."""
    import torch.distributed as dist
    from card import Card
    from checkpoints import make_checkpoint
    from models import experts_of, make_config
    from routing import Spread
    from sft import Tokens, summary, trainer_for
    from transformers import TrainerCallback

    from kt_hf import KTConfig, load_kt_model

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tiny = given.shape == "tiny"
    if not tiny:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if tiny else "cpu:gloo,cuda:nccl")
    card = Card(torch.device("cpu") if tiny else torch.device("cuda"))
    config = make_config("qwen3_30b", given.shape, given.layers)
    folder = given.checkpoint / f"qwen3_30b-{given.shape}-{given.layers}"
    if rank == 0:
        make_checkpoint(config, folder, card.device)
    dist.barrier()
    placement = None
    if not tiny:
        placement = {"resident": 0, "streamed": 0, tier: experts_of(config)}
    begin = time.perf_counter()
    model = load_kt_model(
        folder, KTConfig(kt_lora_rank=16, kt_backend="torch" if tiny else "auto", kt_expert_placement=placement)
    )
    loading = time.perf_counter() - begin
    model.config.use_cache = False
    spread = Spread(model)
    watch, parts = Watch(), []
    if size > 1:
        watch.install()

    class Parts(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            parts.append(watch.take())

    class Rows(Tokens):
        """Batch n of rank r is batch n * size + r of one process."""

        def __call__(self, rows: Any) -> Any:
            self._count += 1
            return self.batch(len(rows), tokens, (self._count - 1) * size + rank)

    trainer = trainer_for(
        card, model, 1, Rows(config.vocab_size, tokens), given.steps * given.rows, callbacks=[Parts()],
        gradient_accumulation_steps=max(1, given.rows // size),
    )  # fmt: skip
    trainer.args.max_steps = given.steps
    trainer.train()
    timed = trainer.timer.steps[2:]
    per_step = tokens * size * max(1, given.rows // size)
    headers, rows, sent = (sorted(values)[len(values) // 2] for values in zip(*parts[2:], strict=True))
    if rank == 0:
        result = summary(timed, per_step)
        row = {
            "tier": tier, "gpus": size, "tokens_a_rank": tokens, "layers": given.layers, "loading": round(loading, 1),
            "header_seconds": round(headers, 4), "rows_seconds": round(rows, 4), "gb_sent": round(sent / 1e9, 3),
            "exchange_share": round((headers + rows) / result["step"], 3), "experts_touched": spread.describe(),
            "losses": [round(e["loss"], 4) for e in trainer.state.log_history if "loss" in e],
            "norms": [round(e["grad_norm"], 4) for e in trainer.state.log_history if "grad_norm" in e],
            "device": "CPU" if tiny else torch.cuda.get_device_name(), "torch": torch.__version__, **result,
        }  # fmt: skip
        print(MARK + json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def series(given: argparse.Namespace) -> int:
    """Each cell by torchrun; a table of what came out, and the rows in the file."""
    results, failed = [], 0
    for tier in given.tiers:
        for tokens in given.tokens:
            for gpus in given.gpus:
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(gpus), "--standalone",
                    __file__, *sys.argv[1:], "--cell", tier, str(tokens),
                ]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit, check=False)
                rows = [json.loads(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK)]
                if done.returncode or not rows:
                    failed += 1
                    print(f"{tier}, {tokens} tokens, {gpus} GPUs failed:\n{done.stderr[-3000:]}", flush=True)
                    continue
                results += rows
                print(json.dumps(rows[0]), flush=True)
                if given.csv:
                    with given.csv.open("a") as file:
                        file.write(json.dumps(rows[0]) + "\n")
    for row in results:
        one = next((r for r in results if r["gpus"] == 1 and same(r, row)), None)
        ratio = row["tokens_per_second"] / one["tokens_per_second"] if one else float("nan")
        apart = abs(row["losses"][-1] - one["losses"][-1]) if one else float("nan")
        print(
            f"{row['tier']:9} {row['gpus']} GPU(s) {row['tokens_a_rank']:6} tokens a rank "
            f"{row['tokens_per_second']:9.0f} tokens/s  x{ratio:.2f}  exchange {row['exchange_share']:.1%}  "
            f"last loss apart {apart:.4f}"
        )
    return failed


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["tier"], one["tokens_a_rank"]) == (other["tier"], other["tokens_a_rank"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiers", nargs="+", choices=tuple(PLACEMENTS), default=["streamed", "resident"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, help="rows of a step, of all ranks together; default: as many as GPUs")
    parser.add_argument("--shape", choices=("real", "tiny"), default="real")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "kt_hf_ranks")
    parser.add_argument("--csv", type=Path, help="file that rows are appended to, one JSON object a line")
    parser.add_argument("--limit", type=float, default=500, help="seconds that a cell may take")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.rows = given.rows or max(given.gpus)
    if given.cell:
        train(given, given.cell[0], int(given.cell[1]))
        return 0
    return series(given)


if __name__ == "__main__":
    sys.exit(main())
