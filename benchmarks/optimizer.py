"""Optimizer step and refresh of the operators' LoRA, for about 100 million expert-LoRA parameters, against the time
that a copy takes for as many bytes.

    python benchmarks/optimizer.py [--layers 11] [--rank 128] [--torch-threads 1 2]

Fused AdamW on fp32 masters reads parameter, gradient and two moments and writes three of them: 28 bytes a parameter.
The refresh reads 4 and writes 2 (bf16), and the operators copy those (2 and 2). A copy of a large tensor by as many
threads, in the same run, says how long the memory takes for so many bytes; prints both and their ratio.
"""

from __future__ import annotations

import torch
from cases import adapted
from harness import Timing, append, cores, describe, parser, timed
from processes import Run, take_turns
from shapes import make_batch, random_model
from sizes import Shape

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends import kernel_availability
from kt_hf.experts import kt_layers

E, K, H, INNER = 16, 2, 1024, 512  # small experts, a large rank: little to pack
ADAMW, REFRESH = 28, 6  # bytes a parameter
KERNEL = 4


def copy_run(mib: int) -> Run:
    """Seconds of a copy of so many MiB: it reads and writes that many each."""
    source, target = (torch.ones(mib * 2**18) for _ in range(2))

    def run(threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        return {"copy": timed(lambda: target.copy_(source))}

    return run


def build(layers: int, rank: int, mib: int) -> dict[str, Run]:
    model = adapted(apply_kt_moe(random_model(Shape("", E, K, H, INNER), layers), KTConfig(kt_lora_rank=rank)), rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    experts = kt_layers(model)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step(threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        optimizing = timed(optimizer.step)
        return {"optimizer": optimizing, "refresh": timed(lambda: [layer.update_lora_pointers() for layer in experts])}

    batch = make_batch(Shape("", E, K, H, INNER), 4)
    experts[0](batch["x"], batch["ids"], batch["weights"])  # that the layers work
    return {"kt": step, "memory": copy_run(mib)}


def main() -> None:
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--layers", type=int, default=11)
    arguments.add_argument("--rank", type=int, default=128)
    arguments.add_argument("--torch-threads", type=int, nargs="+", default=sorted({1, cores()}))
    arguments.add_argument("--copy-mib", type=int, default=512)
    given = arguments.parse_args()
    print(describe())
    count = given.layers * E * given.rank * 3 * (H + INNER)
    timings = take_turns(
        {"kt": lambda: build(given.layers, given.rank, given.copy_mib)}, given.torch_threads, given.runs, keep=True
    )
    per_parameter = {"optimizer": ADAMW, "refresh": REFRESH + (KERNEL if kernel_availability().ok else 0)}
    for threads in given.torch_threads:
        step, copy = timings["kt", threads], timings["memory", threads]
        bound = Timing(threads=threads)
        for part, size in per_parameter.items():
            scale = size * count / (2 * given.copy_mib * 2**20)
            bound.parts[part] = [seconds * scale for seconds in copy.parts["copy"]]
        label = f"{count / 1e6:.1f} M parameters, {given.layers} layers r={given.rank}"
        append("optimizer", label, 0, threads, {"kt": step, "memory": bound}, given.save)
        rate = 2 * given.copy_mib * 2**20 / copy.median() / 1e9
        print(f"{label}, {threads} threads of PyTorch's, a copy moves {rate:.1f} GB/s")
        for part in (*per_parameter, None):
            ours, least = step.median(part) * 1e3, bound.median(part) * 1e3
            print(f"  {part or 'both':10s} {ours:8.1f} ms, as many bytes copied {least:8.1f} ms, {ours / least:.2f}")


if __name__ == "__main__":
    main()
