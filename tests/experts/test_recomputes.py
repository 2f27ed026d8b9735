"""Recomputes on a GPU: recognized without a wait, and compared all the same. The CPU stands for the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kt_hf import KTAMXBackwardError, KTExperts
from kt_hf.experts.tickets import Retained, _judged_recompute, in_backward
from tests.support.cases import Case
from tests.support.layers import LayerInputs
from tests.support.one_layer import expected_grads, inputs, layer_with
from tests.support.reference import assert_all_close


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every tensor counts as one on a GPU; the list gets an entry for each comparison that waits."""
    waits: list[bool] = []
    fits = Retained.fits

    def noted(kept: Retained, *given: Tensor) -> bool:
        waits.append(fits(kept, *given))
        return waits[-1]

    monkeypatch.setattr("kt_hf.experts.tickets._on_gpu", lambda _: True)
    monkeypatch.setattr(Retained, "fits", noted)
    return waits


def run(layer: KTExperts, x: LayerInputs, added: Tensor | float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and leaves of a checkpointed forward, to whose hidden states the recompute adds something."""
    leaves = {"hidden": x.hidden.detach().requires_grad_(), "weights": x.weights.detach().requires_grad_()}

    def computed(hidden: Tensor, weights: Tensor) -> Tensor:
        return layer(hidden + added if in_backward() else hidden * 1, x.ids, weights)

    return checkpoint(computed, *leaves.values(), use_reentrant=False), leaves


def gradients_of(layer: KTExperts, output: Tensor, leaves: dict[str, Tensor], x: LayerInputs) -> dict[str, Tensor]:
    tensors = {**leaves, **layer.lora_params}
    return dict(zip(tensors, torch.autograd.grad(output, list(tensors.values()), x.grad_output), strict=True))


def test_the_only_open_forward_is_taken_without_a_wait(case: Case, as_on_a_gpu: list[bool]) -> None:
    layer, base, lora = layer_with(case, kt_expert_activations="retain")
    for seed in range(3):
        x = inputs(case, seed)
        assert_all_close(gradients_of(layer, *run(layer, x), x), expected_grads(x, base, lora), case.grad)
    layer._runner.checks.settle(wait=True)
    assert as_on_a_gpu == []


def test_several_open_forwards_are_compared(case: Case, as_on_a_gpu: list[bool]) -> None:
    """Two of one size, whose backwards come in the order of their forwards: the newest is not the first one's."""
    layer, base, lora = layer_with(case, kt_expert_activations="retain")
    batches = [inputs(case, seed) for seed in range(2)]
    open_ones = [run(layer, x) for x in batches]
    for x, (output, leaves) in zip(batches, open_ones, strict=True):
        assert_all_close(gradients_of(layer, output, leaves, x), expected_grads(x, base, lora), case.grad)
    layer._runner.checks.settle(wait=True)
    assert as_on_a_gpu == [False, True]


def test_an_open_forward_that_was_not_kept(case: Case, as_on_a_gpu: list[bool]) -> None:
    """Its recompute is not that of the only one that was."""
    layer, base, lora = layer_with(case, kt_expert_activations="retain")
    batches, open_ones = [inputs(case, seed) for seed in range(2)], []
    for x, keep in zip(batches, (False, True), strict=True):
        layer.keep_activations(keep)
        open_ones.append(run(layer, x))
    for x, (output, leaves) in zip(batches, open_ones, strict=True):
        assert_all_close(gradients_of(layer, output, leaves, x), expected_grads(x, base, lora), case.grad)
    layer._runner.checks.settle(wait=True)
    assert as_on_a_gpu == [False, True]


def test_a_layer_that_is_called_twice_in_a_recompute(case: Case, as_on_a_gpu: list[bool]) -> None:
    """By reentrant checkpointing, which keeps nothing of the forwards: the second call is none of the first."""
    layer, base, lora = layer_with(case, kt_expert_activations="retain")
    halves = [inputs(case, seed) for seed in range(2)]
    leaves = [leaf.detach().requires_grad_() for x in halves for leaf in (x.hidden, x.weights)]

    def computed(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(given[2 * i], x.ids, given[2 * i + 1]) for i, x in enumerate(halves))

    outputs = checkpoint(computed, *leaves, use_reentrant=True)
    torch.autograd.backward(outputs, [x.grad_output for x in halves])
    layer._runner.checks.settle(wait=True)
    wanted = [expected_grads(x, base, lora) for x in halves]
    for i, one in enumerate(wanted):
        found = {"hidden": leaves[2 * i].grad, "weights": leaves[2 * i + 1].grad}
        assert_all_close(found, {name: one[name] for name in found}, case.grad)
    assert as_on_a_gpu == [False]


def test_kernels_that_do_not_repeat_their_bits(case: Case, as_on_a_gpu: list[bool]) -> None:
    """Output and gradients are the forward's, step after step, and nobody complains."""
    layer, base, lora = layer_with(case, kt_expert_activations="retain")
    for seed in range(3):
        x = inputs(case, seed)
        grads = gradients_of(layer, *run(layer, x, added=x.hidden * 2**-7), x)
        assert_all_close(grads, expected_grads(x, base, lora), 2 * case.grad + 0.02)
    layer._runner.checks.settle(wait=True)
    assert as_on_a_gpu == []


def test_a_forward_of_other_tokens_is_an_error(case: Case) -> None:
    """In backward, with the only open forward's sizes: it would have been given that one's output."""
    layer, *_ = layer_with(case, kt_expert_activations="retain")
    x = inputs(case)
    output, leaves = run(layer, x, added=inputs(case, seed=7).hidden)
    with pytest.raises(KTAMXBackwardError, match=r"other inputs .* Set kt_expert_activations to recompute"):
        gradients_of(layer, output, leaves, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_other_forward(value: float) -> None:
    """A gradient scaler's business, or an error that is told of as such."""
    assert _judged_recompute("layer 1", torch.tensor([value, value])) is None
    assert _judged_recompute("layer 1", torch.tensor([value, 1.0])) is None
