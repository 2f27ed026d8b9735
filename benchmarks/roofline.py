"""How far an expert layer is from what this machine can do: the larger of FLOPs by its peak and bytes by its bandwidth.

    python benchmarks/roofline.py [--shapes deepseek-v2-lite] [--tokens 16 128 512 2048 8192]

The peak is a large bf16 product of PyTorch's, the bandwidth a copy of a large tensor, both on all cores, in the same
run as the layer (kt_hf's default, LoRA rank 8). Bytes are the weights and LoRA of the experts that tokens reach, in
bf16.
"""

from __future__ import annotations

import torch
from cases import builds
from harness import Timing, append, cores, describe, parser, timed
from processes import Run, take_turns
from shapes import fitting
from sizes import SIZES, bound

from kt_hf.system.memory import available_memory

RANK = 8


def machine(size: int, mib: int) -> dict[str, Run]:
    """Seconds of a product of two size x size matrices, and of copying so many MiB (as many read as written)."""
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    source, target = (torch.ones(mib * 2**18) for _ in range(2))

    def run(_: int) -> dict[str, float]:
        torch.set_num_threads(cores())
        return {"product": timed(lambda: torch.mm(a, b)), "copy": timed(lambda: target.copy_(source))}

    return {"machine": run}


def limits(timing: Timing, size: int, mib: int) -> tuple[float, float]:
    """FLOP a second and bytes a second."""
    return 2 * size**3 / timing.median("product"), 2 * mib * 2**20 / timing.median("copy")


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--shapes", "--shape", nargs="+", choices=SIZES, default=["deepseek-v2-lite"])
    arguments.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 512, 2048, 8192])
    arguments.add_argument("--size", type=int, default=4096, help="of the matrices whose product is the peak")
    arguments.add_argument("--copy-mib", type=int, default=512)
    given = arguments.parse_args()
    print(describe())
    for shape in map(fitting, given.shapes):
        made, threads = builds(["default"], shape, RANK, max(given.tokens))
        made["machine"] = lambda: machine(given.size, given.copy_mib)
        keep = 3 * shape.bytes < 0.8 * available_memory()
        timings = take_turns(made, given.tokens, given.runs, keep)
        peak = Timing(threads=cores())
        for tokens in given.tokens:
            for part, runs in timings["machine", tokens].parts.items():
                peak.parts.setdefault(part, []).extend(runs)
        flops, rate = limits(peak, given.size, given.copy_mib)
        print(f"{shape.label(RANK)}: peak {flops / 1e12:.2f} TFLOP/s in bf16, {rate / 1e9:.1f} GB/s on {cores()} cores")
        for tokens in given.tokens:
            timing = timings["default", tokens]
            timing.threads = threads["default"]
            size = f"{shape.label(RANK)} n={given.size} MiB={given.copy_mib}"
            append("roofline", size, tokens, 0, {"machine": peak, "default": timing}, given.save)
            for part in ("forward", "backward"):
                least, by = bound(shape, part, tokens, RANK, flops, rate)
                print(f"  T={tokens:5d} {part:8s} {timing.median(part) * 1e3:9.2f} ms, "
                      f"{timing.median(part) / least:6.2f} of the {least * 1e3:.2f} ms that {by} need")  # fmt: skip


if __name__ == "__main__":
    main()
