"""Gates of families as `Gate` has them, with limits that small random values reach."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu

from kt_hf.gates import PLAIN, Gate

GATES = {
    "plain": PLAIN,
    "gemma4": Gate("gelu_tanh"),
    "gelu": Gate("gelu"),
    "relu": Gate("relu"),
    "deepseek_v4": Gate(limit=0.5),
    "step3p7": Gate(limit=0.5, clamps_after=True),
    "gpt_oss": Gate(alpha=1.702, limit=0.7, up_offset=1.0),
    "inkling2": Gate(gate_cap=1.5, up_cap=0.8),
    "nemotron_h": Gate("relu2", gated=False),
    "no gate, silu": Gate("silu", gated=False),
}


def by_hand(gate: Gate, gu: Tensor) -> Tensor:
    """The gated product [..., I] of [..., 2I] ([..., I] without a gate) by PyTorch's own functions, for autograd."""

    def capped(values: Tensor, cap: float | None) -> Tensor:
        return values if cap is None else cap * torch.tanh(values / cap)

    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": gelu,
        "gelu_tanh": lambda g: gelu(g, approximate="tanh"),
        "relu": relu,
        "relu2": lambda g: relu(g) ** 2,
        "silu": lambda g: capped(g, gate.gate_cap) * torch.sigmoid(gate.alpha * g),
    }
    activation = activations[gate.activation]
    if not gate.gated:
        return activation(gu)
    g, u = gu.chunk(2, -1)
    if gate.limit is None:
        return activation(g) * (capped(u, gate.up_cap) + gate.up_offset)
    u = u.clamp(-gate.limit, gate.limit) + gate.up_offset
    return (activation(g).clamp(max=gate.limit) if gate.clamps_after else activation(g.clamp(max=gate.limit))) * u
