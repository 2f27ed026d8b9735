"""What LoRA of the experts costs on the CPU, experts streamed: a step's parts beside those with LoRA on the GPU.

    python benchmarks/gpu lora --csv gpu_lora.csv                                       # 90 s on an H100
    python benchmarks/gpu lora --device cpu --shape tiny --layers 2 --batch 1 --sequence 32  # try the script

Twelve layers of Qwen3-30B-A3B's shape with random weights of their own, checkpointing, LoRA r=16 on attention and every
expert (207 M parameters on the experts), tokens spread evenly over the experts. Cases:

    gpu       LoRA on the GPU
    cpu       LoRA on the CPU
    waiting   the same, each layer's backward waiting for its gradients
    torch     the same as cpu, gradients clipped by PyTorch's function, which kt_hf replaces for them
    some      LoRA of the first layers on the GPU (--on-gpu, all but a twelfth), of the others on the CPU

`step` is the median of steps without a synchronization between their parts. The parts are of other steps, with one
after each: forward, backward, clip (of the norm, as a Trainer does), optimizer, zero (gradients let go), refresh (of
what the GPU computes with). `arrivals` is how long the thread that called backward waited for gradients, beside the one
of the GPU.
`foreach` is the optimizer's seconds for the same parameters with foreach in place of fused. `optimizer_gb_per_s` is
what it reads and writes a second (28 bytes a parameter), `new_pages` how many pages of 4 KB a step took anew.
The whole model in 24 GB, as `auto` has it, before and after:

    python benchmarks/gpu lora --layers 48 --cap 24 --case torch cpu some --on-gpu 44
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import free_memory, machine, write
from models import TINY, adapted, make_model, set_checkpointing, start_again
from torch import Tensor
from transformers import Qwen3MoeConfig

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.experts import lora_tensors
from kt_hf.experts.layer import update_lora
from kt_hf.experts.lora_delivery import Delivery

# A fifth of the vocabulary: logits are not what is measured.
SIZES = {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
         "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "vocab_size": 32768, "norm_topk_prob": True}  # fmt: skip
CASES = ("gpu", "cpu", "waiting", "torch", "some")
PARTS = ("forward", "backward", "clip", "optimizer", "zero", "refresh")


def build(given: argparse.Namespace, device: torch.device) -> Any:
    sizes = SIZES | ({name: TINY[name] for name in SIZES.keys() & TINY} if given.shape == "tiny" else {})
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=given.layers, use_cache=False)
    settings = KTConfig(kt_lora_rank=given.rank, kt_expert_placement={"streamed": sizes["num_experts"]})
    model = apply_kt_moe(make_model(config, device, stock=False, own_memory=True), settings)
    model = adapted(model, given.rank, device)
    set_checkpointing(model, True)
    spread(model)
    return model


def spread(model: Any) -> None:
    """Each token's experts are drawn: routers of random weights send most tokens of deep layers to a few experts."""

    def drawn(router: Any, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = out
        if getattr(router, "drawn", ids[:0]).shape != ids.shape:  # the same in a recompute and in the next step
            router.drawn = torch.rand(logits.shape, device=logits.device).topk(ids.shape[1]).indices.to(ids.dtype)
        return logits, weights, router.drawn

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(drawn)


@contextlib.contextmanager
def case(name: str) -> Iterator[list[float]]:
    """Seconds that were waited for gradients; in the case `waiting` each layer's backward does."""
    inputs, wait = lora_tensors.LoraTensors.inputs, Delivery.wait
    seconds: list[float] = []

    def timed(delivery: Delivery) -> None:
        begin = time.perf_counter()
        wait(delivery)
        seconds.append(time.perf_counter() - begin)

    Delivery.wait = timed  # type: ignore[method-assign]
    if name == "waiting":
        lora_tensors.LoraTensors.inputs = lambda self, from_gpu: self.parameters  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        lora_tensors.LoraTensors.inputs, Delivery.wait = inputs, wait  # type: ignore[method-assign]


class Training:
    """Steps on one random batch, as a stock Trainer makes them: clipping, AdamW, and the callback's refresh."""

    def __init__(self, model: Any, given: argparse.Namespace, device: torch.device) -> None:
        self.model, self.layers, self.cuda = model, model._kt_wrappers, device.type == "cuda"
        made = torch.randint(512, (given.batch, given.sequence), generator=torch.Generator().manual_seed(2))
        self.ids = made.to(device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.clip = torch.nn.utils.clip_grad_norm_
        update_lora(self.layers)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def parts(self) -> dict[str, Callable[[], Any]]:
        loss: list[Tensor] = []
        return {
            "forward": lambda: loss.append(self.model(input_ids=self.ids, labels=self.ids).loss),
            "backward": lambda: loss.pop().backward(),
            "clip": lambda: self.clip(self.trained, 1.0),
            "optimizer": self.optimizer.step,
            "zero": self.optimizer.zero_grad,
            "refresh": lambda: update_lora(self.layers),
        }

    def step(self) -> float:
        self.synchronize()
        begin = time.perf_counter()
        for part in self.parts().values():
            part()
        self.synchronize()
        return time.perf_counter() - begin

    def step_by_part(self, arrivals: list[float]) -> dict[str, float]:
        taken, parts, pages = {}, self.parts(), new_pages()
        arrivals.clear()
        for name in PARTS:
            self.synchronize()
            begin = time.perf_counter()
            parts[name]()
            self.synchronize()
            taken[name] = time.perf_counter() - begin
        return taken | {"arrivals": sum(arrivals), "new_pages": new_pages() - pages}

    def foreach(self) -> float:
        """Seconds of the optimizer's second step with foreach, on gradients of ones: the first makes its moments."""
        self.optimizer.state.clear()
        other = torch.optim.AdamW(self.trained, lr=1e-6, foreach=True)
        for parameter in self.trained:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):
            self.synchronize()
            begin = time.perf_counter()
            other.step()
            self.synchronize()
            seconds = time.perf_counter() - begin
        return seconds


def new_pages() -> int:
    """Pages that this process has taken from the system so far without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(name: str, model: Any, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    start_again(model, "gpu" if name == "gpu" else "cpu", device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if name == "some":
        count = len(model._kt_wrappers) * 11 // 12 if given.on_gpu is None else given.on_gpu
        for layer in model._kt_wrappers[:count]:
            for projection in layer.projections:
                projection.place_lora(device)
    training = Training(model, given, device)
    if name == "torch":
        training.clip = training.clip.__wrapped__  # type: ignore[attr-defined]
    with case(name) as arrivals:
        steps = [training.step() for _ in range(given.steps + 2)][2:]
        taken = [training.step_by_part(arrivals) for _ in range(given.steps + 1)][1:]
    touched = {int(m.drawn.unique().numel()) for m in model.modules() if hasattr(m, "drawn")}
    experts = [p for layer in training.layers for p in layer.lora_params.values()]
    parts = {part: statistics.median(one[part] for one in taken) for part in (*PARTS, "arrivals", "new_pages")}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "case": name, "layers": given.layers, "batch": given.batch, "sequence": given.sequence, "rank": given.rank,
        "lora_parameters": sum(p.numel() for p in experts),
        "on_cpu": sum(p.numel() for p in experts if p.device.type == "cpu"), "experts_touched": min(touched),
        "torch_threads": torch.get_num_threads(), "step": statistics.median(steps), "fastest_step": min(steps),
    } | parts | {
        "optimizer_gb_per_s": 28e-9 * sum(p.numel() for p in training.trained) / parts["optimizer"],
        "foreach": training.foreach(), "gpu_peak_gb": peak / 1e9,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="timed, of each kind")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--on-gpu", type=int, help="layers whose LoRA is on the GPU in the case `some`")
    parser.add_argument("--cap", type=float, help="GB that PyTorch may take on the GPU")


def run(given: argparse.Namespace, device: torch.device) -> None:
    if given.cap and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap * 1e9 / total), device)
    begin = time.perf_counter()
    model = build(given, device)
    print(f"made in {time.perf_counter() - begin:.1f} s", flush=True)
    for name in given.case:
        row = measure(name, model, given, device)
        free_memory(device)
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()), flush=True)  # fmt: skip
        if given.csv:
            write(given.csv, machine(device) | row)
