"""LoRA that has just begun to learn: in 16 bits its small part must not be rounded away beside the product's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf.backends import ExpertWeights, TorchBackend
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.kt_kernel.backend import KTKernelBackend
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import ThreadPlan
from tests.support.cases import KERNEL_MARKS

E, K, H, I, T, RANK = 4, 2, 256, 128, 768, 16  # noqa: E741
SHAPE = ExpertShape(E, K, H, I)


def stacks(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    sizes = (E, 2 * I, H), (E, H, I)
    gate_up, down = (torch.randn(size, generator=made).mul_(size[-1] ** -0.5).to(dtype) for size in sizes)
    return gate_up, down


def lora_of(size: float, rank: int, only: str) -> tuple[Tensor, ...]:
    """A as it is drawn at the start, B of that size; of gate and up or of down alone."""
    made = torch.Generator().manual_seed(1)
    tensors = []
    for i, shape in enumerate(SHAPE.lora_shapes(rank)):
        if i % 2 == 0:  # as PEFT draws it, uniform in 1 / sqrt(in)
            tensors.append((2 * torch.rand(shape, generator=made) - 1) * shape[-1] ** -0.5)
        else:
            there = only == "all" or (only == "down") == (i == 5)
            tensors.append(torch.randn(shape, generator=made) * size * there)
    return tuple(tensors)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(2)
    x = torch.randn(T, H, generator=made).to(dtype)
    return x, torch.rand(T, E, generator=made).topk(K).indices, torch.rand(T, K, generator=made) + 0.1


def bias_of(dtype: torch.dtype) -> Tensor:
    """Of gate and up, [E, 2I], as large as their products."""
    return torch.randn(E, 2 * I, generator=torch.Generator().manual_seed(3)).to(dtype)


def reference(lora: tuple[Tensor, ...], dtype: torch.dtype, biased: bool) -> Tensor:
    (gate_up, down), (x, ids, weights) = stacks(dtype), inputs(dtype)
    gate_a, gate_b, up_a, up_b, down_a, down_b = (t.to(dtype).double() for t in lora)
    out, bias = torch.zeros(T, H, dtype=torch.float64), bias_of(dtype).double() * biased
    for e in range(E):
        token, choice = (ids == e).nonzero(as_tuple=True)
        rows = x[token].double()
        gate = rows @ (gate_up[e, :I].double() + gate_b[e] @ gate_a[e]).t() + bias[e, :I]
        up = rows @ (gate_up[e, I:].double() + up_b[e] @ up_a[e]).t() + bias[e, I:]
        y = (gate * torch.sigmoid(gate) * up) @ (down[e].double() + down_b[e] @ down_a[e]).t()
        out.index_add_(0, token, y * weights[token, choice].double().unsqueeze(1))
    return out


def seen(
    backend: Any, dtype: torch.dtype, size: float, rank: int, only: str = "all", alone: bool = False,
    biased: bool = False,
) -> float:  # fmt: skip
    """What part of the change that LoRA makes is in the output."""
    (x, ids, weights), outputs = inputs(dtype), []
    for lora in (lora_of(0, rank, only), lora_of(size, rank, only)):
        backend.set_lora(lora)
        parts = zip(*(t.split(1 if alone else T) for t in (x, ids, weights)), strict=True)
        outputs.append(torch.cat([backend.forward(*part, save=False)[0].double() for part in parts]))
    expected = reference(lora, dtype, biased) - reference(lora_of(0, rank, only), dtype, biased)
    return float(((outputs[1] - outputs[0]) * expected).sum() / expected.square().sum())


SMALL = {torch.bfloat16: 3e-4, torch.float16: 4e-5}
WAYS: dict[str, Callable[[ExpertWeights], Any]] = {
    "torch": lambda weights: TorchBackend(weights, SHAPE),
    "grouped": lambda weights: GroupedBackend(weights, SHAPE),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("only", ["up", "down"])
@pytest.mark.parametrize("rank", [RANK, 40])  # 40: gate's and up's B apart
@pytest.mark.parametrize(
    ("way", "dtype", "alone"),
    [
        ("torch", torch.bfloat16, False),
        ("torch", torch.float16, False),
        ("torch", torch.bfloat16, True),
        ("grouped", torch.bfloat16, False),
    ],
)
def test_a_small_part_is_not_lost(
    way: str, dtype: torch.dtype, alone: bool, rank: int, only: str, biased: bool
) -> None:
    """Added to a product, or a bias, that is rounded, 0.1 to 0.6 of it would be seen."""
    weights = ExpertWeights(*stacks(dtype), gate_up_bias=bias_of(dtype) if biased else None)
    found = seen(WAYS[way](weights), dtype, SMALL[dtype], rank, only, alone, biased)
    assert 0.85 <= found <= 1.15


@pytest.mark.parametrize(
    ("size", "least", "most"),
    [
        pytest.param(*one, marks=KERNEL_MARKS)
        for one in ((1e-4, 0.02, 0.3), (4e-4, 0.3, 0.7), (1e-3, 0.75, 0.97), (1e-2, 0.97, 1.03))
    ],
)
def test_the_operators_add_to_a_rounded_product(size: float, least: float, most: float) -> None:
    """As stock PEFT does in bf16; should this fail, kt-kernel adds in fp32 now, and docs/limits.md is out of date."""
    plan = ThreadPlan(((0, 1),))
    weights = ExpertWeights(*stacks(torch.bfloat16))
    backend = KTKernelBackend(weights, SHAPE, RANK, plan, T, False, False, "layer 0")
    assert least <= seen(backend, torch.bfloat16, size, RANK) <= most
