"""Stock trainers on experts of four bits: as on the widened weights in bf16, to the bit; resumed as uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import get_peft_model

from kt_hf import KTMoECallback, apply_kt_moe
from tests.support.cases import make_config
from tests.support.helpers import MIXTRAL
from tests.support.models import expert_modules
from tests.support.patched import fill_lora, lora_config
from tests.support.trainers import Run, assert_same_run, result, trainer_for
from tests.support.trl_runs import arguments, logged, preferences

pytestmark = pytest.mark.usefixtures("cpu_for_gpu")
PLACES: list[Any] = [{"streamed": 8}, {"resident_layers": 1}]
SLOW_TOO = [PLACES[0], pytest.param(PLACES[1], marks=pytest.mark.slow)]


def int4(place: Any) -> Any:
    config = make_config("torch", kt_expert_placement=place, kt_expert_dtype="int4")
    return apply_kt_moe(MIXTRAL(torch.bfloat16), config)


def widened(place: Any) -> Any:
    from kt_hf.backends.quantizer import quantized

    model = MIXTRAL(torch.bfloat16)
    for experts in expert_modules(model).values():
        for parameter in (experts.gate_up_proj, experts.down_proj):
            parameter.data = quantized(parameter.data, "int4").dequantized(torch.bfloat16)
    return apply_kt_moe(model, make_config("torch", kt_expert_placement=place))


def adapted(model: Any) -> Any:
    model = get_peft_model(model, lora_config(MIXTRAL))
    fill_lora(model, 1)
    return model


@pytest.mark.parametrize("place", SLOW_TOO, ids=str)
def test_checkpointed_and_resumed(place: Any, tmp_path: Path) -> None:
    """The Trainer with gradient checkpointing; stopped half-way, another process's model goes on."""
    more = {"max_steps": 4, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2}

    def run(name: str, model: Any, resume: Path | None = None) -> Run:
        trainer = trainer_for(adapted(model), tmp_path / name, **more)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return result(trainer)

    whole = run("int4", int4(place))
    assert_same_run(run("wide", widened(place)), whole)
    resumed = run("resumed", int4(place), tmp_path / "int4" / "checkpoint-2")
    assert all(torch.equal(value, whole.parameters[name]) for name, value in resumed.parameters.items())


@pytest.mark.slow
def test_dpo(tmp_path: Path, tokenizer: Any) -> None:
    """The reference is the same base without the adapter."""
    found = []
    for name, model in (("int4", int4(PLACES[0])), ("wide", widened(PLACES[0]))):
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(**arguments(tmp_path / name, max_steps=3)),
            train_dataset=preferences(),
            processing_class=tokenizer,
            peft_config=lora_config(MIXTRAL),
            callbacks=[KTMoECallback()],
        )
        fill_lora(trainer.model, 2, std=0.02)
        trainer.train()
        found.append((logged(trainer), logged(trainer, "rewards/margins")))
    assert found[0] == found[1]
