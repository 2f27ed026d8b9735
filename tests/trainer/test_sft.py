"""SFTTrainer trains a patched model as it trains the unpatched one under stock PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES
from tests.support.patched import logits_of
from tests.support.stock import assert_same_parameters, pair
from tests.support.tokenizer import text
from tests.support.trl_runs import FP32_AND_KERNEL, ROWS, distance, limit, logged, sft, std, texts

CURVES = [
    *(pytest.param(name, TORCH_FP32, id=f"{name}-{TORCH_FP32}") for name in FAMILIES),
    *(
        pytest.param(name, KERNEL_BF16, id=f"{name}-{KERNEL_BF16}", marks=KERNEL_MARKS)
        for name in ("mixtral", "qwen2_moe", "deepseek_v2")
    ),
]


@pytest.mark.parametrize(("name", "case"), CURVES)
def test_curve(name: str, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    model, stock = pair(FAMILIES[name], case, std(case))
    ours, theirs = sft(model, tmp_path, tokenizer), sft(stock, tmp_path, tokenizer)
    losses = logged(theirs)
    assert losses[0] - min(losses[-3:]) > 0.5
    assert distance(logged(ours), losses) <= limit(case)
    if case is TORCH_FP32:
        assert_same_parameters(model, stock, 1e-3)


def questions() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"prompt": [text(seed, 12) for seed in range(ROWS)], "completion": [text(90 + s, 14) for s in range(ROWS)]}
    )


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wrapped packing": (texts, {"packing": True, "packing_strategy": "wrapped"}),
    "bfd packing": (texts, {"packing": True, "packing_strategy": "bfd"}),
    "completion only": (questions, {}),
    "prompt too": (questions, {"completion_only_loss": False}),
    "auxiliary loss": (texts, {"router_aux_loss_coef": 0.5}),
    "NEFTune": (texts, {"neftune_noise_alpha": 1.0}),
    "checkpointing": (texts, {"gradient_checkpointing": True}),
    "accumulation": (texts, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
    "weight decay, clipping": (texts, {"weight_decay": 0.1, "max_grad_norm": 0.3}),
}


# A way changes the batch and not the arithmetic: on the operators one is enough, the others when there is time.
ON_KERNEL = [
    pytest.param(way, KERNEL_BF16, id=f"{way}-{KERNEL_BF16}",
                 marks=[*KERNEL_MARKS, *([] if way == "checkpointing" else [pytest.mark.slow])])
    for way in WAYS
]  # fmt: skip


@pytest.mark.parametrize(("way", "case"), [*((way, TORCH_FP32) for way in WAYS), *ON_KERNEL])
def test_curve_of_each_way(way: str, case: Case, tmp_path: Path, tokenizer: Any) -> None:
    data, overrides = WAYS[way]
    if way == "NEFTune":
        case = replace(case, dtype=torch.float32)  # the noise is drawn in the model's dtype
    model, stock = pair(MIXTRAL, case, std(case))
    ours = sft(model, tmp_path, tokenizer, data(), max_steps=6, **overrides)
    theirs = sft(stock, tmp_path, tokenizer, data(), max_steps=6, **overrides)
    losses = logged(theirs)
    assert losses[0] - losses[-1] > 0.2
    assert distance(logged(ours), losses) <= limit(case)
    if way == "auxiliary loss":
        auxiliary = logged(theirs, "aux_loss")
        assert min(auxiliary) > 1
        assert distance(logged(ours, "aux_loss"), auxiliary) <= limit(case)


def test_the_ways_differ(tmp_path: Path, tokenizer: Any) -> None:
    """Each option does something: otherwise the comparisons above would compare one and the same run."""
    first = {}
    for way, (data, overrides) in WAYS.items():
        if way in ("checkpointing", "accumulation"):
            continue
        torch.manual_seed(0)
        model, _ = pair(MIXTRAL, TORCH_FP32)
        first[way] = tuple(logged(sft(model, tmp_path, tokenizer, data(), max_steps=2, **overrides)))
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
def test_evaluation_and_the_best_model(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """Evaluation between steps, of other lengths than training. The loss falls, so the largest is the first."""
    held = datasets.Dataset.from_dict({"text": [text(seed, 7 + seed) for seed in range(12)]})
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    runs, logits = [], []
    for index, model in enumerate(pair(MIXTRAL, case, std(case))):
        runs.append(sft(model, tmp_path / str(index), tokenizer, None, held, save_total_limit=1, **often, **best))
        logits.append(logits_of(model.eval(), MIXTRAL.inputs()))
    ours, theirs = runs
    found = logged(theirs, "eval_loss")
    assert len(found) == 4
    assert found[0] - found[-1] > 0.2
    assert distance(logged(ours), logged(theirs)) <= limit(case)
    assert distance(logged(ours, "eval_loss"), found) <= 2 * limit(case)
    if case is TORCH_FP32:
        assert (logits[0] - logits[1]).norm() < 1e-3 * logits[1].norm()
    assert ours.state.best_global_step == theirs.state.best_global_step == 2
    assert ours.evaluate()["eval_loss"] == logged(ours, "eval_loss")[0]


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
def test_evaluation_leaves_training_as_it_is(case: Case, tmp_path: Path, tokenizer: Any) -> None:
    """To the bit, though the operators keep one saved forward only and evaluation comes in between."""
    runs = []
    for overrides in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        torch.manual_seed(0)
        model, _ = pair(MIXTRAL, case)
        runs.append(logged(sft(model, tmp_path, tokenizer, None, texts(), max_steps=4, **overrides)))
    assert runs[0] == runs[1]
