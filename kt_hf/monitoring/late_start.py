"""A hint where experts' LoRA will begin to work late: kt-kernel's operators, and a small learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainingArguments

from ..backends import OPERATORS
from ..backends.tiered import TieredBackend
from ..experts.layer import KTExperts

# Values of B, with LoRA's scaling, from which on more than half of its effect is in an operator's output
# (tests/backends/test_small_lora.py pins it).
_SEEN = 4e-4
_MANY = 25  # steps of the optimizer; Adam's move a value of B by no more than the learning rate


def late_start(layers: Sequence[KTExperts], args: TrainingArguments) -> str | None:
    """After how many steps the experts' LoRA is seen in what the operators compute; None where it is soon.

    Args:
        layers: Of the model.
        args: The trainer's.
    """
    projections = [projection for layer in layers if _by_operators(layer) for projection in layer.projections]
    scalings = [abs(float(p.scaling[adapter])) for p in projections for adapter in p.computed_adapters]
    if not scalings or args.learning_rate <= 0:
        return None
    steps = _SEEN / (args.learning_rate * (max(scalings) or 1.0))
    if steps < _MANY:
        return None
    return (
        f"learning_rate={args.learning_rate:g}: kt-kernel's operators add LoRA to products that are rounded to bf16, "
        f"where the experts' is lost for the first {steps:.0f} steps or so, until it has grown. A higher rate shortens "
        "that; experts on a GPU and kt_backend: torch have no such limit (docs/limits.md)."
    )


def _by_operators(layer: KTExperts) -> bool:
    backend = layer.backend
    parts = [part.backend for part in backend.parts] if isinstance(backend, TieredBackend) else [backend]
    return any(part.name in OPERATORS for part in parts)
