"""Weights of 4 and 8 bits for those operators that compute with them: taken as they are, or quantized from bf16.

| `kt_backend` | codes | scales | quantized here |
|---|---|---|---|
| MXFP4 | e2m1, low nibble first | bf16, for 32 of a row | to powers of two, as the format has them |
| AMXInt4KGroup | nibble - 8, low nibble first | bf16, for 32 of a row | with a searched scale |
| AMXFP8 | e4m3 | fp32, for 128 x 128 | largest value to 448 |
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from torch import Tensor

from ...errors import KTAMXConfigError
from ...shapes import ExpertShape
from ..base import ExpertWeights
from ..packed import E2M1, PackedExperts, PackedMatrices, join_nibbles, power_of_two
from ..quantizer import quantized
from .operators import Operators

logger = logging.getLogger(__name__)

NAMES = ("gate", "up", "down")
# MXFP4's operators refuse to compute without a clamp of gate and up. In fp32 this one changes no value.
NO_CLAMP = 1e30
_GROUP = 32
_CPU = torch.device("cpu")
_noted: set[str] = set()


def packed_experts(weights: ExpertWeights, shape: ExpertShape, operators: Operators, label: str) -> PackedExperts:
    """All experts of a layer as these operators take them; `weights` stay as they are.

    Args:
        weights: Those of low bits are taken as they are if the operators can and they are all; else all are rounded to
            what the operators take, which is logged once.
        shape: The layer's sizes.
        operators: Some that have a `code`.
        label: The layer's name, for messages.

    Raises:
        KTAMXConfigError: A scale is not a finite number.
    """
    stored, experts = weights.low_bit, list(range(shape.num_experts))
    if stored is not None and list(stored.experts) == experts and _taken(stored, operators):
        packed = PackedExperts(experts, stored.gate_up.to(_CPU), stored.down.to(_CPU))
    else:
        if operators.name not in _noted:
            _noted.add(operators.name)
            logger.warning(
                "kt_hf: kt_backend=%s rounds the experts to %s, for the weights given are not stored so: about %s%% of "
                "error.", operators.name, *_ERROR[operators.name],
            )  # fmt: skip
        wide = weights.wide(experts, _CPU, weights.gate_up.dtype)
        packed = PackedExperts(experts, *(_rounded(stack, operators) for stack in (wide.gate_up, wide.down)))
    for name, part in (("gate_up_proj", packed.gate_up), ("down_proj", packed.down)):
        if not torch.isfinite(_scales(part)).all():
            raise KTAMXConfigError(f"{label}: {name} has a scale that is not a finite number.")
    return packed


# Of normally distributed weights, in percent of their norm.
_ERROR = {"MXFP4": ("MXFP4", 11), "AMXInt4KGroup": ("int4 in groups of 32", 9), "AMXFP8": ("FP8 in blocks", 3)}


def _taken(stored: PackedExperts, operators: Operators) -> bool:
    return operators.takes(stored.gate_up) and operators.takes(stored.down)


def _rounded(stack: Tensor, operators: Operators) -> PackedMatrices:
    if operators.code == "e2m1":
        return to_mxfp4(stack)
    return quantized(stack, "int4" if operators.code == "int4" else "fp8")


def to_mxfp4(stack: Tensor) -> PackedMatrices:
    """Round weights to MXFP4: of the two powers of two that fit a group's largest value, the one with less error.

    Args:
        stack: [n, rows, columns], floating, columns a multiple of 32.
    """
    bounds = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1[:8])])
    pieces = [_to_mxfp4(matrix.float().unflatten(-1, (-1, _GROUP)), bounds) for matrix in stack]
    codes, scales = (torch.stack(parts) for parts in zip(*pieces, strict=True))
    return PackedMatrices("e2m1", codes, scales)


def _to_mxfp4(groups: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns / 2] and exponents [rows, groups], both uint8, of groups [rows, groups, 32]."""
    table, best = torch.tensor(E2M1), None
    lowest = groups.abs().amax(-1).clamp(min=2.0**-120).frexp().exponent + 124
    for exponents in (lowest, lowest + 1):  # the largest value is 4 to 8 times, or 2 to 4 times the scale
        scale = power_of_two(exponents.to(torch.uint8))[..., None]
        scaled = groups / scale
        size = torch.bucketize(scaled.abs(), bounds)
        codes = size.to(torch.uint8) | (torch.signbit(scaled).to(torch.uint8) << 3)
        error = (table[codes.int()] * scale - groups).square().sum(-1)
        if best is None:
            best = codes, exponents, error
        else:
            less = error < best[2]
            best = torch.where(less[..., None], codes, best[0]), torch.where(less, exponents, best[1]), error
    assert best is not None
    return join_nibbles(best[0].flatten(-2)), best[1].to(torch.uint8)


def point_to(config: Any, packed: PackedExperts, shape: ExpertShape, operators: Operators) -> list[Tensor]:
    """Write the addresses of a layer's weights, and how they are stored, to the operators' configuration.

    Args:
        config: kt-kernel's `MOESFTConfig`.
        packed: What `packed_experts` gave.
        shape: The layer's sizes.
        operators: Those the configuration is for.

    Returns:
        What must stay in memory until the operators have loaded it.
    """
    inner, block = shape.intermediate_size, operators.block
    config.quant_config.bits = 8 if operators.code == "e4m3" else 4
    config.quant_config.group_size, config.quant_config.zero_point = block[1], False
    if operators.code == "e2m1":
        config.swiglu_limit = NO_CLAMP
    above, below = packed.gate_up, packed.down
    codes = [above.codes[:, :inner], above.codes[:, inner:], below.codes]
    scales = [*_scales(above).flatten(1, -2).chunk(2, 1), _scales(below).flatten(1, -2)]
    if operators.code == "int4":  # one address for all experts
        codes, scales = ([t.contiguous() for t in tensors] for tensors in (codes, scales))
    for name, code, scale in zip(NAMES, codes, scales, strict=True):
        if operators.code == "int4":
            setattr(config, f"{name}_proj", code.data_ptr())
            setattr(config, f"{name}_scale", scale.data_ptr())
        else:
            setattr(config, f"{name}_projs", [[code[e].data_ptr() for e in packed.experts]])
            setattr(config, f"{name}_scales", [[scale[e].data_ptr() for e in packed.experts]])
    return [*codes, *scales]


def _scales(part: PackedMatrices) -> Tensor:
    """In the dtype that the operators take: bf16 of 4 bits (E8M0 is exact in it), fp32 of 8."""
    if part.scales.dtype == torch.uint8:
        return power_of_two(part.scales).bfloat16()
    return part.scales
