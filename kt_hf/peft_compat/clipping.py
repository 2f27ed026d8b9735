"""Clipping where LoRA of experts is on the CPU: PyTorch reads such gradients with one thread, and writes all of them.

Of Qwen3-30B-A3B at rank 16 they are 3.3 GB, and one core reads some 10 GB a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

_LARGE = 2**20  # values: smaller gradients are left to PyTorch


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
    PyTorch does, but that nothing is multiplied by 1 on the CPU. The norm differs by rounding: it is the nearer one,
    for a row's sum is shorter.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    large = [p for p in given if _is_large(p)]
    if foreach or not large:
        again: Any = (p for p in given) if isinstance(parameters, GeneratorType) else given  # it warns of empty ones
        return original(again, max_norm, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        first = next(p.grad.device for p in given if p.grad is not None)
        others = [p for p in given if p.grad is not None and not _is_large(p)]
        norms = torch.cat([_row_norms(p.grad, norm_type) for p in large if p.grad is not None])
        norms = torch.linalg.vector_norm(norms, norm_type)[None].to(first)
        if others:
            of_others = nn.utils.get_total_norm([p.grad for p in others if p.grad is not None], norm_type)
            norms = torch.cat([norms, of_others[None].to(norms)])
        total = nn.utils.get_total_norm([norms], norm_type, error_if_nonfinite)
        nn.utils.clip_grads_with_norm_(others, max_norm, total, foreach)
        coefficient = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0).cpu()
        if coefficient.item() != 1.0:
            nn.utils.clip_grads_with_norm_(large, max_norm, total, foreach)
    return total


def _is_large(parameter: Tensor) -> bool:
    """Whether it is LoRA of experts [E, rank, in] or [E, out, rank] with a large gradient on the CPU."""
    gradient = parameter.grad
    if gradient is None or gradient.device.type != "cpu" or gradient.numel() < _LARGE:
        return False
    return hasattr(parameter, "_kt_serial") and gradient.dim() == 3 and gradient.is_contiguous()


def _row_norms(gradient: Tensor, norm_type: float) -> Tensor:
    """Norms of as many rows as experts have ranks, in the order of memory: [E * rank]."""
    return torch.linalg.vector_norm(gradient.view(-1, max(gradient.shape[1:])), norm_type, dim=1)
