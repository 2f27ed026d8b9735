"""A parameter of the base model with an adapter in it."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter, rank_alpha, scale, token_rows
from .other_tensors import OtherModule


def merged_weight(
    adapter: Adapter, module: OtherModule, parameter: str, weight: Tensor, tokens_of: OtherModule | None = None
) -> Tensor:
    """The parameter with what the adapter has for it: replaced as a whole, LoRA added, retrained rows put in.

    Args:
        adapter: For its settings.
        module: What it has for the module.
        parameter: "weight" for what LoRA and tokens belong to.
        weight: The base's, which may be written to; of its dtype is the result.
        tokens_of: The module whose retrained rows this one shares; itself by default.
    """
    dtype = weight.dtype
    whole = module.whole.get(parameter)
    if whole is not None:
        weight = whole.load()
    if parameter == "weight" and module.lora:
        factor = scale(adapter.config, *rank_alpha(adapter.config, module.name))
        if "lora_embedding_A" in module.lora:  # A [r, rows], B [hidden, r]
            left, right = module.lora["lora_embedding_A"].load().T, module.lora["lora_embedding_B"].load().T
        else:
            left, right = module.lora["lora_B.weight"].load(), module.lora["lora_A.weight"].load()
        weight = torch.addmm(weight.float(), left.float(), right.float(), alpha=factor)
    rows = tokens_of or module
    if parameter == "weight" and rows.tokens is not None:
        weight = weight.to(dtype, copy=True)
        weight[torch.tensor(token_rows(adapter.config, rows.name))] = rows.tokens.load().to(dtype)
    return weight.to(dtype)
