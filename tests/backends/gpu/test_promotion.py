"""Layers that move on a real GPU: the same bits, memory given back, and nothing waits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.placement import packer_of
from tests.support.helpers import MIXTRAL
from tests.support.patched import fill_lora, lora_config
from tests.support.tiered import E

LAYER = 3 * E * MIXTRAL.hidden * MIXTRAL.intermediate * 2  # bytes of a layer's experts


def trained(steps: int = 6, **config: Any) -> tuple[list[Tensor], Any]:
    model = get_peft_model(apply_kt_moe(MIXTRAL(torch.bfloat16), KTConfig(**config)), lora_config(MIXTRAL)).cuda()
    fill_lora(model, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for i in range(steps):
        ids = MIXTRAL.inputs(2, 12, seed=i).cuda()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return losses, model


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_nothing_set_moves_layers_and_results_stay_to_the_bit(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kt_hf.placement.choice.cpu_may_be_faster", lambda *_: False)  # tiny models are
    with caplog.at_level(logging.INFO, "kt_hf"):
        losses, model = trained(kt_moe_lora_device=where)
    packer = packer_of(model)
    assert packer is not None
    assert packer.promotion is not None
    assert packer.promotion.held == [0, 1]
    assert "2 of 2 layers of experts are on the GPU now" in caplog.text
    before = torch.cuda.memory_allocated()
    packer.promotion.release()
    assert before - torch.cuda.memory_allocated() >= 2 * LAYER
    packer.promotion.hold(2)
    assert torch.cuda.memory_allocated() == before
    for other in ({"streamed": E}, "gpu", {"resident_layers": 1}):
        expected, _ = trained(kt_moe_lora_device=where, kt_expert_placement=other)
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True)), other
