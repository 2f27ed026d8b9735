"""Clipping where LoRA of experts is on the CPU, in place of PyTorch's, which reads such gradients with one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.clipping import is_large, large_norm, scale_down


def clip_on_all_cores(
    original: Callable[..., Tensor],
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Replaces `torch.nn.utils.clip_grad_norm_`, which takes one core for the norm of a tensor on the CPU.

    Large gradients of experts' LoRA there are summed row by row, on all of PyTorch's threads. Beside that it does what
    PyTorch does, but that nothing is multiplied by 1 on the CPU.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    large = [p for p in given if is_large(p)]
    if foreach or not large:
        again: Any = (p for p in given) if isinstance(parameters, GeneratorType) else given  # it warns of empty ones
        return original(again, max_norm, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        first = next(p.grad.device for p in given if p.grad is not None)
        others = [p.grad for p in given if p.grad is not None and not is_large(p)]
        norms = large_norm(large, norm_type)[None].to(first)
        if others:
            norms = torch.cat([norms, nn.utils.get_total_norm(others, norm_type)[None].to(norms)])
        total = nn.utils.get_total_norm([norms], norm_type, error_if_nonfinite)
        scale_down(given, max_norm, total, foreach)
    return total
