"""Ranks with a part of the experts each compute what one process computes on all their rows."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.cases import TORCH_FP32
from tests.support.models import FAMILIES, Family
from tests.support.patched import adapted_model, trainable
from tests.support.ranks import fill_whole, joined, on_ranks, relative, results

LENGTHS = (7, 12, 5, 9)


def batches(family: Family, ranks: int, micro: int, unequal: bool) -> list[list[Tensor]]:
    """For each rank its micro-batches of token ids."""
    return [
        [family.inputs(1, LENGTHS[(r + m) % 4] if unequal else 8, seed=10 * r + m) for m in range(micro)]
        for r in range(ranks)
    ]


def model_of(family: Family, checkpointing: str | None, **config: Any) -> Any:
    model = adapted_model(family, TORCH_FP32, **config)
    fill_whole(model, 1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def loss_and_gradients(model: Any, caller: Any, rows: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for i, ids in enumerate(rows):
        last = i == len(rows) - 1
        with caller.no_sync() if isinstance(caller, DistributedDataParallel) and not last else contextlib.nullcontext():
            loss = caller(input_ids=ids, labels=ids).loss / len(rows)
            loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}


def check(
    family: Family, ranks: int, micro: int = 1, unequal: bool = True, checkpointing: str | None = None, **config: Any
) -> None:
    rows = batches(family, ranks, micro, unequal)
    one = model_of(family, checkpointing, **config)
    whole = [loss_and_gradients(one, one, of_rank) for of_rank in rows]  # gradients add up
    expected = {name: value / ranks for name, value in whole[-1][1].items()}

    def work(rank: int) -> tuple[float, dict[str, Tensor]]:
        model = model_of(family, checkpointing, **config)
        return loss_and_gradients(model, DistributedDataParallel(model), rows[rank])

    got = results(on_ranks(ranks, work))
    for (loss, _), (reference, _) in zip(got, whole, strict=True):
        assert abs(loss - reference) <= 1e-6 * abs(reference)
    gradients = joined([part for _, part in got])
    assert gradients.keys() == expected.keys()
    worst = max((relative(gradients[name], value), name) for name, value in expected.items())
    assert worst[0] <= 2e-6, worst


def test_two_ranks_compute_what_one_does() -> None:
    check(FAMILIES["mixtral"], 2, micro=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, ranks: int) -> None:
    check(FAMILIES[name], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("activations", ["retain", "recompute"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_checkpointing_and_accumulation(checkpointing: str | None, activations: str, micro: int, ranks: int) -> None:
    check(FAMILIES["qwen3_moe"], ranks, micro, checkpointing=checkpointing, kt_expert_activations=activations)
