"""DPOTrainer in its three ways to a reference trains a patched model as it trains the unpatched one with stock PEFT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback
from trl.trainer.utils import hash_module

from kt_hf import apply_kt_moe
from kt_hf.experts import kt_layers
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_FP32, Case, make_config
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES, Family
from tests.support.patched import fill_lora, logits_of, patched_model
from tests.support.stock import assert_same_parameters, pair, patched_config, same_start, stock_config
from tests.support.trl_runs import FP32_AND_KERNEL, arguments, callbacks, distance, limit, logged, preferences

MODES = ("disable_adapter", "ref", "precomputed", "precomputed ref")


def dpo(model: nn.Module, config: Any, folder: Path, tokenizer: Any, **overrides: Any) -> trl.DPOTrainer:
    """Not trained yet. Batches in the data's order, so that precomputed values are of the very same batches."""
    settings = {"train_sampling_strategy": "sequential", "learning_rate": 1e-3, **overrides}
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**arguments(folder, **settings)),
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks(model),
    )


def trainers(mode: str, family: Family, case: Case, folder: Path, tokenizer: Any, **more: Any) -> list[trl.DPOTrainer]:
    """Of the patched model and of its twin, from the same start."""
    over = {"precompute_ref_log_probs": mode.startswith("precomputed"), **more}
    if mode.endswith("ref"):  # a PeftModel: TRL copies its adapter
        models = pair(family, case, 0.02)
        return [dpo(model, None, folder / str(i), tokenizer, **over) for i, model in enumerate(models)]
    made = [
        dpo(patched_model(family, case), patched_config(family), folder / "0", tokenizer, **over),
        dpo(family(), stock_config(family), folder / "1", tokenizer, **over),
    ]
    same_start(made[0].model, made[1].model)
    return made


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
@pytest.mark.parametrize("mode", MODES)
def test_curve(mode: str, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    ours, theirs = trainers(mode, MIXTRAL, case, tmp_path, tokenizer)
    assert ("ref" in ours.model.peft_config) == mode.endswith("ref")
    ours.train()
    theirs.train()
    margins, losses = logged(theirs, "rewards/margins"), logged(theirs)
    assert logged(ours, "rewards/margins")[0] == 0.0
    assert margins[-1] > 0.5
    assert losses[0] - losses[-1] > 0.2
    assert distance(logged(ours), losses) <= limit(case)
    assert distance(logged(ours, "rewards/margins"), margins) <= 2.5 * limit(case)
    if case is TORCH_FP32:
        assert_same_parameters(ours.model, theirs.model, 1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_curve_of_each_family(name: str, tmp_path: Path, tokenizer: Any) -> None:
    ours, theirs = trainers("ref", FAMILIES[name], TORCH_FP32, tmp_path, tokenizer, max_steps=5)
    ours.train()
    theirs.train()
    assert logged(ours, "rewards/margins")[0] == 0.0
    assert logged(theirs, "rewards/margins")[-1] > 0.05
    assert distance(logged(ours), logged(theirs)) <= limit(TORCH_FP32)
    assert_same_parameters(ours.model, theirs.model, 1e-3)


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm"])
def test_other_losses(loss: str, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    ours, theirs = trainers("ref", MIXTRAL, case, tmp_path, tokenizer, max_steps=4, loss_type=loss)
    ours.train()
    theirs.train()
    losses = logged(theirs)
    assert losses[0] - losses[-1] > 0.01
    assert max(abs(a - b) / losses[0] for a, b in zip(logged(ours), losses, strict=True)) <= limit(case)


def test_the_reference_stays(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """TRL's copy of the adapter takes the experts along, and training does not reach it."""
    model = get_peft_model(patched_model(MIXTRAL, case), patched_config(MIXTRAL))
    fill_lora(model, seed=1)
    before = logits_of(model, MIXTRAL.inputs())
    trainer = dpo(model, None, tmp_path, tokenizer, max_steps=3)
    names = [name for name, _ in model.named_parameters() if ".experts." in name and ".ref." in name]
    assert len(names) == 12
    trainer.train()
    model.eval()
    assert not torch.equal(logits_of(model, MIXTRAL.inputs()), before)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, MIXTRAL.inputs()), before)


def test_the_checkpoint_is_the_policy(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """With two adapters in the model."""
    model = get_peft_model(patched_model(MIXTRAL, case), patched_config(MIXTRAL))
    fill_lora(model, seed=1)
    trainer = dpo(model, None, tmp_path, tokenizer, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path / "checkpoint-2")
    assert torch.equal(logits_of(again, MIXTRAL.inputs()), logits_of(model.eval(), MIXTRAL.inputs()))


@pytest.mark.parametrize("case", [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS)])
@pytest.mark.parametrize(("mode", "forwards"), [("disable_adapter", 3), ("precomputed", 1)])
def test_forwards_of_a_step(mode: str, forwards: int, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """The reference's forward takes the policy's from the operators, which compute it once more for the backward."""
    ours, _ = trainers(mode, MIXTRAL, case, tmp_path, tokenizer, max_steps=4)
    backend = kt_layers(ours.model)[0]._runner.backend
    forward, calls, steps = backend.forward, [0], [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    class Steps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(calls[0])

    backend.forward = counted
    ours.add_callback(Steps())
    ours.train()
    assert [after - before for before, after in itertools.pairwise(steps)] == [forwards] * 4


def test_precomputed_values_are_not_those_of_other_experts(case: Case) -> None:
    """TRL keeps reference log-probabilities by a hash of the state dict, in which packed experts have no weights."""
    models = [MIXTRAL(case.dtype) for _ in range(3)]
    with torch.no_grad():
        models[2].model.layers[1].mlp.experts.down_proj.mul_(1.5)
    first, same, other = (hash_module(apply_kt_moe(model, make_config(case.backend))) for model in models)
    assert first == same != other
