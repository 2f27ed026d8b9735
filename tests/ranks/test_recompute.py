"""Experts on GPUs (here the CPU in their place): each rank keeps its own tokens, and a recompute exchanges no rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kt_hf.ranks import Ranks
from tests.support.cases import TORCH_BF16
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, trainable
from tests.support.ranks import fill_whole, on_ranks, results

E = MIXTRAL.num_experts
TIERS = {"streamed": {"resident": 0, "streamed": E}, "resident": {"resident_layers": 2}}


def model_of(checkpointing: str | None, tier: str, **config: Any) -> Any:
    model = adapted_model(MIXTRAL, TORCH_BF16, kt_expert_placement=TIERS[tier], **config)
    fill_whole(model, 1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def gradients(model: Any, batches: list[Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients where both forwards come before both backwards, and how often rows were exchanged."""
    caller, calls, exchange = DistributedDataParallel(model), list[int](), Ranks.rows_to_all

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return exchange(*args)

    Ranks.rows_to_all = counted  # type: ignore[method-assign]  # of this process, which ends with the test
    with caller.no_sync():
        losses = [caller(input_ids=ids, labels=ids).loss for ids in batches]
        for loss in losses:
            loss.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}, len(calls)


def rows_of(rank: int) -> list[Tensor]:
    """Two micro-batches: of odd ranks twice the same, so that they alone could take one for the other."""
    if rank % 2:
        return [MIXTRAL.inputs(1, 7, seed=rank)] * 2
    return [MIXTRAL.inputs(1, length, seed=rank + length) for length in (5, 9)]


@pytest.mark.parametrize(
    ("tier", "checkpointing", "hosts"),
    [("streamed", "non-reentrant", 1), ("resident", "non-reentrant", 1), ("streamed", "reentrant", 1),
     ("streamed", "non-reentrant", 2)],
)  # fmt: skip
def test_a_recompute_exchanges_nothing_and_has_the_same_bits(
    tier: str, checkpointing: str, hosts: int, cpu_for_gpu: None
) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        how = {"kt_expert_activations": "retain"}
        plain, before = gradients(model_of(None, tier, **how), rows_of(rank))
        again, exchanges = gradients(model_of(checkpointing, tier, **how), rows_of(rank))
        return plain, again, before, exchanges

    for plain, again, before, exchanges in results(on_ranks(2 * hosts, work, hosts=hosts)):
        assert before == 2 * 2 * 2, "a forward and a backward, two layers, two batches"
        # Where odd ranks take one batch for the other all ranks compute it again, two layers. Reentrant checkpointing
        # keeps nothing of the first forward.
        assert exchanges == before + (2 if checkpointing == "non-reentrant" else 4)
        assert plain.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_one_batch_after_the_other(cpu_for_gpu: None) -> None:
    """As a trainer does: nothing is taken for something else, and rows cross twice a layer."""

    def work(rank: int) -> list[int]:
        model = model_of("non-reentrant", "streamed")
        counts = []
        for ids in rows_of(0 if rank == 0 else 2):
            counts.append(gradients(model, [ids])[1])
            model.zero_grad()
        return counts

    for counts in results(on_ranks(2, work)):
        assert counts[0] == 2 * 2


def test_what_is_kept_is_of_this_ranks_tokens(cpu_for_gpu: None) -> None:
    """[T, H] of its own, and nothing of the other's, however many ranks there are."""

    def work(rank: int) -> list[tuple[int, ...]]:
        model = model_of("non-reentrant", "streamed", kt_expert_activations="retain")
        ids = MIXTRAL.inputs(1, 6 + rank, seed=rank)
        loss = model(input_ids=ids, labels=ids).loss
        tickets = [t for layer in model.base_model.model._kt_wrappers for t in layer._runner._live.values()]
        assert all(ticket.saved is None for ticket in tickets)
        shapes = [tuple(ticket.retained.output.shape) for ticket in tickets if ticket.retained]
        loss.backward()
        return shapes

    for rank, shapes in enumerate(results(on_ranks(2, work))):
        assert shapes == [(6 + rank, MIXTRAL.hidden)] * 2
