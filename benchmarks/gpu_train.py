"""Training steps of a DeepSeek-V2-Lite-shaped model with one GPU: attention there, experts on the CPU, or on both.

    python benchmarks/gpu_train.py --csv gpu_train.csv                                  # all experts on the CPU
    python benchmarks/gpu_train.py --gpu-experts 0 8 16 32 64 --layers 9 --csv gpu_train.csv
    python benchmarks/gpu_train.py --placement cpu 16,0 0,64 8,24 auto gpu --csv gpu_train.csv    # a sweep: R,S
    python benchmarks/gpu_train.py --case stock --csv gpu_train.csv                     # all on the GPU
    python benchmarks/gpu_train.py --case streamed --csv gpu_train.csv                  # stock, experts in host memory
    python benchmarks/gpu_train.py --case peer --family qwen3_moe --csv gpu_train.csv   # ktransformers' own layer
    python benchmarks/gpu_train.py --check --layers 6                                   # losses of 30 steps
    python benchmarks/gpu_train.py --device cpu --shape tiny                            # try the script without a GPU

Weights are random: one layer's experts serve all layers until they are packed. LoRA is on attention and every MLP.
`--family qwen3_moe` has the same sizes; the peer takes no DeepSeek-V2. gpu_others.py says what the cases are.
Seconds a step are medians. `operator` is the time inside the CPU's backend, `wait` the host's for the GPU before it
(attention and what else runs there), `copy in` and `copy out` the GPU's time for copies to and from the CPU, `other`
the rest of the step. On a GPU `copy in` is part of `wait`, and `copy out` may overlap with anything.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_others
import psutil
import torch
from harness import _commit, _cpu, _kernel, _version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from kt_hf import KTConfig, apply_kt_moe, autograd, experts, packing, rates, runner
from kt_hf.backends import grouped, split, streamed, streamer, transfer
from kt_hf.projections import ExpertLora

CONFIG = Path(__file__).parents[1] / "tests/configs/models/deepseek-ai/DeepSeek-V2-Lite-Chat"
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "vocab_size": 512, "kv_lora_rank": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 16}  # fmt: skip
QWEN = {"hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 10944, "num_experts": 64,
        "num_experts_per_tok": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
        "vocab_size": 102400, "mlp_only_layers": [0], "norm_topk_prob": True}  # fmt: skip
PARTS = ("operator forward", "operator backward", "wait", "copy in", "copy out", "optimizer", "refresh", "other")


class Parts:
    """Seconds by part of the current step."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def host(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begin

    def of_host(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.host(part):
                return call(*args, **kwargs)

        return timed

    def of_gpu(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.cuda:
                return call(*args, **kwargs)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*args, **kwargs)
            end.record()
            self._events.append((part, begin, end))
            return result

        return timed

    def take(self) -> dict[str, float]:
        """After a synchronisation: what was counted since the last call."""
        for part, begin, end in self._events:
            self.seconds[part] += begin.elapsed_time(end) / 1e3
        found, self.seconds, self._events = dict(self.seconds), defaultdict(float), []
        return found


def watch(model: Any, parts: Parts) -> None:
    """Time the CPU's backends of a patched model, and all transfers."""
    for layer in model._kt_wrappers:
        backend = layer._runner.backend
        for one in [part.backend for part in getattr(backend, "parts", ())] or [backend]:
            if one.device.type == "cpu" and one.name != "streamed":
                one.forward = parts.of_host("operator forward", one.forward)
                one.backward = parts.of_host("operator backward", one.backward)


def watch_transfers(parts: Parts) -> None:
    to_host, to_device = parts.of_gpu("copy in", transfer.to_host), parts.of_gpu("copy out", transfer.to_device)
    for module in (autograd, runner, split, experts, grouped, streamed):
        for name, timed in (("to_host", to_host), ("to_device", to_device)):
            if hasattr(module, name):
                setattr(module, name, timed)
    transfer.Arriving.wait = parts.of_host("wait", transfer.Arriving.wait)  # type: ignore[method-assign]


def make_config(family: str, shape: str, layers: int) -> Any:
    if family == "qwen3_moe":
        sizes = {name: TINY.get(name, value) for name, value in QWEN.items()} if shape == "tiny" else QWEN
        config = Qwen3MoeConfig(**sizes, num_hidden_layers=layers, architectures=["Qwen3MoeForCausalLM"])
    else:
        config = AutoConfig.from_pretrained(CONFIG)
        config.num_hidden_layers = layers
        for name, value in (TINY if shape == "tiny" else {}).items():
            setattr(config, name, value)
    config.use_cache = False
    return config


@torch.no_grad()
def make_model(config: Any, device: torch.device, stock: bool, own_memory: bool = False) -> Any:
    """Random weights: all but the experts on `device`; the experts shared by all layers on the CPU, or with `stock`
    each layer's own on `device`, or with `own_memory` on the CPU."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shared: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if name.endswith(".experts"):
                if key not in shared:
                    made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
                    shared[key] = made if stock else made.cpu()
                value = shared[key].clone() if stock or own_memory else shared[key]
            else:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1) if "norm" in name else value.normal_(std=0.02)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"still without values: {left}"
    return model


def adapted(model: Any, rank: int, device: torch.device, experts_too: bool = True) -> Any:
    attention = {"q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = sorted(attention & names) + (["gate_proj", "up_proj", "down_proj"] if experts_too else [])
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).to(device)
    model.enable_input_require_grads()
    return model.train()


@torch.no_grad()
def start_again(model: Any, lora_device: str, device: torch.device) -> None:
    """The LoRA values of a fresh run, equal in all runs, on the device asked for."""
    for module in model.modules():
        if isinstance(module, ExpertLora):
            module.follow_to_gpu = lora_device == "gpu"
            module.weight.data = module.weight.data.to(device if module.follow_to_gpu else "cpu")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if "lora_A" in name:
            bound = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
        elif "lora_B" in name:
            parameter.zero_()


def run_steps(model: Any, given: argparse.Namespace, batch: int, steps: int, parts: Parts | None) -> dict[str, Any]:
    """Train `steps` steps on one batch; seconds of each, losses, and medians by part of all but the first."""
    device = next(model.parameters()).device
    vocabulary = min(512, model.config.vocab_size)
    ids = torch.randint(vocabulary, (batch, given.sequence), generator=torch.Generator().manual_seed(2)).to(device)
    trained = [p for p in model.parameters() if p.requires_grad] + getattr(model, "more_parameters", [])
    optimizer = torch.optim.AdamW(trained, lr=given.lr, fused=True)
    layers = getattr(model, "_kt_wrappers", [])
    refresh = getattr(model, "refresh", lambda: [layer.update_lora_pointers() for layer in layers])
    seconds, losses, taken = [], [], []
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    reset_peaks(device)
    for _ in range(steps):
        synchronise()
        begin = time.perf_counter()
        if parts:
            parts.take()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        synchronise()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        stepped = time.perf_counter()
        refresh()
        synchronise()
        end = time.perf_counter()
        seconds.append(end - begin)
        losses.append(loss.item())
        if parts:
            found = parts.take() | {"optimizer": stepped - middle, "refresh": end - stepped}
            counted = ("operator forward", "operator backward", "wait", "optimizer", "refresh")
            taken.append(found | {"other": end - begin - sum(found.get(part, 0.0) for part in counted)})
    kept = seconds[1:] or seconds
    step = statistics.median(kept)
    medians = {part: statistics.median([one.get(part, 0.0) for one in taken[1:] or taken]) for part in PARTS if taken}
    return {"losses": losses, "step": step, "tokens_per_second": batch * given.sequence / step} | medians


def reset_peaks(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
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


def write(path: Path, row: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        row = row | {"commit": _commit()}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    versions = {name: _version(name) for name in ("torch", "transformers", "peft")}
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": date, "commit": "", "gpu": gpu, "cpu": _cpu(), **versions, "kt_kernel": _kernel()}


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


def slow_down(times: int) -> None:
    """A bus that takes so many times as long for streamed weights, also where the planner measures it."""
    copy, rate = streamer.Streamer._copy, rates._copy_rate

    def repeated(self: Any, source: Tensor, target: Tensor) -> None:
        for _ in range(times):
            copy(self, source, target)

    streamer.Streamer._copy = repeated  # type: ignore[method-assign]
    rates._copy_rate = lambda *args: rate(*args) / times


def experts_of(config: Any) -> int:
    return int(getattr(config, "n_routed_experts", None) or config.num_experts)


def others(given: argparse.Namespace, config: Any, device: torch.device) -> Iterator[tuple[str, Any]]:
    """What is measured beside kt_hf: (name, model)."""
    model = make_model(config, device, stock=given.case == "stock")
    if given.case == "peer":
        yield from gpu_others.peer(model, lambda model: adapted(model, given.rank, device, False), given)
        return
    model = adapted(model, given.rank, device) if given.case == "stock" else gpu_others.adapted_in_place(
        model, lambda model: adapted(model, given.rank, torch.device("cpu")), device)  # fmt: skip
    if given.case == "stock":
        yield "stock", model
    else:
        yield from gpu_others.streamed(model, device)


def placement(text: str) -> str | dict[str, int]:
    """kt_expert_placement from the command line: "8,16" is 8 resident and 16 streamed."""
    if "," not in text:
        return text
    resident, streamed = (int(part) for part in text.split(","))
    return {"resident": resident, "streamed": streamed}


def set_checkpointing(model: Any, on: bool) -> None:
    if on:
        kwargs = {"use_reentrant": getattr(model, "reentrant", False)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_disable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("deepseek-v2-lite", "tiny"), default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--gpu-experts", type=int, nargs="+", default=[0])
    told = "kt_expert_placement: auto, cpu, gpu, or R,S: resident and streamed experts a layer"
    parser.add_argument("--placement", nargs="+", type=placement, default=[], help=told)
    parser.add_argument("--lora-device", nargs="+", choices=("cpu", "gpu"), default=["cpu"])
    parser.add_argument("--case", choices=("kt", "stock", "streamed", "peer"), default="kt")
    parser.add_argument("--family", choices=("deepseek_v2", "qwen3_moe"), default="deepseek_v2")
    parser.add_argument("--check", action="store_true", help="print 30 losses of each setting and compare them")
    parser.add_argument("--steps", type=int, default=3, help="after the first, which is not counted")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, help="worker threads of the operators; default: the plan")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--own-memory", action="store_true", help="each layer's experts in memory of their own")
    parser.add_argument("--gpu-gb", type=float, help="let PyTorch have so much of the GPU's memory")
    parser.add_argument("--slower-bus", type=int, default=1, help="copy streamed weights so many times: 2 is PCIe 4")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device, torch.cuda.current_device()) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        packing._TIER = device
    print(f"{machine(device)}\n{torch.get_num_threads()} threads of PyTorch's", flush=True)
    if given.gpu_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(given.gpu_gb * 1e9 / total, device)
    slow_down(given.slower_bus)
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
        for name, model in others(given, config, device):
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
        settings = KTConfig(kt_backend=given.backend, kt_lora_rank=given.rank, kt_num_threads=given.threads, **where)
        tokens = max(given.batch) * given.sequence
        made = make_model(config, device, stock=False, own_memory=given.own_memory)
        model = apply_kt_moe(made, settings, tokens_per_step=tokens)
        del made
        tiers = model._kt_wrappers[0].packer.tiers
        model = adapted(model, given.rank, device)
        print(f"{where}: {tiers}, made and packed in {time.perf_counter() - begin:.1f} s", flush=True)
        if given.check:
            check(model, given, tiers.on_gpu, losses)
        else:
            watch(model, parts)
            placed = {"gpu_experts": tiers.resident, "streamed_experts": tiers.streamed}
            measure(model, given, {"case": "kt"} | common | placed, parts)
        del model
        gc.collect()
    if losses:
        steps = list(zip(*losses.values(), strict=True))
        apart = max(max(step) - min(step) for step in steps)
        fall = min(run[0] - run[-1] for run in losses.values())
        print(
            f"largest difference of a step's losses {apart:.4f} (allowed 0.02), smallest fall {fall:.3f} (at least 0.3)"
        )


if __name__ == "__main__":
    main()
