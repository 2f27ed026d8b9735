"""One expert layer, forward and backward: kt_hf against the bare operators, stock transformers + PEFT, and the peer.

    python benchmarks/layer.py [--shapes deepseek-v2-lite ...] [--tokens 512 ...] [--ranks 8 0] [--cases kt bare ...]

Prints milliseconds and ratios of one run, and appends to results.csv. With LoRA on every expert; rank 0 is without.

    default      KTExperts of apply_kt_moe(model): the backend and threads that kt_hf chooses
    kt           the same with AMXBF16, backward weights of the layer's own, buffers for the longest batch alone;
                 kt-int8, kt-int4: quantized
    torch        kt_hf's torch backend on all cores
    bare         kt-kernel's two calls and nothing else, on kt's packed weights
    stock        transformers' grouped_mm with PEFT's LoRA on fused experts (target_parameters), all cores
    stock-eager  transformers' loop over experts, the same LoRA
    peer         kt_kernel.sft's layer, threads and backward weights as kt's; peer-shared: its default, shared ones

With --device cuda the inputs are on a GPU, where the rest of a model would be, and copies to and from it are part of
what is timed; the bare operators' stay on the CPU. Stock is left out, for it would compute there. One more case:

    kt-lora-gpu  as kt, with the LoRA parameters on the GPU too

Started with THP_MEM_ALLOC_ENABLE=1, PyTorch's memory of all cases is in pages of 2 MB where Linux gives them for the
asking; where it gives them to everybody it always is. The rows say `huge pages` then.

Each case is a process of its own and they take turns, the others stopped; where memory does not hold them all, each
is started anew for its turn. A case whose run takes more than eight seconds is run once.
"""

from __future__ import annotations

import argparse

from cases import builds
from harness import append, describe, parser, with_pages
from processes import Build, take_turns
from shapes import SIZES, Shape, fitting

from kt_hf.system.memory import available_memory

CASES = ("default", "kt", "kt-int8", "kt-int4", "torch", "bare", "stock", "stock-eager", "peer", "peer-shared")
ON_GPU = ("kt", "kt-lora-gpu", "bare", "peer")


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--shapes", "--shape", nargs="+", choices=SIZES, default=["deepseek-v2-lite"])
    arguments.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512, 2048, 8192])
    arguments.add_argument("--ranks", "--rank", type=int, nargs="+", default=[8])
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--cases", nargs="+", choices=sorted({*CASES, *ON_GPU}))
    given = arguments.parse_args()
    possible = ON_GPU if given.device == "cuda" else CASES
    given.cases = given.cases or possible
    if wrong := sorted(set(given.cases) - set(possible)):
        arguments.error(f"--device {given.device}: not with {', '.join(wrong)}")
    print(describe())
    for shape in map(fitting, given.shapes):
        compare(given, shape)


def compare(given: argparse.Namespace, shape: Shape) -> None:
    """The cases of all ranks in turn, so that LoRA's share is of one run too."""
    processes: dict[str, Build] = {}
    threads: dict[str, int] = {}
    for rank in given.ranks:
        made, threads = builds(given.cases, shape, rank, max(given.tokens), given.device)
        processes |= {f"{name} r={rank}": of_rank(build, rank) for name, build in made.items()}
    # Twice the experts is what a case holds on average; activations of the longest batch beside them.
    held = 2 * shape.bytes + 8 * max(given.tokens) * shape.K * (shape.H + shape.inner) * 2
    keep = len(processes) * held < 0.8 * available_memory()
    timings = take_turns(processes, given.tokens, given.runs, keep)
    for rank in given.ranks:
        label = with_pages(shape.label(rank))
        if given.device == "cuda":
            label = label.replace(" r=", " inputs=GPU r=")
        print(f"{label}{'' if keep else ', a process a turn'}", flush=True)
        for tokens in given.tokens:
            keys = {case: (f"{case} r={rank}", tokens) for case in given.cases}
            found = {case: timings[key] for case, key in keys.items() if key in timings}
            for case, timing in found.items():
                timing.threads = threads[case]
            append("layer", label, tokens, 0, found, given.save)
            print(f" T={tokens}")
            for case, timing in found.items():
                ratios = [
                    f"{timing.median() / found[other].median():6.3f} of {other}"
                    for other in ("bare", "stock", "peer")
                    if other in found and other != case
                ]
                print(f"  {case:12s} {timing.threads:3d} threads  forward {timing.median('forward') * 1e3:9.2f} ms  "
                      f"backward {timing.median('backward') * 1e3:9.2f} ms  {'  '.join(ratios)}")  # fmt: skip


def of_rank(build: Build, rank: int) -> Build:
    """The same cases under names that tell the rank."""
    return lambda: {f"{case} r={rank}": run for case, run in build().items()}


if __name__ == "__main__":
    main()
