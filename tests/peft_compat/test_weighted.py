"""add_weighted_adapter: on experts as on attention, in the ways that are exact or PEFT's own; the rest is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from kt_hf import KTAMXConfigError
from kt_hf.experts.projections import ExpertProjection
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, fill_lora, logits_of, lora_config, patched_model
from tests.support.reference import assert_close

IDS = MIXTRAL.inputs()
WEIGHTS = [0.7, -0.4]


def two_adapters(case: Case, rank: int = 8, **other: Any) -> PeftModel:
    """Two of other scalings and, in up_proj, other ranks."""
    model = adapted_model(MIXTRAL, case, seed=1, kt_lora_rank=16)
    settings = {"r": rank, "lora_alpha": 4, "rank_pattern": {"up_proj": 3}, **other}
    model.add_adapter("other", lora_config(MIXTRAL, **settings))
    fill_lora(model, seed=2, only=lambda name: ".other." in name)
    return model


def deltas(projection: ExpertProjection, names: list[str]) -> list[Tensor]:
    """Scaling · B·A of each adapter, [E, out, in]."""
    found = []
    for name in names:
        a, b = projection.tensors(name)
        found.append(projection.scaling[name] * b.detach() @ a.detach())
    return found


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_combinations(kind: str, case: Case, tmp_path: Path) -> None:
    """Each expert's own product is the weighted sum, and the model's logits those of both adapters weighted."""
    model = two_adapters(case)
    active = model.active_adapters
    rank = {"svd_rank": 16} if kind == "svd" else {}
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=kind, **rank)
    assert model.active_adapters == active
    for layer in model._kt_wrappers:
        for projection in layer.projections:
            first, second, total = deltas(projection, ["default", "other", "sum"])
            assert_close(total, WEIGHTS[0] * first + WEIGHTS[1] * second, 1e-5, "the sum")
            assert not any(parameter.requires_grad for parameter in projection.tensors("sum"))
    model.set_adapter("sum")
    actual = logits_of(model, IDS)
    for module in model.modules():
        for name, weight in zip(("default", "other"), WEIGHTS, strict=True):
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    model.base_model.set_adapter(["default", "other"])
    limit = 1e-4 if case.dtype is torch.float32 else 0.06
    assert_close(actual, logits_of(model, IDS), limit, "logits")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path / "sum")
    saved = dict(model.named_parameters())
    for key, value in again.named_parameters():
        if ".experts." in key:
            assert torch.equal(value, saved[key.replace(".default.", ".sum.")])
    if case.dtype is torch.float32:  # PEFT keeps attention's sum in the model's dtype, and loads it in fp32
        assert torch.equal(logits_of(again, IDS), actual)


def test_svd_keeps_the_most_of_its_rank() -> None:
    model = two_adapters(TORCH_FP32)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", svd_rank=5)
    projection = model._kt_wrappers[1].down_proj
    first, second, total = deltas(projection, ["default", "other", "sum"])
    whole = WEIGHTS[0] * first + WEIGHTS[1] * second
    best = torch.linalg.svdvals(whole)[:, 5:].square().sum(1).sqrt()
    torch.testing.assert_close((total - whole).flatten(1).norm(dim=1), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adapters", [["default", "other"], ["other"]])
def test_linear_is_pefts_own_rule(adapters: list[str]) -> None:
    model = two_adapters(TORCH_FP32, rank_pattern={})
    model.add_weighted_adapter(adapters, WEIGHTS[: len(adapters)], "sum", combination_type="linear")
    for projection in model._kt_wrappers[0].projections:
        a, b = projection.tensors("sum")
        factors = [w * projection.scaling[name] for name, w in zip(adapters, WEIGHTS, strict=False)]
        pairs = [projection.tensors(name) for name in adapters]
        expected_a = sum(p[0] * math.copysign(abs(f) ** 0.5, f) for p, f in zip(pairs, factors, strict=True))
        expected_b = sum(p[1] * abs(f) ** 0.5 for p, f in zip(pairs, factors, strict=True))
        assert_close(a.detach(), expected_a.detach(), 1e-6, "A")
        assert_close(b.detach(), expected_b.detach(), 1e-6, "B")


def test_adapters_of_other_projections() -> None:
    """One has gate_proj alone, the other has it not: the sum has both."""
    model = two_adapters(TORCH_FP32, target_modules=["q_proj", "down_proj"])
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    layer = model._kt_wrappers[0]
    first, total = deltas(layer.gate_proj, ["default", "sum"])
    assert_close(total, WEIGHTS[0] * first, 1e-5, "gate_proj")
    first, second, total = deltas(layer.down_proj, ["default", "other", "sum"])
    assert_close(total, WEIGHTS[0] * first + WEIGHTS[1] * second, 1e-5, "down_proj")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"combination_type": "ties", "density": 0.5}, "combination_type='ties'.*use cat, svd, linear"),
        ({"combination_type": "dare_linear_svd", "density": 0.5}, "combination_type='dare_linear_svd'"),
        ({"combination_type": "magnitude_prune", "density": 0.5}, "combination_type='magnitude_prune'"),
        ({"svd_clamp": 0.9}, r"svd_clamp=0\.9"),
    ],
    ids=lambda value: value.get("combination_type", "svd_clamp") if isinstance(value, dict) else "",
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    model = two_adapters(TORCH_FP32)
    modules = dict(model.named_modules())
    with pytest.raises(KTAMXConfigError, match=words):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", **settings)
    assert dict(model.named_modules()) == modules
    assert set(model.peft_config) == {"default", "other"}


def test_rslora_is_refused() -> None:
    model = two_adapters(TORCH_FP32, use_rslora=True)
    with pytest.raises(KTAMXConfigError, match=r"use_rslora=True.*set_adapter"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")


@pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS, id="kernel")])
def test_a_sum_of_too_large_a_rank_is_refused(mark: None) -> None:
    model = two_adapters(KERNEL_BF16, rank=16)
    with pytest.raises(KTAMXConfigError, match=r"rank 24 is larger than the 16.*kt_lora_rank=24"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    assert all("sum" not in p.lora_A for layer in model._kt_wrappers for p in layer.projections)


def test_adapters_of_attention_alone_are_pefts_business() -> None:
    model = adapted_model(MIXTRAL, TORCH_FP32, seed=1)
    for name in ("one", "two"):
        model.add_adapter(name, lora_config(MIXTRAL, target_modules=["q_proj"]))
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="ties", density=0.5)
    assert all("sum" not in p.lora_A for layer in model._kt_wrappers for p in layer.projections)
