"""The forward of one token without saving, while text is generated, by PyTorch.

Nothing is sorted, gathered or spread, and what is small is done once for all experts of the token: an operation of one
row takes 30 µs in bf16 whatever its size. Sums are rounded as among other tokens, but may run in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..system.row_linear import has_row_linear, row_linear, takes
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

    def through_b_of_each(self, chosen: Tensor, xa: Tensor) -> Tensor:
        """B of gate and up of the experts `chosen` [K], times their rows of `xa` [K, 2r]: [K, 2I]."""


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
        gated: From gate and up, [K, 2I], to their gated product, [K, I].
        x: Hidden state, [1, H], in the weights' dtype.
        experts: The token's K experts, all different.
        weights: Their routing weights, [1, K].

    Returns:
        The weighted sum, [1, H], in the weights' dtype.
    """
    chosen = torch.tensor(experts, device=x.device)
    biases, of_lora = None if bias is None else bias.index_select(0, chosen), None
    if lora:
        a = lora.a.index_select(0, chosen)
        of_lora = lora.through_b_of_each(chosen, _product(x.to(dtype), a.flatten(0, 1)).view(len(experts), -1))
    inner = _products([x] * len(experts), held.gate_up, experts, of_lora if lora else biases, dtype)
    if lora and biases is not None:  # as among other tokens
        inner.add_(biases)
    h, of_lora = gated(inner), None
    if lora:
        ha = torch.bmm(h.unsqueeze(1), lora.down_a.index_select(0, chosen).transpose(1, 2))
        of_lora = torch.bmm(ha, lora.down_b.index_select(0, chosen).transpose(1, 2)).squeeze(1)
    y = _products(h.to(x.dtype).split(1), held.down, experts, of_lora, dtype)
    y.mul_(weights.t())  # fp32: rounded to 16 bits they would be off by 0.2 %
    return y.sum(0, keepdim=True, dtype=torch.promote_types(dtype, torch.float32)).to(x.dtype)


def _products(
    rows: Sequence[Tensor], weights: Tensor, experts: list[int], add: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Each row [1, C] times its expert's weight, and on top of its row of `add` [K, R]: [K, R] in `dtype`.

    The sum is rounded once; where `dtype` is wider than the weights', the product is rounded to theirs before.
    """
    if add is not None and add.dtype != weights.dtype:
        return torch.cat([_product(row, weights[e]) for e, row in zip(experts, rows, strict=True)]) + add
    adds = [None] * len(experts) if add is None else add
    return torch.cat([_product(row, weights[e], a) for e, row, a in zip(experts, rows, adds, strict=True)]).to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [1, C] times the transpose of `weight` [R, C] of the same dtype, and a bias [R], rounded once."""
    if x.dtype == torch.bfloat16 and takes(weight) and has_row_linear():
        return row_linear(x, weight, bias)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
