"""Tokens that send a gate far below zero: right gradients where the operators alone give NaN, in every kind of call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kt_hf import KTAMXBackwardError, apply_kt_moe
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.layers import SCALING, LayerInputs, forward_backward, make_inputs, random_lora, set_lora
from tests.support.models import base_weights, expert_modules
from tests.support.one_layer import build, check, constant, inputs, layer_with
from tests.support.patched import adapted_model, gradients_of, lora_config, loss_of
from tests.support.reference import BaseWeights, LayerResult, assert_all_close, assert_close, experts_forward_backward

kernel = pytest.mark.parametrize("case", [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS)], ids=str)


def gates(x: LayerInputs, base: BaseWeights, lora: dict[str, Tensor]) -> Tensor:
    """[T, K, I] fp32 gate pre-activations, LoRA included."""
    weight = base.gate.float() + lora["gate_lora_b"] @ lora["gate_lora_a"] * SCALING
    return torch.einsum("th,tkih->tki", x.hidden.float(), weight[x.ids])


def loud(x: LayerInputs, tokens: list[int], base: BaseWeights, lora: dict[str, Tensor], least: float) -> LayerInputs:
    """The same with the smallest gate pre-activation of these tokens at `least`."""
    lowest = gates(x, base, lora).amin(dim=(1, 2))
    hidden = x.hidden.clone()
    for token in tokens:
        hidden[token] = (hidden[token].float() * least / lowest[token]).to(hidden.dtype)
    return x._replace(hidden=hidden)


def assert_right(
    layer: Any, x: LayerInputs, base: BaseWeights, lora: dict[str, Tensor], case: Case, limit: float
) -> None:
    actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, SCALING)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, limit)


@pytest.mark.parametrize("least", [-88.2, -89.0, -104.0, -1e5])
@pytest.mark.parametrize("tokens", [[3], [0, 1, 17, 36], list(range(37))], ids=["one", "four", "all"])
def test_gates_far_below_zero(case: Case, tokens: list[int], least: float) -> None:
    layer, base, lora = layer_with(case)
    x = loud(inputs(case), tokens, base, lora, least)
    # Inputs of 1e5 leave few gates between shut and open, and bf16 rounds those by half of their slope.
    assert_right(layer, x, base, lora, case, case.grad * (2 if least < -500 else 1))
    assert_right(layer, inputs(case, 1), base, lora, case, case.grad)  # and the layer is as before


@kernel
def test_the_operators_alone_give_nan(case: Case) -> None:
    """What this is for: the token's gradient is NaN, and gate_a's and up_a's are wrong without being NaN."""
    layer, base, lora = layer_with(case)
    x = loud(inputs(case), [3], base, lora, -120.0)
    layer._runner.backend.careful_backward = lambda *_: None
    with pytest.raises(KTAMXBackwardError, match=r"^model\.layers\.0\.mlp\.experts: the gradient of hidden_states"):
        forward_backward(layer, x)
    backend = layer._runner.backend
    _, saved = backend.forward(x.hidden, x.ids, x.weights, save=True)
    found = backend.backward(saved, x.grad_output)
    assert (~torch.isfinite(found.hidden_states)).any(dim=1).nonzero().flatten().tolist() == [3]
    expected = experts_forward_backward(*x, base, lora, SCALING).grads
    error = {}
    for name, gradient in zip(lora, found.lora, strict=True):
        scaling = SCALING if name.endswith("b") else 1.0
        rank = (slice(None), slice(0, 8)) if name.endswith("a") else (..., slice(0, 8))
        error[name] = (gradient[rank].float() * scaling - expected[name]).abs().sum() / expected[name].abs().sum()
    assert {name for name, value in error.items() if value > 0.1} == {"gate_lora_a", "up_lora_a"}


def without_lora(layer: Any) -> None:
    for projection in layer.projections:
        projection.enable_adapters(False)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x._replace(ids=x.ids.clone().index_fill_(1, torch.tensor([1]), 8)),  # no second expert
        lambda x: x._replace(ids=x.ids[:, :1].expand(-1, 2).contiguous()),  # the same expert twice
    ],
    ids=["", "sentinel", "repeated"],
)
@pytest.mark.parametrize("on", [True, False], ids=["lora", "no lora"])
def test_inputs_of_every_kind(case: Case, change: Callable[[LayerInputs], LayerInputs], on: bool) -> None:
    layer, base, lora = layer_with(case)
    if not on:
        without_lora(layer)
        lora = {name: torch.zeros_like(value) for name, value in lora.items()}
    x = change(loud(inputs(case), [2, 5, 20], base, lora, -150.0))
    actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, SCALING)
    wanted = expected.grads if on else {name: g for name, g in expected.grads.items() if name not in lora}
    got = {name: actual.grads[name] for name in wanted}
    assert_all_close(got, wanted, case.grad)


