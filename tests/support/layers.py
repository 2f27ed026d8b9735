"""Inputs for one experts layer, and the same computation through KTExperts and through the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.support.models import Family
from tests.support.reference import LORA_NAMES, LayerResult

RANK = 8
ALPHA = 12
SCALING = ALPHA / RANK  # 1.5: neither one nor a power of two, so a forgotten or doubled scaling shows


class LayerInputs(NamedTuple):
    """hidden [T, H], ids [T, K] int64, weights [T, K] fp32, grad_output [T, H]."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    grad_output: Tensor

    def clones(self) -> LayerInputs:
        return LayerInputs(*(value.detach().clone() for value in self))


def make_inputs(
    family: Family,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    experts: Iterable[int] | None = None,
) -> LayerInputs:
    """Random inputs; each row's ids are distinct and drawn from `experts` (default: all)."""
    rng = torch.Generator().manual_seed(seed)
    pool = torch.tensor(list(range(family.num_experts) if experts is None else experts))
    choice = torch.rand(tokens, len(pool), generator=rng).argsort(dim=1)[:, : family.top_k]
    weights = torch.rand(tokens, family.top_k, generator=rng) + 0.1
    return LayerInputs(
        torch.randn(tokens, family.hidden, generator=rng).to(dtype),
        pool[choice],
        weights / weights.sum(-1, keepdim=True),
        torch.randn(tokens, family.hidden, generator=rng).to(dtype),
    )


def random_lora(family: Family, seed: int = 0, rank: int = RANK) -> dict[str, Tensor]:
    """Six non-zero tensors whose contribution is of the size of the base weights'."""
    rng = torch.Generator().manual_seed(1000 + seed)
    sizes = {"gate": (family.hidden, family.intermediate), "up": (family.hidden, family.intermediate)}
    sizes["down"] = (family.intermediate, family.hidden)
    lora = {}
    for name, (into, out) in sizes.items():
        lora[f"{name}_lora_a"] = torch.randn(family.num_experts, rank, into, generator=rng) * 0.15
        lora[f"{name}_lora_b"] = torch.randn(family.num_experts, out, rank, generator=rng) * 0.15
    return {name: lora[name] for name in LORA_NAMES}


@torch.no_grad()
def set_lora(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write the values into the layer's Parameters in place, as an optimizer does; nothing is told about it."""
    parameters = layer.lora_params
    assert set(parameters) == set(values)
    for name, value in values.items():
        parameters[name].copy_(value)


def forward(layer: nn.Module, x: LayerInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output, and the leaves to differentiate: fresh hidden and weights, and the layer's LoRA."""
    leaves = {"hidden": x.hidden.detach().requires_grad_(), "weights": x.weights.detach().requires_grad_()}
    output = layer(leaves["hidden"], x.ids, leaves["weights"])
    return output, {**leaves, **layer.lora_params}


def gradients(output: Tensor, leaves: Mapping[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    """Gradients by leaf name; zeros where autograd found no path, which the comparison then judges."""
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def forward_backward(layer: nn.Module, x: LayerInputs) -> LayerResult:
    output, leaves = forward(layer, x)
    return LayerResult(output.detach(), gradients(output, leaves, x.grad_output))


def on_gpu(x: LayerInputs) -> LayerInputs:
    return LayerInputs(*(value.cuda() for value in x))
