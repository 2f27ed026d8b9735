"""Failures others met in the numbers: overwritten inputs, spoilt saved forwards, values out of range, capture."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kt_hf import apply_kt_moe
from tests.support.cases import KERNEL_BF16, TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.layers import SCALING, forward_backward, make_inputs, random_lora, set_lora
from tests.support.models import FAMILIES, Family, base_weights, expert_modules
from tests.support.one_layer import expected_grads, inputs, layer_with
from tests.support.patched import (
    adapted_layers,
    adapted_model,
    fill_lora,
    gradients_of,
    logits_of,
    lora_config,
    loss_of,
)
from tests.support.reference import LayerResult, assert_all_close, assert_close, experts_forward_backward


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_routing_modified(family: Family, case: Case) -> None:
    """What the model hands to the experts is as it was, after forward and after backward."""
    model = adapted_model(family, case, seed=1)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model._kt_wrappers:
        layer.register_forward_pre_hook(lambda _, args: seen.extend((t, t.detach().clone()) for t in args))
    loss = loss_of(model, family.inputs())
    assert len(seen) == 3 * len(family.moe_layers)
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)
    loss.backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("switch", [False, True], ids=["", "and a switch of adapters"])
def test_stale_active_experts(case: Case, tokens: int, switch: bool) -> None:
    """grad_input is what goes wrong, and only there: attention's gradients of a whole model show it."""
    model = adapted_model(MIXTRAL, case, seed=1)
    model.add_adapter("other", lora_config(MIXTRAL))
    fill_lora(model, seed=2, only=lambda name: ".other." in name)
    ids = MIXTRAL.inputs()
    expected = gradients_of(model, loss_of(model, ids))
    loss = loss_of(model, ids)
    if switch:
        model.set_adapter("other")
    logits_of(model, MIXTRAL.inputs(1, tokens, seed=5))
    if switch:
        model.set_adapter("default")
    assert_all_close(gradients_of(model, loss), expected, case.same)


GATES = (-1e4, -1e3, -100.0, -88.5, -87.0, -50.0, -1.0, 0.0, 50.0, 88.5, 1e3, 1e4)


@pytest.mark.parametrize("value", GATES)
def test_bf16_range(case: Case, value: float) -> None:
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


def test_cache_underflow(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of several threads to several layers never run beside each other, and each gets its own results."""
    model = adapted_model(MIXTRAL, case)
    layers, busy, overlaps = model._kt_wrappers, threading.Lock(), []

    def watch(backend: Any, name: str) -> None:
        original = getattr(backend, name)

        def alone(*args: Any, **kwargs: Any) -> Any:
            if not busy.acquire(blocking=False):
                overlaps.append(name)
                return original(*args, **kwargs)
            try:
                time.sleep(0.002)
                return original(*args, **kwargs)
            finally:
                busy.release()

        monkeypatch.setattr(backend, name, alone)

    for layer in layers:
        for name in ("forward", "backward", "set_lora"):
            watch(layer._runner.backend, name)
    bases = [base for _, base in adapted_layers(MIXTRAL, case)]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for seed in range(6):
                x, lora = inputs(case, seed), random_lora(MIXTRAL, seed)
                set_lora(layers[index], lora)
                actual = forward_backward(layers[index], x)
                assert_all_close(actual.grads, expected_grads(x, bases[index], lora), case.grad)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not overlaps


def test_cuda_graph(backend: str) -> None:
    """torch.compile leaves the layer out of its graphs: no stale LoRA, no constant output, gradients as ever."""
    case = TORCH_FP32 if backend == "torch" else KERNEL_BF16
    layer, base, _ = layer_with(case)
    compiled = torch.compile(layer, backend="eager")
    for seed in range(3):
        lora = random_lora(MIXTRAL, seed)
        set_lora(layer, lora)
        x = make_inputs(MIXTRAL, 37, case.dtype, seed)
        leaves = [x.hidden.clone().requires_grad_(), x.weights.clone().requires_grad_(), *layer.lora_params.values()]
        output = compiled(leaves[0], x.ids, leaves[1])
        names = ["hidden", "weights", *layer.lora_params]
        grads = dict(zip(names, torch.autograd.grad(output, leaves, x.grad_output), strict=True))
        assert_all_close(grads, expected_grads(x, base, lora), case.grad)
    torch._dynamo.reset()
