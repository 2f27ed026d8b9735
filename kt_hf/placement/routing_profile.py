"""How often a model's routers choose each expert: the profile that a placement is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..discovery import find_experts, layer_index
from ..errors import KTAMXConfigError
from ..experts import kt_layers


def count_experts(model: nn.Module, batches: Iterable[Any]) -> dict[int, Tensor]:
    """How often the routers choose each expert: one forward a batch, without gradients.

    Args:
        model: A transformers model with routed experts, before `apply_kt_moe` or after, on any device.
        batches: Keyword arguments of its forward (`input_ids` and `attention_mask`, or a tokenizer's output), or
            tensors of token ids [B, L]. Labels are left out.

    Returns:
        Layer index -> [E] int64 on the CPU.

    Raises:
        KTAMXConfigError: `model` is no model, or `batches` is a single batch.
        KTAMXModelNotSupportedError: The model has no experts of a known kind.
    """
    if not isinstance(model, nn.Module):
        raise KTAMXConfigError(f"model={model!r} is no model, but a {type(model).__name__}.")
    if isinstance(batches, (Tensor, Mapping, str)):
        raise KTAMXConfigError(f"batches is a {type(batches).__name__}: give a list of batches, [batch] for one.")
    layers: list[tuple[int, nn.Module, int]] = [
        (layer.layer_idx, layer, layer.shape.num_experts) for layer in kt_layers(model)
    ] or [
        (layer_index(site.name, i), site.experts, site.shape.num_experts) for i, site in enumerate(find_experts(model))
    ]
    counts: dict[int, Tensor] = {}

    def watch(layer: int, total: int) -> Any:
        counts[layer] = torch.zeros(total, dtype=torch.int64, device="cpu")

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            ids = ids.detach().flatten().cpu().long()
            counts[layer] += torch.bincount(ids[(ids >= 0) & (ids < total)], minlength=total)

        return hook

    device = next(model.parameters()).device
    training = model.training
    with contextlib.ExitStack() as stack:
        for layer, module, total in layers:
            handle = module.register_forward_pre_hook(watch(layer, total), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(model.train, training)
        model.eval()
        with torch.no_grad():
            for batch in batches:
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                inputs.pop("labels", None)
                model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}, use_cache=False)
    return counts
