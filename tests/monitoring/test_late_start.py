"""The warning that experts' LoRA begins late: by operators, at a small learning rate, and nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.support.trainers import model_to_train, trainer_for


@pytest.mark.parametrize(
    ("case", "rate", "said"),
    [
        pytest.param(KERNEL_BF16, 3e-6, "for the first ", marks=KERNEL_MARKS),
        pytest.param(KERNEL_BF16, 1e-4, "", marks=KERNEL_MARKS),
        (TORCH_BF16, 3e-6, ""),
    ],
)
def test_a_small_rate_is_told(
    case: Case, rate: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(model_to_train(case), tmp_path, max_steps=1, learning_rate=rate)
    with caplog.at_level(logging.WARNING, "kt_hf"):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "learning_rate=" in record.getMessage()]
    assert len(told) == bool(said)
    assert all(said in words and f"{rate:g}" in words for words in told)
    if told:  # 4e-4 by steps of the rate, B times its scaling
        scaling = next(iter(trainer.model.base_model.model._kt_wrappers)).projections[0].scaling["default"]
        assert f"first {4e-4 / (rate * scaling):.0f} steps" in told[0]
