"""The functions of `fused_kernels` by plain operations of PyTorch, for devices where Triton does not run.

Both modules have the same functions; what they take and give is said in `fused_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu as _silu

from ...gates import PLAIN, Gate


def indexed(order: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `fused_kernels.indexed`."""
    tokens = order.div(K, rounding_mode="floor")
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return tokens, weights.index_select(0, order), place


def gathered(x: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """See `fused_kernels.gathered`."""
    return x.index_select(0, tokens)


def gated(
    gu: Tensor, lora: Tensor | None, ends: Tensor, gate: Gate = PLAIN, bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fused_kernels.gated`."""
    wide = _biased(_wide_sum(gu, lora), bias, experts)
    if not gate.plain:
        return gate.applied(wide).to(gu.dtype)
    g, u = wide.chunk(2, dim=1)
    return torch.mul(_silu(g), u, out=gu.new_empty(g.shape))


def gate_gradients_(
    gu: Tensor, gu_lora: Tensor | None, q: Tensor, q_lora: Tensor | None, weights: Tensor, ends: Tensor,
    gate: Gate = PLAIN, bias: Tensor | None = None, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fused_kernels.gate_gradients_`."""
    gu = _biased(_added(gu, gu_lora), bias, experts)
    h, by_gu = _plain_with_derivatives(gu) if gate.plain else gate.with_derivatives(gu)
    by_row = (_added(q, q_lora).float() * h).sum(1)
    scale = weights.unsqueeze(1)
    q.mul_(scale)
    by_gu.view(len(q), gate.halves, -1).mul_(q.unsqueeze(1))
    gu.copy_(by_gu)
    q.copy_(h.mul_(scale))
    return by_row


def _plain_with_derivatives(gu: Tensor) -> tuple[Tensor, Tensor]:
    """silu(g) u and its derivative by each element, in the rows' dtype."""
    g, u = gu.chunk(2, dim=1)
    s = torch.sigmoid(g)
    silu = g * s
    # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    return silu * u, torch.cat([(s + silu * (1 - s)).mul_(u), silu], dim=1)


def weighted(base: Tensor, lora: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    """See `fused_kernels.weighted`."""
    if weights is None:
        out.copy_(_wide_sum(base, lora))
        return
    scale = weights.unsqueeze(1)  # in fp32, as what it multiplies becomes
    if lora is None:
        torch.mul(base, scale, out=out)
    else:
        torch.addcmul(base * scale, lora, scale, out=out)


def summed(
    base: Tensor, lora: Tensor | None, weights: Tensor | None, place: Tensor, ends: Tensor, K: int
) -> Tensor:  # fmt: skip
    """See `fused_kernels.summed`."""
    rows = base
    if lora is not None or weights is not None:
        rows = torch.empty_like(base)  # rounded row by row, as of pieces, to the bit
        weighted(base, lora, weights, rows)
    within = place if len(rows) == len(place) else place.clamp(max=len(rows) - 1)
    spread = rows.index_select(0, within).masked_fill_((place >= ends[-1]).unsqueeze(1), 0)
    return spread.view(-1, K, rows.shape[1]).sum(1)  # PyTorch sums 16 bits in fp32


def _wide_sum(base: Tensor, lora: Tensor | None) -> Tensor:
    """In fp32, as new a tensor as `base` is 16 bits. In bf16 LoRA below a 500th of the base would be lost."""
    wide = base.float()
    return wide if lora is None else wide.add_(lora)


def _added(base: Tensor, lora: Tensor | None) -> Tensor:
    """The sum, in the memory of `base`."""
    return base if lora is None else base.add_(lora)


def _biased(rows: Tensor, bias: Tensor | None, experts: Tensor | None) -> Tensor:
    """The sum of rows and their experts' biases, in the memory of `rows`."""
    if bias is None:
        return rows
    assert experts is not None, "a bias is an expert's"
    return rows.add_(bias.index_select(0, experts.clamp(max=len(bias) - 1).int()))
