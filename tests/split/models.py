"""Split models and layers, with their adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kt_hf import KTExperts, apply_kt_moe
from kt_hf.backends.tiered import SplitBackend
from tests.conftest import Case, make_config
from tests.families.layers import random_lora, set_lora
from tests.families.patched import fill_lora, lora_config
from tests.helpers import MIXTRAL
from tests.models import base_weights
from tests.reference import BaseWeights

E = MIXTRAL.num_experts


def split_model(case: Case, gpu: list[int], seed: int | None = None, **config: Any) -> PeftModel:
    """A Mixtral with an adapter, the experts `gpu` of each layer in the GPU's tier."""
    counts = {layer: torch.tensor([int(e in gpu) for e in range(E)]) for layer in (0, 1)}
    config = make_config(case.backend, kt_num_gpu_experts=len(gpu), **config)
    model = get_peft_model(apply_kt_moe(MIXTRAL(case.dtype), config, placement=counts), lora_config(MIXTRAL))
    if seed is not None:
        fill_lora(model, seed)
    return model


def tiered_model(
    case: Case, resident: list[int], streamed: list[int], seed: int | None = None, **config: Any
) -> PeftModel:
    """As `split_model`, with the experts `streamed` of each layer in their tier."""
    counts = {layer: torch.tensor([2 * int(e in resident) + int(e in streamed) for e in range(E)]) for layer in (0, 1)}
    placement = {"resident": len(resident), "streamed": len(streamed)}
    config = make_config(case.backend, kt_expert_placement=placement, **config)
    model = get_peft_model(apply_kt_moe(MIXTRAL(case.dtype), config, placement=counts), lora_config(MIXTRAL))
    if seed is not None:
        fill_lora(model, seed)
    return model


def tiered_layer(
    case: Case, resident: list[int], streamed: list[int], **config: Any
) -> tuple[KTExperts, BaseWeights, dict[str, Tensor]]:
    """The first layer, and what the reference needs."""
    layer = tiered_model(case, resident, streamed, **config)._kt_wrappers[0]
    rest = [e for e in range(E) if e not in {*resident, *streamed}]
    expected = [tier for tier in (sorted(resident), sorted(streamed), rest) if tier]
    backend = layer._runner.backend
    parts = [part.experts.tolist() for part in backend.parts] if isinstance(backend, SplitBackend) else [list(range(E))]
    assert parts == expected
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    return layer, base, lora


def split_layer(case: Case, gpu: list[int], **config: Any) -> tuple[KTExperts, BaseWeights, dict[str, Tensor]]:
    """The first layer, and what the reference needs."""
    layer = split_model(case, gpu, **config)._kt_wrappers[0]
    backend = layer._runner.backend
    if 0 < len(gpu) < E:
        assert isinstance(backend, SplitBackend)
        assert [part.experts.tolist() for part in backend.parts] == [gpu, [e for e in range(E) if e not in gpu]]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    return layer, base, lora
