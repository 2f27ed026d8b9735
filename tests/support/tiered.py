"""Split models and layers, with their adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kt_hf import KTExperts, apply_kt_moe
from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.pinned_weights import HostWeights
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.backends.gpu.weight_stream import Streamer
from kt_hf.backends.tiered import TieredBackend
from tests.support.cases import Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.layers import random_lora, set_lora
from tests.support.models import base_weights
from tests.support.patched import fill_lora, lora_config
from tests.support.reference import BaseWeights

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
    parts = (
        [part.experts.tolist() for part in backend.parts] if isinstance(backend, TieredBackend) else [list(range(E))]
    )
    assert parts == expected
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    return layer, base, lora


def split_layer(case: Case, gpu: list[int], **config: Any) -> tuple[KTExperts, BaseWeights, dict[str, Tensor]]:
    """The first layer, and what the reference needs."""
    layer = split_model(case, gpu, **config)._kt_wrappers[0]
    backend = layer._runner.backend
    if 0 < len(gpu) < E:
        assert isinstance(backend, TieredBackend)
        assert [part.experts.tolist() for part in backend.parts] == [gpu, [e for e in range(E) if e not in gpu]]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    return layer, base, lora


class Watched(Streamer):
    """Copies on the CPU, and notes them: (address of the source, elements)."""

    def __init__(self, chunk_bytes: int, buffers: int = 3) -> None:
        super().__init__(torch.device("cpu"), chunk_bytes, buffers, copies=True)
        self.copied: list[tuple[int, int]] = []

    def _copy(self, source: Tensor, target: Tensor) -> None:
        self.copied.append((source.data_ptr(), source.numel()))
        super()._copy(source, target)

    def experts(self, weights: HostWeights) -> list[int]:
        """Those copied of a layer since the last call, by their `down`; forgets all."""
        base, size = weights.down.data_ptr(), weights.down[0].numel()
        found: list[int] = []
        for address, count in self.copied:
            first, rest = divmod(address - base, size * 2)
            if not rest and 0 <= first < len(weights.down) and count % size == 0:
                found.extend(range(first, first + count // size))
        self.copied.clear()
        return found


def layer_weights(layer: int = 0) -> ExpertWeights:
    experts = MIXTRAL(torch.bfloat16).model.layers[layer].mlp.experts
    return ExpertWeights(experts.gate_up_proj.detach(), experts.down_proj.detach())


def streamed_parts(model: Any) -> list[StreamedBackend]:
    found = []
    for layer in model._kt_wrappers:
        backend = layer._runner.backend
        parts = [part.backend for part in backend.parts] if isinstance(backend, TieredBackend) else [backend]
        found += [part for part in parts if isinstance(part, StreamedBackend) and part.name == "streamed"]
    return found
