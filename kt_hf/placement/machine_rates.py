"""How fast a machine computes experts: measured by `calibration`, or assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..shapes import BF16, ExpertShape

# What widening moves in a second, bits read and bf16 written, by what a copy within the GPU's memory does: 1.10 T
# weights of 4 bits a second on an H100, and 0.69 T of FP8.
_WIDENING_4, _WIDENING_8 = 0.94, 0.69


@dataclass(frozen=True)
class LinearCost:
    """Seconds that the CPU takes for its experts of a layer, forward or backward, as a linear function.

    Copies from and to the GPU are in it.

    Attributes:
        fixed: Seconds of a call.
        per_token: Seconds of a token, whether or not one of the CPU's experts gets it.
        per_expert: Seconds of an expert that gets any token.
        per_row: Seconds of a token at one expert.
    """

    fixed: float
    per_token: float
    per_expert: float
    per_row: float

    def seconds(self, tokens: float, experts: float, rows: float) -> float:
        """Seconds of a call.

        Args:
            tokens: Of the call.
            experts: On the CPU, that get any of them.
            rows: Tokens of these experts, counted once an expert.
        """
        return self.fixed + self.per_token * tokens + self.per_expert * experts + self.per_row * rows


@dataclass(frozen=True)
class MachineRates:
    """How fast a machine computes experts of one shape.

    Attributes:
        pcie_bytes_per_s: Bytes a second from page-locked memory to the GPU; 0 if memory cannot be page-locked.
        forward: Seconds of the CPU's forward.
        backward: Seconds of the CPU's backward.
        beside_forward: Seconds of the CPU's forward while experts are streamed, which the host has to launch.
        beside_backward: Seconds of the CPU's backward while experts are streamed.
        gpu_forward_rows_per_s: Rows a second of the GPU's forward, weights in its memory; a row is a token at one
            expert.
        gpu_backward_rows_per_s: Rows a second of the GPU's backward.
        assumed: Whether these rates are assumed, and were not measured.
        gpu_bytes_per_s: Bytes a second of a copy within the GPU's memory, read and written.
    """

    pcie_bytes_per_s: float
    forward: LinearCost
    backward: LinearCost
    beside_forward: LinearCost
    beside_backward: LinearCost
    gpu_forward_rows_per_s: float
    gpu_backward_rows_per_s: float
    assumed: bool = False
    gpu_bytes_per_s: float = 3.0e12

    def widening_seconds(self, weights: float, bits: float) -> float:
        """Seconds that the GPU takes to make bf16 of weights of low bits.

        Args:
            weights: How many.
            bits: Of one as it is stored, scales included; of 16 none are widened.
        """
        share = _WIDENING_4 if bits < 8 else _WIDENING_8
        return weights * (bits + BF16) / 8 / (share * self.gpu_bytes_per_s) if bits < BF16 else 0.0


def slowest_rates(of_ranks: Sequence[Mapping[str, Any]]) -> MachineRates:
    """The rates of the slowest: of each cost the most that a rank has measured, of each rate the least.

    Args:
        of_ranks: `MachineRates` of each rank as plain values (`dataclasses.asdict`).
    """

    def of(name: str) -> Any:
        values = [rates[name] for rates in of_ranks]
        if isinstance(values[0], Mapping):
            return LinearCost(*(max(cost[term.name] for cost in values) for term in fields(LinearCost)))
        return any(values) if isinstance(values[0], bool) else min(values)

    return MachineRates(*(of(field.name) for field in fields(MachineRates)))


def assumed_rates(shape: ExpertShape) -> MachineRates:
    """The rates of an H200 on PCIe 5 and 16 AMX cores, measured on experts of 2,048 x 1,408 and scaled by size."""
    scale = shape.hidden_size * shape.intermediate_size / (2048 * 1408)
    return MachineRates(
        pcie_bytes_per_s=55e9,
        forward=LinearCost(2.5e-3, 1.2e-6, 40e-6 * scale, 2.8e-6 * scale),
        backward=LinearCost(4e-3, 2.5e-6, 40e-6 * scale, 4.6e-6 * scale),
        beside_forward=LinearCost(4e-3, 1.5e-6, 60e-6 * scale, 3e-6 * scale),
        beside_backward=LinearCost(7e-3, 3e-6, 60e-6 * scale, 5e-6 * scale),
        gpu_forward_rows_per_s=12e6 / scale,
        gpu_backward_rows_per_s=4e6 / scale,
        assumed=True,
    )
