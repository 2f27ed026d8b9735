"""Patched models with adapters, and whole-model results."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kt_hf import apply_kt_moe
from tests.support.cases import Case, make_config
from tests.support.layers import ALPHA, RANK
from tests.support.models import Family, base_weights
from tests.support.reference import BaseWeights


def patched_model(family: Family, case: Case, **config: Any) -> PreTrainedModel:
    return apply_kt_moe(family(case.dtype), make_config(case.backend, **config))


def lora_config(family: Family, **overrides: Any) -> LoraConfig:
    """An ordinary config: nothing in it knows that experts are special."""
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": family.target_modules, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **overrides})


def adapted_model(
    family: Family, case: Case, seed: int | None = None, lora: dict[str, Any] | None = None, **config: Any
) -> PeftModel:
    """Patched, with an adapter on attention and every MLP or as `lora` says; with a seed, both A and B are random."""
    model = get_peft_model(patched_model(family, case, **config), lora_config(family, **(lora or {})))
    if seed is not None:
        fill_lora(model, seed)
    return model


def loaded_again(model: PeftModel, family: Family, case: Case, folder: Path) -> PeftModel:
    """The adapter saved into `folder`, and loaded into another patched model."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(patched_model(family, case), folder)


def adapted_layers(family: Family, case: Case) -> list[tuple[nn.Module, BaseWeights]]:
    """Every layer's KTExperts, with a fresh adapter, beside the weights its module had before the patch."""
    model = family(case.dtype)
    bases = base_weights(model)
    apply_kt_moe(model, make_config(case.backend))
    peft_model = get_peft_model(model, lora_config(family))
    layers = peft_model._kt_wrappers
    assert [layer.layer_idx for layer in layers] == list(bases)
    return list(zip(layers, bases.values(), strict=True))


@torch.no_grad()
def fill_lora(model: nn.Module, seed: int, only: Callable[[str], bool] = lambda name: True, std: float = 0.1) -> None:
    """Random values for the LoRA parameters, the same for the same name in any model."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and only(name):
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every trainable parameter; one that has no gradient at all is an error, not a zero."""
    parameters = trainable(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
