"""What experts over ranks would bring on 1 to 8 GPUs and 1 to 4 hosts: predicted from what one and two GPUs took.

    python benchmarks/ranks_model.py                         # tables, as they are in docs/ranks.md
    python benchmarks/ranks_model.py --plot docs/ranks_model.png
    python benchmarks/ranks_model.py --check                 # predictions beside measurements

A step of a rank is, layer by layer and in each direction, the larger of the bus and of what the GPU computes, and what
it exchanges. Of streamed experts each weight crosses the bus twice a step, in forward and in backward (the recompute of
checkpointing is kept). No step is shorter than the host takes to launch its kernels. Constants are of an H200 (PCIe 5,
docs/gpu.md and docs/low-bit.md: 12 of Qwen3-30B-A3B's layers, LoRA r=16, SFTTrainer, checkpointing, routing spread)
and NVLink.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUS = 54e9  # bytes/s of a GPU's PCIe 5, all GPUs of a host at the same time (two were measured)
NVLINK = 210e9  # bytes/s that a rank receives: all_gather of 33.5 MB in 0.16 ms
LAUNCH = 0.0165  # seconds a layer and step that the host launches kernels: 12 layers of 2,048 tokens take 0.18 to 0.21
# `LAUNCH` of streamed layers on several ranks, where hosts wait for copies and so for each other: two H200s took 0.33
# to 0.38 s for 12 layers, bf16 or int4, 2,048 or 8,192 tokens a rank, and with resident ones 0.18 and 0.31.
LAUNCH_ON_RANKS = 0.028
GPU = 129e12  # FLOP/s in the slope between 8,192 and 16,384 tokens
FIXED = 0.0045  # seconds a layer and step beside that slope, taken to be the same for any number of GPUs
FORWARD = 1 / 3  # of what the GPU computes; in a trace of two H200s the bus bounds forward and the GPU backward
WIDEN = 0.65e-12  # seconds a weight of int4, in forward and again in backward: 2.56 bytes at 0.94 of a copy's rate
UNEVEN = 1.1  # rows of the rank that has most over the mean, routing spread
BITS = {"bf16": 16.0, "int4": 4.5}
NETWORKS = {"10 GbE": 1.1e9, "100 GbE": 11e9, "400 Gb/s": 45e9}  # bytes/s of a host
TIERS = ("streamed", "resident")
GPUS, HOSTS = (1, 2, 4, 8), (1, 2, 4)
RANK = 16  # of LoRA on experts


@dataclass(frozen=True)
class Model:
    """Sizes: layers with experts, E, K, hidden, intermediate, parameters of attention a layer."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    attention: float


MODELS = {
    "Qwen3-30B-A3B": Model(48, 128, 8, 2048, 768, 19e6),
    "Qwen3-235B-A22B": Model(94, 128, 8, 4096, 1536, 71e6),
    "DeepSeek-V3": Model(58, 256, 8, 7168, 2048, 187e6),
}
_REFERENCE = MODELS["Qwen3-30B-A3B"]  # that constants a layer were measured with


def weights(m: Model) -> float:
    """Weights of a layer's experts."""
    return 3.0 * m.experts * m.hidden * m.intermediate


def step(
    m: Model, tokens: int, gpus: int, hosts: int, tier: str, dtype: str, network: float, divided: str = "host"
) -> tuple[float, float]:
    """Seconds of a step, and those of them that wait for what is between ranks.

    Args:
        m: Sizes of the model.
        tokens: Of each rank.
        gpus: Of a host.
        hosts: Of the run.
        tier: `streamed` or `resident`.
        dtype: What experts are held in.
        network: Bytes/s of a host.
        divided: Among whom experts are divided, `host` or `all`.
    """
    owners = gpus * (hosts if divided == "all" else 1)
    held = weights(m) / owners
    experts = 2 * 6 * m.top_k * m.hidden * m.intermediate * tokens * (UNEVEN if owners > 1 else 1.0)
    dense = 3 * 2 * m.attention * tokens
    compute = (experts + dense) / GPU + FIXED + (WIDEN * held * 2 if dtype == "int4" else 0)
    bus = 2 * held * BITS[dtype] / 8 / BUS if tier == "streamed" else 0.0
    directions = sum(max(compute * part, bus / 2) for part in (FORWARD, 1 - FORWARD))
    layer = max(LAUNCH_ON_RANKS if owners > 1 and tier == "streamed" else LAUNCH, directions)
    sent = 5 * tokens * m.hidden * 2  # tokens, outputs; tokens, gradients, gradients of the inputs
    between = sent * (gpus - 1) / NVLINK
    if divided == "all" and hosts > 1:
        between += gpus * sent * (hosts - 1) * gpus / network  # all GPUs of a host share its network
    once = 0.0
    if divided == "host" and hosts > 1:  # the mean of owned gradients, in fp32
        lora = 4.0 * m.layers * m.experts * RANK * 3 * (m.hidden + m.intermediate)
        once = 2 * (hosts - 1) / hosts * lora / network
    return m.layers * (layer + between) + once, m.layers * between + once


