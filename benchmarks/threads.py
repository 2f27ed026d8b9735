"""Workers of the operators, PyTorch's threads beside them or without them, against tokens: is the default the best?

    python benchmarks/threads.py [--shape deepseek-v2-lite] [--tokens 64 ...] [--workers 1 2 ...]

One expert layer with LoRA, forward + backward. Each number of workers is a process of its own, and they take turns.
No workers stand for backend torch. Prints for each number of tokens the best combination and how much longer the
default takes: what kt_backend=auto chooses, the operators on the physical cores less one with as many threads of
PyTorch's, or backend torch on all cores. With --check it ends with status 1 if that is more than 5 % anywhere from 64
tokens on.
"""

from __future__ import annotations

import sys

from cases import default_backend, patched, step
from harness import Timing, append, cores, describe, parser
from processes import Build, Run, take_turns
from shapes import SIZES, Shape, fitting

from kt_hf import KTConfig
from kt_hf.backends import kernel_availability
from kt_hf.system.cpu import plan_threads
from kt_hf.system.memory import available_memory

RANK = 8
PLANNED = ", planned"  # marks the default in the CSV


def case_name(torch_threads: int) -> str:
    return f"PyTorch on {torch_threads}"


def build(shape: Shape, workers: int, torch_threads: list[int], longest: int) -> Build:
    def make() -> dict[str, Run]:
        config = KTConfig(
            kt_backend="AMXBF16" if workers else "torch",
            kt_num_threads=workers or None,
            kt_lora_rank=RANK,
            kt_share_backward_weights=False,
            kt_max_len=longest,
        )
        experts, parameters, model = patched(shape, RANK, config)
        held = experts.factory.threads.workers
        if workers and held != workers:
            raise ValueError(f"{workers} workers were asked for, {held} compute")
        return {
            f"{workers}/{case_name(count)}": step(experts, parameters, shape, count, lambda: model)
            for count in torch_threads
        }

    return make


def main() -> int:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--shape", choices=SIZES, default="deepseek-v2-lite")
    arguments.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 2048])
    arguments.add_argument("--workers", type=int, nargs="+", help="default: 1, 2, 4, ... and the cores, less one, two")
    arguments.add_argument("--check", action="store_true")
    given = arguments.parse_args()
    if not kernel_availability().ok:
        raise SystemExit(f"Only the operators have workers: {kernel_availability().reason}.")
    most, planned = cores(), plan_threads().workers
    few = [0] + [2**n for n in range(most.bit_length())] + [most, most - 1, most - 2, planned]
    workers = given.workers or sorted({count for count in few if 0 <= count <= most})
    torch_threads = sorted({1, max(1, most // 2), planned, most})
    shape = fitting(given.shape, 1)
    default = (0, most) if default_backend(shape) == "torch" else (planned, planned)
    print(describe())
    keep = len(workers) * 2.5 * shape.bytes < 0.8 * available_memory()
    timings = take_turns(
        {f"{count} workers": build(shape, count, torch_threads, max(given.tokens)) for count in workers},
        given.tokens,
        given.runs,
        keep,
    )
    worst = 0.0
    for tokens in given.tokens:
        found: dict[tuple[int, int], Timing] = {}
        for count in workers:
            for beside in torch_threads:
                timing = timings.get((f"{count}/{case_name(beside)}", tokens))
                if timing:
                    timing.threads = count
                    found[count, beside] = timing
        for count in workers:
            rows = {
                case_name(beside) + (PLANNED if (held, beside) == default else ""): timing
                for (held, beside), timing in found.items()
                if held == count
            }
            append("threads", shape.label(RANK), tokens, count, rows, given.save)
        print(f"{shape.label(RANK)}, T={tokens}, ms of forward + backward")
        print("  workers  " + "".join(f"{case_name(beside):>16s}" for beside in torch_threads))
        for count in workers:
            cells = [found.get((count, beside)) for beside in torch_threads]
            print(f"  {count:7d}  " + "".join(f"{cell.median() * 1e3:16.2f}" if cell else " " * 16 for cell in cells))
        if default in found:
            best = min(found, key=lambda key: found[key].median())
            behind = found[default].median() / found[best].median() - 1
            worst = max(worst, behind if tokens >= 64 else 0.0)
            print(f"  best: {best[0]} workers, {case_name(best[1])}; default: {default}, {behind:.1%} more")
    return int(given.check and worst > 0.05)


if __name__ == "__main__":
    sys.exit(main())
