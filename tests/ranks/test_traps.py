"""What DDP would do to owned LoRA, what a layer sends and keeps, and batches longer than a backend takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kt_hf.experts.holders import ExpertLora
from kt_hf.ranks import channel
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, lora_config
from tests.support.ranks import fill_whole, on_ranks, relative, results

TOKENS = 6


def model_of() -> Any:
    model = adapted_model(MIXTRAL, TORCH_FP32)
    fill_whole(model, 1)
    return model.train()


def lora_of(model: Any) -> list[ExpertLora]:
    return [module for module in model.modules() if isinstance(module, ExpertLora)]


@pytest.mark.parametrize("given", ["PeftModel", "transformers model"])
def test_adapters_made_after_patching_are_left_alone_too(given: str) -> None:
    """TRL makes its `ref` adapter when the trainer begins: names that were listed before would lack it.

    They are other names where DDP is given the model that has its adapters by transformers' `add_adapter`.
    """

    def work(rank: int) -> list[bool]:
        model = model_of()
        model.add_adapter("ref", lora_config(MIXTRAL))
        with torch.no_grad():
            for holder in lora_of(model):
                holder.weight.fill_(rank + 1)
        DistributedDataParallel(model if given == "PeftModel" else model.base_model.model)
        return [bool((holder.weight == rank + 1).all()) for holder in lora_of(model)]

    for values in results(on_ranks(2, work)):
        assert len(values) == 2 * 2 * 3 * 2  # layers, adapters, projections, A and B
        assert all(values)


def test_owned_lora_may_be_on_another_kind_of_device() -> None:
    """DDP refuses a model of several kinds, GPU and CPU; here meta stands for the CPU beside a GPU."""

    def work(rank: int) -> bool:
        model = model_of()
        for holder in lora_of(model):
            holder.weight = nn.Parameter(holder.weight.to("meta"))
        DistributedDataParallel(model)
        return True

    assert results(on_ranks(2, work)) == [True, True]


@pytest.mark.parametrize(("timeout", "waits"), [(19, 13), (8, 4), (60, 45), (1800, 1770)])
def test_a_run_may_be_connected_for_gpus_alone(timeout: int, waits: int) -> None:
    """As accelerate does by NCCL; here by gloo for CUDA tensors. The CPU's exchanges give up before NCCL does."""

    def work(rank: int) -> tuple[bool, float]:
        with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
            dist.all_reduce(torch.ones(1))
        model, ids = model_of(), MIXTRAL.inputs(1, 6)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return bool(loss.isfinite()), channel._timeout().total_seconds()

    assert results(on_ranks(2, work, timeout=timeout, backend="cuda:gloo")) == [(True, waits)] * 2


def layer_inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(8, generator=rng)[:2] for _ in range(TOKENS)])
    return torch.randn(TOKENS, 64, generator=rng), ids, torch.rand(TOKENS, 2, generator=rng)


def computed(tokens: slice, most: int | None = None) -> dict[str, Any]:
    """A layer's output and gradient, the sizes of its backend's calls, and what autograd keeps of its inputs."""
    layer = model_of().base_model.model._kt_wrappers[0]
    original, calls, messages = layer.backend.forward, list[int](), list[str]()
    layer.backend.max_len = most

    def forward(x: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(len(x))
        return original(x, *rest, **options)

    layer.backend.forward = forward
    x, ids, weights = (t[tokens].clone() for t in layer_inputs())
    x.requires_grad_()
    layer(x, ids, weights).sum().backward()  # after the first, which compares the owners
    x.grad, names = None, ("all_gather_into_tensor", "all_to_all_single")
    for name in names:
        exchange = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, exchange=exchange, **k: (messages.append(name), exchange(*a, **k))[1])
    out = layer(x, ids, weights)
    kept = {tuple(t.shape) for t in out.grad_fn.saved_tensors}
    out.pow(2).sum().backward()
    held = layer.backend.weights.gate_up.nbytes + layer.backend.weights.down.nbytes
    return {"out": out.detach(), "x": x.grad, "calls": calls, "kept": kept, "messages": messages, "held": held}


def halves(most: int | None = None) -> list[dict[str, Any]]:
    half = TOKENS // 2
    return results(on_ranks(2, lambda rank: computed(slice(rank * half, (rank + 1) * half), most)))


@pytest.mark.parametrize("most", [4])
def test_tokens_of_all_ranks_may_be_more_than_a_backend_takes(most: int) -> None:
    """`kt_max_len` is of a call: ranks' tokens together are computed in pieces."""
    one, two = computed(slice(0, TOKENS)), halves(most)
    for name in ("out", "x"):
        assert relative(torch.cat([rank[name] for rank in two]), one[name]) <= 2e-6
    assert all(max(rank["calls"]) <= most for rank in two)
    assert all(rank["held"] == one["held"] // 2 for rank in two)


def test_a_layer_sends_six_messages_and_keeps_its_own_inputs() -> None:
    """Header, tokens, outputs with their header; header, gradients with the tokens, gradients with their header."""
    for rank in halves():
        # Tokens of equally many on each rank need no copy for each; those of unlike numbers go from each to each.
        assert rank["messages"] == ["all_gather_into_tensor", "all_gather_into_tensor", "all_to_all_single"] * 2
        assert rank["kept"] == {(TOKENS // 2, 64), (TOKENS // 2, 2), ()}
