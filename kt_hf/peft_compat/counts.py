"""Counts of parameters that include the experts, whose packed weights are no Parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..experts import kt_layers

# Of each trainer the model, and the operations of a token.
_counted: weakref.WeakKeyDictionary[Any, tuple[nn.Module, int]] = weakref.WeakKeyDictionary()


def expert_parameters(model: nn.Module) -> int:
    """How many weights the patched experts of a model have, their LoRA not counted."""
    return sum(layer.shape.num_weights for layer in kt_layers(model))


def trainable_and_all(original: Callable[..., Any], model: Any) -> tuple[int, int]:
    """Replaces `PeftModel.get_nb_trainable_parameters`, which `print_trainable_parameters` shows.

    Returns:
        Trained parameters, and all parameters with the experts' weights.
    """
    trainable, everything = original(model)
    return trainable, everything + expert_parameters(model)


def number(original: Callable[..., Any], model: Any, only_trainable: bool = False, *args: Any, **kwargs: Any) -> int:
    """Replaces `PreTrainedModel.num_parameters`: the experts are counted, unless `only_trainable` is set."""
    counted: int = original(model, only_trainable, *args, **kwargs)
    return counted if only_trainable else counted + expert_parameters(model)


def operations(original: Callable[..., int], trainer: Any, inputs: dict[str, Any]) -> int:
    """Replaces `Trainer.floating_point_ops`: the operations of a token, counted once, times the batch's tokens.

    Counting walks through all modules in each micro-batch: 5 ms with 12 layers, in which no GPU gets anything to do.
    """
    name = getattr(trainer.model, "main_input_name", "input_ids")
    tokens = inputs[name].numel() if name in inputs else 0  # GRPO's batches are lists, which have no names
    if not tokens:
        return original(trainer, inputs)
    model, of_token = _counted.get(trainer, (None, 0))
    if model is not trainer.model:  # a trainer may be given another, as a search of hyperparameters does
        counted = original(trainer, inputs)
        if not kt_layers(trainer.model):
            return counted
        of_token = counted // tokens
        _counted[trainer] = trainer.model, of_token
    return of_token * tokens
