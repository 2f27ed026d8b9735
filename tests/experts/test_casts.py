"""Casts, moves and default devices: none reaches the copies that are computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward, forward_backward, gradients, make_inputs
from tests.support.one_layer import expected_grads, inputs, layer_with
from tests.support.patched import adapted_model, fill_lora, lora_config, patched_model
from tests.support.reference import assert_all_close

CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to cpu": lambda module: module.to("cpu", torch.float16),
    "half and back": lambda module: module.half().float(),
    "apply": lambda module: module._apply(lambda tensor: tensor * 0),
}


@pytest.mark.parametrize(("name", "whole"), [*((name, True) for name in CASTS), ("double", False), ("apply", False)])
def test_casts_change_nothing(case: Case, name: str, whole: bool) -> None:
    """Casts change no result to the bit, nor the parameters, also between a forward and its backward."""
    model = adapted_model(MIXTRAL, case, seed=1)
    layer, x = model._kt_wrappers[0], inputs(case)
    before = forward_backward(layer, x)
    tensors = {key: value.data_ptr() for key, value in layer.lora_params.items()}
    output, leaves = forward(layer, x)
    CASTS[name](model if whole else layer)
    assert {key: value.data_ptr() for key, value in layer.lora_params.items()} == tensors
    assert {value.dtype for value in layer.lora_params.values()} == {torch.float32}
    for result in (forward_backward(layer, x).grads, gradients(output, leaves, x.grad_output)):
        assert [key for key, grad in before.grads.items() if not torch.equal(result[key], grad)] == []
    assert torch.equal(forward_backward(layer, x).output, before.output)


def test_a_cast_of_the_parameters_data_is_followed(case: Case) -> None:
    """As trainers cast adapters of quantised models: the parameter takes the dtype, the results follow its values."""
    layer, base, lora = layer_with(case)
    x = inputs(case)
    forward_backward(layer, x)
    for parameter in layer.lora_params.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    actual = forward_backward(layer, x)
    rounded = {name: value.to(torch.bfloat16).float() for name, value in lora.items()}
    assert {actual.grads[name].dtype for name in lora} == {torch.bfloat16}
    assert_all_close(actual.grads, expected_grads(x, base, rounded), max(case.grad, 1e-2))


def test_pefts_casts_and_autocast_change_nothing(case: Case) -> None:
    layer, x = (model := adapted_model(MIXTRAL, case, seed=1))._kt_wrappers[0], inputs(case)
    expected = forward_backward(layer, x).output
    model.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)
    assert torch.equal(forward_backward(layer, x).output, expected)
    tiny = make_inputs(MIXTRAL, 1, case.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = forward_backward(layer, tiny).output
    assert torch.equal(inside, forward_backward(layer, tiny).output)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_the_default_device_is_not_the_operators(case: Case, device: str) -> None:
    """`torch.set_default_device` must not reach what the operators get pointers of. "meta" has none, on any machine."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = patched_model(MIXTRAL, case)
    with torch.device(device):
        model = get_peft_model(model, lora_config(MIXTRAL, target_modules=["gate_proj", "up_proj", "down_proj"]))
    layer = model._kt_wrappers[0]
    assert {parameter.device.type for parameter in layer.lora_params.values()} == {"cpu"}
    fill_lora(model, seed=1)
    x = inputs(case)
    expected = forward_backward(layer, x)
    fill_lora(model, seed=2)
    fill_lora(model, seed=1)
    with torch.device(device):
        actual = forward_backward(layer, x)
    assert torch.equal(actual.output, expected.output)
    assert [name for name, grad in expected.grads.items() if not torch.equal(actual.grads[name], grad)] == []
