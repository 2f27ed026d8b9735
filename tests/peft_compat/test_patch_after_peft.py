"""apply_kt_moe on a model that has adapters already: on attention, or put on the fused experts by stock PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from kt_hf import apply_kt_moe
from tests.support.cases import Case, make_config, transformers_adapters
from tests.support.helpers import MIXTRAL
from tests.support.layers import RANK
from tests.support.models import FAMILIES, expert_modules
from tests.support.patched import (
    fill_lora,
    gradients_of,
    loaded_again,
    logits_of,
    lora_config,
    loss_of,
    patched_model,
    trainable,
)
from tests.support.reference import assert_close

IDS = MIXTRAL.inputs()
# Two ways to compute one model: in bf16, every operation of it rounds.
SAME_MODEL = {torch.float32: 1e-4, torch.bfloat16: 0.06}


def test_after_an_attention_adapter(case: Case, tmp_path: Path) -> None:
    config = lora_config(MIXTRAL, target_modules=list(MIXTRAL.attention))
    model = get_peft_model(MIXTRAL(case.dtype), config)
    fill_lora(model, seed=1)
    before, names = logits_of(model, IDS), set(trainable(model))
    assert apply_kt_moe(model, make_config(case.backend)) is model
    assert set(trainable(model)) == names
    assert_close(logits_of(model, IDS), before, SAME_MODEL[case.dtype], "logits")
    assert torch.equal(logits_of(loaded_again(model, MIXTRAL, case, tmp_path), IDS), logits_of(model, IDS))
    model.add_adapter("later", lora_config(MIXTRAL))
    model.set_adapter("later")
    assert len([name for name in trainable(model) if ".experts." in name]) == 12


STOCK = {
    "mixtral": (FAMILIES["mixtral"], {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "qwen3_moe": (FAMILIES["qwen3_moe"], {}),
    "deepseek_v2": (FAMILIES["deepseek_v2"], {}),
    "target_parameters": (
        FAMILIES["qwen2_moe"],
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "down alone": (
        FAMILIES["mixtral"],
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    ),
}


@pytest.mark.parametrize("filled", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", STOCK)
def test_after_stock_peft_wrapped_the_fused_experts(name: str, filled: bool, case: Case, tmp_path: Path) -> None:
    family, settings = STOCK[name]
    ids = family.inputs()
    model = get_peft_model(family(case.dtype), lora_config(family, **settings))
    base = logits_of(model, ids)
    assert not all(hasattr(module, "gate_up_proj") for module in expert_modules(model).values()), "not wrapped at all"
    if filled:
        fill_lora(model, seed=1)
    before = logits_of(model, ids)
    assert torch.equal(before, base) != filled

    apply_kt_moe(model, make_config(case.backend))
    after = logits_of(model, ids)
    assert_close(after, before, SAME_MODEL[case.dtype], "logits after patching")
    gradients = gradients_of(model, loss_of(model, ids))
    experts = [name for name in gradients if ".experts." in name and ".lora_B." in name]
    assert len(experts) == (2 if name == "down alone" else 6)
    assert all(gradients[name].any() for name in experts)
    if not filled and name != "target_parameters":
        layer = model._kt_wrappers[0]
        assert {p.r["default"] for p in layer.projections if p.r} == {RANK}, "a fresh adapter has the config's rank"

    again = loaded_again(model, family, case, tmp_path)
    assert torch.equal(logits_of(again, ids), after)
    assert not again.peft_config["default"].target_parameters


def test_two_stock_adapters_are_both_taken_over() -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(MIXTRAL(), lora_config(MIXTRAL, **settings))
    model.add_adapter("other", lora_config(MIXTRAL, r=4, **settings))
    fill_lora(model, seed=1)
    before = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        before[adapter] = logits_of(model, IDS)
    apply_kt_moe(model, make_config("torch"))
    assert_close(logits_of(model, IDS), before["other"], 1e-4, "the active adapter")
    assert all(".other." in name for name in trainable(model))
    model.set_adapter("default")
    assert_close(logits_of(model, IDS), before["default"], 1e-4, "the other")


@transformers_adapters
def test_transformers_own_adapters(case: Case, tmp_path: Path) -> None:
    model = patched_model(MIXTRAL, case)
    model.add_adapter(lora_config(MIXTRAL))
    fill_lora(model, seed=1)
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path)
    again = patched_model(MIXTRAL, case)
    assert not torch.equal(logits_of(again, IDS), expected)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(again, IDS), expected)
