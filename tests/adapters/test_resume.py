"""A resumed run equals the uninterrupted one to the bit: losses, LoRA, optimizer and scheduler (one worker thread)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kt_hf import KTMoECallback, verify_adapter
from kt_hf.adapters import check_checkpoint
from tests.support.cases import Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import fill_lora, lora_config, patched_model
from tests.support.tokenizer import text
from tests.support.trainers import model_to_train, settings

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
STEPS, STOP = 6, 3
KINDS = ("sft", "dpo", "dpo with a reference adapter")


def trainer_of(kind: str, case: Case, folder: Path, tokenizer: Any) -> Any:
    model = model_to_train(case)
    run = settings(folder, max_steps=STEPS, save_strategy="steps", save_steps=STOP, learning_rate=1e-3, bf16=False,
                   gradient_checkpointing=False, lr_scheduler_type="linear")  # fmt: skip
    both = {"processing_class": tokenizer, "callbacks": [KTMoECallback()]}
    if kind == "sft":
        data = datasets.Dataset.from_dict({"text": [text(seed, 12 + seed % 5) for seed in range(10)]})
        return trl.SFTTrainer(model, trl.SFTConfig(**run, max_length=32), train_dataset=data, **both)
    rows = {
        "prompt": [text(seed, 5) for seed in range(10)],
        "chosen": [text(seed + 20, 6) for seed in range(10)],
        "rejected": [text(seed + 40, 7) for seed in range(10)],
    }
    data = datasets.Dataset.from_dict(rows)
    if kind == "dpo":  # the adapter switched off is the reference
        model, both["peft_config"] = patched_model(MIXTRAL, case), lora_config(MIXTRAL)
    trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**run), train_dataset=data, **both)
    assert ("ref" in trainer.model.peft_config) == (kind != "dpo")
    fill_lora(trainer.model, seed=1)
    return trainer


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def assert_same_state(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.mark.parametrize(("kind", "how"), [*((kind, "path") for kind in KINDS), ("sft", "True")])
def test_resumed_is_uninterrupted(kind: str, how: str, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = trainer_of(kind, case, whole, tokenizer)
    first.train()
    shutil.copytree(whole / f"checkpoint-{STOP}", parts / f"checkpoint-{STOP}")
    second = trainer_of(kind, case, parts, tokenizer)
    second.train(resume_from_checkpoint=True if how == "True" else str(parts / f"checkpoint-{STOP}"))

    assert losses(second) == losses(first)
    assert len(losses(first)) == STEPS
    before, after = whole / f"checkpoint-{STOP}", whole / f"checkpoint-{STEPS}"
    again = parts / f"checkpoint-{STEPS}"
    files = sorted(path.relative_to(after) for path in after.rglob("adapter_model.safetensors"))
    assert files
    for file in files:
        there, wanted = load_file(again / file), load_file(after / file)
        assert_same_state(there, wanted)
    moved = load_file(before / files[0])
    assert not torch.equal(*(next(iter(x.values())) for x in (moved, load_file(after / files[0]))))
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_same_state(
            torch.load(again / name, weights_only=True), torch.load(after / name, weights_only=True), name
        )
    for folder in (before, after, again):
        assert verify_adapter(folder)
        check_checkpoint(folder)
