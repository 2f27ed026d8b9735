"""kt_lora_config: what lora_target means on each family, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from kt_hf import KTAMXConfigError, kt_lora_config
from kt_hf.lora import expert_targets
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.models import EXPERT_PROJECTIONS, FAMILIES, Family, expert_modules
from tests.support.patched import patched_model, trainable

ATTENTION = set(MIXTRAL.attention)
EXPERTS = set(EXPERT_PROJECTIONS)

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def targets(target: Any, family: Family = MIXTRAL, **settings: Any) -> set[str]:
    return set(kt_lora_config(patched_model(family, TORCH_FP32), lora_target=target, **settings).target_modules)


@every_family
def test_all(family: Family) -> None:
    assert targets("all", family) == {*family.attention, *EXPERTS}


@every_family
def test_all_attention(family: Family) -> None:
    assert targets("all_attention", family) == set(family.attention)


@every_family
def test_all_reaches_everything_but_router_and_head(family: Family) -> None:
    model = patched_model(family, TORCH_FP32)
    model = get_peft_model(model, kt_lora_config(model))
    names = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trainable(model)}
    assert not [name for name in names if name.endswith(("mlp.gate", "router", "shared_expert_gate", "lm_head"))]
    layers = range(len(model.model.model.layers))
    modules = [f"model.layers.{index}.self_attn.{name}" for index in layers for name in family.attention]
    for index in family.moe_layers:
        modules += [f"model.layers.{index}.mlp.experts.{name}" for name in EXPERT_PROJECTIONS]
        modules += [f"model.layers.{index}.mlp.{family.shared}.{name}" for name in EXPERT_PROJECTIONS if family.shared]
    modules += [f"model.layers.{index}.mlp.{name}" for index in family.dense_layers for name in EXPERT_PROJECTIONS]
    assert names == set(modules)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["q_proj", "gate_proj"], {"q_proj", "gate_proj"}),
        (("v_proj",), {"v_proj"}),
        ({"down_proj"}, {"down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (" q_proj , gate_proj,up_proj , down_proj, ", {"q_proj", *EXPERTS}),
        ("w1,w2,w3", EXPERTS),
        (["w1"], {"gate_proj"}),
        (["w3"], {"up_proj"}),
        (["w2"], {"down_proj"}),
        ("q_proj,w2,gate_proj", {"q_proj", "down_proj", "gate_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["experts.gate_proj"], {"experts.gate_proj"}),
        (iter(["q_proj"]), {"q_proj"}),
    ],
)
def test_names(target: str | Iterable[str], expected: set[str]) -> None:
    assert targets(target) == expected


@pytest.mark.parametrize("wrong", ["q_prj", "gate_up_proj", "proj", "w4", "all_linear"])
@pytest.mark.parametrize("with_others", [False, True])
def test_unknown_name_lists_those_there_are(wrong: str, with_others: bool) -> None:
    with pytest.raises(KTAMXConfigError, match=f"no module is called '{wrong}'") as error:
        targets(["q_proj", wrong] if with_others else wrong)
    listed = str(error.value).partition("There are: ")[2].rstrip(".").split(", ")
    assert set(listed) == ATTENTION | EXPERTS


@pytest.mark.parametrize("empty", ["", " , ", [], ()])
def test_no_names_are_refused(empty: Any) -> None:
    with pytest.raises(KTAMXConfigError, match="lora_target is empty"):
        targets(empty)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", None])
def test_bad_rank(rank: Any) -> None:
    with pytest.raises(KTAMXConfigError, match=f"lora_rank={rank!r} is not a positive integer"):
        targets("all", lora_rank=rank)


def test_settings_reach_peft() -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    config = kt_lora_config(
        model, lora_rank=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True, rank_pattern={"q_proj": 2}
    )
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 6, 0.1, "CAUSAL_LM")
    assert (config.use_rslora, config.rank_pattern) == (True, {"q_proj": 2})
    assert kt_lora_config(model, task_type="SEQ_CLS").task_type == "SEQ_CLS"


def test_unpatched_model_has_no_expert_targets() -> None:
    model = MIXTRAL()
    assert set(kt_lora_config(model).target_modules) == ATTENTION
    assert expert_targets(model) == []
    with pytest.raises(KTAMXConfigError, match="'gate_proj'"):
        kt_lora_config(model, lora_target="gate_proj")


def test_heads_of_other_names_are_left_out() -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    model.set_output_embeddings(None)
    model.answers = model.lm_head = MIXTRAL().lm_head
    model.get_output_embeddings = lambda: model.answers
    assert "answers" not in kt_lora_config(model).target_modules


@pytest.mark.parametrize("target", ["all", "all_attention", "q_proj,w1"])
def test_for_a_second_adapter(target: str) -> None:
    """On a model that has an adapter already, the same modules are meant as before it."""
    model = patched_model(MIXTRAL, TORCH_FP32)
    before = kt_lora_config(model, lora_target=target)
    model = get_peft_model(model, kt_lora_config(model))
    assert isinstance(model, PeftModel)
    assert kt_lora_config(model, lora_target=target).target_modules == before.target_modules


def test_the_layer_is_a_peft_target_by_any_of_its_names() -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    model = get_peft_model(model, kt_lora_config(model, lora_target=["experts.gate_proj"]))
    assert {name.partition(".lora_")[0].rsplit(".", 2)[-2:][0] for name in trainable(model)} == {"experts"}
    assert len(trainable(model)) == 2 * len(expert_modules(model))
