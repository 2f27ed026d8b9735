"""The oracle against the stock modules: without LoRA as they are, with LoRA merged into their weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.support.layers import SCALING, make_inputs, random_lora
from tests.support.models import Family, base_weights, expert_modules
from tests.support.reference import (
    assert_all_close,
    assert_close,
    experts_forward,
    experts_forward_backward,
    relative_error,
)


def stock_layer(family: Family) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = family()
    model.set_experts_implementation("eager")
    return next(iter(expert_modules(model).values())), next(iter(base_weights(model).values()))


@pytest.mark.parametrize("with_lora", [False, True])
def test_reference_is_the_stock_module(family: Family, with_lora: bool) -> None:
    module, base = stock_layer(family)
    x = make_inputs(family, 37)
    lora = random_lora(family, seed=3) if with_lora else {}
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in {"hidden": x.hidden, "weights": x.weights, **lora}.items()
    }

    def delta(name: str) -> torch.Tensor:
        return SCALING * leaves[f"{name}_lora_b"] @ leaves[f"{name}_lora_a"] if with_lora else torch.zeros(())

    merged = {
        "gate_up_proj": torch.cat([base.gate + delta("gate"), base.up + delta("up")], dim=1),
        "down_proj": base.down + delta("down"),
    }
    output = functional_call(module, merged, (leaves["hidden"], x.ids, leaves["weights"]))
    grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), x.grad_output), strict=True))

    expected = experts_forward_backward(*x, base, lora or None, SCALING)
    assert_close(output, expected.output, 1e-5, "output")
    assert_all_close(grads, expected.grads, 1e-5)


def test_reference_skips_ids_of_no_expert_and_counts_repeated_ones(family: Family) -> None:
    _, base = stock_layer(family)
    hidden, ids, weights, _ = make_inputs(family, 5)
    ids[:, 0] = ids[:, 1] = 3
    ids[:, 2:] = family.num_experts
    both = experts_forward(hidden, ids, weights, base)
    ids[:, 1] = -1
    one = experts_forward(hidden, ids, weights, base)
    assert_close(both, one * (weights[:, :2].sum(1) / weights[:, 0])[:, None], 1e-5, "repeated id")
    ids[:] = -7
    assert not experts_forward(hidden, ids, weights, base).any()


def test_reference_without_tokens(family: Family) -> None:
    _, base = stock_layer(family)
    result = experts_forward_backward(*make_inputs(family, 0), base, random_lora(family), SCALING)
    assert result.output.shape == (0, family.hidden)
    assert len(result.grads) == 8
    assert not any(grad.any() for grad in result.grads.values())


def test_relative_error() -> None:
    ones, zeros = torch.ones(4), torch.zeros(4)
    assert relative_error(ones * 1.01, ones) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(ones, zeros) == math.inf
    assert relative_error(ones * math.nan, ones) == math.inf
    assert relative_error(ones[:0], ones[:0]) == 0
    with pytest.raises(AssertionError, match="shapes differ"):
        relative_error(ones, ones[:2])
