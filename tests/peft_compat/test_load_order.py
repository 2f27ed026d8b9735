"""Patch, pack, adapter, file: any order a user can write works, or is refused before work starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from kt_hf import KTAMXConfigError, apply_kt_moe
from tests.support.cases import TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.models import EXPERT_PROJECTIONS, FAMILIES, Family
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model

IDS = MIXTRAL.inputs()


def adapter_then(*steps: str) -> Callable[[Family, Case, Path], PeftModel]:
    """The steps from a stock model to one with the adapter in `folder`, in this order."""

    def build(family: Family, case: Case, folder: Path) -> PeftModel:
        model = family(case.dtype)
        for step in steps:
            if step == "patch":
                model = apply_kt_moe(model, make_config(case.backend))
            elif step == "patch and pack":
                model = apply_kt_moe(model, make_config(case.backend, kt_lora_rank=8))
            elif step == "new adapter":
                model = get_peft_model(model, lora_config(family))
            elif step == "attention adapter":
                model = get_peft_model(model, lora_config(family, target_modules=list(family.attention)))
            elif step == "load":
                model = PeftModel.from_pretrained(model, folder)
            else:
                model.load_adapter(folder, "loaded")
                model.set_adapter("loaded")
        return model

    return build


ORDERS = [
    ("patch", "load"),
    ("patch and pack", "load"),
    ("patch", "new adapter", "load another"),
    ("attention adapter", "patch", "load another"),
    ("patch", "load", "patch"),
]


@pytest.mark.parametrize("steps", ORDERS, ids=" - ".join)
def test_any_order_that_works_gives_the_same(case: Case, steps: tuple[str, ...], tmp_path: Path) -> None:
    saver = adapted_model(MIXTRAL, case, seed=1)
    saver.save_pretrained(tmp_path)
    model = adapter_then(*steps)(MIXTRAL, case, tmp_path)
    assert torch.equal(logits_of(model, IDS), logits_of(saver, IDS))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_adapter_loaded_before_the_patch_is_kept_or_refused(name: str, tmp_path: Path) -> None:
    """PEFT finds no place for the experts' tensors and drops them: that must not pass for a loaded adapter."""
    family = FAMILIES[name]
    saver = adapted_model(family, TORCH_FP32, seed=1)
    saver.save_pretrained(tmp_path)
    try:
        model = adapter_then("load", "patch")(family, TORCH_FP32, tmp_path)
    except KTAMXConfigError:
        return
    assert torch.equal(logits_of(model, family.inputs()), logits_of(saver, family.inputs()))


def test_a_loaded_adapter_of_experts_alone_has_effect(case: Case, tmp_path: Path) -> None:
    """An adapter on the experts alone: without effect until it is trained, with effect once loaded."""
    base = logits_of(patched_model(MIXTRAL, case, kt_lora_rank=8), IDS)
    config = lora_config(MIXTRAL, target_modules=list(EXPERT_PROJECTIONS))
    model = get_peft_model(patched_model(MIXTRAL, case), config)
    assert torch.equal(logits_of(model, IDS), base)
    fill_lora(model, seed=1)
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path)
    loaded = logits_of(PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path), IDS)
    assert torch.equal(loaded, expected)
    assert (loaded - base).abs().mean() > 0.05 * base.abs().mean()
