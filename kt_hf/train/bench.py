"""Forward and backward of one layer of experts on this machine, over tokens and threads.

As a program it measures one number of threads and prints JSON: worker threads are made once in a process.

python -m kt_hf.train.bench '{"shape": [64, 6, 2048, 1408], "rank": 8, "backend": "AMXBF16", ...}'
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import KTAMXError


@dataclass(frozen=True)
class Row:
    """Milliseconds, medians over the runs, of a batch of `tokens`."""

    backend: str
    threads: int
    tokens: int
    forward_ms: float
    backward_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Through one such layer, forward and backward."""
        return self.tokens / (self.forward_ms + self.backward_ms) * 1000


def measure(
    shape: tuple[int, int, int, int], rank: int, backend: str, threads: int, tokens: Sequence[int], runs: int
) -> list[Row]:
    """Measure in a new process, with its own worker threads.

    Args:
        shape: Experts E, experts a token K, hidden size H, intermediate size I.
        rank: Of LoRA.
        backend: `AMXBF16`, `AMXInt8`, `AMXInt4` or `torch`.
        threads: Worker threads, PyTorch's for the backend `torch`.

    Raises:
        KTAMXError: The process failed; the message is its last line.
    """
    asked = {"shape": shape, "rank": rank, "backend": backend, "threads": threads, "tokens": list(tokens), "runs": runs}
    command = [sys.executable, "-m", "kt_hf.train.bench", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KTAMXError(f"The benchmark failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _measure(asked: dict[str, Any]) -> list[Row]:
    import torch

    from ..backends import ExpertShape, ExpertWeights, pack
    from ..cpu import plan_threads

    E, K, H, I = asked["shape"]  # noqa: E741
    kernel = asked["backend"] != "torch"
    torch.set_num_threads(1 if kernel else asked["threads"])
    shape, most = ExpertShape(E, K, H, I), max(asked["tokens"])
    weights = ExpertWeights(
        torch.randn(E, 2 * I, H, dtype=torch.bfloat16).mul_(0.02),
        torch.randn(E, H, I, dtype=torch.bfloat16).mul_(0.02),
    )
    plan = plan_threads(asked["threads"]) if kernel else plan_threads(1)
    layer = pack(asked["backend"], weights, shape, asked["rank"], plan, most, False, False, "benchmark")
    layer.set_lora(tuple(torch.randn(size).mul_(0.02) for size in shape.lora_shapes(asked["rank"])))
    rows = []
    for T in asked["tokens"]:
        x, grad = (torch.randn(T, H).to(torch.bfloat16) for _ in range(2))
        ids = torch.rand(T, E).topk(K).indices
        routing = torch.rand(T, K)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(asked["runs"] + 1):
            start = time.perf_counter()
            _, saved = layer.forward(x, ids, routing, save=True)
            middle = time.perf_counter()
            assert saved is not None
            layer.backward(saved, grad)
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - middle)
        forward, backward = (round(statistics.median(t[1:]) * 1000, 2) for t in times)  # the first warms up
        rows.append(Row(asked["backend"], plan.workers if kernel else asked["threads"], T, forward, backward))
    return rows


def plot(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw tokens per second over tokens, a curve for each number of threads, into the PNG `path`; returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for backend, threads in dict.fromkeys((row.backend, row.threads) for row in rows):
        curve = [row for row in rows if (row.backend, row.threads) == (backend, threads)]
        label = f"{backend}, {threads} thread{'s' if threads > 1 else ''}"
        axes.plot([row.tokens for row in curve], [row.tokens_per_second for row in curve], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in a batch")
    axes.set_ylabel("tokens per second through a layer")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in _measure(json.loads(sys.argv[1]))]))
