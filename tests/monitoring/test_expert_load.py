"""Tokens per second and the load of the experts, as the callback logs them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kt_hf import KTMoECallback
from kt_hf.monitoring.expert_load import LoadLog, entropy
from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, loss_of
from tests.support.trainers import model_to_train, trainer_for

KEYS = {"tokens_per_second", "expert_load_entropy", "expert_load_max", "experts_without_tokens"}


def test_entropy() -> None:
    assert entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1)
    assert entropy(torch.tensor([7, 0, 0, 0])) == 0
    assert entropy(torch.tensor([3, 1])) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert math.isnan(entropy(torch.tensor([0, 0])))


def routed(model: nn.Module) -> list[list[Tensor]]:
    """Filled, a list a layer, with the ids of every forward in training mode with gradients on."""
    seen: list[list[Tensor]] = [[] for _ in model._kt_wrappers]
    for layer, ids in zip(model._kt_wrappers, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, args, ids=ids: ids.append(args[1]) if torch.is_grad_enabled() else 0)
    return seen


def counts(ids: list[Tensor]) -> Tensor:
    return torch.bincount(torch.cat(ids).flatten(), minlength=MIXTRAL.num_experts)


def test_counts_are_those_of_the_routers(case: Case) -> None:
    """Of what has gradients: evaluation and a forward that is thrown away do not count."""
    model = adapted_model(MIXTRAL, case, seed=1)
    layers, log = model._kt_wrappers, LoadLog()
    with torch.no_grad():
        loss_of(model, MIXTRAL.inputs())
    assert log.collect(layers) == {}
    seen = routed(model)
    for seed in range(2):
        loss_of(model, MIXTRAL.inputs(2, 9, seed=seed)).backward()
    found = log.collect(layers)
    assert set(found) == KEYS
    for layer, ids in zip(layers, seen, strict=True):
        assert torch.equal(log.total[layer.layer_idx], counts(ids))
    each = [counts(ids) for ids in seen]
    assert found["expert_load_entropy"] == pytest.approx(sum(map(entropy, each)) / len(each), abs=1e-4)
    assert found["expert_load_max"] == pytest.approx(max(float(c.max() / c.sum() * 8) for c in each), abs=0.01)
    assert found["experts_without_tokens"] == sum(int((c == 0).sum()) for c in each)
    assert log.collect(layers) == {}  # counted from anew


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_a_run_logs_each_token_once(case: Case, tmp_path: Path, reentrant: bool | None) -> None:
    overrides: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 3}
    if reentrant is not None:
        overrides |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = model_to_train(case)
    trainer = trainer_for(model, tmp_path, evaluate=True, eval_strategy="steps", eval_steps=2, **overrides)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert all(set(entry) >= KEYS for entry in entries)
    assert not any(KEYS & set(entry) for entry in trainer.state.log_history if "loss" not in entry)
    tokens = 4 * 3 * 2 * 10  # steps, micro-batches, rows, length
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, KTMoECallback))
    for total in callback.expert_load.total.values():
        assert int(total.sum()) == tokens * MIXTRAL.top_k
    assert min(entry["tokens_per_second"] for entry in entries) >= tokens / 2 / seconds


def test_a_second_run_begins_at_zero(tmp_path: Path) -> None:
    callback = KTMoECallback()
    model = model_to_train(TORCH_FP32)
    for _ in range(2):
        trainer = trainer_for(model, tmp_path, callback=False, max_steps=2)
        trainer.add_callback(callback)
        trainer.train()
        assert all(int(total.sum()) == 2 * 2 * 10 * MIXTRAL.top_k for total in callback.expert_load.total.values())


def test_an_evaluation_is_no_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 102.0, 103.0, 110.0])  # begin, a step's end, an evaluation's, the next step's, a log
    monkeypatch.setattr("kt_hf.monitoring.expert_load.time.perf_counter", lambda: next(clock))
    log = LoadLog(_since=-1.0)
    log.begin([])
    log.stepped()
    log.set_aside()
    log.stepped()
    assert log._since == 100.0
    log.collect([])
    assert log._since == 110.0