@pytest.mark.parametrize("settings", [{"target_modules": ["down_proj"]}, {"target_modules": ["gate_proj"], "r": 3}])
def test_fewer_projections_and_smaller_ranks(case: Case, settings: dict[str, Any], monkeypatch: Any) -> None:
    model, layer, base = build(case, **settings)
    original = make_inputs

    def loud_inputs(*args: Any, **kwargs: Any) -> LayerInputs:
        x = original(*args, **kwargs)
        x.hidden[[1, 9]] *= 200
        return x

    monkeypatch.setattr("tests.support.one_layer.make_inputs", loud_inputs)
    check(
        case,
        layer,
        base,
        {"default": constant(model.peft_config["default"].lora_alpha / model.peft_config["default"].r)},
    )


@pytest.mark.parametrize("mode", ["pieces", "non-reentrant", "reentrant", "stale"])
def test_calls_of_every_kind(case: Case, mode: str) -> None:
    layer, base, lora = layer_with(case, **({"kt_max_len": 10} if mode == "pieces" else {}))
    x = loud(inputs(case), [3, 12, 35], base, lora, -150.0)
    expected = experts_forward_backward(*x, base, lora, SCALING)
    leaves = [x.hidden.clone().requires_grad_(), x.weights.clone().requires_grad_()]
    if "reentrant" in mode:
        output = checkpoint(layer, leaves[0], x.ids, leaves[1], use_reentrant=mode == "reentrant")
    else:
        output = layer(leaves[0], x.ids, leaves[1])
    if mode == "stale":
        layer(*inputs(case, 4)[:3])
    output.backward(x.grad_output)
    actual = {"hidden": leaves[0].grad, "weights": leaves[1].grad}
    actual |= {name: parameter.grad for name, parameter in layer.lora_params.items()}
    assert_all_close(actual, expected.grads, case.grad)


@kernel
def test_told_once_a_layer(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """A second model of the process, whose layers have the same names, is warned of as well."""
    with caplog.at_level(logging.WARNING, "kt_hf"):
        for _ in range(2):
            layer, base, lora = layer_with(case)
            x = loud(inputs(case), [3, 5], base, lora, -150.0)
            for _ in range(2):
                forward_backward(layer, x)
    warnings = [record.getMessage() for record in caplog.records if "pre-activation" in record.getMessage()]
    assert len(warnings) == 2
    assert all(warning.startswith("model.layers.0.mlp.experts: 2 of 37 tokens") for warning in warnings)


@kernel
def test_packed_for_inference_is_told(case: Case) -> None:
    model = MIXTRAL(case.dtype)
    base = base_weights(model)[0]
    layer = apply_kt_moe(model, make_config(case.backend, kt_lora_rank=0))._kt_wrappers[0]
    none = {name: torch.zeros(1) for name in ("gate_lora_a", "gate_lora_b")}
    x = loud(inputs(case), [3], base, none, -150.0)
    hidden = x.hidden.clone().requires_grad_()
    with pytest.raises(KTAMXBackwardError, match="kt_lora_rank=0 cannot compute their gradient"):
        layer(hidden, x.ids, x.weights).backward(x.grad_output)


@kernel
def test_a_whole_model_trains_through_it(case: Case) -> None:
    """Attention's gradients come through the experts' grad_input."""
    model = adapted_model(MIXTRAL, case, seed=1)
    oracle = adapted_model(MIXTRAL, TORCH_BF16, seed=1)
    for patched in (model, oracle):
        with torch.no_grad():
            for name, parameter in patched.named_parameters():
                if "post_attention_layernorm" in name:
                    parameter.mul_(60)
    ids = MIXTRAL.inputs()
    assert_all_close(gradients_of(model, loss_of(model, ids)), gradients_of(oracle, loss_of(oracle, ids)), 0.06)


def check_finite_and_right(actual: LayerResult, expected: LayerResult, case: Case) -> None:
    """What the gate shuts to less than bf16 can add up to is only finite and small."""
    for name, result, wanted, limit in (
        ("output", actual.output, expected.output, case.forward),
        *((name, actual.grads[name], wanted, case.grad) for name, wanted in expected.grads.items()),
    ):
        assert torch.isfinite(result).all(), name
        if wanted.abs().max() > 1e-30:
            assert_close(result, wanted, limit, name)
        else:
            assert result.abs().max() < 1e-30, name


@pytest.mark.parametrize("value", [-1e4, -88.5, 88.5, 1e4])
def test_every_gate_at_a_value(case: Case, value: float) -> None:
    """Gate pre-activations of any size are right. Here each token's are `value`."""
    model = MIXTRAL(case.dtype)
    experts = next(iter(expert_modules(model).values()))
    with torch.no_grad():
        experts.gate_up_proj[:, : MIXTRAL.intermediate].zero_()
        experts.gate_up_proj[:, : MIXTRAL.intermediate, 0] = value
    base = base_weights(model)[0]
    model = apply_kt_moe(model, make_config(case.backend))
    layer = get_peft_model(model, lora_config(MIXTRAL))._kt_wrappers[0]
    lora = random_lora(MIXTRAL)
    lora["gate_lora_b"].zero_()
    set_lora(layer, lora)
    x = inputs(case)
    x.hidden[:, 0] = 1
    expected = experts_forward_backward(*x, base, lora, SCALING)
    check_finite_and_right(forward_backward(layer, x), expected, case)
