"""One row times a matrix in bf16 on the CPU, as fast as the memory gives the matrix."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

# oneDNN's linear layer, with nothing after it, which torch.compile calls. It reads weights at 22 GB/s where a product
# of PyTorch's reads them at 11 on one core and at 15 on two. None where PyTorch has no oneDNN.
_OPERATION: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@functools.cache
def has_row_linear() -> bool:
    """Whether `row_linear` runs here: PyTorch has oneDNN, and the CPU products of bf16."""
    return _OPERATION is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def takes(weight: Tensor) -> bool:
    """Whether `row_linear` takes a matrix."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of one row, without gradients.

    Args:
        x: [1, C] bf16 on the CPU.
        weight: [R, C], which `takes` says yes to, as `has_row_linear` does.
        bias: [R] bf16; None without.

    Returns:
        [1, R] bf16, summed in fp32.
    """
    result: Tensor = _OPERATION(x, weight, bias, "none", [], "")
    return result
