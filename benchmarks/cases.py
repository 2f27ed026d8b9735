"""What computes one expert layer in layer.py and threads.py: each case forward and backward as
a training step calls it, gradients starting from None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import cores, timed
from peer import peer_layer
from peft import LoraConfig, get_peft_model
from processes import Build, Run
from shapes import Shape, make_batch, random_model
from torch import Tensor, nn

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends import choose_backend, kernel_availability
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import plan_threads

QUANTIZED = {"kt-int8": "AMXInt8", "kt-int4": "AMXInt4"}


def adapted(model: Any, rank: int) -> Any:
    """LoRA on the experts of a patched model through the ordinary names; B random, so that nothing is multiplied by
    zero. Rank 0: none."""
    if rank == 0:
        return model
    names = ["gate_proj", "up_proj", "down_proj"]
    return _random_b(get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)))


def stock_adapted(model: Any, rank: int) -> Any:
    """The same by PEFT on transformers' fused experts, where gate and up share one A: it computes less."""
    if rank == 0:
        return model
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return _random_b(get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=names)))


def _random_b(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.02)
    return model


def step(
    experts: Callable[..., Tensor],
    parameters: list[nn.Parameter],
    shape: Shape,
    threads: int,
    before: Any = None,
    device: str = "cpu",
) -> Run:
    """Forward and backward of a layer.

    Args:
        threads: PyTorch's.
        before: Called before each run, not timed.
        device: Of the inputs. What a GPU has to do is waited for.
    """
    batches: dict[int, dict[str, Tensor]] = {}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(tokens: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        if before:
            before()
        if tokens not in batches:
            batches.clear()
            batches[tokens] = {name: tensor.to(device) for name, tensor in make_batch(shape, tokens).items()}
        batch = batches[tokens]
        for parameter in parameters:
            parameter.grad = None
        x = batch["x"].clone().requires_grad_()
        weights = batch["weights"].clone().requires_grad_()
        out: list[Tensor] = []
        wait()
        forward = timed(lambda: (out.append(experts(x, batch["ids"], weights)), wait()))
        return {"forward": forward, "backward": timed(lambda: (out[0].backward(batch["grad"]), wait()))}

    return run


def patched(shape: Shape, rank: int, config: KTConfig, device: str = "cpu") -> tuple[Any, list[nn.Parameter], Any]:
    """A layer's `KTExperts`, packed; its LoRA parameters; the model, which must live as long."""
    model = adapted(apply_kt_moe(random_model(shape), config), rank).to(device)
    experts = model._kt_wrappers[0]
    experts.update_lora_pointers()
    return experts, [p for p in model.parameters() if p.requires_grad], model


def default_backend(shape: Shape) -> str:
    """What kt_backend=auto chooses with nothing else set."""
    backend, _ = choose_backend("auto", ExpertShape(shape.E, shape.K, shape.H, shape.inner), 1, plan_threads().workers)
    return backend


def torch_threads(backend: Any) -> int:
    """As KTMoECallback sets them."""
    return min(cores(), backend.torch_threads or cores())


def bare(backend: Any, shape: Shape) -> Run:
    """kt-kernel's two calls with pointers made ready before: what no wrapper can be faster than."""
    K = shape.K
    grads = [torch.zeros(size, dtype=torch.bfloat16) for size in backend.shape.lora_shapes(backend.max_rank)]

    def run(tokens: int) -> dict[str, float]:
        torch.set_num_threads(1)
        operator = backend.raw_operator()
        batch = make_batch(shape, tokens)
        length, x, ids, grad = torch.tensor([tokens], dtype=torch.int32), batch["x"], batch["ids"], batch["grad"]
        out, grad_input = torch.empty_like(x), torch.empty_like(x)
        weights, grad_weights = batch["weights"].float().contiguous(), torch.empty(tokens, K)
        pointers = [g.data_ptr() for g in grads] if backend.max_rank else [0] * 6
        forward = timed(lambda: operator.forward_sft(
            length.data_ptr(), K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), True
        ))  # fmt: skip
        backward = timed(lambda: operator.backward(
            grad.data_ptr(), grad_input.data_ptr(), *pointers, grad_weights.data_ptr(), 0, 0, 0, False, 1.0,
        ))  # fmt: skip
        return {"forward": forward, "backward": backward}

    return run


def builds(
    cases: list[str], shape: Shape, rank: int, longest: int, device: str = "cpu"
) -> tuple[dict[str, Build], dict[str, int]]:
    """Processes for these cases, and the threads each computes on (the workers, else PyTorch's).

    `device` is where the rest of the model would be, and so the inputs; the bare operators' are on the CPU anyway.
    """
    workers, every = plan_threads().workers, cores()

    def kt(name: str, config: KTConfig) -> Build:
        def build() -> dict[str, Run]:
            experts, parameters, model = patched(shape, rank, config, device)
            run = step(experts, parameters, shape, torch_threads(experts.backend), lambda: model, device)
            found = {name: run} if name in cases else {}
            if name == "kt" and "bare" in cases:
                found["bare"] = bare(experts._runner.backend, shape)
            return found

        return build

    def stock() -> dict[str, Run]:
        model = stock_adapted(random_model(shape), rank)
        experts = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("mlp.experts")))
        base = model.get_base_model() if rank else model
        parameters = [p for p in model.parameters() if p.requires_grad]

        def by(implementation: str) -> Run:
            return step(experts, parameters, shape, every, lambda: base.set_experts_implementation(implementation))

        return {
            name: by(implementation)
            for name, implementation in (("stock", "grouped_mm"), ("stock-eager", "eager"))
            if name in cases
        }

    def peer(name: str, share: bool) -> Build:
        def build() -> dict[str, Run]:
            experts, parameters = peer_layer(random_model(shape), rank, workers, share, longest)
            return {name: step(experts, parameters, shape, 1, device=device)}

        return build

    found: dict[str, Build] = {}
    threads = dict.fromkeys(("torch", "stock", "stock-eager"), every)
    if "default" in cases:
        found["default"] = kt("default", KTConfig(kt_lora_rank=rank))
        threads["default"] = every if default_backend(shape) == "torch" else workers
    if "torch" in cases:
        found["torch"] = kt("torch", KTConfig(kt_backend="torch", kt_lora_rank=rank))
    if kernel_availability().ok:
        # Buffers for the longest batch, as the peer is told: the default's, for 32,768 tokens, do not fit everywhere.
        own = {"kt_share_backward_weights": False, "kt_lora_rank": rank, "kt_max_len": max(longest, 64)}
        if "kt" in cases or "bare" in cases:
            found["kt"] = kt("kt", KTConfig(kt_backend="AMXBF16", **own))
        if "kt-lora-gpu" in cases:
            found["kt-lora-gpu"] = kt("kt-lora-gpu", KTConfig(kt_backend="AMXBF16", kt_moe_lora_device="gpu", **own))
        for name, backend in QUANTIZED.items():
            if name in cases:
                found[name] = kt(name, KTConfig(kt_backend=backend, **own))
        for name, share in (("peer", False), ("peer-shared", True)):
            if name in cases and rank:
                found[name] = peer(name, share)
    if "stock" in cases or "stock-eager" in cases:
        found["stock"] = stock
    return found, {case: threads.get(case, workers) for case in cases}
