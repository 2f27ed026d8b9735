"""The model a patched one must train like: transformers' own experts, under stock PEFT's `target_parameters`.

In a fused gate_up adapter gate and up share one A, which is another model than one A each. So the fused adapter gets
twice the rank and alpha, A = [gate's; up's], and a mask on the gradient keeps its B block-diagonal: the same function
with the same freedom, element for element, so Adam's steps and clipping are the same as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from kt_hf.experts import kt_layers
from tests.support.cases import Case
from tests.support.layers import ALPHA, RANK
from tests.support.models import EXPERT_PROJECTIONS, Family
from tests.support.patched import patched_model

EXPERTS = tuple(f"experts.{name}" for name in EXPERT_PROJECTIONS)


def patched_config(family: Family, **overrides: Any) -> LoraConfig:
    """LoRA on attention and on routed experts; not on shared ones, whose names stock PEFT would take for the routed."""
    targets = [*family.attention, *EXPERTS]
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, **_task(), **overrides})


def stock_config(family: Family, **overrides: Any) -> LoraConfig:
    """The same for the unpatched model."""
    return LoraConfig(
        **{
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": list(family.attention),
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 2 * RANK},
            "alpha_pattern": {r".*\.gate_up_proj": 2 * ALPHA},
            **_task(),
            **overrides,
        }
    )


def _task() -> dict[str, str]:
    return {"task_type": "CAUSAL_LM"}


def pair(family: Family, case: Case, std: float = 0.0, **config: Any) -> tuple[PeftModel, PeftModel]:
    """A patched model and its stock twin in fp32, from the same start: A drawn, B of the given deviation.

    In bf16 a LoRA contribution below the rounding step of the base's output is lost, whoever computes. It is while B
    is near zero, so a comparison of bf16 with fp32 needs a start with B at its usual size.
    """
    model = get_peft_model(patched_model(family, case, **config), patched_config(family))
    stock = get_peft_model(family(), stock_config(family))
    same_start(model, stock, std)
    return model, stock


@torch.no_grad()
def same_start(model: nn.Module, stock: nn.Module, std: float = 0.0) -> None:
    """Give the stock model the patched one's LoRA, B drawn before, and keep its fused B block-diagonal."""
    rng = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if ".lora_B.default." in name and std:
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)
    values = as_stock(model)
    parameters = {name: p for name, p in stock.named_parameters() if p.requires_grad}
    assert set(parameters) == set(values), set(parameters) ^ set(values)
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
    for wrapper in _wrappers(stock).values():
        if wrapper.parameter_name == "gate_up_proj":
            _keep_block_diagonal(wrapper.lora_B["default"].weight)


def _keep_block_diagonal(b: nn.Parameter) -> None:
    """b [2I, 2r·E], columns counting the rank first."""
    mask = torch.zeros(b.shape[0], 2 * RANK, b.shape[1] // (2 * RANK))
    mask[: b.shape[0] // 2, :RANK] = 1
    mask[b.shape[0] // 2 :, RANK:] = 1
    b.register_hook(mask.view_as(b).mul)


def as_stock(model: nn.Module) -> dict[str, Tensor]:
    """A patched model's trainable parameters by the names and in the shapes that the stock model has for them."""
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and ".experts." not in n}
    names = {id(module): name for name, module in model.named_modules()}
    for layer in kt_layers(model):
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = (
            [tensor.detach().float().clone() for tensor in projection.tensors("default")]
            for projection in layer.projections
        )
        zero = torch.zeros_like(gate_b)
        fused_a = torch.cat([gate_a, up_a], dim=1)
        fused_b = torch.cat([torch.cat([gate_b, zero], dim=2), torch.cat([zero, up_b], dim=2)], dim=1)
        # PEFT wraps the parameters one after the other, the last outermost.
        for place, a, b in (("", down_a, down_b), ("base_layer.", fused_a, fused_b)):
            prefix = f"{names[id(layer)]}.{place}lora_"
            values[f"{prefix}A.default.weight"] = a.flatten(0, 1)
            values[f"{prefix}B.default.weight"] = b.permute(1, 2, 0).flatten(1)
    return values


def assert_same_parameters(model: nn.Module, stock: nn.Module, limit: float) -> None:
    """Each trained tensor within `limit` of the stock model's, relative to its size."""
    wanted = {name: p.detach() for name, p in stock.named_parameters() if p.requires_grad}
    actual = as_stock(model)
    assert set(actual) == set(wanted)
    worst = {name: ((actual[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    assert max(worst.values()) <= limit, sorted(worst.items(), key=lambda item: -item[1])[:3]


def _wrappers(stock: nn.Module) -> dict[str, Any]:
    return dict(_walk(stock))


def _walk(stock: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in stock.named_modules():
        if isinstance(module, ParamWrapper):
            yield name, module
