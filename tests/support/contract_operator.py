"""A bare driver of kt-kernel's operators, independent of kt_hf: what the contract tests talk to."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

_keys = itertools.count(100_000)  # far from those kt_hf draws
_engine: Any = None


def engine() -> Any:
    """One CPUInfer for all tests: two at a time compute wrong results."""
    global _engine
    if _engine is None:
        from kt_hf.backends.kt_kernel.engine import Engine
        from kt_hf.system.cpu import ThreadPlan

        # kt_hf's own, for there must be one a process; the driver uses nothing else of kt_hf.
        _engine = Engine.get(ThreadPlan(((0, 1),)))
    return _engine.cpu_infer


class Operator:
    """One layer: E experts, K a token, H, I, LoRA rank r; weights and LoRA random, seeded.

    `kind` is the operator class, BF16, Int8 or Int4; `saved` loads weights that an operator with `save` wrote.
    """

    def __init__(
        self, E: int = 8, K: int = 2, H: int = 64, inner: int = 96, rank: int = 8, seed: int = 0, max_len: int = 512,
        kind: str = "BF16", saved: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        from kt_kernel import kt_kernel_ext

        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int, scale: float) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).bfloat16().contiguous()

        self.E, self.K, self.H, self.inner, self.rank = E, K, H, inner, rank
        self.gate = draw(E, inner, H, scale=H**-0.5)
        self.up = draw(E, inner, H, scale=H**-0.5)
        self.down = draw(E, H, inner, scale=inner**-0.5)
        sizes = (E, rank, H), (E, inner, rank), (E, rank, H), (E, inner, rank), (E, rank, inner), (E, H, rank)
        self.lora = [draw(*size, scale=0.1) for size in sizes] if rank else []
        self.grads = [torch.full(size, 7.0, dtype=torch.bfloat16) for size in sizes] if rank else []
        self.map = torch.arange(E, dtype=torch.int64)
        config = kt_kernel_ext.moe.MOESFTConfig()
        config.expert_num, config.num_experts_per_tok = E, K
        config.hidden_size, config.intermediate_size = H, inner
        config.lora_rank, config.lora_alpha, config.lora_dropout = rank, float(rank), 0.0
        config.max_cache_depth, config.max_len, config.layer_idx = 1, max_len, next(_keys)
        config.share_backward_bb = config.share_cache_pool = config.full_weight_grad = False
        config.authoritative_optimizer_grads = rank > 0
        config.physical_to_logical_map = self.map.data_ptr()
        if not saved:
            config.gate_proj, config.up_proj = self.gate.data_ptr(), self.up.data_ptr()
            config.down_proj = self.down.data_ptr()
        config.load = saved
        names = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
        for name, tensor in zip(names, self.lora, strict=False):
            setattr(config, name, tensor.data_ptr())
        for name, value in settings.items():
            setattr(config, name, value)
        config.pool = engine().backend_
        self.moe = getattr(kt_kernel_ext.moe, f"AMX{kind}_SFT_MOE")(config)
        engine().submit(self.moe.load_weights_task())
        engine().sync()
        self.update_lora()

    def update_lora(self) -> None:
        if self.rank:
            self.moe.update_lora_weights(*(t.data_ptr() for t in self.lora))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool = True) -> Tensor:
        out = torch.empty_like(x)
        length = torch.tensor([x.shape[0]], dtype=torch.int32)
        self.moe.forward_sft(
            length.data_ptr(), self.K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), save
        )
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """grad_input, grad_weights, the six LoRA gradients (buffers, overwritten by the next)."""
        grad_input = torch.full_like(grad, 7.0)
        grad_weights = torch.full((grad.shape[0], self.K), 7.0)
        pointers = [t.data_ptr() for t in self.grads] or [0] * 6
        self.moe.backward(
            grad.data_ptr(), grad_input.data_ptr(), *pointers, grad_weights.data_ptr(), 0, 0, 0, False, 1.0
        )
        return grad_input, grad_weights, self.grads

    def batch(self, tokens: int, seed: int = 1, experts: range | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, ids (of `experts` only), weights, grad_output."""
        generator = torch.Generator().manual_seed(seed)
        choice = torch.tensor(list(experts or range(self.E)))
        picks = torch.rand(tokens, len(choice), generator=generator).argsort(1)[:, : self.K]
        ids = choice[picks].contiguous()
        x = torch.randn(tokens, self.H, generator=generator).bfloat16()
        grad = torch.randn(tokens, self.H, generator=generator).bfloat16()
        return x, ids, torch.rand(tokens, self.K, generator=generator), grad

    def reference(
        self, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Output, grad_input, grad_weights and LoRA gradients by autograd in fp32, a loop over tokens' experts."""
        x = x.float().requires_grad_()
        weights = weights.clone().requires_grad_()
        lora = [t.float().requires_grad_() for t in self.lora]
        out = torch.zeros(x.shape[0], self.H)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            if len(token) == 0:
                continue
            xe = x[token]
            g, u = xe @ self.gate[e].float().T, xe @ self.up[e].float().T
            if lora:
                g = g + xe @ lora[0][e].T @ lora[1][e].T
                u = u + xe @ lora[2][e].T @ lora[3][e].T
            h = torch.nn.functional.silu(g) * u
            y = h @ self.down[e].float().T
            if lora:
                y = y + h @ lora[4][e].T @ lora[5][e].T
            out = out.index_add(0, token, y * weights[token, slot, None])
        grads = torch.autograd.grad(out, [x, weights, *lora], grad.float())
        return out.detach(), grads[0], grads[1], list(grads[2:])


def error(a: Tensor, b: Tensor) -> float:
    """mean|a - b| / mean|b|."""
    return float((a.float() - b.float()).abs().mean() / b.float().abs().mean().clamp_min(1e-12))
