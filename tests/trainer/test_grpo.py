"""GRPOTrainer: generation with the patched model, and steps that are the unpatched model's with stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import get_peft_model
from torch import nn

from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.models import VOCAB
from tests.support.patched import logits_of, patched_model
from tests.support.stock import assert_same_parameters, pair, patched_config, same_start, stock_config
from tests.support.tokenizer import text
from tests.support.trl_runs import FP32_AND_KERNEL, arguments, callbacks, distance, logged

Completions = list[list[list[int]]]


def low_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of tokens in the lower half of the vocabulary: chance gives a half."""
    return [sum(token < VOCAB // 2 for token in ids) / len(ids) for ids in completion_ids]


def grpo(model: nn.Module, config: Any, folder: Path, tokenizer: Any, **overrides: Any) -> trl.GRPOTrainer:
    """Not trained yet: eight prompts a step, four completions each, used for two updates."""
    settings = {
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 12,
        "per_device_train_batch_size": 32,
        "beta": 0.04,
        "learning_rate": 3e-3,
        "max_steps": 6,
        **overrides,
    }
    return trl.GRPOTrainer(
        model,
        reward_funcs=low_words,
        args=trl.GRPOConfig(**arguments(folder, **settings)),
        train_dataset=datasets.Dataset.from_dict({"prompt": [text(seed, 4 + seed % 4) for seed in range(16)]}),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks(model),
    )


def watch_generation(trainer: trl.GRPOTrainer, replay: Completions | None = None) -> Completions:
    """Every completion from now on; with `replay` those are given instead of generated ones."""
    seen: Completions = []
    original = trainer._generate_single_turn

    def generate(*args: Any, **kwargs: Any) -> Any:
        ids, logprobs = (replay[len(seen)], None) if replay is not None else original(*args, **kwargs)
        seen.append(ids)
        return ids, logprobs

    trainer._generate_single_turn = generate
    return seen


def trainers(reference: str, case: Case, folder: Path, tokenizer: Any) -> list[trl.GRPOTrainer]:
    if reference == "ref":
        models = pair(MIXTRAL, case, 0.02)
        return [grpo(model, None, folder / str(i), tokenizer) for i, model in enumerate(models)]
    made = [
        grpo(patched_model(MIXTRAL, case), patched_config(MIXTRAL), folder / "0", tokenizer),
        grpo(MIXTRAL(), stock_config(MIXTRAL), folder / "1", tokenizer),
    ]
    same_start(made[0].model, made[1].model)
    return made


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
@pytest.mark.parametrize("reference", ["disable_adapter", "ref"])
def test_curve(reference: str, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """In fp32 both generate, and the same. In bf16 other tokens would be drawn, so stock's are given to both."""
    ours, theirs = trainers(reference, case, tmp_path, tokenizer)
    expected = watch_generation(theirs)
    torch.manual_seed(0)
    theirs.train()
    actual = watch_generation(ours, None if case is TORCH_FP32 else expected)
    torch.manual_seed(0)
    ours.train()
    assert actual == expected
    limit = 1e-4 if case is TORCH_FP32 else 0.02
    assert distance(logged(ours), logged(theirs)) <= limit
    assert logged(ours, "kl")[0] == 0.0
    assert logged(theirs, "kl")[-1] > 0.02
    assert distance(logged(ours, "kl"), logged(theirs, "kl")) <= limit
    if case is TORCH_FP32:
        assert_same_parameters(ours.model, theirs.model, 1e-3)


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
def test_the_reward_rises(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    model = get_peft_model(patched_model(MIXTRAL, case), patched_config(MIXTRAL))
    many = {"per_device_train_batch_size": 64, "num_generations": 16, "num_iterations": 1, "max_completion_length": 6}
    trainer = grpo(model, None, tmp_path, tokenizer, learning_rate=0.03, max_steps=14, beta=0.0, **many)
    before = logits_of(model, MIXTRAL.inputs())
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model.eval(), MIXTRAL.inputs()), before)


def test_generation_uses_the_latest_policy(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """Without the callback too, no completion is drawn with the LoRA of a step before: refreshing changes none."""
    model = get_peft_model(patched_model(MIXTRAL, case), patched_config(MIXTRAL))
    trainer = grpo(model, None, tmp_path, tokenizer, num_iterations=1, max_steps=4, learning_rate=0.02)
    original = trainer._generate_single_turn
    pairs: list[tuple[Any, Any]] = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        first = original(*args, **kwargs)
        after = torch.get_rng_state()
        for layer in model._kt_wrappers:
            layer.update_lora_pointers()
        torch.set_rng_state(state)
        pairs.append((first, original(*args, **kwargs)))
        torch.set_rng_state(after)
        return first

    trainer._generate_single_turn = generate
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if type(c).__name__ != "KTMoECallback"
    ]
    trainer.train()
    assert len(pairs) == 4
    assert all(first == second for first, second in pairs)
    assert pairs[0] != pairs[1]
