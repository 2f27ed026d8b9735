"""Tickets: whatever happens between a forward and its backward, the gradients are those of that forward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kt_hf import KTAMXBackwardError, KTExperts
from kt_hf.experts.tickets import Retained, in_backward
from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, forward, forward_backward, gradients, make_inputs, random_lora, set_lora
from tests.support.one_layer import expected_grads, inputs, layer_with
from tests.support.patched import adapted_model, fill_lora, gradients_of, logits_of, lora_config, loss_of
from tests.support.reference import assert_all_close, assert_close


def test_second_backward_after_retain_graph(case: Case) -> None:
    """Also after another forward, and without retain_graph PyTorch's own error."""
    layer, base, lora = layer_with(case)
    x = inputs(case)
    output, leaves = forward(layer, x)
    expected = expected_grads(x, base, lora)
    tensors = list(leaves.values())
    for between in (lambda: None, lambda: layer(*inputs(case, seed=5)[:3])):
        grads = torch.autograd.grad(output, tensors, x.grad_output, retain_graph=True)
        assert_all_close(dict(zip(leaves, grads, strict=True)), expected, case.grad)
        between()
    grads = torch.autograd.grad(output, tensors, x.grad_output)
    assert_all_close(dict(zip(leaves, grads, strict=True)), expected, case.grad)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, tensors, x.grad_output)


ACTIVATIONS = pytest.mark.parametrize("activations", ["retain", "recompute"])


@ACTIVATIONS
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)], ids=str)
def test_backwards_in_any_order(case: Case, order: tuple[int, ...], activations: str) -> None:
    """Three forwards, each with LoRA values of its own, then their backwards; test_schedules draws a thousand."""
    layer, base, _ = layer_with(case, kt_expert_activations=activations)
    runs = []
    for seed in range(3):
        x, lora = make_inputs(MIXTRAL, 20 + 9 * seed, case.dtype, seed), random_lora(MIXTRAL, seed)
        set_lora(layer, lora)
        runs.append((x, lora, *forward(layer, x)))
    for index in order:
        x, lora, output, leaves = runs[index]
        assert_all_close(gradients(output, leaves, x.grad_output), expected_grads(x, base, lora), case.grad)
    x, lora = inputs(case, seed=9), random_lora(MIXTRAL, 2)
    assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, lora), case.grad)


def fused_step(layer: KTExperts) -> None:
    parameters = list(layer.lora_params.values())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters, lr=0.3, fused=True).step()
    layer.zero_grad()


def assignment(layer: KTExperts) -> None:
    set_lora(layer, random_lora(MIXTRAL, seed=7))


def bare_data(layer: KTExperts) -> None:
    for parameter in layer.lora_params.values():
        parameter.data.mul_(-3)
    layer.update_lora_pointers()


def evaluation(layer: KTExperts) -> None:
    with torch.no_grad():
        layer(*make_inputs(MIXTRAL, 2, seed=3, experts=range(2))[:3])


@ACTIVATIONS
@pytest.mark.parametrize(
    ("change", "then"),
    [(fused_step, None), (fused_step, evaluation), (assignment, evaluation), (bare_data, None)],
    ids=["fused_step", "fused_step then a forward", "assignment then a forward", "bare_data"],
)
def test_lora_changed_between_forward_and_backward(
    case: Case, change: Callable[[KTExperts], None], then: Callable[[KTExperts], None] | None, activations: str
) -> None:
    """The gradients are those of the values in forward, and the next forward has the new ones."""
    layer, base, lora = layer_with(case, kt_expert_activations=activations)
    x = inputs(case)
    output, leaves = forward(layer, x)
    change(layer)
    if then:
        then(layer)
    assert_all_close(gradients(output, leaves, x.grad_output), expected_grads(x, base, lora), case.grad)
    new = {name: value.detach().clone() for name, value in layer.lora_params.items()}
    assert not torch.equal(new["down_lora_b"], lora["down_lora_b"])
    assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, new), case.grad)


@pytest.mark.parametrize("switch", ["other", "disable", "delete"])
def test_adapters_switched_between_forward_and_backward(case: Case, switch: str) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    model.add_adapter("other", lora_config(MIXTRAL))
    fill_lora(model, seed=2, only=lambda name: ".other." in name)
    ids = MIXTRAL.inputs()
    expected = gradients_of(model, loss_of(model, ids))
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in expected}
    loss = loss_of(model, ids)

    def grads_of(loss: Tensor) -> tuple[Tensor, ...]:
        logits_of(model, ids)
        for parameter in parameters.values():
            parameter.requires_grad_()  # switching took it away
        return torch.autograd.grad(loss, list(parameters.values()))

    if switch == "disable":
        with model.disable_adapter():
            grads = grads_of(loss)
    else:
        model.set_adapter("other")
        if switch == "delete":
            model.delete_adapter("default")
        grads = grads_of(loss)
    assert_all_close(dict(zip(parameters, grads, strict=True)), expected, case.same)


def test_only_what_is_wanted_has_a_gradient(case: Case) -> None:
    layer, base, lora = layer_with(case)
    x = inputs(case)
    expected = expected_grads(x, base, lora)
    output = layer(x.hidden, x.ids, x.weights)
    grads = torch.autograd.grad(output, list(layer.lora_params.values()), x.grad_output)
    names = list(layer.lora_params)
    assert_all_close(dict(zip(names, grads, strict=True)), {name: expected[name] for name in names}, case.grad)
    layer.requires_grad_(False)
    assert not layer(x.hidden, x.ids, x.weights).requires_grad
    for index, name in ((0, "hidden"), (2, "weights")):
        leaves = [x.hidden.clone(), x.ids, x.weights.clone()]
        leaves[index].requires_grad_()
        assert_close(
            torch.autograd.grad(layer(*leaves), leaves[index], x.grad_output)[0], expected[name], case.grad, name
        )


