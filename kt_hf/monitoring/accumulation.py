"""Gradient accumulation where experts are streamed: each micro-batch brings their weights to the GPU once more."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from ..experts.layer import kt_layers
from ..placement import packer_of


def streams_experts(model: nn.Module) -> bool:
    """Whether weights of experts are copied from host memory to the GPU each time that they are needed.

    Args:
        model: Any model, or a wrapper of one; False if it is not patched.
    """
    packer = packer_of(model)
    if packer is None or packer.tiers is None:
        return False
    return packer.tiers.streamed > 0 and packer.tiers.resident_layers < len(kt_layers(model))


def accumulation_advice(model: nn.Module, args: TrainingArguments) -> str | None:
    """What to set instead of gradient accumulation, with the numbers; None where nothing is streamed or accumulated.

    Args:
        model: The trainer's.
        args: The trainer's.
    """
    if not streams_experts(model):
        return None
    steps, batch = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if steps < 2:
        return None
    return (
        f"gradient_accumulation_steps={steps} copies the streamed experts to the GPU {steps} times a step: "
        f"per_device_train_batch_size={batch * steps}, gradient_accumulation_steps=1 copies them once, for the same "
        "rows a step and, where the loss is a sum over tokens, the same loss (take a divisor if it does not fit)."
    )
