"""One experts layer against the fp32 reference: output and every gradient, without and with LoRA."""

from __future__ import annotations

import pytest
import torch

from kt_hf import apply_kt_moe
from tests.support.cases import Case, make_config
from tests.support.layers import RANK, SCALING, forward_backward, make_inputs, random_lora, set_lora
from tests.support.models import Family, base_weights
from tests.support.patched import adapted_layers
from tests.support.reference import LORA_NAMES, assert_all_close, assert_close, experts_forward_backward
from tests.support.sizes import LAYER_SIZES

pytestmark = LAYER_SIZES

# Large before small: what a big call left in a reused buffer must not show in a small one.
TOKENS = (200, 1, 0, 37)


@pytest.mark.parametrize("rank", [None, RANK], ids=["unpacked", "packed"])
def test_without_adapter(family: Family, case: Case, rank: int | None) -> None:
    model = family(case.dtype)
    bases = base_weights(model)
    apply_kt_moe(model, make_config(case.backend, kt_lora_rank=rank))
    for layer, base in zip(model._kt_wrappers, bases.values(), strict=True):
        assert layer.lora_params == {}
        for tokens in TOKENS:
            x = make_inputs(family, tokens, case.dtype, seed=tokens)
            actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base)
            assert actual.output.dtype is case.dtype
            assert_close(actual.output, expected.output, case.forward, f"output, layer {layer.layer_idx}, T={tokens}")
            # A single token's routing gradient is two numbers, each a sum that may cancel.
            assert_all_close(actual.grads, expected.grads, case.grad if tokens > 1 else 2 * case.grad)


def test_with_random_lora(family: Family, case: Case) -> None:
    for layer, base in adapted_layers(family, case):
        lora = random_lora(family, seed=layer.layer_idx)
        set_lora(layer, lora)
        for tokens in TOKENS:
            x = make_inputs(family, tokens, case.dtype, seed=tokens)
            actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, SCALING)
            assert actual.output.shape == x.hidden.shape
            assert actual.output.dtype is case.dtype
            assert_close(actual.output, expected.output, case.forward, f"output, layer {layer.layer_idx}, T={tokens}")
            assert_all_close(actual.grads, expected.grads, case.grad)


def test_untouched_experts_get_a_gradient_of_exactly_zero(family: Family, case: Case) -> None:
    layer, _ = adapted_layers(family, case)[0]
    set_lora(layer, random_lora(family))
    forward_backward(layer, make_inputs(family, 37, case.dtype))
    used = [1, 4, 6]
    grads = forward_backward(layer, make_inputs(family, 37, case.dtype, experts=used)).grads
    unused = [expert for expert in range(family.num_experts) if expert not in used]
    for name in LORA_NAMES:
        assert all(grads[name][expert].any() for expert in used), name
        assert not grads[name][unused].any(), name


def test_fresh_adapter_is_the_base(family: Family, case: Case) -> None:
    """B starts at zero: the output is the base's, A gets no gradient yet, B does."""
    for layer, base in adapted_layers(family, case):
        x = make_inputs(family, 37, case.dtype)
        assert all(not layer.lora_params[name].any() for name in LORA_NAMES if name.endswith("_b"))
        lora = {name: value.detach().clone() for name, value in layer.lora_params.items()}
        actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, SCALING)
        assert_close(actual.output, expected.output, case.forward, "output")
        assert_all_close(actual.grads, expected.grads, case.grad)


def test_new_lora_values_are_seen_without_being_announced(family: Family, case: Case) -> None:
    layer, base = adapted_layers(family, case)[0]
    x = make_inputs(family, 37, case.dtype)
    for seed in (1, 2):
        lora = random_lora(family, seed)
        set_lora(layer, lora)
        expected = experts_forward_backward(*x, base, lora, SCALING)
        with torch.no_grad():
            assert_close(layer(x.hidden, x.ids, x.weights), expected.output, case.forward, f"values {seed}")
