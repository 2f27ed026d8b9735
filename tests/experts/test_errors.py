"""No tokens, values that are not finite, exceptions in the middle: told by the layer's name, and good steps after."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_hf import KTAMXBackwardError, KTAMXError, KTAMXForwardError
from kt_hf.backends import Gradients
from kt_hf.backends.finite_checks import DeferredChecks, all_finite, is_finite, magnitudes
from kt_hf.experts.result_checks import check_gpu_gradients
from tests.support.cases import Case
from tests.support.helpers import MIXTRAL, count_calls
from tests.support.layers import forward, forward_backward, gradients, make_inputs, random_lora, set_lora
from tests.support.one_layer import expected_grads, inputs, layer_with
from tests.support.patched import adapted_model
from tests.support.reference import assert_all_close


def test_no_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    calls = count_calls(model, monkeypatch)
    layer = model._kt_wrappers[0]
    actual = forward_backward(layer, make_inputs(MIXTRAL, 0, case.dtype))
    assert actual.output.shape == (0, MIXTRAL.hidden)
    assert actual.output.dtype is case.dtype
    assert {name: grad.shape for name, grad in actual.grads.items() if name in layer.lora_params} == {
        name: parameter.shape for name, parameter in layer.lora_params.items()
    }
    assert not any(grad.any() for grad in actual.grads.values())
    assert calls.forward == calls.backward == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_passes_as_nan(case: Case, value: float) -> None:
    """A loss scaler looks for it, skips the step and goes on with a smaller scale."""
    layer, base, lora = layer_with(case)
    x = inputs(case)
    grad = x.grad_output.clone()
    grad[3, 5] = value
    output, leaves = forward(layer, x)
    grads = gradients(output, leaves, grad)
    assert {name: value.shape for name, value in grads.items()} == {name: leaf.shape for name, leaf in leaves.items()}
    assert all(value.isnan().all() for value in grads.values())
    assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, lora), case.grad)


@pytest.mark.parametrize("where", ["lora", "hidden_states"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_output_that_is_not_finite_names_the_layer(case: Case, where: str, training: bool) -> None:
    layer, base, lora = layer_with(case)
    x = inputs(case)
    bad = x
    if where == "lora":
        set_lora(layer, {**lora, "down_lora_b": lora["down_lora_b"] * float("nan")})
    else:
        bad = x._replace(hidden=torch.full_like(x.hidden, float("inf")))
    words = "its input was finite" if where == "lora" else "its input already was not"
    with torch.set_grad_enabled(training), pytest.raises(KTAMXForwardError, match=words) as error:
        layer(bad.hidden, bad.ids, bad.weights)
    assert str(error.value).startswith("model.layers.0.mlp.experts: the output")
    set_lora(layer, lora)
    assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, lora), case.grad)


@pytest.mark.parametrize("which", ["hidden_states", "top_k_weights", "lora"])
def test_gradient_that_became_nan_names_the_layer(case: Case, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    layer, base, lora = layer_with(case)
    original = layer._runner.backend.backward

    def backward(*args: Any) -> Any:
        result = original(*args)
        bad = result.lora[4] if which == "lora" else getattr(result, which)
        bad.view(-1)[0] = float("nan")
        return result

    x = inputs(case)
    with monkeypatch.context() as patch:
        patch.setattr(layer._runner.backend, "backward", backward)
        with pytest.raises(KTAMXBackwardError) as error:
            forward_backward(layer, x)
    assert str(error.value).startswith("model.layers.0.mlp.experts: the gradient of ")
    assert (which if which != "lora" else "LoRA") in str(error.value)
    assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, lora), case.grad)


@pytest.mark.parametrize("method", ["forward", "backward", "set_lora"])
def test_good_steps_after_an_exception(case: Case, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """One that a notebook's user interrupted, say: nothing half done is taken for done."""
    layer, base, lora = layer_with(case)
    x = inputs(case)
    forward_backward(layer, x)
    set_lora(layer, random_lora(MIXTRAL, seed=5))
    forward_backward(layer, x)
    set_lora(layer, lora)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer._runner.backend, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            forward_backward(layer, x)
    for seed in (0, 1):
        x = inputs(case, seed)
        assert_all_close(forward_backward(layer, x).grads, expected_grads(x, base, lora), case.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0, 1, 33, 4097])
def test_what_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    good = torch.randn(size, dtype=dtype)
    assert is_finite(good)
    if size > 1:
        good[:2] = torch.tensor([1, -1]) * torch.finfo(dtype).max  # sum or difference may overflow: finite all the same
        assert is_finite(good)
    assert all_finite(good)
    assert all_finite(good, good.float())
    for place in {0, size // 2, size - 1} if size else ():
        for value in ("nan", "inf", "-inf"):
            bad = good.clone()
            bad[place] = float(value)
            assert not is_finite(bad), (place, value)
            assert not all_finite(bad), (place, value)
            assert not all_finite(good.float(), bad), (place, value)
            found = magnitudes(good, bad, good[:0], bad.double(), good.double() * 2)
            assert (found < math.inf).tolist() == [True, False, True, False, True], (place, value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((), None), (("grad",), None), (("grad", "hidden", "lora"), None), (("hidden",), "its inputs"),
        (("weights", "lora"), "its inputs"), (("lora",), "an expert LoRA tensor"),
    ],
)  # fmt: skip
def test_gradients_of_a_gpu_are_judged_together(bad: tuple[str, ...], message: str | None) -> None:
    """What came in, the gradients of the inputs, and those of LoRA, in one answer; looked at later."""

    def tensor(name: str, *size: int) -> torch.Tensor:
        return torch.ones(size).fill_(math.nan if name in bad else 1)

    gradients = Gradients(tensor("hidden", 3, 4), tensor("weights", 3, 2), (tensor("", 2, 2), tensor("lora", 2, 2)))
    checks, lora = DeferredChecks(), SimpleNamespace(parameters=[torch.empty(1, device="meta")])
    check_gpu_gradients(checks, "layer 3", gradients, tensor("grad", 3, 4), lora)  # type: ignore[arg-type]
    if message is None:
        checks.settle(wait=True)
        return
    with pytest.raises(KTAMXBackwardError, match=rf"layer 3: the gradient of {message} is not finite"):
        checks.settle(wait=True)


def test_a_projection_cannot_be_pickled(case: Case) -> None:
    """By itself neither: its weights are in the backend."""
    layer, *_ = layer_with(case)
    with pytest.raises(KTAMXError, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(layer.gate_proj)
