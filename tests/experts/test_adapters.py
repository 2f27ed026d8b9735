"""KTExperts with its adapters: unlike ranks, patterns, several at once, casts, and what is refused by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kt_hf import KTAMXConfigError, KTAMXForwardError
from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.layers import ALPHA, RANK, LayerInputs, forward_backward, random_lora, set_lora
from tests.support.models import base_weights
from tests.support.one_layer import DEFAULT, TOKENS, build, check, constant, inputs, stacked
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model, trainable
from tests.support.reference import assert_all_close, assert_close, experts_forward_backward

IDS = MIXTRAL.inputs()

# -- one adapter

SETTINGS: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "gate alone": ({"target_modules": ["gate_proj"]}, constant(ALPHA / RANK)),
    "down alone": ({"target_modules": ["down_proj"]}, constant(ALPHA / RANK)),
    "gate and down": ({"target_modules": ["gate_proj", "down_proj"]}, constant(ALPHA / RANK)),
    "rank_pattern": (
        {"rank_pattern": {"up_proj": 3, "experts.down_proj": 16}},
        lambda projection: ALPHA / {"gate_proj": RANK, "up_proj": 3, "down_proj": 16}[projection],
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"gate_proj": 2, "down_proj": 40}},
        lambda projection: {"gate_proj": 2, "up_proj": ALPHA, "down_proj": 40}[projection] / RANK,
    ),
    "use_rslora": ({"use_rslora": True}, constant(ALPHA / math.sqrt(RANK))),
    "all of them": (
        {"use_rslora": True, "rank_pattern": {"gate_proj": 4}, "alpha_pattern": {"gate_proj": 6}},
        lambda projection: 3.0 if projection == "gate_proj" else ALPHA / math.sqrt(RANK),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_adapter(case: Case, name: str) -> None:
    settings, scaling = SETTINGS[name]
    _, layer, base = build(case, **settings)
    check(case, layer, base, {"default": scaling})


@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_the_parameters(case: Case, autocast: bool) -> None:
    """fp32 masters, unless the user asks PEFT for the model's dtype."""
    model = patched_model(MIXTRAL, case, kt_lora_rank=32)
    model = get_peft_model(model, lora_config(MIXTRAL), autocast_adapter_dtype=autocast)
    fill_lora(model, seed=1)
    layer = model._kt_wrappers[0]
    assert {p.dtype for p in layer.lora_params.values()} == {torch.float32 if autocast else case.dtype}
    check(case, layer, base_weights(MIXTRAL(case.dtype))[0], DEFAULT)


def test_a_projection_without_lora_has_no_parameters(case: Case) -> None:
    model, layer, _ = build(case, target_modules=["down_proj"])
    assert set(layer.lora_params) == {"down_lora_a", "down_lora_b"}
    assert len(trainable(model)) == 4


@pytest.mark.parametrize(("init", "zero_b"), [(True, True), (False, False), ("gaussian", True)])
def test_initial_values(init: bool | str, zero_b: bool) -> None:
    """A is drawn expert by expert as PEFT draws a Linear's: from the input's size, not from the stacked tensor's."""
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), lora_config(MIXTRAL, init_lora_weights=init))
    for layer in model._kt_wrappers:
        for name, parameter in layer.lora_params.items():
            inside = 96 if name.startswith("down") else 64
            if name.endswith("_b"):
                assert parameter.any() != zero_b
            elif init == "gaussian":
                assert parameter.std().item() == pytest.approx(1 / RANK, rel=0.05)
            else:
                assert 0.98 / math.sqrt(inside) < parameter.abs().max() <= 1 / math.sqrt(inside)
                assert parameter.std().item() == pytest.approx(1 / math.sqrt(3 * inside), rel=0.05)
            experts = parameter.detach().flatten(1)
            assert (zero_b and name.endswith("_b")) or len(experts.unique(dim=0)) == len(experts)


# -- several


def test_several_active_adapters(case: Case) -> None:
    """Two that overlap in some projections, of other ranks and scalings, active at once, in either order."""
    model, layer, base = build(case, target_modules=["q_proj", "gate_proj", "down_proj"])
    model.add_adapter("other", lora_config(MIXTRAL, r=3, lora_alpha=9, target_modules=["down_proj", "up_proj"]))
    fill_lora(model, seed=2)
    default, other = constant(ALPHA / RANK), constant(3.0)
    check(case, layer, base, {"default": default})
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        scalings = {"default": default, "other": other}
        check(case, layer, base, {name: scalings[name] for name in names})
    model.set_adapter("other")
    check(case, layer, base, {"other": other})


def test_adapters_added_switched_and_deleted(case: Case) -> None:
    model, layer, base = build(case)
    default, other = constant(ALPHA / RANK), constant(2.0)
    model.add_adapter("other", lora_config(MIXTRAL, r=4, lora_alpha=8))
    fill_lora(model, seed=2, only=lambda name: ".other." in name)
    check(case, layer, base, {"default": default})
    model.set_adapter("other")
    check(case, layer, base, {"other": other})
    model.set_adapter("default")
    with model.disable_adapter():
        check(case, layer, base, {})
    check(case, layer, base, {"default": default})
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    check(case, layer, base, {"other": other})
    assert all(set(projection.lora_A) == {"other"} for projection in layer.projections)
    model.add_adapter("default", lora_config(MIXTRAL, r=2))
    fill_lora(model, seed=3, only=lambda name: ".default." in name)
    model.set_adapter("default")
    check(case, layer, base, {"default": constant(ALPHA / 2)})


