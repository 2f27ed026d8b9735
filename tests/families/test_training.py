"""Families whose experts stock PEFT holds otherwise: twenty steps of SFT beside it, from the same LoRA."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from kt_hf.adapters import convert
from tests.families.test_families import adapted
from tests.support.families import VOCAB, tiny
from tests.support.tiny import tokenizer
from tests.support.trainers import settings
from tests.support.trl_runs import callbacks, distance, logged, sft

STEPS = 20
FAMILIES = ("gpt_oss", "nemotron_h", "gemma4", "deepseek_v4", "llama4", "minimax_m3_vl", "aria")
NO_HIDDEN_STATES = "llama4"  # which SFTTrainer takes its loss from: transformers' Trainer instead
NO_ROUTER_LOSS = "deepseek_v4"  # TRL asks its configuration for num_experts


def rows() -> datasets.Dataset:
    """Numbers that count up from one place to another, which can be learned."""
    rng = torch.Generator().manual_seed(3)
    starts = torch.randint(3, VOCAB - 16, (16,), generator=rng).tolist()
    return datasets.Dataset.from_dict({"input_ids": [list(range(start, start + 12)) for start in starts]})


def with_our_freedom(stock: PeftModel) -> PeftModel:
    """Keep at zero what the export has left zero: gate's rows where up's ranks are, which kt_hf has no weights for."""
    for name, parameter in stock.named_parameters():
        if ".experts." in name and parameter.requires_grad:
            parameter.register_hook(parameter.detach().ne(0).to(parameter.dtype).mul)
    return stock


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_beside_stock_peft(family: str, tmp_path: Path) -> None:
    model = adapted(family, std=0.02)
    model.save_pretrained(tmp_path / "kt")
    base = tmp_path / "base"
    tiny(family).save_pretrained(base)
    exported = convert(tmp_path / "kt", tmp_path / "peft", to="peft", base=base)
    stock = with_our_freedom(PeftModel.from_pretrained(tiny(family), exported, is_trainable=True))
    losses = [_losses(family, one, tmp_path / str(i)) for i, one in enumerate((model, stock))]
    assert len(losses[0]) == STEPS
    assert losses[0][-1] < losses[0][0] - 0.1
    assert distance(*losses) < 0.02


def _losses(family: str, model: nn.Module, folder: Path) -> list[float]:
    arguments = {"max_steps": STEPS, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    if family == NO_HIDDEN_STATES:
        data = [{"input_ids": ids, "labels": ids} for ids in rows()["input_ids"]]
        trainer = Trainer(
            model, TrainingArguments(**settings(folder, **arguments)), train_dataset=data, callbacks=callbacks(model)
        )
        trainer.train()
        return logged(trainer)
    if family == NO_ROUTER_LOSS:
        arguments["router_aux_loss_coef"] = 0.0
    return logged(sft(model, folder, tokenizer(None), rows(), **arguments))
