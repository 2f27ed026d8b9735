"""ktransformers' own training layer, `kt_kernel.sft` of the kt-kernel wheel, driven with stock libraries to measure
against.

A process can hold one setting of it: a layer index that is wrapped twice ends the process. Its outputs alias one buffer
of the process, so they are cloned where they live on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

RETAIN = {"cpu": "retain", "gpu": "retain"}  # its other policies work under gradient checkpointing alone


class _Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class _Holder(nn.Module):
    """All that the peer asks of a model: `config` and `layers`."""

    def __init__(self, config: Any, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([_Layer(block) for block in blocks])


def settings(rank: int, threads: int, share: bool, longest: int) -> dict[str, Any]:
    """What its KTConfig is told, where its own choice is not wanted."""
    return {
        "kt_backend": "AMXBF16", "kt_num_threads": threads, "kt_lora_rank": rank, "kt_lora_alpha": 2.0 * rank,
        "kt_lora_dropout": 0.0, "kt_model_max_length": max(longest, 64), "kt_share_backward_bb": share,
        "kt_activation_policy": RETAIN,
    }  # fmt: skip


def peer_layer(
    model: Any, rank: int, threads: int, share: bool, longest: int
) -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    """The routed experts of a model's first layer as the peer computes them, and their LoRA parameters.

    The router is left out by calling the wrapper behind it, so that all cases compute the same.
    """
    from kt_kernel.sft import (
        KTConfig,
        get_kt_lora_params,
        kt_adapt_peft_lora,
        update_kt_lora_pointers,
        wrap_moe_layers_with_kt_wrapper,
    )

    holder = _Holder(model.config, [model.model.layers[0].mlp])
    wrappers = wrap_moe_layers_with_kt_wrapper(holder, KTConfig(**settings(rank, threads, share, longest)))
    holder._kt_wrappers = wrappers
    kt_adapt_peft_lora(holder)
    parameters = get_kt_lora_params(holder)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)
    update_kt_lora_pointers(holder)
    holder.train()
    layer = wrappers[0]
    layer.holder = [holder]  # a list, so that it is no submodule: what it holds must live as long

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return layer._forward_routed(x[None], ids, weights)[0].clone()

    return experts, parameters


def peer_model(model: Any, rank: int, chosen: dict[str, Any]) -> tuple[Any, list[nn.Parameter], Callable[[], None]]:
    """A whole model trained by the peer, LoRA on attention and experts: it, its parameters, what refreshes the LoRA."""
    import kt_kernel.sft.wrapper as wrapper
    from kt_kernel.sft import (
        KTConfig,
        get_kt_trainable_params,
        kt_adapt_peft_lora,
        update_kt_lora_pointers,
        wrap_moe_layers_with_kt_wrapper,
    )

    if model.config.model_type == "mixtral":
        # It looks for `block_sparse_moe`, which transformers 5 calls `mlp`, and would wrap nothing without a word.
        known = wrapper.get_moe_arch_config
        wrapper.get_moe_arch_config = lambda config: dataclasses.replace(known(config), moe_layer_attr="mlp")
    model.config.architectures = [type(model).__name__]  # by which it knows the family
    model.requires_grad_(False)
    needed = {"kt_lora_rank": rank, "kt_lora_alpha": 2.0 * rank, "kt_activation_policy": RETAIN}
    wrappers = wrap_moe_layers_with_kt_wrapper(model, KTConfig(**(needed | chosen)))
    if len(wrappers) != model.config.num_hidden_layers:
        raise RuntimeError(f"the peer wrapped {len(wrappers)} of {model.config.num_hidden_layers} layers")
    model._kt_wrappers = wrappers
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=attention))
    model.base_model.model._kt_wrappers = wrappers  # where its functions look for them
    kt_adapt_peft_lora(model)
    known_ids = {id(parameter) for parameter in model.parameters()}
    own = [p for p in get_kt_trainable_params(model) if id(p) not in known_ids]
    parameters = [p for p in model.parameters() if p.requires_grad] + own
    return model, parameters, lambda: update_kt_lora_pointers(model)
