"""The norm of all gradients where some are of parameters that one rank alone has."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..ranks import Kind, Place, Ranks
from .exchange import DIVIDED


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
    ids = {id(parameter) for parameter in owned}
    rest = [p.grad for p in parameters if p.grad is not None and id(p) not in ids]
    total = float(get_total_norm(rest, norm_type)) if rest else 0.0
    if ranks is not None:
        mine = [p.grad for p in owned if p.grad is not None]
        norm = float(get_total_norm(mine, norm_type)) if mine else 0.0
        ranks.agree(Place(Kind.NORM))
        norms = ranks.all_values(torch.tensor([norm], dtype=torch.float64, device="cpu")).flatten().tolist()
        total = _joined([total, *norms], norm_type)
    device = rest[0].device if rest else next((p.grad.device for p in owned if p.grad is not None), None)
    result = torch.tensor(total, dtype=torch.float32, device=device)
    clip_grads_with_norm_(parameters, max_norm, result)
    return result


def _joined(norms: list[float], norm_type: float) -> float:
    """The norm of tensors of these norms, in one order on all ranks."""
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    if math.isinf(norm_type):
        return max(norms)
    return float(sum(norm**norm_type for norm in norms) ** (1 / norm_type))
