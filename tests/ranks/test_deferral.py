"""On GPUs ranks look at each other's headers later, inside of a pass: what they assume till then.

The CPU, connected by gloo, stands for the GPUs.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kt_hf.experts import tickets
from kt_hf.ranks import Kind, Place, Ranks
from kt_hf.ranks.channel import Channel
from tests.support.deferral import ids_of, model_of, step
from tests.support.helpers import MIXTRAL
from tests.support.patched import trainable
from tests.support.ranks import on_ranks, results, timed


@pytest.fixture(autouse=True)
def cpu_as_gpu(cpu_for_gpu: None) -> None:
    """Where experts of GPUs are computed."""


def test_bits_are_the_same_and_meetings_that_wait_few() -> None:
    """Of a step: one where it begins, and five where a pass, or a recompute of it, enters or leaves the layers."""

    def work(rank: int, deferring: bool) -> tuple[list[dict[str, Tensor]], list[int]]:
        model, waits = DistributedDataParallel(model_of(deferring)), list[int]()
        gathered = Channel.gathered

        def counted(channel: Channel, values: Tensor) -> Tensor:
            waits.append(1)
            return gathered(channel, values)

        Channel.gathered = counted  # type: ignore[method-assign]
        found, counts = [], []
        for number in range(4):
            waits.clear()
            model.zero_grad()
            step(model, rank, number)
            counts.append(len(waits))
            found.append({name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None})
        return found, counts

    deferred, counts = zip(*results(on_ranks(2, lambda rank: work(rank, True))), strict=True)
    at_once, others = zip(*results(on_ranks(2, lambda rank: work(rank, False))), strict=True)
    for mine, wanted in zip(deferred, at_once, strict=True):
        for one, other in zip(mine, wanted, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [found[-1] for found in counts] == [1 + 5] * 2
    assert [found[-1] for found in others] == [1 + 2 * 3] * 2, "on a CPU headers ride with outputs"


def test_ranks_that_take_other_forwards_for_the_one_recomputed() -> None:
    """One knows the only open forward; the other, whose layer has lost it, would compute it again."""

    def work(rank: int) -> None:
        model = model_of()
        step(model, rank, 0)
        step(model, rank, 1)
        loss = model(input_ids=ids_of(rank, 2), labels=ids_of(rank, 2)).loss
        if rank == 1:
            for ticket in model.base_model.model._kt_wrappers[1]._runner._live.values():
                ticket.retained = None
        loss.backward()

    (first, _), _ = results(on_ranks(2, timed(work), 6))
    assert "Or set kt_expert_activations to recompute" in str(first)


@pytest.mark.parametrize("parted", ["rank 0 has fewer", "rank 1 has none", "both have fewer"])
def test_a_layer_that_has_other_tokens_than_the_first_is_computed_anew(parted: str) -> None:
    """No bit is lost where ranks went on with a wrong number; the layer waits for the right one from then on."""

    def work(rank: int, deferring: bool) -> tuple[list[dict[str, Tensor]], bool, int]:
        model = model_of(deferring)
        layer, waits = model.base_model.model._kt_wrappers[1], list[int]()
        forward, agree, kept = layer.forward, Ranks.agree, {0: 3, 1: 9} if "both" in parted else {int(parted[5]): 0}

        def sparse(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            count = min(kept.get(rank, 9), len(ids)) if parted != "rank 0 has fewer" or rank else 2
            if parted == "both have fewer":
                count = 3 - rank
            return torch.cat((forward(hidden[:count], ids[:count], weights[:count]), hidden[count:]))

        def counted(ranks: Ranks, place: Place, *rest: Any, **how: Any) -> Any:
            waits.append(place.kind is Kind.TOKENS and place.layer == 1)
            return agree(ranks, place, *rest, **how)

        layer.forward, Ranks.agree = sparse, counted  # type: ignore[method-assign]
        found = []
        for number in range(3):
            waits.clear()
            model.zero_grad()
            step(model, rank, number)
            found.append({name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None})
        return found, layer.exchange._steady, sum(waits)

    deferred = results(on_ranks(2, lambda rank: work(rank, True)))
    at_once = results(on_ranks(2, lambda rank: work(rank, False)))
    for (mine, steady, waits), (wanted, *_) in zip(deferred, at_once, strict=True):
        assert not steady
        assert waits == 1, "in the forward alone"
        for one, other in zip(mine, wanted, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_was_computed_in_vain_is_let_go_first() -> None:
    """Two layers' outputs of all ranks' tokens would be in memory at a time."""

    def work(rank: int) -> list[bool]:
        model, alive, made = model_of(), list[bool](), list[weakref.ref[Tensor]]()
        layer = model.base_model.model._kt_wrappers[1]
        forward, compute = layer.forward, layer.backend.forward

        def noted(*given: Any, **how: Any) -> Any:
            alive.extend(ref() is not None for ref in made)
            result = compute(*given, **how)
            made[:] = weakref.ref(given[0]), weakref.ref(result[0])
            return result

        step(model, rank)
        layer.forward = lambda x, *rest: torch.cat((forward(x[:2], *(part[:2] for part in rest)), x[2:]))
        layer.backend.forward = noted
        step(model, rank, 1)
        return alive

    assert on_ranks(2, work) == [[False, False]] * 2


def test_no_layer_keeps_rows_that_were_sent() -> None:
    """But for their widths: of 48 layers they would be more than a layer's weights."""

    def work(rank: int) -> int:
        model = model_of()
        for number in range(2):
            step(model, rank, number)
        kept = [layer.exchange._rows for layer in model.base_model.model._kt_wrappers]
        return sum(rows.untyped_storage().nbytes() for pair in kept for rows in pair)

    assert on_ranks(2, work) == [0, 0]


def test_edges_are_those_of_the_pass() -> None:
    ranks = object.__new__(Ranks)
    ranks._edges = {}
    for _ in range(2):
        edges = [
            (kind, layer)
            for kind, layers in ((Kind.OUTPUTS, range(3)), (Kind.GRADIENTS, range(2, -1, -1)),
                                 (Kind.INPUT_GRADIENTS, range(2, -1, -1)))
            for layer in layers
            if ranks._is_edge(Place(kind, layer))
        ]  # fmt: skip
    assert edges == [(Kind.OUTPUTS, 2), (Kind.GRADIENTS, 2), (Kind.INPUT_GRADIENTS, 0)]


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_recompute_whose_router_chooses_otherwise_is_the_forward(chunk: int | None) -> None:
    """Kernels that do not repeat their bits may choose another of two experts that are as good."""

    def work(rank: int, other: bool) -> dict[str, Tensor]:
        model = model_of()
        layers = model.base_model.model._kt_wrappers
        if chunk:
            layers[0].backend._streamer._chunk_bytes = chunk
        forward = layers[1].forward

        def chosen(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            if other and tickets.in_backward():
                ids = ids.clone()
                ids[0] = (ids[0] + MIXTRAL.num_experts // 2) % MIXTRAL.num_experts  # the other rank's
            return forward(hidden, ids, weights)

        layers[1].forward = chosen
        for number in range(3):
            model.zero_grad()
            step(model, rank, number)
        return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}

    for found, wanted in zip(
        *(results(on_ranks(2, lambda rank, other=other: work(rank, other))) for other in (True, False)), strict=True
    ):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name
