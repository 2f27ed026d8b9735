"""Whole training steps: forward, backward, optimizer (fused AdamW), refresh of the operators' LoRA; and peak memory.

    python benchmarks/step.py [--models smollm2 deepseek-v2-lite ...] [--tokens 512] [--cases kt stock peer ...]

LoRA rank 8 on attention and every expert, no checkpointing. `smollm2` is the demo's model (SmolLM2-135M up-cycled to
eight experts) on a real text; other names are slices of `--layers` layers of a shape with random weights and a
small vocabulary.

    kt            apply_kt_moe(model) with nothing set, threads as KTMoECallback sets them
    operators     the same with kt_backend=AMXBF16, which the first has where there are more than two cores or AMX
    operators-all the same with a worker for every core
    torch         the same with kt_backend=torch
    stock         transformers' grouped_mm, PEFT's LoRA on attention and fused experts, PyTorch on all cores
    stock-eager   transformers' loop over experts, the same LoRA
    peer          kt_kernel.sft at its best: a worker fewer than cores, PyTorch on one thread, own backward weights
    peer-default  kt_kernel.sft with nothing set

Every case is a process of its own that takes turns with the others. Each has the memory to itself: one at a time, made
anew for each turn, with one step before those that are measured.
"""

from __future__ import annotations

import pydoc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizer's first step would import it, in each process anew
from harness import append, cores, describe, parser, timed, with_pages
from peer import peer_model, settings
from peft import LoraConfig, get_peft_model
from processes import Build, Run, Worker, take_turns
from shapes import SIZES, fitting, random_model
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe
from kt_hf.backends import kernel_availability
from kt_hf.builtin.smollm2_moe import upcycle
from kt_hf.system.cpu import plan_threads

CASES = ("kt", "operators", "operators-all", "torch", "stock", "stock-eager", "peer", "peer-default")
RANK = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def real_model(file: Path, layers: int | None) -> dict[str, Run]:
    """Write the demo's model and tokens of a text, once for all cases."""
    model, tokenizer = upcycle(num_layers=layers)
    text = "".join(pydoc.getdoc(module) for module in (__import__(name) for name in ("argparse", "json", "logging")))
    torch.save((model, tokenizer(text * 50, return_tensors="pt").input_ids), file)
    return {}


def read_model(file: Path) -> tuple[Any, Tensor]:
    return torch.load(file, weights_only=False)  # not mapped: the pages of a mapped file would count as memory


def steps(
    model: Any, parameters: list[nn.Parameter], ids: Tensor, refresh: Callable[[], object], threads: int | None
) -> Run:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run(tokens: int) -> dict[str, float]:
        if threads:
            torch.set_num_threads(threads)
        batch = ids[:, :tokens]
        loss: list[Tensor] = []

        def optimize() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return {
            "forward": timed(lambda: loss.append(model(input_ids=batch, labels=batch).loss)),
            "backward": timed(lambda: loss[0].backward()),
            "optimizer": timed(optimize),
            "refresh": timed(refresh),
        }

    return run


def stock_case(model: Any, ids: Tensor, implementation: str) -> Run:
    model.set_experts_implementation(implementation)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = get_peft_model(model, config).train()
    return steps(model, [p for p in model.parameters() if p.requires_grad], ids, lambda: None, cores())


def kt_case(model: Any, ids: Tensor, config: KTConfig) -> Run:
    model = apply_kt_moe(model, config)
    names = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)).train()
    callback, state, control = KTMoECallback(), TrainerState(), TrainerControl()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, state, control, model=model)  # packs, and sets PyTorch's threads
    return steps(
        model, [p for p in model.parameters() if p.requires_grad], ids,
        lambda: callback.on_step_end(arguments, state, control, model=model), None,
    )  # fmt: skip


def peer_case(model: Any, ids: Tensor, best: bool, longest: int) -> Run:
    chosen = settings(RANK, max(1, cores() - 1), False, longest) if best else {}
    model, parameters, refresh = peer_model(model, RANK, chosen)
    return steps(model.train(), parameters, ids, refresh, 1 if best else None)


def builds(cases: list[str], load: Callable[[], tuple[Any, Tensor]], longest: int) -> dict[str, Build]:
    makers: dict[str, Callable[[Any, Tensor], Run]] = {
        "kt": lambda model, ids: kt_case(model, ids, KTConfig()),
        "operators": lambda model, ids: kt_case(model, ids, KTConfig(kt_backend="AMXBF16")),
        "operators-all": lambda model, ids: kt_case(model, ids, KTConfig(kt_backend="AMXBF16", kt_num_threads=cores())),
        "torch": lambda model, ids: kt_case(model, ids, KTConfig(kt_backend="torch")),
        "stock": lambda model, ids: stock_case(model, ids, "grouped_mm"),
        "stock-eager": lambda model, ids: stock_case(model, ids, "eager"),
        "peer": lambda model, ids: peer_case(model, ids, True, longest),
        "peer-default": lambda model, ids: peer_case(model, ids, False, longest),
    }

    def build(case: str) -> Build:
        def make() -> dict[str, Run]:
            torch.manual_seed(0)
            return {case: makers[case](*load())}

        return make

    needing = ("operators", "peer")
    return {case: build(case) for case in cases if kernel_availability().ok or not case.startswith(needing)}


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--models", nargs="+", choices=["smollm2", *SIZES], default=["smollm2"])
    arguments.add_argument("--tokens", type=int, nargs="+", default=[512])
    arguments.add_argument("--layers", type=int, help="default: all of smollm2, 4 of the others")
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    given = arguments.parse_args()
    print(describe())
    workers = plan_threads().workers
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            if name == "smollm2":
                file = Path(folder, "model.pt")
                Worker(lambda file=file: real_model(file, given.layers)).end()
                label = f"smollm2 r={RANK}" + (f" L={given.layers}" if given.layers else "")

                def load(file: Path = file) -> tuple[Any, Tensor]:
                    return read_model(file)
            else:
                layers = given.layers or 4
                shape = fitting(name, layers)
                label = f"{shape.label(RANK)} L={layers}"

                def load(shape: Any = shape, layers: int = layers) -> tuple[Any, Tensor]:
                    ids = torch.randint(1024, (1, max(given.tokens)), generator=torch.Generator().manual_seed(0))
                    return random_model(shape, layers, vocab=1024, head_dim=128), ids

            label = with_pages(label)
            timings = take_turns(builds(given.cases, load, max(given.tokens)), given.tokens, given.runs, keep=False)
        for tokens in given.tokens:
            found = {case: timings[case, tokens] for case in given.cases if (case, tokens) in timings}
            for case, timing in found.items():
                operators = case != "torch" and not case.startswith("stock") and kernel_availability().ok
                timing.threads = workers if operators else cores()
                if case == "peer-default":
                    timing.threads = 1  # what its KTConfig chooses
                if case == "operators-all":
                    timing.threads = cores()
            append("step", label, tokens, 0, found, given.save)
            print(f"{label}, T={tokens}")
            for case, timing in found.items():
                parts = "  ".join(f"{part} {timing.median(part):6.2f}" for part in timing.parts)
                ratio = f"{timing.median() / found['stock'].median():.3f} of stock" if "stock" in found else ""
                print(f"  {case:12s} {timing.median():6.2f} s a step ({parts})  {timing.peak_mib:6d} MiB  {ratio}")


if __name__ == "__main__":
    main()
