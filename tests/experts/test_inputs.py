"""Inputs a router or a caller may hand over: any ids, layout and dtype; none of them is written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.cases import Case
from tests.support.layers import SCALING, LayerInputs, forward_backward, make_inputs, random_lora, set_lora
from tests.support.models import Family
from tests.support.patched import adapted_layers
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward
from tests.support.sizes import LAYER_SIZES

pytestmark = LAYER_SIZES

TOKENS = 37
# What rounding an input, an output or a gradient to the dtype may cost, over the backend's own error.
ROUNDING = {torch.float32: 0.0, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _strided(value: Tensor) -> Tensor:
    """The same values, every other column of a wider tensor."""
    wide = value.new_zeros(value.shape[0], 2 * value.shape[1])
    wide[:, ::2] = value
    return wide[:, ::2]


def _transposed(value: Tensor) -> Tensor:
    return value.t().contiguous().t()


def out_of_range(x: LayerInputs, experts: int) -> LayerInputs:
    ids = x.ids.clone()
    for row, wrong in enumerate((experts, experts + 5, -1, -7, 2**31 + 1)):
        ids[row, row % 2] = wrong
        ids[row + 10] = wrong  # a token that no expert takes at all
    return x._replace(ids=ids)


def repeated(x: LayerInputs, experts: int) -> LayerInputs:
    ids = x.ids.clone()
    ids[::2, 1] = ids[::2, 0]
    return x._replace(ids=ids)


def one_expert_takes_all(x: LayerInputs, experts: int) -> LayerInputs:
    return x._replace(ids=torch.full_like(x.ids, experts - 1))


def strided(x: LayerInputs, experts: int) -> LayerInputs:
    return LayerInputs(*map(_strided, x))


def transposed(x: LayerInputs, experts: int) -> LayerInputs:
    return LayerInputs(*map(_transposed, x))


def one_column(x: LayerInputs, experts: int) -> LayerInputs:
    """A router that sends every token to fewer experts than the model says."""
    return x._replace(ids=x.ids[:, :1], weights=x.weights[:, :1])


def gradient_of_a_sum(x: LayerInputs, experts: int) -> LayerInputs:
    """out.sum() sends back a tensor of stride 0."""
    return x._replace(grad_output=torch.ones((), dtype=x.grad_output.dtype).expand_as(x.hidden))


VARIANTS = (out_of_range, repeated, one_expert_takes_all, strided, transposed, one_column, gradient_of_a_sum)


def check(family: Family, case: Case, x: LayerInputs, rounding: float = 0.0) -> Tensor:
    layer, base = adapted_layers(family, case)[0]
    lora = random_lora(family)
    set_lora(layer, lora)
    before = x.clones()
    actual = forward_backward(layer, x)
    for name, value, kept in zip(x._fields, x, before, strict=True):
        assert torch.equal(value, kept), f"{name} was written to"
    expected = experts_forward_backward(*before, base, lora, SCALING)
    assert actual.output.dtype is x.hidden.dtype
    assert actual.grads["weights"].dtype is x.weights.dtype
    assert_close(actual.output, expected.output, case.forward + rounding, "output")
    assert_all_close(actual.grads, expected.grads, case.grad + rounding)
    return actual.output


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_ids_and_layouts(family: Family, case: Case, variant: Callable[[LayerInputs, int], LayerInputs]) -> None:
    x = variant(make_inputs(family, TOKENS, case.dtype), family.num_experts)
    output = check(family, case, x)
    nobodys = ~((x.ids >= 0) & (x.ids < family.num_experts)).any(dim=1)
    assert nobodys.sum() == (5 if variant is out_of_range else 0)
    assert not output[nobodys].any()


@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_input_dtypes(family: Family, case: Case, dtype: torch.dtype) -> None:
    """The output and the gradients come back in the inputs' dtypes, whatever the backend computes in."""
    x = make_inputs(family, TOKENS, dtype)
    check(family, case, x._replace(weights=x.weights.to(dtype)), ROUNDING[dtype])


def test_the_output_is_new_memory(family: Family, case: Case) -> None:
    """A second call must change neither the first call's output nor, through an alias, an input."""
    layer, _ = adapted_layers(family, case)[0]
    x, other = make_inputs(family, TOKENS, case.dtype), make_inputs(family, TOKENS, case.dtype, seed=9)
    with torch.no_grad():
        first = layer(x.hidden, x.ids, x.weights)
        kept = first.clone()
        second = layer(other.hidden, other.ids, other.weights)
        assert torch.equal(first, kept)
        assert not torch.equal(first, second)
        hidden = x.hidden.clone()
        first.fill_(7)
        assert torch.equal(x.hidden, hidden)
        assert torch.equal(layer(x.hidden, x.ids, x.weights), kept)
