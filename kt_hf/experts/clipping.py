"""Clipping by the norm of all gradients, where some are of one rank alone, or are large and on the CPU.

PyTorch reads a gradient on the CPU with one thread. Of Qwen3-30B-A3B at rank 16 experts' LoRA has 3.3 GB of them, and
one core reads some 10 GB a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..ranks import Kind, Place, Ranks
from .exchange import DIVIDED
from .replicas import average_over_hosts

_LARGE = 2**20  # values: smaller gradients are left to PyTorch


def is_large(parameter: Tensor) -> bool:
    """Whether it is LoRA of experts [E, rank, in] or [E, out, rank] with a large gradient on the CPU."""
    gradient = parameter.grad
    if gradient is None or gradient.device.type != "cpu" or gradient.numel() < _LARGE:
        return False
    return hasattr(parameter, "_kt_serial") and gradient.dim() == 3 and gradient.is_contiguous()


def large_norm(parameters: Iterable[Tensor], norm_type: float) -> Tensor:
    """The norm of the gradients of `is_large` ones, [] on the CPU: row by row, which all of PyTorch's threads compute.

    It differs from PyTorch's by rounding, and is the nearer one, for a row's sum is shorter.

    Args:
        parameters: One at least, all of them large.
        norm_type: p of the p-norm; inf for the largest value.
    """
    norms = [_row_norms(p.grad, norm_type) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.cat(norms), norm_type)


def scale_down(parameters: Iterable[Tensor], max_norm: float, total: Tensor, foreach: bool | None = None) -> None:
    """`torch.nn.utils.clip_grads_with_norm_`, but that large gradients are not multiplied by 1.

    Args:
        parameters: Their gradients are scaled in place.
        max_norm: The norm they are to have, if `total` is larger.
        total: The norm of all gradients, [].
        foreach: As PyTorch has it.
    """
    given = list(parameters)
    large, sharded = [p for p in given if is_large(p)], list[Tensor]()
    if not isinstance(total, DTensor):  # FSDP2's gradients, which PyTorch multiplies by such a norm alone
        sharded = [p for p in given if isinstance(p.grad, DTensor)]
    apart = {id(p) for p in (*large, *sharded)}
    clip_grads_with_norm_([p for p in given if id(p) not in apart], max_norm, total, foreach)
    coefficient = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0) if apart else None
    for parameter in sharded:
        gradient: Any = parameter.grad
        gradient.to_local().mul_(coefficient)
    if coefficient is not None and coefficient.item() != 1.0:
        clip_grads_with_norm_(large, max_norm, total, foreach)


def owned_among(parameters: Iterable[Tensor]) -> tuple[list[Tensor], Ranks | None]:
    """Those of some parameters that are LoRA of experts which this rank owns, and the ranks that own the others."""
    layers = list(DIVIDED)
    owned = {id(parameter) for layer in layers for parameter in layer.parameters()}
    among = [parameter for parameter in parameters if id(parameter) in owned]
    exchange = layers[0].exchange if among else None
    return among, exchange.ranks if exchange else None


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a model whose experts are divided among ranks.

    PyTorch's own takes a rank's gradients for all there are: each rank would scale by another norm, and parameters that
    all ranks hold would drift apart. All ranks call this together, after the backward that ends a step.
    `Accelerator.clip_grad_norm_`, which trainers call, does the same.

    Args:
        parameters: Of the model, the same on all ranks but for the experts' LoRA.
        max_norm: The gradients are scaled down to this norm if theirs is larger.
        norm_type: p of the p-norm; inf for the largest value.

    Returns:
        The norm before, [] fp32, the same to the bit on all ranks.

    Raises:
        KTAMXError: Another rank is not here, or has ended.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    owned, ranks = owned_among(parameters)
    average_over_hosts(owned)
    if ranks is not None:
        ranks.agree(Place(Kind.NORM))  # before FSDP2's gradients are summed, where a rank in another place never comes
    ids = {id(parameter) for parameter in owned}
    rest = [p for p in parameters if id(p) not in ids]
    total = _norm(rest, norm_type)
    if ranks is not None:
        norm = torch.tensor([_norm(owned, norm_type)], dtype=torch.float64, device="cpu")
        norms = ranks.owner_values(norm).flatten().tolist()  # each expert's gradients once, not those of its replicas
        total = _joined([total, *norms], norm_type)
    device = next((p.grad.device for p in (*rest, *owned) if p.grad is not None), None)
    result = torch.tensor(total, dtype=torch.float32, device=device)
    scale_down(parameters, max_norm, result)
    return result


def _norm(parameters: Sequence[Tensor], norm_type: float) -> float:
    """The norm of this rank's gradients of some parameters; 0 if there are none."""
    large = [p for p in parameters if is_large(p)]
    others = [p.grad for p in parameters if p.grad is not None and not is_large(p)]
    sharded = [gradient for gradient in others if isinstance(gradient, DTensor)]
    norms = [float(get_total_norm(sharded, norm_type).full_tensor())] if sharded else []  # type: ignore[attr-defined]
    if len(others) > len(sharded):
        norms.append(float(get_total_norm([g for g in others if not isinstance(g, DTensor)], norm_type)))
    if large:
        norms.append(float(large_norm(large, norm_type)))
    return _joined(norms, norm_type) if len(norms) > 1 else sum(norms)


def _row_norms(gradient: Tensor, norm_type: float) -> Tensor:
    """Norms of as many rows as experts have ranks, in the order of memory: [E * rank]."""
    return torch.linalg.vector_norm(gradient.view(-1, max(gradient.shape[1:])), norm_type, dim=1)


def _joined(norms: list[float], norm_type: float) -> float:
    """The norm of tensors of these norms, in one order on all ranks."""
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    if math.isinf(norm_type):
        return max(norms)
    return float(sum(norm**norm_type for norm in norms) ** (1 / norm_type))
