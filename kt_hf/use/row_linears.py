"""A model's linear layers while it writes an answer, a token at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..system.row_linear import has_row_linear, row_linear, takes


@contextlib.contextmanager
def row_linears(model: nn.Module) -> Iterator[None]:
    """While this is open, linear layers of bf16 on the CPU compute one row by `row_linear`, in half the time.

    Attention and the head are two fifths of what a token of Qwen3-30B reads. What has more rows, or gradients, is
    computed as always.

    Args:
        model: Any; its layers are as they were afterwards.
    """
    taken: list[Any] = [module for module in model.modules() if _is_plain(module)] if has_row_linear() else []
    for module in taken:
        module.forward = functools.partial(_forward, module)
    try:
        yield
    finally:
        for module in taken:
            del module.forward


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear layer as PyTorch has it, that nobody else has changed."""
    return type(module) is nn.Linear and takes(module.weight) and "forward" not in vars(module)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    one_row = x.dtype == weight.dtype and x.numel() == module.in_features
    if not one_row or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not takes(weight):
        return nn.Linear.forward(module, x)
    return row_linear(x.reshape(1, -1), weight, bias).view(*x.shape[:-1], -1)
