"""Gradients that are still on their way when a layer's backward ends: whoever reads one sees what has arrived."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kt_hf import KTAMXBackwardError
from kt_hf.backends.transfer import Arriving
from kt_hf.experts import lora_tensors, result_checks
from kt_hf.experts.lora_delivery import Delivery, delivered
from tests.support.cases import TORCH_BF16
from tests.support.helpers import MIXTRAL
from tests.support.layers import forward_backward, make_inputs
from tests.support.patched import adapted_model

GARBAGE = 1e30


class Late:
    """Stands for a GPU's event: the copies hold garbage until somebody waits for it."""

    waits = 0

    def __init__(self, copies: list[Tensor], values: list[Tensor]) -> None:
        self.copies, self.values, self.done = copies, values, False

    def synchronize(self) -> None:
        Late.waits += 1
        for copy, value in zip(self.copies, self.values, strict=True):
            copy.data.copy_(value)
        self.done = True

    def query(self) -> bool:
        return self.done


def late(tensors: Any, dtypes: Any, into: Any = (), beside: bool = False) -> Arriving:
    """In the place of `to_host`."""
    values = [tensor.detach().to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    copies = [torch.full_like(v, 0 if v.dtype == torch.bool else GARBAGE) for v in values]
    return Arriving(tuple(copies), Late(copies, values))  # type: ignore[arg-type]


class Product(torch.autograd.Function):
    """x times the sum of the parameters, whose gradients arrive late; `finite` is what is said of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delivery: Delivery, finite: bool, *parameters: Tensor) -> Tensor:
        ctx.delivery, ctx.finite = delivery, finite
        ctx.save_for_backward(x, *parameters)
        return x * sum(parameters)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        values = [grad_outputs[0] * x for _ in parameters] + [torch.tensor(ctx.finite)]
        arriving = late(values, [value.dtype for value in values])
        error = KTAMXBackwardError("not finite")
        return (
            grad_outputs[0] * sum(parameters),
            None,
            None,
            *ctx.delivery.begin(arriving, lambda: error),
        )


def product(x: Tensor, *parameters: nn.Parameter, finite: bool = True) -> Tensor:
    delivery = Delivery()
    return Product.apply(x, delivery, finite, *delivered(parameters, delivery))


X = torch.tensor([1.0, 2.0, 3.0])


@pytest.fixture
def w() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def test_the_first_gradient_is_handed_over(w: nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is made of it: the parameter gets the very memory that it arrives in."""
    seen: list[int] = []
    kept = Delivery.begin

    def begin(self: Delivery, arriving: Arriving, error: Callable[[], Exception]) -> list[Tensor]:
        seen.append(arriving.coming[0].data_ptr())
        return kept(self, arriving, error)

    monkeypatch.setattr(Delivery, "begin", begin)
    product(X, w).sum().backward()
    assert torch.equal(w.grad, X)
    assert [w.grad.data_ptr()] == seen


def test_later_gradients_are_added(w: nn.Parameter) -> None:
    for _ in range(3):
        product(X, w).sum().backward()
    assert torch.equal(w.grad, 3 * X)


def test_a_parameter_used_by_two_layers(w: nn.Parameter) -> None:
    (product(X, w) + product(2 * X, w)).sum().backward()
    assert torch.equal(w.grad, 3 * X)


def test_a_graph_that_is_kept(w: nn.Parameter) -> None:
    loss = product(X, w).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(w.grad, 2 * X)


def test_hooks_see_what_has_arrived(w: nn.Parameter) -> None:
    seen: list[Tensor] = []
    w.register_hook(lambda grad: seen.append(grad.clone()))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    product(X, w).sum().backward()
    assert [torch.equal(one, X) for one in seen] == [True, True]


def test_gradients_that_are_asked_for(w: nn.Parameter) -> None:
    (found,) = torch.autograd.grad(product(X, w).sum(), [w])
    assert torch.equal(found, X)


def test_a_parameter_without_gradient_stays_without(w: nn.Parameter) -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    delivery = Delivery()
    views = delivered([frozen, w], delivery)
    assert views[0] is frozen
    assert not views[0].requires_grad
    assert views[1].requires_grad
    product(X, frozen, w).sum().backward()
    assert frozen.grad is None
    assert torch.equal(w.grad, X)


def test_anomaly_mode_finds_no_anomaly(w: nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the gradients as soon as a backward returns them."""
    monkeypatch.setitem(globals(), "GARBAGE", float("nan"))
    with torch.autograd.set_detect_anomaly(True):
        product(X, w).sum().backward()
    assert torch.equal(w.grad, X)


def test_what_is_not_finite_never_reaches_a_parameter(w: nn.Parameter) -> None:
    with pytest.raises(KTAMXBackwardError, match="not finite"):
        product(X, w, finite=False).sum().backward()
    assert w.grad is None
    product(X, w).sum().backward()  # and the next backward is as ever
    assert torch.equal(w.grad, X)


def test_two_threads_through_one_graph(w: nn.Parameter) -> None:
    """Each waits for its gradients, whoever was first."""
    loss = product(X, w).sum()
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, [w], retain_graph=True)[0]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(one, X) for one in found] == [True] * 8


@pytest.fixture
def gpu_of_late_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers on the CPU whose LoRA gradients arrive as from a GPU."""
    inputs = lora_tensors.LoraTensors.inputs
    monkeypatch.setattr(lora_tensors.LoraTensors, "inputs", lambda self, from_gpu: inputs(self, True))
    monkeypatch.setattr(result_checks, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(result_checks, "to_host", late)
    before = Late.waits
    yield
    assert Late.waits > before


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_model_trains_as_without(
    checkpointing: bool | None, clip: float | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Losses and parameters of some steps of two micro-batches, to the bit."""
    ends = []
    for way in ("at once", "late"):
        if way == "late":
            request.getfixturevalue("gpu_of_late_copies")
        torch.manual_seed(0)
        model = adapted_model(MIXTRAL, TORCH_BF16, seed=1)
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for step in range(3):
            for micro in range(2):
                ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2 * step + micro))
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                losses.append(loss.item())
            if clip:
                torch.nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
        ends.append((losses, [p.detach().clone() for p in trained]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_a_gradient_of_a_layer_that_is_not_finite(gpu_of_late_copies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it is looked at before it is sent: an error that names the layer, and no gradient."""
    model = adapted_model(MIXTRAL, TORCH_BF16, seed=1)
    layer = model._kt_wrappers[0]
    gradients = result_checks.all_finite
    monkeypatch.setattr(result_checks, "all_finite", lambda *t: ~gradients(*t))
    with pytest.raises(KTAMXBackwardError, match=f"{layer.label}.*LoRA"):
        forward_backward(layer, make_inputs(MIXTRAL, 9, torch.bfloat16))
    assert all(parameter.grad is None for parameter in layer.lora_params.values())