def test_deleting_the_last_adapter_leaves_the_base(case: Case) -> None:
    model, layer, base = build(case)
    check(case, layer, base, DEFAULT)
    model.base_model.delete_adapter("default")
    assert layer.lora_params == {}
    check(case, layer, base, {})


def test_scaling_changed_by_hand_is_seen(case: Case) -> None:
    _, layer, base = build(case)
    for projection in layer.projections:
        projection.set_scale("default", 2.0)
    check(case, layer, base, {"default": constant(2 * ALPHA / RANK)})


# -- what is refused, and what is told

REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "init_lora_weights='orthogonal'": {"init_lora_weights": "orthogonal"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_of_lora_are_refused_by_name(name: str) -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    with pytest.raises(KTAMXConfigError) as error:
        get_peft_model(model, lora_config(MIXTRAL, target_modules=["gate_proj"], **REFUSED[name]))
    assert "model.layers.0.mlp.experts.gate_proj" in str(error.value)
    assert name.partition("=")[0] in str(error.value)
    assert name.partition("=")[2] in str(error.value)


@pytest.mark.parametrize("name", ["use_dora", "lora_bias"])
def test_variants_of_lora_are_taken_on_attention_alone(name: str) -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    model = get_peft_model(model, lora_config(MIXTRAL, target_modules=["q_proj"], **REFUSED[name]))
    assert torch.isfinite(logits_of(model, IDS)).all()


def test_dropout_warns_once_and_is_not_applied(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    model, layer, base = build(case, lora_dropout=0.5)
    model.add_adapter("other", lora_config(MIXTRAL, lora_dropout=0.5))
    told = [record for record in caplog.records if "lora_dropout=0.5" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]
    model.train()
    check(case, layer, base, DEFAULT)
    caplog.clear()
    build(case, lora_dropout=0.0)
    assert "lora_dropout" not in caplog.text


BAD_INPUTS: dict[str, tuple[Callable[[LayerInputs], tuple[Tensor, Tensor, Tensor]], str]] = {
    "3-D": (lambda x: (x.hidden[None], x.ids, x.weights), r"hidden_states is .*\(1, 37, 64\).*\[T, 64\]"),
    "another width": (lambda x: (x.hidden[:, :32], x.ids, x.weights), r"hidden_states is .*\(37, 32\)"),
    "integers": (lambda x: (x.hidden.long(), x.ids, x.weights), "hidden_states is torch.int64"),
    "fewer rows": (lambda x: (x.hidden, x.ids[1:], x.weights[1:]), r"top_k_index is \(36, 2\).*\[37, K\]"),
    "unlike": (lambda x: (x.hidden, x.ids, x.weights[:, :1]), r"top_k_weights \(37, 1\)"),
    "ids as floats": (lambda x: (x.hidden, x.ids.float(), x.weights), "top_k_index is torch.float32"),
    "mask": (lambda x: (x.hidden, x.ids > 3, x.weights), "top_k_index is torch.bool"),
    "weights as integers": (lambda x: (x.hidden, x.ids, x.ids), "top_k_weights torch.int64"),
    "more experts": (lambda x: (x.hidden, *[torch.cat([t, t], 1) for t in x[1:3]]), "4 experts.*num_experts_per_tok"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_by_the_layers_name(name: str) -> None:
    change, words = BAD_INPUTS[name]
    layer = patched_model(MIXTRAL, TORCH_FP32)._kt_wrappers[1]
    with pytest.raises(KTAMXForwardError, match=words) as error:
        layer(*change(inputs(TORCH_FP32)))
    assert str(error.value).startswith("model.layers.1.mlp.experts: ")


def test_fewer_experts_a_token_than_the_model_says(case: Case) -> None:
    _, layer, base = build(case)
    x = inputs(case)
    x = x._replace(ids=x.ids[:, :1], weights=x.weights[:, :1])
    lora = stacked(layer, DEFAULT)
    expected = experts_forward_backward(*x, base, lora)
    actual = forward_backward(layer, x)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert actual.grads["weights"].shape == (TOKENS, 1)
    assert_close(actual.grads["weights"], expected.grads["weights"], case.grad, "weights")


def test_repr_tells_sizes_and_backend(case: Case) -> None:
    text = repr(adapted_model(MIXTRAL, case)._kt_wrappers[1])
    for part in ("layer_idx=1", "experts=8", "top_k=2", "hidden=64", "intermediate=96", f"backend={case.backend}"):
        assert part in text
    assert "in_features=64, out_features=96, held by the backend" in text


@pytest.mark.parametrize("rank", [1, 20, 256])
def test_ranks_from_1_to_256(case: Case, rank: int) -> None:
    """Those between are in SETTINGS, and the operators pad them."""
    base = base_weights(MIXTRAL(case.dtype))[1]
    model = get_peft_model(patched_model(MIXTRAL, case), lora_config(MIXTRAL, r=rank))
    layer = model._kt_wrappers[1]
    # Of equal effect at each rank.
    lora = {name: value * rank**-0.25 for name, value in random_lora(MIXTRAL, rank=rank).items()}
    assert {parameter.shape for parameter in layer.lora_params.values()} == {value.shape for value in lora.values()}
    set_lora(layer, lora)
    x = inputs(case)
    actual, expected = forward_backward(layer, x), experts_forward_backward(*x, base, lora, ALPHA / rank)
    assert layer._runner.backend.rank == rank
    assert layer._runner.backend.max_rank in (None, rank)
    assert_close(actual.output, expected.output, case.forward, "output")
    assert_all_close(actual.grads, expected.grads, case.grad)
