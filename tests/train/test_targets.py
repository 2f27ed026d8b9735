"""`lora_target` as people write it, on the attention a model has."""

from __future__ import annotations

import pytest

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.train.config.settings import RunKeys
from kt_hf.train.targets import lora_config, lora_targets
from tests.support.models import FAMILIES

USERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.mark.parametrize(
    ("family", "query"), [("deepseek_v2", {"q_proj"}), ("deepseek_v3", {"q_a_proj", "q_b_proj"}), ("mixtral", None)]
)
def test_names_of_plain_attention_mean_what_latent_attention_has(family: str, query: set[str] | None) -> None:
    model = apply_kt_moe(FAMILIES[family](), KTConfig(kt_backend="torch"))
    config, told = lora_config(model, RunKeys(lora_target=USERS))
    experts = {"gate_proj", "up_proj", "down_proj", "o_proj"}
    if query is None:
        assert set(config.target_modules) == set(USERS.split(","))
        assert told == []
    else:
        assert set(config.target_modules) == experts | query | {"kv_a_proj_with_mqa", "kv_b_proj"}
        assert any("kv_a_proj_with_mqa and kv_b_proj in its place" in line for line in told)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["all", USERS, "gate_proj,up_proj,down_proj"])
def test_an_unpatched_model_gets_lora_on_its_experts_by_stock_peft(family: str, target: str) -> None:
    from peft import get_peft_model

    model = FAMILIES[family]()
    config, told = lora_config(model, RunKeys(lora_target=target, lora_rank=4, lora_dropout=0.1))
    assert any("stock PEFT has none for fused experts" in line for line in told)
    trained = [n for n, p in get_peft_model(model, config).named_parameters() if p.requires_grad]
    layers = {name.split(".mlp.")[0] for name in trained if ".mlp.experts." in name}
    assert len(layers) == len(FAMILIES[family].moe_layers)
    shared = FAMILIES[family].shared
    if shared:  # PEFT rewrites DeepSeek's targets, Qwen2-MoE's not
        reached = any(f".{shared}." in name for name in trained)
        assert reached or any("shared experts without LoRA" in line for line in told)
    assert any(".self_attn." in name for name in trained) == (target != "gate_proj,up_proj,down_proj")


def test_words_and_lists_are_taken() -> None:
    assert lora_targets("all", set()) == ("all", [])
    assert lora_targets(["q_proj", "o_proj"], {"q_proj", "o_proj"}) == (["q_proj", "o_proj"], [])
