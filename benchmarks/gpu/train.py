"""Training steps of a DeepSeek-V2-Lite-shaped model with one GPU: attention there, experts on the CPU, or on both.

    python benchmarks/gpu train --csv gpu_train.csv                                  # all experts on the CPU
    python benchmarks/gpu train --gpu-experts 0 8 16 32 64 --layers 9 --csv gpu_train.csv
    python benchmarks/gpu train --placement cpu 16,0 0,64 8,24 auto gpu --csv gpu_train.csv    # a sweep: R,S
    python benchmarks/gpu train --case stock --csv gpu_train.csv                     # all on the GPU
    python benchmarks/gpu train --case streamed --csv gpu_train.csv                  # stock, experts in host memory
    python benchmarks/gpu train --case peer --family qwen3_moe --csv gpu_train.csv   # ktransformers' own layer
    python benchmarks/gpu train --check --layers 6                                   # losses of 30 steps
    python benchmarks/gpu train --device cpu --shape tiny                            # try the script without a GPU

Weights are random: one layer's experts serve all layers until they are packed. LoRA is on attention and every MLP.
`--family qwen3_moe` has the same sizes; the peer takes no DeepSeek-V2. others.py says what the cases are.
Seconds a step are medians; parts.py says what its parts are.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import others
import psutil
import torch
from common import free_memory, machine, write
from models import adapted, experts_of, make_config, make_fp8_checkpoint, make_model, set_checkpointing, start_again
from parts import PARTS, Parts, Steps, slower_bus, watch, watch_transfers

from kt_hf import KTConfig, apply_kt_moe, load_kt_model


def run_steps(model: Any, given: argparse.Namespace, batch: int, steps: int, parts: Parts | None) -> dict[str, Any]:
    """Train `steps` steps on one batch; losses, and medians of the step and its parts over all but the first."""
    trainer = Steps(model, given.sequence, batch, given.lr)
    reset_peaks(trainer.device)
    seconds, losses, taken = zip(*(trainer.one(parts) for _ in range(steps)), strict=True)
    step = statistics.median(seconds[1:] or seconds)
    medians = {part: statistics.median([one.get(part, 0.0) for one in taken[1:] or taken]) for part in PARTS if parts}
    return {"losses": losses, "step": step, "tokens_per_second": batch * given.sequence / step} | medians


def reset_peaks(device: torch.device) -> None:
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory


def peaks(device: torch.device) -> dict[str, float]:
    host = float(psutil.Process().memory_info().rss)
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        host = float(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"gpu_peak_gb": gpu / 1e9, "host_peak_gb": host / 1e9}


def measure(model: Any, given: argparse.Namespace, case: dict[str, Any], parts: Parts | None) -> None:
    device = next(model.parameters()).device
    for lora_device in given.lora_device if parts else ["gpu"]:
        for checkpointing in given.checkpointing:
            set_checkpointing(model, checkpointing == "on")
            for batch in given.batch:
                what = case | {"batch": batch, "checkpointing": checkpointing, "lora_device": lora_device}
                start_again(model, lora_device, device)
                try:
                    found = run_steps(model, given, batch, given.steps + 1, parts)
                except torch.cuda.OutOfMemoryError as error:
                    print(f"{what}: out of GPU memory ({str(error).splitlines()[0][:100]})", flush=True)
                    continue
                losses = found.pop("losses")
                row = what | found | peaks(device) | {"first_loss": losses[0], "last_loss": losses[-1]}
                told = "  ".join(f"{part} {found[part]:.3f}" for part in PARTS if part in found)
                memory = f"GPU {row['gpu_peak_gb']:.1f} GB  host {row['host_peak_gb']:.1f} GB"
                rate = f"{found['step']:.3f} s  {found['tokens_per_second']:.0f} tokens/s"
                print(f"{what}\n   {rate}  {memory}  {told}", flush=True)
                if given.csv:
                    write(given.csv, machine(device) | dict.fromkeys(PARTS, "") | row)


def check(model: Any, given: argparse.Namespace, gpu_experts: int, losses: dict[str, list[float]]) -> None:
    """30 losses of each LoRA device, with and without checkpointing."""
    device = next(model.parameters()).device
    for lora_device in ("cpu", "gpu"):
        for checkpointing in ("on", "off"):
            set_checkpointing(model, checkpointing == "on")
            start_again(model, lora_device, device)
            name = f"LoRA on {lora_device}, {gpu_experts} experts on the GPU, checkpointing {checkpointing}"
            losses[name] = run_steps(model, given, 1, 30, None)["losses"]
            print(f"{name}: {' '.join(f'{loss:.3f}' for loss in losses[name])}", flush=True)


def beside(given: argparse.Namespace, config: Any, device: torch.device) -> Iterator[tuple[str, Any]]:
    """What is measured beside kt_hf: (name, model)."""
    model = make_model(config, device, stock=given.case == "stock")
    if given.case == "peer":
        yield from others.peer(model, lambda model: adapted(model, given.rank, device, False), given)
        return
    model = adapted(model, given.rank, device) if given.case == "stock" else others.adapted_in_place(
        model, lambda model: adapted(model, given.rank, torch.device("cpu")), device)  # fmt: skip
    if given.case == "stock":
        yield "stock", model
    else:
        yield from others.streamed(model, device)


def placement(text: str) -> str | dict[str, int]:
    """kt_expert_placement from the command line: "8,16" is 8 resident and 16 streamed."""
    if "," not in text:
        return text
    resident, streamed = (int(part) for part in text.split(","))
    return {"resident": resident, "streamed": streamed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--gpu-experts", type=int, nargs="+", default=[0])
    values = "kt_expert_placement: auto, cpu, gpu, or R,S: resident and streamed experts a layer"
    parser.add_argument("--placement", nargs="+", type=placement, default=[], help=values)
    parser.add_argument("--lora-device", nargs="+", choices=("cpu", "gpu"), default=["cpu"])
    parser.add_argument("--case", choices=("kt", "stock", "streamed", "peer"), default="kt")
    parser.add_argument("--family", choices=("deepseek_v2", "qwen3_moe"), default="deepseek_v2")
    parser.add_argument("--check", action="store_true", help="print 30 losses of each setting and compare them")
    parser.add_argument("--steps", type=int, default=3, help="after the first, which is not counted")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, help="worker threads of the operators; default: the plan")
    parser.add_argument("--own-memory", action="store_true", help="each layer's experts in memory of their own")
    parser.add_argument("--source", choices=("bf16", "fp8"), default="bf16", help="fp8: load a checkpoint of FP8")
    parser.add_argument("--gpu-gb", type=float, help="let PyTorch have so much of the GPU's memory")
    parser.add_argument("--slower-bus", type=int, default=1, help="copy streamed weights so many times: 2 is PCIe 4")


def run(given: argparse.Namespace, device: torch.device) -> None:
    if given.gpu_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(given.gpu_gb * 1e9 / total, device)
    with slower_bus(given.slower_bus), contextlib.ExitStack() as stack:
        folder = None
        if given.source == "fp8":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_fp8_checkpoint(make_config(given.family, given.shape, given.layers), folder)
        cases(given, device, folder)


def cases(given: argparse.Namespace, device: torch.device, folder: Path | None) -> None:
    config = make_config(given.family, given.shape, given.layers)
    common = {
        "bus": f"1/{given.slower_bus}",
        "family": given.family,
        "layers": given.layers,
        "sequence": given.sequence,
        "rank": given.rank,
    }
    losses: dict[str, list[float]] = {}
    if given.case != "kt":
        for name, model in beside(given, config, device):
            on_gpu = experts_of(config) if given.case == "stock" else 0
            measure(model, given, {"case": name} | common | {"gpu_experts": on_gpu, "streamed_experts": 0}, None)
        return
    parts = Parts(device.type == "cuda")
    if not given.check:
        watch_transfers(parts)
    counts = [0, 16] if given.check and given.gpu_experts == [0] else given.gpu_experts
    tried = [{"kt_expert_placement": one} for one in given.placement] or [{"kt_num_gpu_experts": n} for n in counts]
    for where in tried:
        begin = time.perf_counter()
        home = "gpu" if given.lora_device == ["gpu"] else "cpu"
        settings = KTConfig(
            kt_backend=given.backend,
            kt_lora_rank=given.rank,
            kt_num_threads=given.threads,
            kt_moe_lora_device=home,
            **where,
        )
        tokens = max(given.batch) * given.sequence
        if folder:
            model = load_kt_model(folder, settings, tokens_per_step=tokens)
            model.config.use_cache = False
        else:
            made = make_model(config, device, stock=False, own_memory=given.own_memory)
            model = apply_kt_moe(made, settings, tokens_per_step=tokens)
            del made
        tiers = model._kt_wrappers[0].factory.tiers
        model = adapted(model, given.rank, device)
        print(f"{where}: {tiers}, made and packed in {time.perf_counter() - begin:.1f} s", flush=True)
        if given.check:
            check(model, given, tiers.on_gpu, losses)
        else:
            watch(model, parts)
            placed = {"gpu_experts": tiers.resident, "streamed_experts": tiers.streamed}
            measure(model, given, {"case": "kt fp8" if folder else "kt"} | common | placed, parts)
        del model
        gc.collect()
    if losses:
        judge(losses)


def judge(losses: dict[str, list[float]]) -> None:
    """Stop with an error where the runs' losses are apart, or did not fall."""
    apart = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
    fall = min(run[0] - run[-1] for run in losses.values())
    told = f"largest difference of a step's losses {apart:.4f} (allowed 0.02), smallest fall {fall:.3f} (at least 0.3)"
    if not (apart <= 0.02 and fall >= 0.3):  # NaN is neither
        raise SystemExit(f"FAILED: {told}")
    print(told)
