"""A hint where experts' LoRA will begin to work late: kt-kernel's operators, and a small learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..backends import OPERATORS
from ..backends.tiered import TieredBackend
from ..experts.layer import KTExperts

# Values of B, with LoRA's scaling, from which on about half of its effect is in an operator's output
# (tests/backends/test_small_lora.py pins it).
_SEEN = 4e-4
_MANY = 25  # steps of the optimizer; Adam's move a value of B by no more than the learning rate


def late_start(layers: Sequence[KTExperts], optimizer: Any) -> str | None:
    """After how many steps the experts' LoRA is seen in what the operators compute; None where it is soon.

    Args:
        layers: Of the model.
        optimizer: Of the run, or a wrapper of it, at its begin; None is no optimizer.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    rates = {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    latest, slowest = 0.0, 0.0
    for projection in (projection for layer in layers if _by_operators(layer) for projection in layer.projections):
        for adapter in projection.computed_adapters:
            b, scaling = projection.tensors(adapter)[1], abs(float(projection.scaling[adapter]))
            rate, wanted = rates.get(id(b), 0.0), _SEEN / scaling if scaling else 0.0
            if rate > 0 and wanted >= _MANY * rate:  # else B, gigabytes of some models, is not looked at
                latest, slowest = max((latest, slowest), ((wanted - _largest(b)) / rate, rate))
    if latest < _MANY:
        return None
    return (
        f"learning_rate={slowest:g}: kt-kernel's operators add LoRA to products that are rounded to bf16, where the "
        f"experts' is lost for the first {latest:.0f} steps or so, until it has grown. A higher rate shortens that; "
        "experts on a GPU and kt_backend: torch have no such limit (docs/limits.md)."
    )


def _by_operators(layer: KTExperts) -> bool:
    backend = layer.backend
    parts = [part.backend for part in backend.parts] if isinstance(backend, TieredBackend) else [backend]
    return any(part.name in OPERATORS for part in parts)


def _largest(b: Tensor) -> float:
    held = b.to_local() if isinstance(b, DTensor) else b
    return max(abs(float(end)) for end in held.detach().aminmax()) if held.numel() else 0.0
