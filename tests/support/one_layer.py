"""One layer of a patched model with its adapters, against the fp32 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kt_hf import KTExperts
from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import ALPHA, RANK, SCALING, LayerInputs, make_inputs, random_lora, set_lora
from tests.support.models import EXPERT_PROJECTIONS, base_weights
from tests.support.patched import adapted_model, fill_lora, lora_config, patched_model
from tests.support.reference import BaseWeights, assert_all_close, assert_close, experts_forward_backward

TOKENS = 37


def build(case: Case, **settings: Any) -> tuple[PeftModel, KTExperts, Any]:
    """A patched Mixtral with one adapter of `settings`, filled; its first layer, and that layer's weights before."""
    model = MIXTRAL(case.dtype)
    base = base_weights(model)[0]
    del model
    model = get_peft_model(patched_model(MIXTRAL, case, kt_lora_rank=32), lora_config(MIXTRAL, **settings))
    fill_lora(model, seed=1)
    return model, model._kt_wrappers[0], base


def inputs(case: Case, seed: int = 0) -> LayerInputs:
    return make_inputs(MIXTRAL, TOKENS, case.dtype, seed=seed)


def stacked(layer: KTExperts, adapters: dict[str, Callable[[str], float]]) -> dict[str, Tensor]:
    """The reference's six tensors for these active adapters together: A stacked, B with its scaling by name."""
    tensors = {}
    for projection, name in zip(EXPERT_PROJECTIONS, ("gate", "up", "down"), strict=True):
        module = getattr(layer, projection)
        a = [module.lora_A[adapter].weight.detach() for adapter in adapters if adapter in module.lora_A]
        b = [module.lora_B[k].weight.detach() * s(projection) for k, s in adapters.items() if k in module.lora_B]
        inside, outside = module.in_features, module.out_features
        tensors[f"{name}_lora_a"] = torch.cat(a, 1).float() if a else torch.zeros(8, 1, inside)
        tensors[f"{name}_lora_b"] = torch.cat(b, 2).float() if b else torch.zeros(8, outside, 1)
    return tensors


def check(case: Case, layer: KTExperts, base: Any, adapters: dict[str, Callable[[str], float]], seed: int = 0) -> None:
    """Output and gradients, those of A and B of every adapter among them, against the reference."""
    x = inputs(case, seed)
    leaves = {"hidden": x.hidden.detach().requires_grad_(), "weights": x.weights.detach().requires_grad_()}
    output = layer(leaves["hidden"], x.ids, leaves["weights"])
    expected = experts_forward_backward(*x, base, stacked(layer, adapters))
    assert_close(output, expected.output, case.forward, "output")
    output.backward(x.grad_output)
    actual, wanted = {name: leaf.grad for name, leaf in leaves.items()}, {}
    for projection, name in zip(EXPERT_PROJECTIONS, ("gate", "up", "down"), strict=True):
        module, offset = getattr(layer, projection), 0
        for adapter, scaling in adapters.items():
            if adapter not in module.lora_A:
                continue
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            rows = slice(offset, offset + a.shape[1])
            offset += a.shape[1]
            actual[f"{adapter} {name} a"], actual[f"{adapter} {name} b"] = a.grad, b.grad
            wanted[f"{adapter} {name} a"] = expected.grads[f"{name}_lora_a"][:, rows]
            wanted[f"{adapter} {name} b"] = expected.grads[f"{name}_lora_b"][:, :, rows] * scaling(projection)
    layer.zero_grad()
    wanted |= {name: expected.grads[name] for name in leaves}
    assert_all_close(actual, wanted, case.grad)


def constant(value: float) -> Callable[[str], float]:
    """A scaling that is the same for each projection."""
    return lambda projection: value


DEFAULT = {"default": constant(ALPHA / RANK)}


def layer_with(case: Case, **config: Any) -> tuple[KTExperts, BaseWeights, dict[str, Tensor]]:
    """A layer with one adapter whose values are random_lora's, and what the reference needs of it."""
    layer = adapted_model(MIXTRAL, case, **config)._kt_wrappers[0]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    return layer, base, lora


def expected_grads(x: LayerInputs, base: BaseWeights, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    return experts_forward_backward(*x, base, lora, SCALING).grads
