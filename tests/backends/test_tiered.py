"""Experts in two tiers give what all of them on the CPU give."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model

from kt_hf import KTAMXConfigError, KTAMXForwardError, apply_kt_moe
from kt_hf.backends import TorchBackend
from kt_hf.backends.gpu.resident import GroupedBackend
from kt_hf.backends.tiered import TieredBackend
from kt_hf.placement import packer as packing
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.layers import LayerInputs, forward, forward_backward, gradients, make_inputs, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import expected_grads, inputs
from tests.support.patched import adapted_model, fill_lora, gradients_of, logits_of, lora_config, loss_of
from tests.support.reference import LayerResult, assert_all_close, assert_close, experts_forward_backward
from tests.support.tiered import E, split_layer, split_model

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")

PLACEMENTS = ([3], [0, 5], [1, 2, 6, 7], [0, 1, 2, 3, 4, 6], list(range(E)))


def check(case: Case, actual: LayerResult, x: LayerInputs, base: Any, lora: Any) -> None:
    expected = experts_forward_backward(*x, base, lora, 1.5)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, case.grad)


@pytest.mark.parametrize("gpu", PLACEMENTS, ids=str)
def test_any_placement(case: Case, gpu: list[int]) -> None:
    """Output and gradients of input, routing weights and LoRA against the reference; twice, for what is left over."""
    layer, base, lora = split_layer(case, gpu)
    for seed in (0, 1):
        x = inputs(case, seed)
        check(case, forward_backward(layer, x), x, base, lora)


def test_the_tiers_are_computed_by_their_backends(backend: str) -> None:
    for case, first in ((TORCH_FP32, TorchBackend), (TORCH_BF16, GroupedBackend)):
        if backend == "AMXBF16" and case is TORCH_FP32:
            continue
        one = Case(backend, case.dtype, case.forward, case.grad, case.same)
        parts = split_layer(one, [2, 4])[0]._runner.backend.parts
        assert isinstance(parts[0].backend, first)
        assert (parts[1].backend.name, len(parts)) == (backend, 2)


@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_tokens_of_one_tier_only(case: Case, tier: str) -> None:
    gpu = [1, 4, 6]
    layer, base, lora = split_layer(case, gpu)
    used = gpu if tier == "gpu" else [0, 2, 3, 5, 7]
    x = make_inputs(MIXTRAL, 21, case.dtype, experts=used)
    actual = forward_backward(layer, x)
    check(case, actual, x, base, lora)
    for name in lora:
        idle = [e for e in range(E) if e not in used]
        assert not actual.grads[name][idle].any(), f"{name}: an expert without tokens has a gradient"


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(case: Case, tokens: int) -> None:
    layer, base, lora = split_layer(case, [1, 4, 6])
    x = make_inputs(MIXTRAL, tokens, case.dtype)
    check(case, forward_backward(layer, x), x, base, lora)


def test_ids_of_no_expert(case: Case) -> None:
    """Sentinels of expert parallelism: -1 and E."""
    layer, base, lora = split_layer(case, [1, 4, 6])
    x = inputs(case)
    x.ids[::3, 0], x.ids[::5, 1] = -1, E
    check(case, forward_backward(layer, x), x, base, lora)


@pytest.mark.parametrize("rank", [8, 32])
def test_operators_built_for_a_larger_rank(case: Case, rank: int) -> None:
    layer, base, lora = split_layer(case, [1, 4], kt_lora_rank=rank)
    x = inputs(case)
    check(case, forward_backward(layer, x), x, base, lora)


@pytest.mark.parametrize("max_len", [10, 37])
def test_longer_than_a_call(case: Case, max_len: int) -> None:
    layer, base, lora = split_layer(case, [1, 4], kt_max_len=max_len)
    x = inputs(case)
    check(case, forward_backward(layer, x), x, base, lora)


def test_forwards_and_lora_changes_before_the_backwards(case: Case) -> None:
    layer, base, lora = split_layer(case, [1, 4, 6])
    seen = []
    for seed in range(3):
        lora = random_lora(MIXTRAL, seed)
        set_lora(layer, lora)
        x = make_inputs(MIXTRAL, 11 + 7 * seed, case.dtype, seed)
        seen.append((x, lora, *forward(layer, x)))
        with torch.no_grad():
            layer(*make_inputs(MIXTRAL, 2, case.dtype, seed=9)[:3])
    for x, lora, output, leaves in (seen[1], seen[2], seen[0]):
        assert_all_close(gradients(output, leaves, x.grad_output), expected_grads(x, base, lora), case.grad)


@pytest.mark.parametrize("activations", ["retain", "recompute"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_whole_model(case: Case, activations: str, reentrant: bool | None) -> None:
    """Logits and all gradients as with every expert on the CPU, with and without gradient checkpointing."""
    tolerance = 2 * case.grad if case is TORCH_FP32 else 0.12
    ids = MIXTRAL.inputs()
    plain = adapted_model(MIXTRAL, case, seed=1)
    expected, grads = logits_of(plain, ids), gradients_of(plain, loss_of(plain, ids))
    model = split_model(case, [0, 3, 5], seed=1, kt_expert_activations=activations)
    assert_close(logits_of(model, ids), expected, tolerance / 2, "logits")
    if reentrant is not None:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.zero_grad()
    loss_of(model, ids).backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_all_close(actual, grads, tolerance)


def test_retained_forward_is_computed_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = split_model(case, [0, 3, 5], seed=1)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counts: list[str] = []
    for layer, part in itertools.product(model._kt_wrappers, (0, 1)):
        backend = layer._runner.backend.parts[part].backend
        original = backend.forward
        monkeypatch.setattr(
            backend, "forward", lambda *a, f=original, p=part, **k: (counts.append(f"part {p}"), f(*a, **k))[1]
        )
    loss_of(model, MIXTRAL.inputs()).backward()
    assert sorted(counts) == ["part 0"] * 2 + ["part 1"] * 2


@pytest.mark.parametrize("case", [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS)], ids=str)
def test_gate_overflow_in_the_cpu_tier(case: Case) -> None:
    """Where the operators give NaN, the CPU's part is computed again with care, and the GPU's is left alone."""
    layer, base, lora = split_layer(case, [1, 4])
    x = inputs(case)
    x.hidden[5].mul_(60)
    actual = forward_backward(layer, x)
    expected = experts_forward_backward(*x, base, lora, 1.5)
    gate = torch.einsum("h,eih->ei", x.hidden[5].float(), base.gate)
    assert gate.min() < -90, "the token does not overflow: a weak test"
    for name in ("hidden", "weights", *lora):
        assert_close(actual.grads[name], expected.grads[name], 3 * case.grad, name)


def test_gradient_that_is_not_finite_goes_through(case: Case) -> None:
    """A gradient scaler's overflow: the scaler must see it, and it is no error of the experts."""
    layer, base, lora = split_layer(case, [1, 4, 6])
    x = inputs(case)
    bad = x._replace(grad_output=torch.full_like(x.grad_output, float("inf")))
    grads = forward_backward(layer, bad).grads
    assert not any(torch.isfinite(grads[name]).all() for name in ("weights", *lora))
    assert not torch.isfinite(grads["hidden"]).any()
    check(case, forward_backward(layer, x), x, base, lora)


