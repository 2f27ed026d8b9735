"""Clipping gradients of experts' LoRA on the CPU: what PyTorch's function does, by rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from kt_hf.experts import clipping

ours: Any = nn.utils.clip_grad_norm_
stock: Any = ours.__wrapped__


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    """LoRA of 64 experts, A and B of ranks 8 and 12, beside parameters of other kinds, sizes and dtypes."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(7,), (64, 8, 2048), (64, 2560, 8), (64, 12, 2048), (64, 12, 4), (300, 50)]
    made = [nn.Parameter(torch.zeros(size)) for size in sizes]
    made.append(nn.Parameter(torch.zeros(33, dtype=torch.bfloat16)))
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for lora in made[1:5]:
        lora._kt_serial = 1  # type: ignore[attr-defined]
    return [nn.Parameter(torch.zeros(2)), *made]  # the first has no gradient


def gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("norm_type", [2.0, 1, math.inf])
@pytest.mark.parametrize("max_norm", [0.25, 1e9, math.inf])
def test_the_norm_and_what_is_clipped(parameters: list[nn.Parameter], norm_type: float, max_norm: float) -> None:
    before = gradients(parameters)
    exact = torch.cat([g.flatten().double() for g in before]).norm(norm_type)
    assert len([p for p in parameters if clipping.is_large(p)]) == 3
    total = ours(iter(parameters), max_norm, norm_type)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=2e-6)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    assert all(torch.equal(a, b * factor) for a, b in zip(gradients(parameters), before, strict=True))
    written = [p.grad._version for p in parameters if clipping.is_large(p) and p.grad is not None]
    assert written == [int(max_norm == 0.25)] * 3, "what is not clipped is not written"


def test_what_is_not_finite(parameters: list[nn.Parameter]) -> None:
    assert parameters[2].grad is not None
    parameters[2].grad[3, 4, 5] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        ours(parameters, 1.0, error_if_nonfinite=True)
    assert ours(parameters, 1.0).isnan()
    assert all(g.isnan().all() for g in gradients(parameters)), "as PyTorch's"


def test_other_parameters_are_pytorchs(parameters: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_row_norms", lambda *_: pytest.fail("rows of a stranger's gradient"))
    others = [p for p in parameters if not hasattr(p, "_kt_serial")]
    before = gradients(others)
    total = ours(others, 0.5)
    clipped = gradients(others)
    for parameter, gradient in zip(others[1:], before, strict=True):
        parameter.grad = gradient
    assert torch.equal(stock(others, 0.5), total)
    assert all(torch.equal(a, b) for a, b in zip(gradients(others), clipped, strict=True))
    assert ours(others[1], 1.0) > 0, "one tensor"
    with pytest.warns(UserWarning, match="empty generator"):
        ours((p for p in ()), 1.0)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.25, 1e9])
def test_where_ranks_share_a_norm_it_is_the_same(
    parameters: list[nn.Parameter], norm_type: float, max_norm: float
) -> None:
    """What divided experts are clipped with takes the same way for large gradients; here one rank has all."""
    before = gradients(parameters)
    exact = torch.cat([g.flatten().double() for g in before]).norm(norm_type)
    total = clipping.clip_grad_norm_(parameters, max_norm, norm_type)
    assert total.item() == pytest.approx(exact.item(), rel=2e-6)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    assert all(torch.equal(a, b * factor) for a, b in zip(gradients(parameters), before, strict=True))
    written = [p.grad._version for p in parameters if clipping.is_large(p) and p.grad is not None]
    assert written == [int(max_norm == 0.25)] * 3, "what is not clipped is not written"
