"""A patched model against the stock one of the same weights: loss, logits, auxiliary loss, gradients."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from tests.support.cases import Case
from tests.support.layers import RANK
from tests.support.models import FAMILIES, Family
from tests.support.patched import (
    adapted_model,
    fill_lora,
    gradients_of,
    logits_of,
    lora_config,
    loss_of,
    patched_model,
)
from tests.support.reference import assert_all_close, assert_close, relative_error

# bf16 is applied to every operation of the model, attention included; the stock model in bf16 is as far from fp32.
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 0.03}
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 0.06}


@pytest.mark.parametrize("rank", [None, RANK], ids=["unpacked", "packed"])
def test_loss_and_logits(family: Family, case: Case, rank: int | None) -> None:
    ids = family.inputs()
    stock, exact = family(case.dtype), family()
    model = patched_model(family, case, kt_lora_rank=rank)
    with torch.no_grad():
        assert abs(loss_of(model, ids).item() - loss_of(stock, ids).item()) < 0.01
    assert logits_of(model, ids).dtype is case.dtype
    assert_close(logits_of(model, ids), logits_of(exact, ids), LOGITS[case.dtype], "logits")


# transformers computes none for DeepSeek.
WITH_AUXILIARY_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("family", [FAMILIES[name] for name in WITH_AUXILIARY_LOSS], ids=WITH_AUXILIARY_LOSS)
def test_auxiliary_loss(family: Family, case: Case) -> None:
    """Router logits are recorded on the router, which stays the model's own."""
    ids = family.inputs()
    kwargs = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    with torch.no_grad():
        stock, model = family(case.dtype)(**kwargs), patched_model(family, case)(**kwargs)
    assert stock.aux_loss.item() > 0.1
    assert model.aux_loss.item() == pytest.approx(stock.aux_loss.item(), rel=LOGITS[case.dtype])
    assert model.loss.item() == pytest.approx(stock.loss.item(), abs=0.01)


def test_attention_gradients_are_stock_pefts(family: Family, case: Case) -> None:
    """They pass through every expert, the routing weights included; expert LoRA is there and contributes zero."""
    ids = family.inputs()
    stock = get_peft_model(family(), lora_config(family, target_modules=list(family.attention)))
    model = adapted_model(family, case)
    for either in (stock, model):
        fill_lora(either, seed=2, only=lambda name: ".self_attn." in name and ".lora_A." in name)
        # Small enough to leave each token its experts: what inputs() promises holds for the base alone.
        fill_lora(either, seed=2, only=lambda name: ".self_attn." in name and ".lora_B." in name, std=0.002)
    expected = gradients_of(stock, loss_of(stock, ids))
    actual = gradients_of(model, loss_of(model, ids))
    assert set(expected) == {name for name in actual if ".self_attn." in name}
    assert_all_close({name: actual[name] for name in expected}, expected, GRADIENTS[case.dtype])


def test_a_step_down_every_gradient_lowers_the_loss(family: Family, case: Case) -> None:
    """The expert part of the step alone as well: attention cannot do it for them."""
    ids = family.inputs()
    model = adapted_model(family, case, seed=3)
    before = loss_of(model, ids)
    grads = gradients_of(model, before)
    parameters = {name: p for name, p in model.named_parameters() if ".experts." in name}
    size = sum(grads[name].square().sum() for name in parameters)
    step = 0.05 / size.item()  # to first order, the loss falls by 0.05
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.sub_(step * grads[name])
        after = loss_of(model, ids)
    assert 0.02 < before.item() - after.item() < 0.08


def test_training_changes_what_the_model_says(family: Family, case: Case) -> None:
    model = adapted_model(family, case)
    before = logits_of(model, family.inputs())
    fill_lora(model, seed=4, only=lambda name: ".experts." in name)
    assert relative_error(logits_of(model, family.inputs()), before) > 0.05
