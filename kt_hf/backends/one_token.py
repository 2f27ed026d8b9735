"""The forward of one token without saving, while text is generated, by PyTorch.

Nothing is sorted, gathered or spread: that takes half as long as the products of one row do. The products are the same
as among other tokens, to the bit, and so is the order of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .base import ExpertWeights


class HeldLora(Protocol):
    """The LoRA that a backend holds: gate's A above up's, and down's A and B."""

    @property
    def a(self) -> Tensor:
        """[E, 2r, H]."""

    @property
    def down_a(self) -> Tensor:
        """[E, r, I]."""

    @property
    def down_b(self) -> Tensor:
        """[E, H, r]."""

    def add_b(self, e: int, xa: Tensor, to: Tensor) -> None:
        """Add expert e's B of gate and up, times `xa` [S, 2r], to `to` [S, 2I]."""


def all_different(experts: list[int]) -> bool:
    """Whether a token's experts are all different, and none of them is -1, no expert."""
    return -1 not in experts and len(set(experts)) == len(experts)


def one_token(
    held: ExpertWeights,
    bias: Tensor | None,
    lora: HeldLora | None,
    dtype: torch.dtype,
    gated: Callable[[Tensor], Tensor],
    x: Tensor,
    experts: list[int],
    weights: Tensor,
) -> Tensor:
    """Compute the experts of one token.

    Args:
        held: The layer's weights.
        bias: Of gate and up, [E, 2I], in `dtype`; None without.
        lora: The LoRA tensors in `dtype`; None without.
        dtype: Of the computation: fp32 where the CPU has no 16-bit products, else the weights'.
        gated: From gate and up, [1, 2I], to their gated product, [1, I].
        x: Hidden state, [1, H], in the weights' dtype.
        experts: The token's K experts, all different.
        weights: Their routing weights, [1, K].

    Returns:
        The weighted sum, [1, H], in the weights' dtype.
    """
    wide = x.to(dtype)
    y = torch.empty(len(experts), x.shape[1], dtype=dtype, device=x.device)
    for e, out in zip(experts, y.split(1), strict=True):
        inner = _product(wide, held.gate_up[e])
        if lora:
            lora.add_b(e, wide @ lora.a[e].t(), inner)
        if bias is not None:
            inner.add_(bias[e])
        h = gated(inner)
        out.copy_(_product(h, held.down[e]))
        if lora:
            out.addmm_(h @ lora.down_a[e].t(), lora.down_b[e].t())
    y.mul_(weights.to(dtype).t())
    return y.sum(0, keepdim=True, dtype=torch.promote_types(dtype, torch.float32)).to(x.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, C] times the transpose of `weight` [R, C]: [1, R], in the dtype of x."""
    return (x.to(weight.dtype) @ weight.t()).to(x.dtype)
