"""PEFT's and transformers' other verbs on a patched model, each against the same model made another way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn

from kt_hf import KTAMXError
from tests.support.cases import TORCH_FP32, Case, transformers_adapters
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model, trainable

IDS = MIXTRAL.inputs()


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in trainable(model).items()}


# -- transformers' own


@transformers_adapters
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["names", "all-linear"])
def test_transformers_add_save_load(name: str, targets: str | None, tmp_path: Path) -> None:
    """What add_adapter and save_pretrained leave is what PeftModel and load_adapter take."""
    family = FAMILIES[name]
    config = lora_config(family, **({"target_modules": targets} if targets else {}))
    model = patched_model(family, TORCH_FP32)
    model.add_adapter(config)
    assert len([key for key in trainable(model) if ".experts." in key]) == 6 * len(family.moe_layers)
    fill_lora(model, seed=1)
    expected = logits_of(model, family.inputs())
    model.save_pretrained(tmp_path)
    again = patched_model(family, TORCH_FP32)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(again, family.inputs()), expected)
    peft = PeftModel.from_pretrained(patched_model(family, TORCH_FP32), tmp_path)
    assert torch.equal(logits_of(peft, family.inputs()), expected)


@transformers_adapters
def test_transformers_verbs(case: Case, tmp_path: Path) -> None:
    model = patched_model(MIXTRAL, case, kt_lora_rank=8)
    base = logits_of(model, IDS)
    outputs = {}
    for index, name in enumerate(("one", "two")):
        model.add_adapter(lora_config(MIXTRAL, r=8 - 4 * index), adapter_name=name)
        fill_lora(model, seed=index + 1, only=lambda key, name=name: f".{name}." in key)
        model.set_adapter(name)
        outputs[name] = logits_of(model, IDS)
        assert all(f".{name}." in key for key in trainable(model))
    assert not torch.equal(outputs["one"], outputs["two"])
    model.set_adapter("one")
    assert model.active_adapters() == ["one"]
    assert torch.equal(logits_of(model, IDS), outputs["one"])
    model.disable_adapters()
    assert torch.equal(logits_of(model, IDS), base)
    model.enable_adapters()
    assert torch.equal(logits_of(model, IDS), outputs["one"])
    state = model.get_adapter_state_dict("two")
    assert len([key for key in state if ".experts." in key]) == 12
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits_of(model, IDS), outputs["two"])
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="three")
    model.set_adapter("three")
    assert torch.equal(logits_of(model, IDS), outputs["two"])
    model.delete_adapter(["two", "three"])
    assert torch.equal(logits_of(model, IDS), base)
    with pytest.raises(KTAMXError, match="cannot be saved"):  # bare again
        model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare").exists()


# -- PEFT's


def test_unmerging_what_was_never_merged(case: Case) -> None:
    """Loops that merge for a generation unmerge in a `finally`: it must not hide the refusal of the merge."""
    model = adapted_model(MIXTRAL, case, seed=1)
    expected = logits_of(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Already unmerged
        model.unmerge_adapter()
    assert torch.equal(logits_of(model, IDS), expected)


def test_rescaling(case: Case) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    expected = logits_of(model, IDS)
    with model.disable_adapter():
        base = logits_of(model, IDS)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits_of(model, IDS), base)
    assert torch.equal(logits_of(model, IDS), expected)


def test_status(case: Case) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    model.add_adapter("other", lora_config(MIXTRAL, target_modules=["down_proj"]))
    layers = {status.name: status for status in model.get_layer_status()}
    down = layers["model.model.layers.1.mlp.experts.down_proj"]
    assert down.enabled
    assert down.active_adapters == ["default"]
    assert down.requires_grad == {"default": True, "other": False}
    assert down.merged_adapters == []
    status = model.get_model_status()
    assert status.num_adapter_layers == 2 * (4 + 3)
    assert status.trainable_params == sum(parameter.numel() for parameter in trainable(model).values())


def test_gradients_switched_by_adapter(case: Case) -> None:
    model = adapted_model(MIXTRAL, case, seed=1)
    expected = grads(model)
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    assert not model(input_ids=IDS, labels=IDS).loss.requires_grad
    model.set_requires_grad("default")
    assert [name for name, grad in grads(model).items() if not torch.equal(grad, expected[name])] == []


def test_mixed_model_with_lora_alone(case: Case) -> None:
    """get_peft_model(mixed=True) comes by another way into PEFT: packed, computed and trained the same."""
    model = get_peft_model(patched_model(MIXTRAL, case), lora_config(MIXTRAL), mixed=True)
    fill_lora(model, seed=1)
    assert all(layer.packed for layer in model._kt_wrappers)
    plain = get_peft_model(patched_model(MIXTRAL, case), lora_config(MIXTRAL), autocast_adapter_dtype=False)
    fill_lora(plain, seed=1)
    assert torch.equal(logits_of(model, IDS), logits_of(plain, IDS))


SCALES: dict[str, Any] = {"rslora": {"use_rslora": True}, "patterns": {"rank_pattern": {"up_proj": 2}}}


@pytest.mark.parametrize("name", SCALES)
def test_scaling_survives_saving(case: Case, name: str, tmp_path: Path) -> None:
    """A loaded adapter has the scaling and the ranks it was trained with, by its config."""
    model = get_peft_model(patched_model(MIXTRAL, case), lora_config(MIXTRAL, **SCALES[name]))
    fill_lora(model, seed=1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    for one, other in zip(model._kt_wrappers, again._kt_wrappers, strict=True):
        assert [p.scaling for p in one.projections] == [p.scaling for p in other.projections]
