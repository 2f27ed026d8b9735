"""Whole runs of stock trainers: Trainer, SFTTrainer and DPOTrainer, with and without the callback, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from kt_hf import KTMoECallback, kt_lora_config
from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import gradients_of, logits_of, loss_of, patched_model
from tests.support.tokenizer import text
from tests.support.trainers import STEPS, assert_same_run, model_to_train, result, settings, trainer_for

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def test_loss_falls(case: Case, tmp_path: Path) -> None:
    trainer = trainer_for(model_to_train(case), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    run = result(trainer)
    assert len(run.losses) == STEPS
    assert sum(run.losses[-4:]) < sum(run.losses[:4]) - 4
    assert all(not torch.equal(run.parameters[name], before[name]) for name in before)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_are_one_large_batch(case: Case, tmp_path: Path, accumulation: int) -> None:
    runs = []
    for batch, steps in ((4, 1), (4 // accumulation, accumulation)):
        trainer = trainer_for(
            model_to_train(case),
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        trainer.train()
        runs.append(result(trainer))
    start = dict(model_to_train(case).named_parameters())
    for name, value in runs[0].parameters.items():
        large, small = value - start[name], runs[1].parameters[name] - start[name]
        assert (large - small).norm() < 3 * case.grad * large.norm(), name


def test_resumed_run_is_the_uninterrupted_one(case: Case, tmp_path: Path) -> None:
    whole = trainer_for(model_to_train(case), tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer_for(model_to_train(case), tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(result(resumed), result(whole))
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == list(range(1, 9))


def test_best_model_is_loaded_at_the_end(case: Case, tmp_path: Path) -> None:
    trainer = trainer_for(
        model_to_train(case),
        tmp_path,
        max_steps=4,
        greater_is_better=True,  # so the first, since the loss falls
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        evaluate=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), trainer.state.best_model_checkpoint)
    assert torch.equal(logits_of(trainer.model, MIXTRAL.inputs()), logits_of(again, MIXTRAL.inputs()))


# -- TRL


def train_sft(case: Case, folder: Path, tokenizer: Any, adapt: bool, **overrides: Any) -> Trainer:
    model = patched_model(MIXTRAL, case)
    config = kt_lora_config(model, lora_rank=4, lora_alpha=8)
    data = datasets.Dataset.from_dict({"text": [text(seed, 8 + seed) for seed in range(6)]})
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        get_peft_model(model, config) if adapt else model,
        trl.SFTConfig(**settings(folder, max_steps=6, max_length=32, **overrides)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=None if adapt else config,
        callbacks=[KTMoECallback()],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [{"bf16": False}, {"bf16": True}, {"bf16": False, "packing": True, "packing_strategy": "wrapped"}],
    ids=["fp32", "bf16 autocast", "packing"],
)
def test_sft(case: Case, tmp_path: Path, tokenizer: Any, overrides: dict[str, Any]) -> None:
    trainer = train_sft(case, tmp_path, tokenizer, adapt=False, **overrides)
    run = result(trainer)
    assert run.losses[-1] < run.losses[0] - 0.1
    experts = [name for name in run.parameters if ".experts." in name]
    assert len(experts) == 12
    assert all(run.parameters[name].any() for name in experts)
    trainer.save_model()
    again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    assert torch.equal(logits_of(again, MIXTRAL.inputs()), logits_of(trained, MIXTRAL.inputs()))


def test_sft_of_a_peft_model(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    by_config = result(train_sft(case, tmp_path, tokenizer, adapt=False, bf16=False))
    by_model = result(train_sft(case, tmp_path, tokenizer, adapt=True, bf16=False))
    assert_same_run(by_model, by_config)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dpo(case: Case, tmp_path: Path, tokenizer: Any, checkpointing: bool) -> None:
    """The reference is the adapter switched off: before the first step it is the policy, so no margin at all."""
    model = patched_model(MIXTRAL, case)
    data = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = {name: [text(10 * seed + len(name), 5) for seed in range(6)] for name in data}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings(tmp_path, max_steps=6, bf16=False, gradient_checkpointing=checkpointing)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=kt_lora_config(model, lora_rank=4, lora_alpha=8),
        callbacks=[KTMoECallback()],
    )
    base = logits_of(model, MIXTRAL.inputs())
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(margins) == 6
    assert margins[0] == 0.0
    assert margins[-1] > 0.01
    with trainer.model.disable_adapter():
        assert torch.equal(logits_of(trainer.model.eval(), MIXTRAL.inputs()), base)


def test_trainers_gradients_are_those_of_the_model(case: Case, tmp_path: Path) -> None:
    """What the trainer adds (autocast, accumulation, clipping) changes nothing here."""
    model = model_to_train(case)
    trainer = trainer_for(model, tmp_path, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=12)
    seen: dict[str, torch.Tensor] = {}
    original: Callable[..., Any] = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return loss

    fresh = model_to_train(case)
    ids = torch.stack([row["input_ids"] for row in trainer.train_dataset])
    expected = gradients_of(fresh, loss_of(fresh, ids))
    trainer.training_step = training_step
    trainer.train()
    assert set(seen) == set(expected)
    assert all((seen[n] - expected[n]).norm() < 3 * case.grad * expected[n].norm() for n in expected)
