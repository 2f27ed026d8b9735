"""After a few steps a planned placement is told what its parts took; once, and only where one was planned."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from pathlib import Path

import pytest
from peft import get_peft_model

from kt_hf import KTMoECallback, apply_kt_moe
from kt_hf.placement import choice
from kt_hf.placement.planner import TierPlan
from tests.support.cases import TORCH_BF16, make_config
from tests.support.helpers import MIXTRAL
from tests.support.patched import lora_config
from tests.support.trainers import trainer_for

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")

TOLD = re.compile(
    r"kt_expert_placement=auto, after 5 steps: a forward and backward takes (\S+) s: streaming 0 s \(0.1 planned\), "
    r"the CPU's experts (\S+) s \(0.2 planned\)\."
)


def told(tmp_path: Path, caplog: pytest.LogCaptureFixture, placement: object, **arguments: int) -> list[str]:
    caplog.set_level(logging.INFO, "kt_hf")
    config = make_config("torch", kt_expert_placement=placement, kt_lora_rank=8)
    model = get_peft_model(apply_kt_moe(MIXTRAL(TORCH_BF16.dtype), config), lora_config(MIXTRAL))
    trainer_for(model, tmp_path, max_steps=7, **arguments).train()
    return [message for message in caplog.messages if "a forward and backward takes" in message]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "plan_tiers", lambda *_: TierPlan(2, 3, 3, 1.0, 0.1, 0.2, 0.3))
    monkeypatch.setattr(choice, "measure_rates", lambda *_: None)
    for name in ("cpu_may_be_faster", "is_worth_its_cpu"):
        monkeypatch.setattr(choice, name, lambda *_: True)


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("forwards", [1, 2])
def test_what_a_plan_took(forwards: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = told(tmp_path, caplog, "auto", gradient_accumulation_steps=forwards)
    found = TOLD.search(message)
    assert found, message
    step, cpu = map(float, found.groups())
    assert 0 < cpu < step < 5


@pytest.mark.usefixtures("planned")
def test_nothing_was_planned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(tmp_path, caplog, {"resident": 2, "streamed": 3}) == []


@pytest.mark.usefixtures("planned")
def test_the_callback_keeps_no_expert_alive(tmp_path: Path) -> None:
    """Also of a run that ended before its steps were timed."""
    config = make_config("torch", kt_expert_placement="auto", kt_lora_rank=8)
    model = get_peft_model(apply_kt_moe(MIXTRAL(TORCH_BF16.dtype), config), lora_config(MIXTRAL))
    trainer = trainer_for(model, tmp_path, max_steps=3)
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, KTMoECallback))
    trainer.train()
    layers = [weakref.ref(layer) for layer in model._kt_wrappers]
    del trainer, model
    gc.collect()
    assert callback.expert_load.total
    assert [layer() for layer in layers] == [None, None]


def test_everything_stays_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "plan_tiers", lambda *_: TierPlan(0, 0, 8, 1.0, 0.0, 0.2, 0.0))
    monkeypatch.setattr(choice, "measure_rates", lambda *_: None)
    for name in ("cpu_may_be_faster", "is_worth_its_cpu"):
        monkeypatch.setattr(choice, name, lambda *_: True)
    assert told(tmp_path, caplog, "auto") == []
