"""Weights to low bits: int4 with a searched scale for 32, int8 with one for each row, FP8 with one for 128 x 128."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import KTAMXConfigError
from ..shapes import BF16, ExpertShape
from .base import ExpertWeights
from .gpu.pinned_weights import own_pages
from .packed import Code, PackedExperts, PackedMatrices, join_nibbles

# What `kt_expert_dtype` may be, and bits of a weight with its part of the scales; int8's depend on the row's length.
EXPERT_BITS = {"bf16": BF16, "int4": 4.5, "int8": 8.02, "fp8": 8.002}
GROUP = 32  # weights of a row that share a scale in int4
_BLOCK = 128  # rows and columns that share a scale in FP8
_A_ROW = (1, sys.maxsize)
# The largest of a group divided by 7.5, and smaller scales that clip it: the least squared error is taken. On normal
# weights it is 0.088 of their norm, 0.095 without the search.
_SHRINK = tuple(1 - 0.03 * i for i in range(12))
# Weights quantized at a time, each of which takes some 20 bytes meanwhile. A GPU is not to wait for launches.
_PIECE, _PIECE_ON_GPU = 2**20, 2**24


def refuse_indivisible(to: str, shape: ExpertShape, where: str = "") -> None:
    """Refuse sizes that a kind cannot have.

    Args:
        to: A key of `EXPERT_BITS`.
        shape: Sizes of a layer.
        where: Which layer, for the message.

    Raises:
        KTAMXConfigError: A row is not a whole number of groups.
    """
    for name, size in (("a hidden size", shape.hidden_size), ("an intermediate size", shape.intermediate_size)):
        if to == "int4" and size % GROUP:
            raise KTAMXConfigError(
                f"kt_expert_dtype=int4: {where or 'the experts'}: {name} of {size}, which is no multiple of the "
                f"{GROUP} weights that share a scale. Use int8 or fp8."
            )


def quantized(stack: Tensor, to: str, device: torch.device | None = None) -> PackedMatrices:
    """Quantize a stack of matrices, some at a time.

    Args:
        stack: [n, rows, columns], floating, on any device.
        to: int4, int8 or fp8.
        device: Where it is computed; None for the stack's.

    Returns:
        The same weights in low bits, on the CPU in pages of their own.

    Raises:
        KTAMXConfigError: Columns that are no multiple of int4's group.
    """
    (code, block, quantize), pieces = _KINDS[to], []
    piece = _PIECE_ON_GPU if (device or stack.device).type == "cuda" else _PIECE
    step = max(1, piece // max(1, stack.shape[1] * stack.shape[2]))
    wide = stack.shape if code != "int4" else (*stack.shape[:2], stack.shape[2] // 2)
    codes = own_pages(tuple(wide), {"int4": torch.uint8, "int8": torch.int8}.get(code, torch.float8_e4m3fn))
    for first in range(0, len(stack), step):
        values, scales = quantize(stack[first : first + step].to(device or stack.device).float())
        codes[first : first + step].copy_(values)
        pieces.append(scales.cpu())
    scales = torch.cat(pieces) if pieces else quantize(stack.float())[1].cpu()
    return PackedMatrices(code, codes, scales, block)


def alike_rows(to: str, row: int, rows: int) -> tuple[int, int]:
    """The first row, and the one after the last, that share scales with one of a matrix of so many rows."""
    height = _KINDS[to][1][0]
    first = row - row % height
    return first, min(first + height, rows)


def quantized_experts(weights: ExpertWeights, to: str, device: torch.device | None = None) -> ExpertWeights:
    """Quantize all experts of a layer; `weights` are emptied, gate_up before down is begun.

    Args:
        weights: Of which none are of low bits.
        to: int4, int8 or fp8.
        device: Where it is computed; None for the weights'.

    Returns:
        The layer with all of its experts in low bits.
    """
    dtype, parts = weights.gate_up.dtype, []
    sizes = weights.gate_up.shape[1:], weights.down.shape[1:]
    experts = list(range(len(weights.gate_up)))
    for name in ("gate_up", "down"):
        parts.append(quantized(getattr(weights, name).detach(), to, device))
        setattr(weights, name, torch.empty(0))
    gate_up, down = (torch.empty((0, *size), dtype=dtype, device="cpu") for size in sizes)
    biases = weights.gate_up_bias, weights.down_bias
    low_bit = PackedExperts(experts, *parts)
    return ExpertWeights(gate_up, down, low_bit=low_bit, gate_up_bias=biases[0], down_bias=biases[1])


def _int4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, rows, columns / 2] and scales bf16 [n, rows, columns / 32]."""
    if weights.shape[-1] % GROUP:
        raise KTAMXConfigError(f"int4: rows of {weights.shape[-1]} weights are no multiple of {GROUP}.")
    groups = weights.unflatten(-1, (-1, GROUP))
    full = groups.abs().amax(-1, keepdim=True) / 7.5
    best = least = None
    for shrink in _SHRINK:
        scale = (full * shrink).clamp(min=1e-9).bfloat16().float()
        error = (groups / scale).round_().clamp_(-8, 7).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = scale, error
        else:
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    assert best is not None
    codes = (groups / best).round_().clamp_(-8, 7).add_(8).to(torch.uint8).flatten(-2)
    return join_nibbles(codes), best.squeeze(-1).bfloat16()


def _int8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values int8 [n, rows, columns] and scales fp32 [n, 1, rows, 1]."""
    scales = (weights.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (weights / scales).round_().clamp_(-127, 127).to(torch.int8), scales[:, None]


def _fp8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values float8_e4m3fn [n, rows, columns] and scales fp32 [n, 1, R, C]; blocks at the edges may be smaller."""
    rows, columns = weights.shape[1:]
    padded = torch.nn.functional.pad(weights, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    blocks = padded.unflatten(-1, (-1, _BLOCK)).unflatten(-3, (-1, _BLOCK))  # [n, R, 128, C, 128]
    scales = (blocks.abs().amax((-3, -1), keepdim=True) / 448).clamp(min=1e-12)
    values = (blocks / scales).to(torch.float8_e4m3fn).flatten(-2).flatten(-3, -2)
    return values[:, :rows, :columns], scales[:, None, :, 0, :, 0]


_KINDS: dict[str, tuple[Code, tuple[int, int], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int4": ("int4", (1, GROUP), _int4),
    "int8": ("int8", _A_ROW, _int8),
    "fp8": ("e4m3", (_BLOCK, _BLOCK), _fp8),
}
