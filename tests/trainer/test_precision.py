"""Models of every dtype, autocast, gradient scaling and a router in fp32, on both backends."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.cases import KERNEL_MARKS, Case
from tests.support.models import FAMILIES
from tests.support.patched import fill_lora, gradients_of, loss_of, patched_model
from tests.support.reference import relative_error
from tests.support.stock import as_stock, pair, patched_config

FAMILY = FAMILIES["qwen2_moe"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The model's other parts count too: bf16 in each operation of a whole model costs this much with stock PEFT as well.
GRADIENTS = {torch.float32: 0.02, torch.float16: 0.03, torch.bfloat16: 0.08}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [
    pytest.param(Case(name, dtype, 0.0, 0.0, 0.0), id=f"{name}-{short(dtype)}", marks=marks)
    for name, marks in (("torch", ()), ("AMXBF16", KERNEL_MARKS))
    for dtype in DTYPES
]


def models(case: Case) -> tuple[PeftModel, PeftModel, list[tuple[torch.dtype, torch.dtype]]]:
    """Patched and stock (fp32), B not zero, and a list that fills with the dtypes into and out of the experts."""
    model, stock = pair(FAMILY, case, std=0.05)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for layer in model._kt_wrappers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    return model, stock, seen


def stock_gradients(stock: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    """The fused B's gradient is masked by a hook, which torch.autograd.grad would pass over."""
    stock.zero_grad()
    loss_of(stock, ids).backward()
    return {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """By the stock model's names: gradients take the parameters' place for a moment."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in kept:
            parameter = model.get_parameter(name)
            assert parameter.grad is not None
            assert parameter.grad.dtype is parameter.dtype is torch.float32
            parameter.copy_(parameter.grad)
        found = as_stock(model)
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)
    return found


def assert_gradients(model: PeftModel, stock: PeftModel, ids: Tensor, limit: float) -> None:
    expected, actual = stock_gradients(stock, ids), gradients(model)
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < limit, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_each_dtype(case: Case) -> None:
    model, stock, seen = models(case)
    ids = FAMILY.inputs()
    loss = loss_of(model, ids)
    loss.backward()
    assert seen == [(case.dtype, case.dtype)] * 2
    assert abs(loss.item() - loss_of(stock, ids).item()) < 0.01
    exact = case.backend == "torch" and case.dtype is torch.float32
    assert_gradients(model, stock, ids, 1e-4 if exact else GRADIENTS[case.dtype])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=short)
def test_autocast(autocast: torch.dtype, case: Case) -> None:
    """It reaches the model around the experts; these compute as ever, and give back what dtype they were given."""
    model, stock, seen = models(case)
    # Two rounded dtypes need other tokens, whose routing is near no tie on any CPU.
    ids = FAMILY.inputs(seed=5 if (autocast, case.dtype) == (torch.bfloat16, torch.float16) else None)
    with torch.autocast("cpu", autocast):
        loss = loss_of(model, ids)
    loss.backward()
    assert all(given is got for given, got in seen)
    assert abs(loss.item() - loss_of(stock, ids).item()) < 0.02
    # A model in fp16 under bf16: each loses what the other would have kept, 0.14 with either backend.
    mixed = 2.5 if (autocast, case.dtype) == (torch.bfloat16, torch.float16) else 1.0
    assert_gradients(model, stock, ids, mixed * max(GRADIENTS[autocast], GRADIENTS[case.dtype]))


@pytest.mark.parametrize("case", CASES)
def test_autocast_does_not_reach_into_the_experts(case: Case) -> None:
    """One layer, the same inputs, inside and outside: the same bits, forward and backward."""
    model, _, _ = models(case)
    layer = model._kt_wrappers[0]
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, FAMILY.hidden, generator=rng).to(case.dtype).requires_grad_()
    ids = torch.randint(FAMILY.num_experts, (9, FAMILY.top_k), generator=rng)
    weights = torch.rand(9, FAMILY.top_k, generator=rng)
    results = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            output = layer(hidden, ids, weights)
            grads = torch.autograd.grad(output.float().sum(), [hidden, *layer.lora_params.values()])
        results.append([output, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def fp32_router(model: nn.Module) -> list[torch.dtype]:
    """Routers compute in fp32, as people make them to in bf16 models; returns what dtypes their weights come in."""
    seen: list[torch.dtype] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[1].dtype if output[1].is_floating_point() else output[2].dtype)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.float()
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
            module.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_a_float32_router(case: Case) -> None:
    """Routing weights stay fp32 on their way into the experts; their gradient comes back, the output is the model's."""
    model, stock, seen = models(case)
    routing = fp32_router(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("mlp.gate.weight"))
    ids = FAMILY.inputs()
    loss_of(model, ids).backward()
    assert routing == [torch.float32] * 2
    assert seen == [(case.dtype, case.dtype)] * 2
    routers = {n: p.requires_grad_() for n, p in stock.named_parameters() if n.endswith("mlp.gate.weight")}
    expected = stock_gradients(stock, ids)
    for name in routers:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.dtype is torch.float32
        assert relative_error(gradient, expected[name]) < 1.5 * GRADIENTS[case.dtype]


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_scaler_skips_what_overflows(case: Case) -> None:
    """fp16 training: a step whose scaled gradients overflow changes nothing, and the next ones are right."""
    model, stock, _ = models(case)
    ids = FAMILY.inputs()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in parameters]
    for factor in (float("inf"), 1.0):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, ids)
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        if factor == 1.0:
            assert_gradients(model, stock, ids, max(GRADIENTS[torch.float16], GRADIENTS[case.dtype]))
            break
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("case", CASES)
def test_lora_in_the_models_dtype(case: Case) -> None:
    """autocast_adapter_dtype=False leaves LoRA in the model's dtype: gradients and steps are in it."""
    model = get_peft_model(patched_model(FAMILY, case), patched_config(FAMILY), autocast_adapter_dtype=False)
    fill_lora(model, seed=1)
    grads = gradients_of(model, loss_of(model, FAMILY.inputs()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype is grads[name].dtype is case.dtype, name
            assert grads[name].any()
