"""Experts in two tiers, one of them a real GPU; and the GPU's backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kt_hf import KTAMXError
from kt_hf.backends import ExpertWeights
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.shapes import LORA_NAMES, ExpertShape
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, forward_backward, make_inputs, on_gpu, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.patched import adapted_model, fill_lora, gradients_of, logits_of, loss_of
from tests.support.reference import LayerResult, assert_all_close, assert_close, experts_forward_backward
from tests.support.tiered import E, split_model

CASES = [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16"), pytest.param(TORCH_BF16, id="torch")]


def split_layer(case: Case, gpu: list[int], **config: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    layer = split_model(case, gpu, **config).cuda()._kt_wrappers[0]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    device = "cuda" if config.get("kt_moe_lora_device") == "gpu" else "cpu"
    assert {p.device.type for p in layer.lora_params.values()} == {device}
    set_lora(layer, {name: value.to(device) for name, value in lora.items()})
    return layer, base, lora


def check(case: Case, actual: LayerResult, x: LayerInputs, base: Any, lora: Any) -> None:
    expected = experts_forward_backward(*x, base, lora, 1.5)
    assert actual.output.is_cuda
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close({name: grad.cpu() for name, grad in actual.grads.items()}, expected.grads, case.grad)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("gpu", [[3], [0, 5], [0, 1, 2, 3, 4, 6], list(range(E))], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_any_placement(case: Case, gpu: list[int], where: str) -> None:
    layer, base, lora = split_layer(case, gpu, kt_moe_lora_device=where)
    backend = layer._runner.backend
    assert backend.device.type == "cuda"
    first = backend.parts[0].backend if len(gpu) < E else backend
    assert first.weights.gate_up.is_cuda
    assert first.weights.gate_up.shape[0] == len(gpu)
    for seed in (0, 1):
        x = make_inputs(MIXTRAL, 37, case.dtype, seed)
        check(case, forward_backward(layer, on_gpu(x)), x, base, lora)


@pytest.mark.parametrize("case", CASES)
def test_few_tokens_and_one_tier(case: Case) -> None:
    layer, base, lora = split_layer(case, [1, 4, 6])
    for tokens, used in ((0, None), (1, None), (21, [1, 4, 6]), (21, [0, 2, 3, 5, 7])):
        x = make_inputs(MIXTRAL, tokens, case.dtype, experts=used)
        check(case, forward_backward(layer, on_gpu(x)), x, base, lora)
    x = make_inputs(MIXTRAL, 21, case.dtype)
    x.ids[::3, 0], x.ids[5] = -1, E
    check(case, forward_backward(layer, on_gpu(x)), x, base, lora)


@pytest.mark.parametrize("rank", [0, 1, 8, 12, 64])
@pytest.mark.parametrize("tokens", [1, 300])
def test_grouped_products(rank: int, tokens: int) -> None:
    """With experts that get no rows, first, last and between, and rows of no expert."""
    experts = MIXTRAL(torch.bfloat16).model.layers[0].mlp.experts
    weights = ExpertWeights(experts.gate_up_proj.detach().cuda(), experts.down_proj.detach().cuda())
    backend = GroupedBackend(weights, ExpertShape(E, 2, MIXTRAL.hidden, MIXTRAL.intermediate))
    base, lora = base_weights(MIXTRAL(torch.bfloat16))[0], random_lora(MIXTRAL, rank=rank) if rank else None
    backend.set_lora(tuple(lora.values()) if lora else ())
    for used in (None, [1, 2, 5], [7, 0]):
        x = make_inputs(MIXTRAL, tokens, torch.bfloat16, experts=used)
        if tokens > 1:
            x.ids[::4, 0] = -1
        there = on_gpu(x)
        out, saved = backend.forward(there.hidden, there.ids, there.weights.float(), save=True)
        assert saved is not None
        found = backend.backward(saved, there.grad_output)
        expected = experts_forward_backward(*x, base, lora)
        assert_close(out, expected.output, 1e-2, "output")
        grads = {"hidden": found.hidden_states, "weights": found.top_k_weights}
        grads |= dict(zip(LORA_NAMES, found.lora, strict=bool(lora)))
        assert_all_close({name: grad.cpu() for name, grad in grads.items()}, expected.grads, 2e-2)


@pytest.mark.parametrize(
    ("activations", "reentrant", "autocast"),
    [
        ("retain", None, False),
        ("retain", False, False),
        ("retain", True, False),
        ("recompute", False, False),
        ("recompute", True, False),
        ("retain", False, True),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_whole_model(case: Case, activations: str, reentrant: bool | None, autocast: bool) -> None:
    """As with all on the CPU: with gradient checkpointing, under autocast, experts in both tiers or in one."""
    ids = MIXTRAL.inputs()
    plain = adapted_model(MIXTRAL, case, seed=1)
    expected, grads = logits_of(plain, ids), gradients_of(plain, loss_of(plain, ids))
    for gpu in ([], [0, 3, 5]):
        model = split_model(case, gpu, kt_expert_activations=activations).cuda()
        fill_lora(model, seed=1)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            assert_close(logits_of(model, ids.cuda()), expected, 0.06, "logits")
            if reentrant is not None:
                model.train()
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            loss = loss_of(model, ids.cuda())
        loss.backward()
        actual = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        assert_all_close(actual, grads, 0.12)


@pytest.mark.parametrize("case", CASES)
def test_an_output_that_is_not_finite_is_told_before_the_next_step(case: Case) -> None:
    layer, _, lora = split_layer(case, [1, 4, 6])
    set_lora(layer, {**lora, "down_lora_b": lora["down_lora_b"] * float("inf")})
    x = on_gpu(make_inputs(MIXTRAL, 37, case.dtype))

    def step() -> None:
        forward_backward(layer, x)
        layer.update_lora_pointers()

    with pytest.raises(KTAMXError, match="not finite"):
        step()


@pytest.mark.parametrize("case", CASES)
def test_gradient_that_is_not_finite_goes_through(case: Case) -> None:
    layer, base, lora = split_layer(case, [1, 4, 6])
    x = make_inputs(MIXTRAL, 37, case.dtype)
    bad = x._replace(grad_output=torch.full_like(x.grad_output, float("inf")))
    grads = forward_backward(layer, on_gpu(bad)).grads
    assert not any(torch.isfinite(grads[name]).all() for name in ("hidden", "weights", *lora))
    layer.update_lora_pointers()
    check(case, forward_backward(layer, on_gpu(x)), x, base, lora)
