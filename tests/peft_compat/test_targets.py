"""What a LoraConfig can name, and what it then reaches in a patched model: the same model as by plain names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.models import EXPERT_PROJECTIONS, FAMILIES, Family
from tests.support.patched import (
    adapted_model,
    fill_lora,
    gradients_of,
    loaded_again,
    logits_of,
    lora_config,
    loss_of,
    trainable,
)

IDS = MIXTRAL.inputs()


def adapted(family: Family, case: Case, **settings: Any) -> PeftModel:
    return adapted_model(family, case, seed=1, lora=settings)


def expert_names(model: torch.nn.Module, adapter: str = "default") -> set[str]:
    """`0.gate_proj`: the layers and projections that have this adapter, by their parameters."""
    found = set()
    for name, _ in model.named_parameters():
        if ".experts." in name and f".lora_A.{adapter}." in name:
            parts = name.split(".")
            found.add(f"{parts[parts.index('layers') + 1]}.{parts[parts.index('experts') + 1]}")
    return found


ALL = {f"{layer}.{name}" for layer in (0, 1) for name in EXPERT_PROJECTIONS}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_all_linear_reaches_the_experts(family: Family, tmp_path: Path) -> None:
    """Attention, dense MLPs, shared experts and all experts; neither head nor router; saved and loaded as ever."""
    model = adapted(family, TORCH_FP32, target_modules="all-linear")
    named = {name.removesuffix(".lora_A.default.weight") for name in trainable(model) if ".lora_A." in name}
    everything = adapted(family, TORCH_FP32, target_modules=family.target_modules)
    plain = {name.removesuffix(".lora_A.default.weight") for name in trainable(everything) if ".lora_A." in name}
    assert len(expert_names(model)) == 3 * len(family.moe_layers)
    assert plain <= named
    assert {name.rpartition(".")[2] for name in named - plain} <= {"shared_expert_gate"}
    again = loaded_again(model, family, TORCH_FP32, tmp_path)
    assert torch.equal(logits_of(again, family.inputs()), logits_of(model, family.inputs()))


def test_all_linear_is_what_the_names_give(case: Case) -> None:
    model, named = adapted(MIXTRAL, case, target_modules="ALL-LINEAR"), adapted(MIXTRAL, case)
    assert set(trainable(model)) == set(trainable(named))
    assert torch.equal(logits_of(model, IDS), logits_of(named, IDS))
    grads, expected = gradients_of(model, loss_of(model, IDS)), gradients_of(named, loss_of(named, IDS))
    assert [name for name, grad in expected.items() if not torch.equal(grads[name], grad)] == []


def test_all_linear_as_the_second_adapter(case: Case) -> None:
    """Where adapters wrap the layers already, on attention or on experts."""
    for first in (["q_proj"], ["down_proj"]):
        model = adapted_model(MIXTRAL, case, lora={"target_modules": first})
        model.add_adapter("all", lora_config(MIXTRAL, target_modules="all-linear"))
        fill_lora(model, seed=1)
        model.set_adapter("all")
        assert expert_names(model, "all") == ALL
        assert not [name for name, _ in model.named_parameters() if name.count("lora_") > 1]
        alone = adapted(MIXTRAL, case, target_modules="all-linear")
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                if ".default." in name:
                    parameter.copy_(dict(model.named_parameters())[name.replace(".default.", ".all.")])
        assert torch.equal(logits_of(model, IDS), logits_of(alone, IDS))


SELECTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "regex": ({"target_modules": r".*layers\.1\..*(q_proj|experts\.up_proj)"}, {"1.up_proj"}),
    "full names": ({"target_modules": ["model.layers.0.mlp.experts.down_proj"]}, {"0.down_proj"}),
    "experts.name": ({"target_modules": ["q_proj", "experts.gate_proj"]}, {"0.gate_proj", "1.gate_proj"}),
    "layers_to_transform": ({"layers_to_transform": [1]}, {name for name in ALL if name.startswith("1.")}),
    "exclude_modules": ({"exclude_modules": ["up_proj"]}, {name for name in ALL if "up_proj" not in name}),
    "exclude_modules, regex": ({"exclude_modules": r".*layers\.0\..*"}, {name for name in ALL if name[0] == "1"}),
    "all-linear but experts": ({"target_modules": "all-linear", "exclude_modules": r".*\.experts\..*"}, set()),
    "all-linear but one": (
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {name for name in ALL if "down_proj" not in name},
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str, tmp_path: Path) -> None:
    settings, expected = SELECTIONS[name]
    model = adapted(MIXTRAL, TORCH_FP32, **settings)
    assert expert_names(model) == expected
    assert all(grad.any() for key, grad in gradients_of(model, loss_of(model, IDS)).items() if ".lora_B." in key)
    again = loaded_again(model, MIXTRAL, TORCH_FP32, tmp_path)
    assert expert_names(again) == expected
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_mixtrals_old_names(case: Case) -> None:
    """w1, w2, w3, which stock PEFT translates: they would match nothing here, and say nothing."""
    patterns = {"rank_pattern": {"w1": 4}, "alpha_pattern": {"experts.w2": 6}}
    model = adapted(MIXTRAL, case, target_modules=[*MIXTRAL.attention, "w1", "w2", "experts.w3"], **patterns)
    plain = adapted(MIXTRAL, case, rank_pattern={"gate_proj": 4}, alpha_pattern={"down_proj": 6})
    assert torch.equal(logits_of(model, IDS), logits_of(plain, IDS))
    assert model._kt_wrappers[0].gate_proj.r == {"default": 4}
    assert model._kt_wrappers[0].down_proj.lora_alpha == {"default": 6}


def test_the_router_by_its_name(case: Case, tmp_path: Path) -> None:
    """gate: a Linear in transformers 4, a parameter now; stock PEFT adapts the parameter."""
    model = adapted(MIXTRAL, case, target_modules=["q_proj", "gate", *EXPERT_PROJECTIONS])
    grads = gradients_of(model, loss_of(model, IDS))
    assert len([name for name, grad in grads.items() if ".mlp.gate.lora_B" in name and grad.any()]) == 2
    assert expert_names(model) == ALL
    again = loaded_again(model, MIXTRAL, case, tmp_path)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "trainable_token_indices": ({"trainable_token_indices": [1, 2, 7]}, "trainable_tokens_delta"),
    "modules_to_save, the router": ({"modules_to_save": ["gate"]}, "mlp.gate.modules_to_save"),
    "modules_to_save, the head": ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save"),
    "embeddings": ({"target_modules": ["embed_tokens", *EXPERT_PROJECTIONS]}, "embed_tokens.lora_embedding_A"),
    "bias": ({"bias": "all"}, ".experts.up_proj.lora_B"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_trains_beside_the_experts(name: str, case: Case, tmp_path: Path) -> None:
    """A step changes it and every expert tensor, and a saved adapter has both."""
    settings, part = BESIDE[name]
    model = adapted(MIXTRAL, case, **settings)
    assert [key for key in trainable(model) if part in key]
    assert expert_names(model) == ALL
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    before = {key: value.detach().clone() for key, value in trainable(model).items()}
    ids = torch.cat([IDS, torch.tensor([[1, 2, 7] * 4])])
    loss_of(model, ids).backward()
    optimizer.step()
    assert [key for key, value in trainable(model).items() if torch.equal(value, before[key])] == []
    again = loaded_again(model, MIXTRAL, case, tmp_path)
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids))
