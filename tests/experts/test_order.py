"""Any order of forwards, adapters and backwards gives the gradients of the plain order.

The operators keep one saved forward a layer, and a later forward or LoRA update spoils it, in grad_input alone where
T is small: so gradients are compared whole, hidden_states included.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.support.cases import Case
from tests.support.layers import (
    SCALING,
    LayerInputs,
    forward,
    gradients,
    make_inputs,
    random_lora,
    set_lora,
)
from tests.support.models import Family
from tests.support.patched import adapted_layers, adapted_model, fill_lora, gradients_of, logits_of, loss_of
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward
from tests.support.sizes import LAYER_SIZES

pytestmark = LAYER_SIZES


def _small_inputs(family: Family, tokens: int, dtype: torch.dtype) -> LayerInputs:
    """ids confined to the first K experts: fewer than the forward before it made active."""
    return make_inputs(family, tokens, dtype, seed=99, experts=range(family.top_k))


def _evaluate(family: Family, layer: nn.Module, tokens: int, dtype: torch.dtype) -> None:
    x = _small_inputs(family, tokens, dtype)
    with torch.no_grad():
        layer(x.hidden, x.ids, x.weights)


def evaluation_of(tokens: int) -> Callable[..., None]:
    def disturb(family: Family, layer: nn.Module, dtype: torch.dtype, lora: dict[str, Tensor]) -> None:
        _evaluate(family, layer, tokens, dtype)

    return disturb


def abandoned_forward(family: Family, layer: nn.Module, dtype: torch.dtype, lora: dict[str, Tensor]) -> None:
    forward(layer, make_inputs(family, 50, dtype, seed=98))


def lora_restored(family: Family, layer: nn.Module, dtype: torch.dtype, lora: dict[str, Tensor]) -> None:
    set_lora(layer, random_lora(family, seed=97))
    set_lora(layer, lora)


def lora_used_and_restored(family: Family, layer: nn.Module, dtype: torch.dtype, lora: dict[str, Tensor]) -> None:
    set_lora(layer, random_lora(family, seed=97))
    _evaluate(family, layer, 2, dtype)
    set_lora(layer, lora)


def lora_announced_and_restored(family: Family, layer: nn.Module, dtype: torch.dtype, lora: dict[str, Tensor]) -> None:
    set_lora(layer, random_lora(family, seed=97))
    layer.update_lora_pointers()
    set_lora(layer, lora)
    layer.update_lora_pointers()


DISTURBANCES = {
    **{f"evaluation_of_{tokens}": evaluation_of(tokens) for tokens in (1, 2, 3)},
    "abandoned_forward": abandoned_forward,
    "lora_restored": lora_restored,
    "lora_used_and_restored": lora_used_and_restored,
    "lora_announced_and_restored": lora_announced_and_restored,
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_between_forward_and_backward_of_a_layer(family: Family, case: Case, disturb: Callable[..., None]) -> None:
    layer, base = adapted_layers(family, case)[0]
    lora = random_lora(family)
    set_lora(layer, lora)
    x = make_inputs(family, 64, case.dtype)
    output, leaves = forward(layer, x)
    disturb(family, layer, case.dtype, lora)
    expected = experts_forward_backward(*x, base, lora, SCALING)
    assert_close(output, expected.output, case.forward, "output")
    assert_all_close(gradients(output, leaves, x.grad_output), expected.grads, case.grad)


@pytest.mark.parametrize("tokens", [(37, 64), (64, 37), (50, 50)])
def test_two_forwards_before_one_backward_of_a_layer(family: Family, case: Case, tokens: tuple[int, int]) -> None:
    layer, base = adapted_layers(family, case)[0]
    lora = random_lora(family)
    set_lora(layer, lora)
    inputs = [make_inputs(family, count, case.dtype, seed=seed) for seed, count in enumerate(tokens)]
    runs = [forward(layer, x) for x in inputs]
    loss = sum((output.float() * x.grad_output.float()).sum() for (output, _), x in zip(runs, inputs, strict=True))
    singles = [experts_forward_backward(*x, base, lora, SCALING).grads for x in inputs]
    leaves = {f"{name}_{i}": run[1][name] for i, run in enumerate(runs) for name in ("hidden", "weights")}
    expected = {f"{name}_{i}": single[name] for i, single in enumerate(singles) for name in ("hidden", "weights")}
    leaves |= layer.lora_params
    expected |= {name: singles[0][name] + singles[1][name] for name in lora}
    assert_all_close(gradients(loss, leaves, torch.ones(())), expected, case.grad)


def test_gradient_mode_changes_no_output(family: Family, case: Case) -> None:
    layer, _ = adapted_layers(family, case)[0]
    set_lora(layer, random_lora(family))
    x = make_inputs(family, 37, case.dtype)
    saved, _ = forward(layer, x)
    with torch.no_grad():
        assert torch.equal(layer(x.hidden, x.ids, x.weights), saved)
    with torch.inference_mode():
        assert torch.equal(layer(x.hidden, x.ids, x.weights), saved)


def few_tokens(tokens: int) -> Callable[[PeftModel, Family], None]:
    def disturb(model: PeftModel, family: Family) -> None:
        logits_of(model, family.inputs(1, tokens, seed=5))

    return disturb


def reference_pass(model: PeftModel, family: Family) -> None:
    """DPO's order: the policy's forward, the reference's, the policy's backward."""
    with model.disable_adapter():
        logits_of(model, family.inputs(seed=6))


def other_adapter(tokens: int) -> Callable[[PeftModel, Family], None]:
    def disturb(model: PeftModel, family: Family) -> None:
        model.set_adapter("other")
        logits_of(model, family.inputs(1, tokens, seed=7))
        model.set_adapter("default")

    return disturb


MODEL_DISTURBANCES = {
    **{f"{tokens}_tokens": few_tokens(tokens) for tokens in (1, 2, 3)},
    "reference_pass": reference_pass,
    **{f"{tokens}_tokens_of_another_adapter": other_adapter(tokens) for tokens in (1, 24)},
}


@pytest.mark.parametrize("disturb", MODEL_DISTURBANCES.values(), ids=MODEL_DISTURBANCES)
def test_between_forward_and_backward_of_a_model(
    family: Family, case: Case, disturb: Callable[[PeftModel, Family], None]
) -> None:
    model = adapted_model(family, case)
    model.add_adapter("other", model.peft_config["default"])
    fill_lora(model, seed=1)
    ids = family.inputs()
    expected = gradients_of(model, loss_of(model, ids))
    loss = loss_of(model, ids)
    disturb(model, family)
    actual = gradients_of(model, loss)
    assert all(grad.any() for grad in expected.values())
    assert_all_close(actual, expected, case.same)


def test_two_forwards_before_one_backward_of_a_model(family: Family, case: Case) -> None:
    model = adapted_model(family, case, seed=1)
    first, second = family.inputs(), family.inputs(1, 9, seed=8)
    singles = [gradients_of(model, loss_of(model, ids)) for ids in (first, second)]
    together = gradients_of(model, loss_of(model, first) + loss_of(model, second))
    assert_all_close(together, {name: singles[0][name] + singles[1][name] for name in together}, case.same)
