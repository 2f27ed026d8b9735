"""Where experts are, decided by what all ranks have measured: one answer on all of them, at the same pass."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest
import torch

from kt_hf import KTConfig, apply_kt_moe
from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.errors import KTAMXError
from kt_hf.placement import Placement, packer_of
from kt_hf.placement.choice import Measured
from kt_hf.placement.lora_device import LoraDevice
from kt_hf.placement.machine_rates import assumed_rates, slowest_rates
from kt_hf.placement.tiers import Tiers
from kt_hf.ranks import Ranks, current_world, of_all_ranks
from kt_hf.shapes import ExpertShape
from tests.placement.test_promotion import LAYER, REST, Scripted, held, model
from tests.support.helpers import MIXTRAL
from tests.support.ranks import fill_whole, on_ranks, results

E, OF_RANK = MIXTRAL.num_experts, LAYER // 2
ROOM = int((REST + 1.5 * OF_RANK) / 0.95)  # for one layer of a rank's experts


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, cpu_for_gpu: None) -> None:
    """A GPU whose memory each rank says for itself; and a CPU that is not worth measuring."""
    monkeypatch.setattr("kt_hf.placement.promotion.DeviceMemory", Owned)
    monkeypatch.setattr("kt_hf.placement.choice.copy_rate", lambda _: 1e12)
    monkeypatch.setattr("kt_hf.placement.promotion.work_bytes", lambda _: 0)
    monkeypatch.setattr("kt_hf.placement.promotion._latest", {})  # a model of another test may be alive still


class Owned(Scripted):
    """As `Scripted`, of a rank that holds half of each layer."""

    limit_bytes = 100 * LAYER

    def allocated(self) -> int:
        return REST + (len(self.promotion.held) * OF_RANK if self.promotion else 0)

    peak = allocated

    def limit(self) -> int:
        return self.limit_bytes


def trained(rank: int, limits: list[int], steps: int, **config: Any) -> tuple[list[list[int]], list[Any]]:
    """The layers held in each step's pass; losses and LoRA at the end."""
    patched = model(**config)
    fill_whole(patched, 1)
    packer = packer_of(patched)
    assert packer is not None
    moved = packer.promotion
    if moved is not None:
        moved._memory.limit_bytes = limits[rank]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW([p for p in patched.parameters() if p.requires_grad], lr=0.01)
    history, losses = [], []
    patched.train()
    for i in range(steps):
        ids = MIXTRAL.inputs(2, 12, seed=2 * i + rank)
        loss = patched(input_ids=ids, labels=ids).loss
        history.append(held(patched) if moved else [])  # as the pass began
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return history, [*losses, *(p.detach() for p in patched.parameters() if p.requires_grad)]


def test_all_hold_what_the_rank_with_least_room_can() -> None:
    """Rank 0 alone would hold both layers; and nothing of it shows in the results."""
    (roomy, first), (tight, second) = results(on_ranks(2, lambda rank: trained(rank, [100 * LAYER, ROOM], 5)))
    assert roomy == tight == [[], [], [1], [1], [1]]
    streamed = results(on_ranks(2, lambda rank: trained(rank, [0, 0], 5, kt_expert_placement={"streamed": E})))
    for mine, (_, expected) in zip((first, second), streamed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_one_that_runs_out_of_memory_gives_back_at_once_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> list[list[int]]:
        compute, left = StreamedBackend.backward, [9 if rank else -1]  # its last layer's in the fifth step

        def scarce(*args: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(*args)

        monkeypatch.setattr(StreamedBackend, "backward", scarce)
        return trained(rank, [100 * LAYER] * 2, 7)[0]

    first, second = results(on_ranks(2, work))
    assert first == [[], [], [0, 1], [0, 1], [0, 1], [1], [1]]
    assert second == first


def placed(rank: int) -> tuple[Tiers | None, LoraDevice | None, int, Placement | None]:
    patched = model(kt_moe_lora_device="auto")
    packer = packer_of(patched)
    assert packer is not None
    return packer.tiers, packer.lora.chosen, packer._chunk_bytes, packer.placement


def test_unlike_machines_are_placed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bus, of memory and of cores each rank has its own."""

    def work(rank: int) -> Any:
        free = [10**12, 3 * 10**8][rank]
        for where in ("kt_hf.placement.choice", "kt_hf.placement.packer"):
            monkeypatch.setattr(f"{where}.free_device_memory", lambda _: free)
        monkeypatch.setattr("kt_hf.placement.choice.copy_rate", lambda _: [1e12, 1e9][rank])
        return placed(rank)

    first, second = results(on_ranks(2, work))
    assert first == second
    assert first[0] == Tiers(0, E // 2) or first[0].on_cpu(E // 2)  # what the slower bus leads to


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_ranks_that_are_not_connected_yet_meet_at_the_launchers_store(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())

    def work(rank: int) -> Any:
        monkeypatch.setenv("MASTER_PORT", port)
        ranks = Ranks(current_world())
        values = of_all_ranks(ranks, lambda: {"rank": rank})

        def measure() -> int:
            if rank:
                raise ValueError("no such device")
            return 1

        with pytest.raises((KTAMXError, ValueError)) as error:
            of_all_ranks(ranks, measure)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)  # beside it, at the same address
        again = of_all_ranks(ranks, lambda: [rank] * (1 + 3 * rank))
        return values, str(error.value), again

    for rank, (values, words, again) in enumerate(results(on_ranks(2, work, connect=False))):
        assert values == [{"rank": 0}, {"rank": 1}]
        assert words == "no such device" if rank else "rank 1 has failed there: ValueError: no such device" in words
        assert again == [[0], [1, 1, 1, 1]]


def test_the_order_of_experts_is_the_first_ranks() -> None:
    def work(rank: int) -> Any:
        counts = {layer: torch.arange(E) if rank else torch.arange(E).flip(0) for layer in (0, 1)}
        config = KTConfig(kt_expert_placement={"resident": 2, "streamed": 2})
        patched = apply_kt_moe(MIXTRAL(torch.bfloat16), config, placement=counts)
        packer = packer_of(patched)
        assert packer is not None
        assert packer.placement is not None
        return packer.placement.order

    first, second = results(on_ranks(2, work))
    assert first == second
    assert first[0] == tuple(range(E))


def test_what_is_decided_by_is_the_least_that_any_has() -> None:
    ranks = [Measured(None, 5, 30, 2.0, 8), Measured(None, 7, 20, 1.0, 16), Measured("no", 9, None, 3.0, 4)]
    assert Measured.least(ranks[:1]) == ranks[0]
    assert Measured.least(ranks) == Measured("no", 5, 20, 1.0, 4)
    rates = assumed_rates(ExpertShape(8, 2, 64, 64))
    slow = dataclasses.replace(rates, pcie_bytes_per_s=1e9, forward=dataclasses.replace(rates.forward, fixed=9.0))
    both = slowest_rates([dataclasses.asdict(rates), dataclasses.asdict(slow)])
    assert both == slow
    assert slowest_rates([dataclasses.asdict(rates)]) == rates
