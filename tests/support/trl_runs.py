"""TRL's trainers on a model and tiny data of numbered words, and what they logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import PeftModel
from torch import nn
from transformers import Trainer

from kt_hf import KTMoECallback
from kt_hf.experts import kt_layers
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_FP32, Case
from tests.support.models import VOCAB
from tests.support.tokenizer import text
from tests.support.trainers import settings

ROWS, STEPS = 16, 10
# Some 400 tokens a step. In bf16 some tokens' experts are others than in fp32, with stock PEFT as well; with fewer
# tokens a step that is seen in the mean: 0.06 to 0.3 for 20 tokens, 0.02 at most for 400.
WORDS = 24
FP32_AND_KERNEL = [
    pytest.param(TORCH_FP32, id=str(TORCH_FP32)),
    pytest.param(KERNEL_BF16, id=str(KERNEL_BF16), marks=KERNEL_MARKS),
]


def limit(case: Case) -> float:
    """How far a step's loss may be from stock's in fp32."""
    return 1e-4 if case is TORCH_FP32 else 0.02


def std(case: Case) -> float:
    """B at the start, see `stock.pair`."""
    return 0.0 if case is TORCH_FP32 else 0.02


def texts() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [text(seed, WORDS + seed % 5) for seed in range(ROWS)]})


def callbacks(model: nn.Module) -> list[Any]:
    return [KTMoECallback()] if kt_layers(model) else []


def arguments(folder: Path, **overrides: Any) -> dict[str, Any]:
    return settings(
        folder,
        **{
            "max_steps": STEPS,
            "learning_rate": 2e-3,
            "per_device_train_batch_size": ROWS,
            "bf16": False,
            "gradient_checkpointing": False,
            **overrides,
        },
    )


def sft(model: PeftModel, folder: Path, tokenizer: Any, data: Any = None, evaluation: Any = None, **over: Any) -> Any:
    """A finished SFTTrainer."""
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments(folder, **{"max_length": 64, **over})),
        train_dataset=texts() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=callbacks(model),
    )
    trainer.train()
    return trainer


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def distance(a: list[float], b: list[float]) -> float:
    """The largest difference of a step's values."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def preferences() -> datasets.Dataset:
    """Prompts, with chosen answers of words below 64 and rejected ones of words above."""
    rng = torch.Generator().manual_seed(0)

    def words(low: int, high: int, count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(low, high, (count,), generator=rng).tolist())

    rows = range(ROWS)
    return datasets.Dataset.from_dict(
        {
            "prompt": [words(3, VOCAB, 4 + i % 3) for i in rows],
            "chosen": [words(3, 64, 8 + i % 4) for i in rows],
            "rejected": [words(64, VOCAB, 9 + i % 2) for i in rows],
        }
    )