def test_gradients_of_gradients_are_refused(case: Case) -> None:
    """They are not implemented: a result without the experts' part would be wrong."""
    layer, _, _ = layer_with(case)
    x = inputs(case)
    hidden = x.hidden.detach().requires_grad_()
    through, beside = layer(hidden, x.ids, x.weights), hidden.float().square().sum()
    with pytest.raises(KTAMXBackwardError, match="create_graph"):
        torch.autograd.grad((through.float() * x.grad_output).sum() + beside, hidden, create_graph=True)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_changes_nothing_in_the_layer(case: Case, enabled: bool) -> None:
    layer, _, _ = layer_with(case)
    x = inputs(case)
    expected = forward_backward(layer, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        inside = forward_backward(layer, x)
        output, leaves = forward(layer, x)
    outside = gradients(output, leaves, x.grad_output)
    assert torch.equal(inside.output, expected.output)
    for name, grad in expected.grads.items():
        assert inside.grads[name].dtype is grad.dtype
        assert torch.equal(inside.grads[name], grad)
        assert torch.equal(outside[name], grad)


def test_autocast_of_a_model(case: Case) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    ids = MIXTRAL.inputs()
    expected = gradients_of(model, loss_of(model, ids))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids)
    actual = gradients_of(model, loss)
    assert {grad.dtype for grad in actual.values()} == {torch.float32}
    assert_all_close(actual, expected, 0.15)


def run(layer: KTExperts, x: LayerInputs) -> None:
    """A forward and its backward, the gradients in `grad`."""
    output = layer(x.hidden, x.ids, x.weights)
    output.backward(x.grad_output)


def test_gradients_that_are_held_stay(case: Case) -> None:
    """The operators' buffers are overwritten by the next backward."""
    layer, base, lora = layer_with(case)
    parameters = layer.lora_params

    run(layer, inputs(case, 2))
    held = {name: parameter.grad for name, parameter in parameters.items()}
    before = {name: grad.clone() for name, grad in held.items()}
    layer.zero_grad()
    x = inputs(case, 3)
    run(layer, x)
    assert all(torch.equal(held[name], before[name]) for name in held)
    assert_all_close({name: parameter.grad for name, parameter in parameters.items()},
                     {name: grad for name, grad in expected_grads(x, base, lora).items() if name in parameters},
                     case.grad)  # fmt: skip


@pytest.mark.parametrize("views", [False, True], ids=["the gradient", "a NumPy view of it"])
def test_accumulated_gradients_keep_their_memory(case: Case, views: bool) -> None:
    """Micro-batches are added in the first one's memory, and what a view holds is not written to."""
    layer, base, lora = layer_with(case)
    total: dict[str, Tensor] = {}
    kept = []
    for seed in range(4):
        x = inputs(case, seed)
        run(layer, x)
        if views:
            kept.append([(p.grad.numpy(), p.grad.clone().numpy()) for p in layer.lora_params.values()])
            layer.zero_grad()
            continue
        for name, grad in expected_grads(x, base, lora).items():
            total[name] = total.get(name, 0) + grad
        wanted = {name: total[name] for name in layer.lora_params}
        assert_all_close({name: p.grad for name, p in layer.lora_params.items()}, wanted, case.grad)
    assert all((view == copy).all() for pairs in kept for view, copy in pairs)


def test_a_backward_lets_go_of_its_forward(case: Case) -> None:
    """Saved tensors and LoRA values are given back by the last backward, not when the graph is collected."""
    layer, *_ = layer_with(case)
    x = inputs(case)
    output, leaves = forward(layer, x)
    (ticket,) = layer._runner._live.values()
    torch.autograd.grad(output, list(leaves.values()), x.grad_output, retain_graph=True)
    assert ticket.values is not None
    torch.autograd.grad(output, list(leaves.values()), x.grad_output)
    assert ticket.values is None
    assert ticket.saved is None


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_recompute_of_any_size_is_recognized(tokens: int, offset: int) -> None:
    """Also where the values do not fill 64-bit words, or do not begin at one."""

    def placed(values: Tensor) -> Tensor:
        held = values.new_zeros(values.numel() + offset)
        held[offset:] = values.flatten()
        return held[offset:].view(values.shape)

    x, ids, weights = (
        torch.randn(tokens, 3).bfloat16(),
        torch.zeros(tokens, 1, dtype=torch.int64),
        torch.rand(tokens, 1),
    )
    kept = Retained(placed(x), ids, placed(weights), x.clone())
    assert kept.fits(x.clone(), ids.clone(), weights.clone())
    assert not kept.fits(x.clone(), ids.clone(), weights + 1)


def test_what_a_failed_backward_keeps_can_be_forgotten(case: Case) -> None:
    """A recompute is kept for its backward; where something fails before that, nobody will ask for it."""
    layer, _, _ = layer_with(case)
    layer._runner.retain = False
    x, kept = inputs(case), []

    def computed(hidden: Tensor) -> Tensor:
        y = layer(hidden, x.ids, x.weights)
        if in_backward():
            kept.append(weakref.ref(layer._runner._latest))
        return Failing.apply(y)

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert len(ctx.saved_tensors) == 1  # which makes the recompute
            raise torch.OutOfMemoryError("CUDA out of memory.")

    output = checkpoint(computed, x.hidden.detach().requires_grad_(), use_reentrant=False)
    with pytest.raises(torch.OutOfMemoryError):
        output.backward(x.grad_output)
    del output
    gc.collect()
    assert [one() is None for one in kept] == [False]
    layer.forget_recompute()
    gc.collect()
    assert [one() is None for one in kept] == [True]
