"""The warning that experts' LoRA begins late: by operators, at a small learning rate, and nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, KERNEL_MISSING, TORCH_BF16, Case
from tests.support.trainers import model_to_train, trainer_for


def warnings_of(trainer: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kt_hf"):
        trainer.train()
    return [record.getMessage() for record in caplog.records if "learning_rate=" in record.getMessage()]


def projections_of(trainer: Any) -> list[Any]:
    return [projection for layer in trainer.model._kt_wrappers for projection in layer.projections]


@torch.no_grad()
def fill_b(trainer: Any, value: float) -> None:
    for projection in projections_of(trainer):
        projection.tensors("default")[1].fill_(value)


@pytest.mark.parametrize(
    ("case", "rate", "late"),
    [
        pytest.param(KERNEL_BF16, 3e-6, True, marks=KERNEL_MARKS),
        pytest.param(KERNEL_BF16, 1e-4, False, marks=KERNEL_MARKS),
        (TORCH_BF16, 3e-6, False),
    ],
)
def test_a_small_rate_is_told_once(
    case: Case, rate: float, late: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(model_to_train(case), tmp_path, max_steps=1, learning_rate=rate)
    fill_b(trainer, 0)
    told = warnings_of(trainer, caplog)
    assert len(told) == late
    if late:  # 4e-4 by steps of the rate, B times its scaling
        scaling = projections_of(trainer)[0].scaling["default"]
        assert f"learning_rate={rate:g}: " in told[0]
        assert f"first {4e-4 / (rate * scaling):.0f} steps" in told[0]
        fill_b(trainer, 0)
        assert not warnings_of(trainer, caplog)


@pytest.mark.kernel
@pytest.mark.parametrize("why", ["B has grown", "B has a rate of its own", "the slower of two adapters"])
def test_what_counts_is_b_and_its_rate(why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if KERNEL_MISSING:
        pytest.skip(KERNEL_MISSING)
    rate = 1e-4 if why.startswith("the") else 3e-6
    trainer = trainer_for(model_to_train(KERNEL_BF16), tmp_path, max_steps=1, learning_rate=rate)
    fill_b(trainer, 0.05 if why == "B has grown" else 0)
    if why == "B has a rate of its own":
        slow, fast = [], []
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                (fast if "lora_B" in name else slow).append(parameter)
        groups = [{"params": slow, "lr": rate}, {"params": fast, "lr": 100 * rate}]
        trainer.optimizer = torch.optim.AdamW(groups)
    elif why == "the slower of two adapters":
        projections_of(trainer)[0].scaling["default"] = 0.01
    told = warnings_of(trainer, caplog)
    assert len(told) == (why == "the slower of two adapters")
    assert all("first 400 steps" in words for words in told)
