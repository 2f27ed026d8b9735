"""The functions of `fused_kernels` by plain operations of PyTorch, for devices where Triton does not run.

Both modules have the same functions; what they take and give is said in `fused_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu as _silu

from ...errors import KTAMXConfigError


def _silu_gradients(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(g) u and its derivatives by g and by u."""
    s = torch.sigmoid(g)
    silu = g * s
    # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    return silu * u, (s + silu * (1 - s)).mul_(u), silu


# By name: the gated product of gate and up, and the same with its two derivatives.
_GATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]] = {
    "silu": (lambda g, u: _silu(g).mul_(u), _silu_gradients)
}


def check_gate(gate: str) -> None:
    """Refuse a gate that nobody computes.

    Args:
        gate: Its name.

    Raises:
        KTAMXConfigError: Naming those that there are.
    """
    if gate not in _GATES:
        raise KTAMXConfigError(f"gate={gate!r} is not one of the gates of experts: {', '.join(_GATES)}.")


def indexed(order: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `fused_kernels.indexed`."""
    tokens = order.div(K, rounding_mode="floor")
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return tokens, weights.index_select(0, order), place


def gathered(x: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """See `fused_kernels.gathered`."""
    return x.index_select(0, tokens)


def gated(gu: Tensor, lora: Tensor | None, ends: Tensor, gate: str = "silu") -> Tensor:
    """See `fused_kernels.gated`."""
    check_gate(gate)
    g, u = _added(gu, lora).chunk(2, dim=1)
    return _GATES[gate][0](g, u)


def gate_gradients_(
    gu: Tensor, gu_lora: Tensor | None, q: Tensor, q_lora: Tensor | None, weights: Tensor, ends: Tensor,
    gate: str = "silu",
) -> Tensor:  # fmt: skip
    """See `fused_kernels.gate_gradients_`."""
    check_gate(gate)
    g, u = _added(gu, gu_lora).chunk(2, dim=1)
    h, by_g, by_u = _GATES[gate][1](g, u)
    by_row = (_added(q, q_lora).float() * h).sum(1)
    scale = weights.unsqueeze(1)
    q.mul_(scale)
    g.copy_(by_g.mul_(q))
    u.copy_(by_u.mul_(q))
    q.copy_(h.mul_(scale))
    return by_row


def weighted(base: Tensor, lora: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    """See `fused_kernels.weighted`."""
    rows = _added(base, lora)
    out.copy_(rows if weights is None else rows.mul_(weights.unsqueeze(1)))


def summed(
    base: Tensor, lora: Tensor | None, weights: Tensor | None, place: Tensor, ends: Tensor, K: int
) -> Tensor:  # fmt: skip
    """See `fused_kernels.summed`."""
    rows = _added(base, lora)
    if weights is not None:
        rows.mul_(weights.unsqueeze(1))
    spread = rows.index_select(0, place).masked_fill_((place >= ends[-1]).unsqueeze(1), 0)
    return spread.view(-1, K, rows.shape[1]).sum(1, dtype=torch.float32).to(rows.dtype)


def _added(base: Tensor, lora: Tensor | None) -> Tensor:
    """The sum, in the memory of `base`."""
    return base if lora is None else base.add_(lora)