def rows(name: str, tokens: int) -> Iterator[str]:
    """Tables of a model in Markdown: GPUs of one host, and hosts of eight."""
    m = MODELS[name]
    yield f"| {name}, {tokens:,} tokens a GPU | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |"
    yield "|---" * (len(GPUS) + 1) + "|"
    for tier in TIERS:
        for dtype in BITS:
            speeds = [n * tokens / step(m, tokens, n, 1, tier, dtype, 1.0)[0] for n in GPUS]
            cells = [f"{speed:,.0f} (x{speed / speeds[0]:.1f})" for speed in speeds]
            yield f"| {tier}, {dtype} | " + " | ".join(cells) + " |"
    yield ""
    yield f"| {name}, hosts of 8 GPUs, streamed bf16 | " + " | ".join(f"{h} host{'s' * (h > 1)}" for h in HOSTS) + " |"
    yield "|---" * (len(HOSTS) + 1) + "|"
    for network, rate in NETWORKS.items():
        for divided in ("host", "all"):
            cells = []
            for hosts in HOSTS:
                seconds, waits = step(m, tokens, 8, hosts, "streamed", "bf16", rate, divided)
                cells.append(f"{8 * hosts * tokens / seconds:,.0f} ({waits / seconds:.0%} between ranks)")
            yield f"| {network}, `{divided}` | " + " | ".join(cells) + " |"
    yield ""


# Seconds a step that H200s took for 12 layers (docs/gpu.md, docs/low-bit.md, docs/ranks.md), with so many tokens each.
MEASURED = (
    ("streamed", "bf16", 2048, 1, 0.577), ("streamed", "bf16", 8192, 1, 0.573), ("streamed", "bf16", 16384, 1, 0.681),
    ("resident", "bf16", 2048, 1, 0.185), ("resident", "bf16", 8192, 1, 0.299), ("streamed", "int4", 2048, 1, 0.213),
    ("streamed", "int4", 8192, 1, 0.285), ("streamed", "int4", 16384, 1, 0.461), ("resident", "int4", 8192, 1, 0.262),
    ("streamed", "bf16", 2048, 2, 0.360), ("streamed", "bf16", 8192, 2, 0.377), ("resident", "bf16", 2048, 2, 0.184),
    ("resident", "bf16", 8192, 2, 0.306), ("streamed", "int4", 2048, 2, 0.325), ("streamed", "int4", 8192, 2, 0.343),
)  # fmt: skip


def check() -> Iterator[str]:
    """Measurements beside the prediction."""
    for tier, dtype, tokens, gpus, seconds in MEASURED:
        predicted = step(_REFERENCE, tokens, gpus, 1, tier, dtype, 1.0)[0] * 12 / _REFERENCE.layers
        part = predicted / seconds - 1
        yield f"{gpus} x {tier:9} {dtype} {tokens:6}: {predicted:.3f} s, measured {seconds:.3f} ({part:+.0%})"


def plot(file: Path, name: str, tokens: int) -> None:
    """Tokens/s over GPUs of one host, and over hosts of eight, marked as predicted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    m = MODELS[name]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for tier in TIERS:
        for dtype in BITS:
            speeds = [n * tokens / step(m, tokens, n, 1, tier, dtype, 1.0)[0] / 1e3 for n in GPUS]
            left.plot(GPUS, speeds, marker="o", label=f"{tier}, {dtype}")
    for network, rate in NETWORKS.items():
        for divided, style in (("host", "-"), ("all", "--")):
            speeds = [8 * h * tokens / step(m, tokens, 8, h, "streamed", "bf16", rate, divided)[0] / 1e3 for h in HOSTS]
            right.plot(HOSTS, speeds, style, marker="o", label=f"{network}, {divided}")
    for axes, title, ticks in ((left, "GPUs of one host", GPUS), (right, "hosts of 8 GPUs, streamed bf16", HOSTS)):
        axes.set(title=title, xticks=ticks, ylabel="thousand tokens/s", ylim=(0, None))
        axes.legend(fontsize=7)
    figure.suptitle(f"{name}, {tokens:,} tokens a GPU: predicted, not measured")
    figure.tight_layout()
    figure.savefig(file, dpi=70)


def main() -> int:
    """Print the tables, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="of each GPU")
    parser.add_argument("--check", action="store_true", help="predictions beside measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the first model to a PNG")
    given = parser.parse_args()
    lines = list(check()) if given.check else [r for n in given.model for t in given.tokens for r in rows(n, t)]
    print("\n".join(lines))
    if given.plot:
        plot(given.plot, given.model[0], given.tokens[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
