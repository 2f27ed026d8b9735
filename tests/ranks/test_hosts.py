"""Several hosts: each has all experts, divided among its ranks, and gradients of their LoRA are averaged over hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kt_hf.experts import clip_grad_norm_
from tests.ranks.test_agreement import batches, loss_and_gradients, model_of
from tests.ranks.test_trainer import compare
from tests.support.models import FAMILIES
from tests.support.patched import trainable
from tests.support.rank_trainers import Trained, trained, trainer
from tests.support.ranks import joined, on_ranks, relative, results

RANKS, HOSTS = 4, 2


def slowly(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("divided", "micro", "checkpointing"),
    [
        ("host", 2, None),
        slowly("all", 2, None),
        slowly("host", 1, "reentrant"),
        slowly("host", 3, "non-reentrant"),
        slowly("auto", 2, "reentrant"),
    ],
)
def test_four_ranks_of_two_hosts_compute_what_one_process_does(
    divided: str, micro: int, checkpointing: str | None
) -> None:
    family = FAMILIES["qwen3_moe"]
    rows = batches(family, RANKS, micro, unequal=True)
    one = model_of(family, checkpointing)
    whole = [loss_and_gradients(one, one, of_rank) for of_rank in rows]  # gradients add up
    expected = {name: value / RANKS for name, value in whole[-1][1].items()}

    def work(rank: int) -> tuple[float, dict[str, Tensor], int, float]:
        model = model_of(family, checkpointing, kt_expert_ranks=divided)
        loss, _ = loss_and_gradients(model, DistributedDataParallel(model), rows[rank])
        norm = float(clip_grad_norm_(model.parameters(), float("inf")))
        gradients = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
        return loss, gradients, model.base_model.model._kt_wrappers[0].share.ranks, norm

    got = results(on_ranks(RANKS, work, hosts=HOSTS))
    assert {rank[2] for rank in got} == {RANKS if divided == "all" else RANKS // HOSTS}
    for (loss, *_), (reference, _) in zip(got, whole, strict=True):
        assert abs(loss - reference) <= 1e-6 * abs(reference)
    gradients = joined([rank[1] for rank in got], 1 if divided == "all" else HOSTS)
    assert gradients.keys() == expected.keys()
    worst = max((relative(gradients[name], value), name) for name, value in expected.items())
    assert worst[0] <= 2e-6, worst
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    assert {abs(rank[3] - float(norm)) <= 1e-6 * float(norm) for rank in got} == {True}


def on(ranks: int, hosts: int, folder: Path, train: dict[str, Any] | None = None, **settings: Any) -> list[Trained]:
    work = lambda rank: trained(trainer(folder, ranks, **settings), **(train or {}))  # noqa: E731
    return results(on_ranks(ranks, work, hosts=hosts))


@pytest.mark.slow
def test_twenty_steps(tmp_path: Path) -> None:
    compare(on(RANKS, HOSTS, tmp_path / "hosts"), trained(trainer(tmp_path / "one", 1)), hosts=HOSTS)
