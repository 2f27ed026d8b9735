"""An ordinary LoraConfig reaches everything, and PEFT's own switches, saving and loading work as for any model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from tests.support.cases import Case
from tests.support.layers import RANK
from tests.support.models import EXPERT_PROJECTIONS, Family
from tests.support.patched import adapted_model, fill_lora, logits_of, patched_model, trainable
from tests.support.reference import LORA_NAMES
from tests.support.sizes import FAMILY_STRUCTURES

pytestmark = FAMILY_STRUCTURES

ROOT = "base_model.model.model.layers"


def expert_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Name without ".default.weight" -> shape, of every expert LoRA tensor."""
    experts, hidden, inner = family.num_experts, family.hidden, family.intermediate
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in family.moe_layers:
        for projection in EXPERT_PROJECTIONS:
            into, out = (inner, hidden) if projection == "down_proj" else (hidden, inner)
            prefix = f"{ROOT}.{layer}.mlp.experts.{projection}"
            shapes[f"{prefix}.lora_A"] = (experts, RANK, into)
            shapes[f"{prefix}.lora_B"] = (experts, out, RANK)
    return shapes


def linear_names(family: Family) -> set[str]:
    """Names without ".default.weight" of the LoRA tensors of attention, shared experts and dense MLPs."""
    modules = [
        f"{ROOT}.{layer}.self_attn.{name}"
        for layer in (*family.moe_layers, *family.dense_layers)
        for name in family.attention
    ]
    modules += [f"{ROOT}.{layer}.mlp.{name}" for layer in family.dense_layers for name in EXPERT_PROJECTIONS]
    if family.shared:
        modules += [
            f"{ROOT}.{layer}.mlp.{family.shared}.{name}" for layer in family.moe_layers for name in EXPERT_PROJECTIONS
        ]
    return {f"{module}.lora_{side}" for module in modules for side in "AB"}


def test_an_ordinary_config_reaches_everything(family: Family, case: Case) -> None:
    parameters = trainable(adapted_model(family, case))
    experts = {f"{name}.default.weight": shape for name, shape in expert_shapes(family).items()}
    linears = {f"{name}.default.weight" for name in linear_names(family)}
    assert set(parameters) == linears | set(experts)  # so the base is frozen, too
    assert {name: tuple(parameters[name].shape) for name in experts} == experts
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


def test_lora_params_are_the_parameters(family: Family, case: Case) -> None:
    model = patched_model(family, case)
    assert all(layer.lora_params == {} for layer in model._kt_wrappers)
    assert not trainable(model)
    model = adapted_model(family, case)
    parameters = dict(model.named_parameters())
    for layer in model._kt_wrappers:
        for name in LORA_NAMES:
            projection, _, side = name.split("_")
            full = f"{ROOT}.{layer.layer_idx}.mlp.experts.{projection}_proj.lora_{side.upper()}.default.weight"
            assert layer.lora_params[name] is parameters[full]


def test_disabled_adapter_is_the_base_to_the_bit(family: Family, case: Case) -> None:
    ids = family.inputs()
    base = logits_of(patched_model(family, case, kt_lora_rank=RANK), ids)
    model = adapted_model(family, case)
    assert torch.equal(logits_of(model, ids), base), "a fresh adapter, of B = 0, changed the output"
    fill_lora(model, seed=5)
    adapted = logits_of(model, ids)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), base)
    assert torch.equal(logits_of(model, ids), adapted)


def test_switching_adapters(family: Family, case: Case) -> None:
    ids = family.inputs()
    model = adapted_model(family, case, seed=6)
    first = logits_of(model, ids)
    model.add_adapter("other", model.peft_config["default"])
    fill_lora(model, seed=7, only=lambda name: ".other." in name)
    model.set_adapter("other")
    second = logits_of(model, ids)
    assert not torch.equal(first, second)
    assert all(".other." in name for name in trainable(model))
    model.set_adapter("default")
    assert torch.equal(logits_of(model, ids), first)


def test_expert_adapters_alone_are_switched_as_well(family: Family, case: Case) -> None:
    """Only experts differ here, so that attention's adapter cannot answer for theirs."""
    ids = family.inputs()
    model = adapted_model(family, case)
    base = logits_of(model, ids)
    fill_lora(model, seed=8, only=lambda name: ".experts." in name)
    assert not torch.equal(logits_of(model, ids), base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), base)


@pytest.fixture
def saved(family: Family, case: Case, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A saved adapter's folder, and the logits of the model that saved it."""
    model = adapted_model(family, case, seed=9)
    model.save_pretrained(tmp_path)
    return tmp_path, logits_of(model, family.inputs())


def test_saved_keys(family: Family, saved: tuple[Path, torch.Tensor]) -> None:
    with safe_open(saved[0] / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    experts = {f"{name}.weight": shape for name, shape in expert_shapes(family).items()}
    assert set(shapes) == set(experts) | {f"{name}.weight" for name in linear_names(family)}
    assert {name: shapes[name] for name in experts} == experts


def test_reloaded_model_is_the_saved_one_to_the_bit(
    family: Family, case: Case, saved: tuple[Path, torch.Tensor]
) -> None:
    folder, expected = saved
    model = PeftModel.from_pretrained(patched_model(family, case), folder)
    assert torch.equal(logits_of(model, family.inputs()), expected)
    assert not trainable(model)  # PEFT loads for inference unless asked otherwise
    again = adapted_model(family, case)
    result = again.load_adapter(folder, "again", is_trainable=True)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    again.set_adapter("again")
    assert torch.equal(logits_of(again, family.inputs()), expected)
    assert len(trainable(again)) == len(expert_shapes(family)) + len(linear_names(family))
