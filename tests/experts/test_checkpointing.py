"""Gradient checkpointing and batches longer than an operator call: equal gradients, no forward more than needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL, count_calls
from tests.support.layers import SCALING, forward, forward_backward, gradients, make_inputs, random_lora, set_lora
from tests.support.one_layer import inputs, layer_with
from tests.support.patched import adapted_layers, adapted_model, gradients_of, logits_of, loss_of
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward

MODES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def checkpointed(case: Case, mode: str, activations: str) -> Any:
    model = adapted_model(MIXTRAL, case, seed=1, kt_expert_activations=activations).train()
    if MODES[mode]:
        model.gradient_checkpointing_enable(MODES[mode])
        model.enable_input_require_grads()
    return model


COUNTS = [
    ("plain", "retain", 1),
    ("non-reentrant", "retain", 1),
    ("reentrant", "retain", 2),
    ("plain", "recompute", 2),
    ("non-reentrant", "recompute", 2),
    ("reentrant", "recompute", 2),
]


@pytest.mark.parametrize(("mode", "activations", "forwards"), COUNTS)
def test_checkpointing(case: Case, monkeypatch: pytest.MonkeyPatch, mode: str, activations: str, forwards: int) -> None:
    """Equal gradients, and no forward of the experts more than needed; over several steps."""
    plain, model = checkpointed(case, "plain", "retain"), checkpointed(case, mode, activations)
    calls = count_calls(model, monkeypatch)
    for step in range(1, 4):
        ids = MIXTRAL.inputs(seed=None if step == 1 else step)
        expected = gradients_of(plain, loss_of(plain, ids))
        loss = loss_of(model, ids)
        loss.backward()
        actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_all_close(actual, expected, case.same)
        model.zero_grad()
        assert calls.forward == [step * forwards] * 2
        assert calls.backward == [step] * 2


@pytest.mark.parametrize("activations", ["retain", "recompute"])
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_checkpointing_with_forwards_in_between(case: Case, mode: str, activations: str) -> None:
    """Another training forward of the same size, and an evaluation."""
    plain, model = checkpointed(case, "plain", "retain"), checkpointed(case, mode, activations)
    first, second = MIXTRAL.inputs(), MIXTRAL.inputs(seed=8)
    expected = [gradients_of(plain, loss_of(plain, ids)) for ids in (first, second)]
    losses = [loss_of(model, ids) for ids in (first, second)]
    logits_of(model, MIXTRAL.inputs(1, 1, seed=5))
    for loss, wanted in zip(losses, expected, strict=True):
        loss.backward()
        actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_all_close(actual, wanted, case.same)
        model.zero_grad()


def squared(layer: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return layer(hidden, ids, weights).square()


def doubled_in_place(layer: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return layer(hidden, ids, weights).mul_(2).square()


@pytest.mark.parametrize("function", [squared, doubled_in_place], ids=lambda function: function.__name__)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recompute_finds_its_own_forward(case: Case, function: Callable[..., Tensor], reentrant: bool) -> None:
    """What follows the experts uses their output again, here: that of the same inputs, as they computed it."""
    layer, _, _ = layer_with(case)
    runs, expected = [], []
    for seed in range(3):
        x = inputs(case, seed)
        leaves = [x.hidden.clone().requires_grad_(), x.weights.clone().requires_grad_(), *layer.lora_params.values()]
        plain = function(layer, leaves[0], x.ids, leaves[1])
        expected.append(torch.autograd.grad(plain, leaves, x.grad_output))
        again = checkpoint(function, layer, leaves[0], x.ids, leaves[1], use_reentrant=reentrant)
        runs.append((again, leaves, x.grad_output))
    for (output, leaves, grad), wanted in zip(runs, expected, strict=True):
        for leaf in leaves:
            leaf.grad = None
        output.backward(grad)
        actual = {str(i): leaf.grad for i, leaf in enumerate(leaves)}
        assert_all_close(actual, {str(i): value for i, value in enumerate(wanted)}, case.same)


@pytest.mark.parametrize("mode", ["non-reentrant", "plain"])
def test_checkpointing_and_a_second_backward(case: Case, mode: str) -> None:
    model = checkpointed(case, mode, "retain")
    loss = loss_of(model, MIXTRAL.inputs())
    first = {}
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
        actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        first = first or actual
        assert_all_close(actual, first, case.same)
        model.zero_grad()


def shortened(case: Case, most: int, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Any:
    """A model whose experts take `most` tokens a call; the torch backend has no such limit of its own."""
    model = adapted_model(MIXTRAL, case, seed=1, kt_max_len=most, **config)
    for layer in model._kt_wrappers:
        monkeypatch.setattr(layer._runner.backend, "max_len", most)
    return model


@pytest.mark.parametrize(("tokens", "pieces"), [(16, 1), (17, 2), (32, 2), (37, 3)])
def test_long_batches_are_computed_in_pieces(
    case: Case, monkeypatch: pytest.MonkeyPatch, tokens: int, pieces: int
) -> None:
    layer = shortened(case, 16, monkeypatch)._kt_wrappers[0]
    base, lora = adapted_layers(MIXTRAL, case)[0][1], random_lora(MIXTRAL)
    set_lora(layer, lora)
    calls = count_calls(SimpleNamespace(_kt_wrappers=[layer]), monkeypatch)
    x = make_inputs(MIXTRAL, tokens, case.dtype)
    actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, SCALING)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, case.grad)
    assert calls.forward == [pieces if pieces == 1 else 2 * pieces]
    assert calls.backward == [pieces]


@pytest.mark.parametrize("activations", ["retain", "recompute"])
@pytest.mark.parametrize("mode", MODES)
def test_pieces_under_checkpointing(case: Case, monkeypatch: pytest.MonkeyPatch, mode: str, activations: str) -> None:
    whole, ids = checkpointed(case, "plain", "retain"), MIXTRAL.inputs()
    model = shortened(case, 10, monkeypatch, kt_expert_activations=activations).train()
    if MODES[mode]:
        model.gradient_checkpointing_enable(MODES[mode])
        model.enable_input_require_grads()
    loss_of(model, ids).backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_all_close(actual, gradients_of(whole, loss_of(whole, ids)), 3 * case.grad)


def backward(loss: Tensor) -> None:
    loss.backward()


def never(loss: Tensor) -> None:
    pass


def kept(loss: Tensor) -> None:
    loss.backward(retain_graph=True)


@pytest.mark.parametrize("end", [backward, never, kept], ids=["backward", "no backward", "graph kept, then dropped"])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_forward_keeps_is_let_go(mode: str, end: Callable[[Tensor], None]) -> None:
    """Saved activations, and copies of inputs and output, live no longer than the graph."""
    model = checkpointed(TORCH_FP32, mode, "retain")
    loss = loss_of(model, MIXTRAL.inputs())
    kept: list[weakref.ref[Any]] = []

    def look() -> None:
        for layer in model._kt_wrappers:
            for ticket in layer._runner._live.values():
                kept.extend(weakref.ref(thing) for thing in (ticket.saved, ticket.retained) if thing is not None)

    look()
    end(loss)
    look()
    assert kept or mode == "reentrant"
    del loss
    gc.collect()
    assert not [ref() for ref in kept if ref() is not None]


def test_lora_copies_are_let_go() -> None:
    """Values that left the backend are kept only while a forward made with them may see its backward."""
    layer, _, _ = layer_with(TORCH_FP32)
    x = inputs(TORCH_FP32)
    output, leaves = forward(layer, x)
    values = weakref.ref(layer._runner._values)
    set_lora(layer, random_lora(MIXTRAL, seed=1))
    layer(*inputs(TORCH_FP32, seed=2)[:3])
    assert values().kept
    gradients(output, leaves, x.grad_output)
    layer(*inputs(TORCH_FP32, seed=2)[:3])
    del output, leaves
    gc.collect()
    assert values() is None
