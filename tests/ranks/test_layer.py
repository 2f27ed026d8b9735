"""One layer on ranks: a rank without tokens, choices of no expert, and what each rank has of the model and the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_hf.ranks import Share, World
from kt_hf.system import cpu, memory
from kt_hf.system.cpu import plan_threads
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.machine import EIGHT, TWO_SOCKETS, machine
from tests.support.patched import adapted_model
from tests.support.ranks import fill_whole, on_ranks, relative, results

TOKENS = 5


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(8, generator=rng)[:2] for _ in range(TOKENS)])
    ids[1, 0], ids[2, 1] = -1, 8  # of no expert, in both ways that models say it
    return torch.randn(TOKENS, 64, generator=rng), ids, torch.rand(TOKENS, 2, generator=rng)


def computed(tokens: slice) -> dict[str, Any]:
    model = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(model, 1)
    layer = model.base_model.model._kt_wrappers[0]
    x, ids, weights = (t[tokens].clone() for t in inputs())
    x.requires_grad_()
    weights.requires_grad_()
    out = layer(x, ids, weights)
    out.pow(2).sum().backward()
    lora = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, "lora": lora, "base": layer.base_fingerprint}


@pytest.mark.parametrize("empty", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_without_tokens(empty: int) -> None:
    one = computed(slice(0, TOKENS))
    two = results(on_ranks(2, lambda rank: computed(slice(0, 0 if rank == empty else TOKENS))))
    full = two[1 - empty]
    assert two[empty]["out"].shape == (0, 64)
    for name in ("out", "x", "weights"):
        assert relative(full[name], one[name]) <= 2e-6
    for name, gradient in one["lora"].items():
        assert relative(2 * torch.cat([rank["lora"][name] for rank in two]), gradient) <= 2e-6
    # Of the whole layer, or DDP's broadcast of buffers would give a rank another's.
    assert all(torch.equal(rank["base"], one["base"]) for rank in two)


@pytest.mark.slow
def test_runs_repeat_their_bits() -> None:
    first, again = (results(on_ranks(4, lambda rank: computed(slice(rank, rank + 1)))) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["out"], b["out"])
        assert torch.equal(a["x"], b["x"])
        assert all(torch.equal(value, b["lora"][name]) for name, value in a["lora"].items())


def test_shares_cover_all_experts_once() -> None:
    shares = [Share(rank, 4, 12) for rank in range(4)]
    assert [expert for share in shares for expert in range(share.lo, share.hi)] == list(range(12))


@pytest.mark.parametrize(
    ("cores", "nodes", "expected"),
    [
        (EIGHT, {0: "0-7"}, [((0, 3),), ((0, 3),)]),
        (TWO_SOCKETS, {0: "0-3", 1: "4-7"}, [((0, 3),), ((1, 3),)]),
    ],
)
def test_cores_are_divided_by_node(
    cores: Any, nodes: dict[int, str], expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each rank would plan all of them."""
    root = machine(tmp_path, cores, nodes)
    for rank, pools in enumerate(expected):
        monkeypatch.setattr(cpu, "current_world", lambda rank=rank: World(rank, 2, rank, 2))
        assert plan_threads(root=root, cpus=set(range(8))).pools == pools


def test_free_memory_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda root: 2**30)
    monkeypatch.setattr(memory, "current_world", lambda: World(1, 4, 1, 4))
    assert memory.available_memory() == 2**28
