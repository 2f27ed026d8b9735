"""The dense part sharded by FSDP2 by hand, owned LoRA left to its rank: gradients and their norm as one process has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kt_hf.experts import clip_grad_norm_
from kt_hf.experts.holders import owned_lora
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, trainable
from tests.support.ranks import fill_whole, joined, on_ranks, relative, results

RANKS = 2


def model_of() -> Any:
    model = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(model, 1)
    return model.train()


def stepped(
    model: Any, rows: list[Tensor], own: list[Any]
) -> tuple[float, float, dict[str, Tensor], dict[str, Tensor]]:
    """Mean loss, norm before clipping, clipped gradients, and the trainable parameters after a step."""
    optimizers = [torch.optim.AdamW(group, lr=1e-3) for group in _groups(model, own)]
    total = 0.0
    for ids in rows:
        loss = model(input_ids=ids, labels=ids).loss / len(rows)
        loss.backward()
        total += float(loss.detach())
    norm = float(clip_grad_norm_(model.parameters(), 0.1))
    gradients = {name: _whole(p.grad) for name, p in trainable(model).items()}
    for optimizer in optimizers:
        optimizer.step()
    return total, norm, gradients, {name: _whole(p.detach()) for name, p in trainable(model).items()}


def _groups(model: Any, own: list[Any]) -> list[list[Any]]:
    ids = {id(p) for p in own}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [group for group in (own, rest) if group]


def _whole(value: Any) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


@pytest.mark.slow
def test_a_sharded_dense_part_trains_as_one_process() -> None:
    rows = [MIXTRAL.inputs(1, 6 + rank, seed=rank) for rank in range(RANKS)]
    expected = stepped(model_of(), rows, [])

    def work(rank: int) -> Any:
        model = model_of()
        own = [holder.weight for holder in owned_lora(model)]
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (*model.base_model.model.model.layers, model):
            fully_shard(layer, mesh=mesh, ignored_params=set(own))
        return stepped(model, [rows[rank]], own)

    got = results(on_ranks(RANKS, work))
    assert abs(sum(rank[0] for rank in got) / RANKS - expected[0]) <= 1e-6 * expected[0]
    for rank in got:
        assert abs(rank[1] - expected[1]) <= 1e-6 * expected[1]
    for index, bound in ((2, 2e-6), (3, 5e-6)):
        parts = joined([rank[index] for rank in got])
        assert parts.keys() == expected[index].keys()
        worst = max((relative(parts[name], value), name) for name, value in expected[index].items())
        assert worst[0] <= bound, worst