def test_gradient_that_is_not_finite_reaches_the_split(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nobody looks before: no care for it, and every result tells."""
    backend, x = split_layer(case, [1, 4, 6])[0]._runner.backend, inputs(case)
    monkeypatch.setattr(backend.parts[1].backend, "careful_backward", lambda *_: pytest.fail("for nothing"))
    _, saved = backend.forward(x.hidden, x.ids, x.weights.float(), save=True)
    found = backend.backward(saved, torch.full_like(x.grad_output, float("inf")))
    assert not any(torch.isfinite(t).any() for t in (found.hidden_states, *(t[0] for t in found.lora)))


def test_output_that_is_not_finite_is_refused(case: Case) -> None:
    layer, _, lora = split_layer(case, [1, 4, 6])
    set_lora(layer, {**lora, "down_lora_b": lora["down_lora_b"] * float("inf")})
    with pytest.raises(KTAMXForwardError, match="not finite"):
        forward_backward(layer, inputs(case))


def test_adapter_switched_off(case: Case) -> None:
    model = split_model(case, [2, 3], seed=1)
    ids = MIXTRAL.inputs()
    with model.disable_adapter():
        off = logits_of(model, ids)
    assert_close(off, logits_of(MIXTRAL(case.dtype), ids), 1e-4 if case is TORCH_FP32 else 0.06, "base")
    assert not torch.equal(off, logits_of(model, ids))


@pytest.mark.parametrize("failing", ["before", "after"])
def test_interrupted_packing(backend: str, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a layer is packed: the next call packs it, and the experts are what they were."""
    case = TORCH_BF16 if backend == "torch" else KERNEL_BF16
    original, calls = packing.build_backend, []

    def pack(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        built = original(*args, **kwargs) if failing == "after" or len(calls) > 1 else None
        if len(calls) == 1:
            raise KeyboardInterrupt
        return built

    monkeypatch.setattr(packing, "build_backend", pack)
    config = make_config(backend, kt_num_gpu_experts=3)
    model = apply_kt_moe(MIXTRAL(case.dtype), config)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, lora_config(MIXTRAL))
    layer = model._kt_wrappers[0]
    base, lora = base_weights(MIXTRAL(case.dtype))[0], random_lora(MIXTRAL)
    set_lora(layer, lora)
    x = inputs(case)
    check(case, forward_backward(layer, x), x, base, lora)
    assert isinstance(layer._runner.backend, TieredBackend)


@pytest.mark.parametrize(("count", "words"), [(9, "has 8 experts. Set it to 8"), (7, "Set it to 8, or to 6 or less")])
def test_too_many(backend: str, count: int, words: str) -> None:
    if backend == "torch" and count == 7:
        pytest.skip("PyTorch needs no number of experts")
    with pytest.raises(KTAMXConfigError, match=f"kt_num_gpu_experts={count}.*{words}"):
        apply_kt_moe(MIXTRAL(torch.bfloat16), make_config(backend, kt_num_gpu_experts=count))


def test_frozen_experts(case: Case) -> None:
    """Experts without LoRA (all_attention) still give the gradients of their inputs."""
    layer, base, _ = split_layer(case, [1, 4, 6])
    for parameter in layer.lora_params.values():
        parameter.requires_grad_(False)
    zero = {name: torch.zeros_like(p) for name, p in layer.lora_params.items()}
    set_lora(layer, zero)
    x = inputs(case)
    leaves = {"hidden": x.hidden.requires_grad_(), "weights": x.weights.requires_grad_()}
    output = layer(leaves["hidden"], x.ids, leaves["weights"])
    grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), x.grad_output), strict=True))
    expected = experts_forward_backward(*x, base)
    assert_all_close(grads, {name: expected.grads[name] for name in leaves}, case.grad)


def test_training(case: Case) -> None:
    """A few steps of AdamW: the losses of a split model are those of an unsplit one (after more of them rounding has
    sent tokens to other experts, here as between any two backends)."""
    ids = MIXTRAL.inputs()
    runs = []
    for model in (adapted_model(MIXTRAL, case), split_model(case, [1, 2, 6])):
        fill_lora(model, seed=1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
        losses = []
        for _ in range(4):
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0][-1] < runs[0][0] - 0.3, runs
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < (1e-3 if case is TORCH_FP32 else 0.1)
