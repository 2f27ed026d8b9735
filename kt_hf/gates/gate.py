"""What lies between an expert's two products: how its gate and up become the input of its down projection.

Plain is silu(gate) * up. Other families clamp, scale, offset or cap these, take another activation, or have no gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import KTAMXConfigError

_GELU = math.sqrt(2 / math.pi), 0.044715
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Gate:
    """The gated product h of an expert: activated gate times a factor made of up.

    With g and u the gate and up of a row, and act(g) = g sigmoid(alpha g) for silu:

        h = act(min(g, limit)) (clamp(u, -limit, limit) + up_offset)
        h = min(act(g), limit) (clamp(u, -limit, limit) + up_offset)                 with clamps_after
        h = gate_cap tanh(g / gate_cap) sigmoid(alpha g) up_cap tanh(u / up_cap)     with caps
        h = act(u)                                                                   without a gate

    A gate that is not plain is computed in fp32 and rounded once.

    Attributes:
        activation: One of `ACTIVATIONS`: silu, gelu (by the error function), gelu_tanh, relu, relu2 (squared).
        alpha: Factor inside of silu's sigmoid.
        limit: Where gate and up are clamped; None for no clamp.
        clamps_after: Whether the gate is clamped after its activation instead of before.
        up_offset: Added to up, after its clamp.
        gate_cap: Soft cap of silu's linear factor; None for none.
        up_cap: Soft cap of up; None for none.
        gated: Whether there is a gate; else the activation is up's, and the expert has two matrices.

    Raises:
        KTAMXConfigError: An activation that nobody computes.
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    clamps_after: bool = False
    up_offset: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise KTAMXConfigError(f"activation={self.activation!r} is not one of experts: {', '.join(ACTIVATIONS)}.")

    @property
    def plain(self) -> bool:
        """Whether this is silu(gate) * up, which every backend computes."""
        return self == PLAIN

    @property
    def halves(self) -> int:
        """How many outputs the first product has for each element of h: 2, or 1 without a gate."""
        return 2 if self.gated else 1

    def __str__(self) -> str:
        """The fields that are not the default's, for messages: `silu, limit=7.0`."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join([self.activation, *changed])

    def applied(self, gu: Tensor) -> Tensor:
        """The gated product of rows.

        Args:
            gu: Gate beside up, [S, 2I] (up alone, [S, I], without a gate), floating, on any device.

        Returns:
            [S, I] of the same dtype.
        """
        wide = _wide(gu)
        if not self.gated:
            return self._activated(wide)[0].to(gu.dtype)
        g, u = wide.chunk(2, dim=-1)
        return self._activated(g)[0].mul_(self._factor(u)[0]).to(gu.dtype)

    def with_derivatives(self, gu: Tensor) -> tuple[Tensor, Tensor]:
        """The gated product of rows, and its derivatives.

        Args:
            gu: As `applied` takes it.

        Returns:
            The product, [S, I], and its derivative by each element of `gu`, laid out alike; both at least fp32. Where a
            clamp holds a value the derivative is 0, and on its very edge too, as PyTorch 2.15 has it (2.9 not): of
            values that 16 bits round to the limit more come from outside, where they lie further apart.
        """
        wide = _wide(gu)
        if not self.gated:
            return self._activated(wide)
        g, u = wide.chunk(2, dim=-1)
        (a, by_g), (v, by_u) = self._activated(g), self._factor(u)
        return a * v, torch.cat([by_g.mul_(v), by_u.mul_(a)], dim=-1)

    def _activated(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The activated gate and its derivative, in new memory."""
        inside = None
        if self.limit is not None and not self.clamps_after:
            inside, g = g < self.limit, g.clamp(max=self.limit)
        a, by_g = self._activation(g)
        if self.limit is not None and self.clamps_after:
            inside, a = a < self.limit, a.clamp(max=self.limit)
        return a, by_g if inside is None else by_g.mul_(inside)

    def _activation(self, g: Tensor) -> tuple[Tensor, Tensor]:
        if self.activation == "silu":
            s = torch.sigmoid(self.alpha * g)
            cap = self.gate_cap
            t = None if cap is None else torch.tanh(g / cap)
            linear, by_g = (g, s) if t is None or cap is None else (t * cap, s * (1 - t * t))
            a = linear * s
            return a, by_g + self.alpha * a * (1 - s)
        if self.activation == "gelu_tanh":
            scale, cubic = _GELU
            t = torch.tanh(scale * (g + cubic * g**3))
            return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * scale * (1 + 3 * cubic * g * g)
        if self.activation == "gelu":
            below = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
            return g * below, below + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        positive = g.clamp(min=0)
        if self.activation == "relu2":
            return positive * positive, 2 * positive
        return positive, (g > 0).to(g.dtype)

    def _factor(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """What the activated gate is multiplied by, and its derivative by u, in new memory."""
        if self.up_cap is not None:
            t = torch.tanh(u / self.up_cap)
            return t * self.up_cap + self.up_offset, 1 - t * t
        if self.limit is not None:
            inside = (u.abs() < self.limit).to(u.dtype)
            return u.clamp(-self.limit, self.limit) + self.up_offset, inside
        return u + self.up_offset, torch.ones_like(u)


PLAIN = Gate()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
