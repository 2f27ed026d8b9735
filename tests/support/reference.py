"""The oracle: a gated-SiLU experts layer with un-merged LoRA in plain fp32 PyTorch, and how far a result is from it.

It shares no code with the package, so that an error in the package cannot hide in both. Gradients are autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class BaseWeights(NamedTuple):
    """One layer's frozen expert weights, fp32: gate and up [E, I, H], down [E, H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate.shape[2]


def experts_forward(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    base: BaseWeights,
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """hidden [T, H], ids and weights [T, K] -> [T, H] in fp32.

    lora holds the six tensors of LORA_NAMES, A as [E, r, in] and B as [E, out, r]. An id outside [0, E) contributes
    nothing; an id that appears twice in a row contributes twice.
    """
    hidden, weights = hidden.float(), weights.float()
    output = torch.zeros_like(hidden)
    for expert in range(base.num_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        routed = _one_expert(hidden[token], expert, base, lora, scaling) * weights[token, slot, None]
        output = output.index_add(0, token, routed)
    return output


def _one_expert(x: Tensor, expert: int, base: BaseWeights, lora: Mapping[str, Tensor] | None, scaling: float) -> Tensor:
    def project(value: Tensor, name: str, weight: Tensor) -> Tensor:
        out = linear(value, weight[expert])
        if lora is not None:
            a, b = lora[f"{name}_lora_a"][expert].float(), lora[f"{name}_lora_b"][expert].float()
            out = out + scaling * linear(linear(value, a), b)
        return out

    activated = silu(project(x, "gate", base.gate)) * project(x, "up", base.up)
    return project(activated, "down", base.down)


class LayerResult(NamedTuple):
    """Output [T, H] and the gradients, by the names "hidden", "weights" and LORA_NAMES."""

    output: Tensor
    grads: dict[str, Tensor]


def experts_forward_backward(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    base: BaseWeights,
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
) -> LayerResult:
    """The layer's fp32 output, and the gradients of (output * grad_output).sum(); none of the inputs is touched."""
    leaves = {"hidden": hidden, "weights": weights, **(lora or {})}
    leaves = {name: value.detach().clone().float().requires_grad_() for name, value in leaves.items()}
    lora_leaves = {name: leaves[name] for name in lora} if lora else None
    output = experts_forward(leaves["hidden"], ids, leaves["weights"], base, lora_leaves, scaling)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output.detach().float(), allow_unused=True)
    filled = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return LayerResult(output.detach(), filled)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """mean|actual - expected| / mean|expected| in fp64. Where expected is all zeros: 0 if actual is too, else inf."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not (torch.isfinite(actual).all() and torch.isfinite(expected).all()):
        return math.inf
    difference = (actual - expected).abs().sum().item()
    if difference == 0.0:
        return 0.0
    size = expected.abs().sum().item()
    return difference / size if size else math.inf


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = relative_error(actual, expected)
    assert error < tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Every named tensor within tolerance of its namesake; all errors are reported, not the first alone."""
    assert set(actual) == set(expected), f"names differ: {sorted(set(actual) ^ set(expected))}"
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.3g}" for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors above {tolerance:.3g}: {wrong}"
