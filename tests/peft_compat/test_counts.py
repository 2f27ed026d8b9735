"""What a Trainer counts of a patched model in each micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model


def operations_of(model: Any, tokens: int) -> int:
    return 6 * tokens * model.num_parameters(exclude_embeddings=True)


def test_operations_are_those_of_a_stock_trainer(tmp_path: Path) -> None:
    """Of batches of unlike sizes, of a list as GRPO's collator leaves it, and of another model."""
    model = adapted_model(MIXTRAL, TORCH_FP32)
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[]))
    assert trainer.floating_point_ops([{"prompt": "one"}]) == 0  # type: ignore[arg-type]
    assert trainer.floating_point_ops({"chosen_input_ids": torch.ones(1, 3)}) == 0
    for tokens in (5, 0, 9):
        assert trainer.floating_point_ops({"input_ids": torch.ones(1, tokens)}) == operations_of(model, tokens)
    other = adapted_model(MIXTRAL, TORCH_FP32, lora={"r": 16})
    assert operations_of(other, 5) != operations_of(model, 5)
    trainer.model = other
    assert trainer.floating_point_ops({"input_ids": torch.ones(1, 5)}) == operations_of(other, 5)
