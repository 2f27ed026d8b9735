"""Stock trainers on a tiny patched Mixtral, and what a run leaves: losses and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from kt_hf import KTMoECallback
from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model

STEPS = 20


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Arguments of a short run on the CPU that reports to nobody."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        **overrides,
    }


def rows(count: int = 12, length: int = 10) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in MIXTRAL.inputs(count, length, seed=3)]


class Run(NamedTuple):
    """Losses as logged, and copies of the trained parameters."""

    losses: list[float]
    parameters: dict[str, Tensor]


def result(trainer: Trainer) -> Run:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})


def trainer_for(
    model: nn.Module,
    folder: Path,
    callback: bool = True,
    evaluate: bool = False,
    optimizers: tuple[Any, Any] = (None, None),
    **overrides: Any,
) -> Trainer:
    """A stock Trainer of 20 steps, unless overridden."""
    return Trainer(
        model,
        TrainingArguments(**settings(folder, **overrides)),
        train_dataset=rows(),
        eval_dataset=rows() if evaluate else None,
        callbacks=[KTMoECallback()] if callback else [],
        optimizers=optimizers,
    )


def model_to_train(case: Case, **config: Any) -> PeftModel:
    """The same initial LoRA each time; B not zero, so that every tensor has a gradient from the start."""
    return adapted_model(MIXTRAL, case, seed=1, **config)


def assert_same_run(actual: Run, expected: Run) -> None:
    """To the bit."""
    assert actual.losses == expected.losses
    assert set(actual.parameters) == set(expected.parameters)
    unlike = [name for name, value in expected.parameters.items() if not torch.equal(actual.parameters[name], value)]
    assert not unlike
