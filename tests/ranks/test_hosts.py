"""Several hosts: each has all experts, divided among its ranks, and gradients of their LoRA are averaged over hosts."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kt_hf import KTAMXConfigError, KTAMXError, load_kt_model
from kt_hf.adapters import check_checkpoint
from kt_hf.adapters.adapter import ADAPTER
from kt_hf.experts import clip_grad_norm_, kt_layers
from kt_hf.placement.hosts import fits_host
from kt_hf.placement.tiers import Tiers
from kt_hf.shapes import ExpertShape
from tests.ranks.test_agreement import batches, loss_and_gradients, model_of
from tests.ranks.test_failures import Outcome, loss_of, outcome, outcomes, raise_in
from tests.ranks.test_trainer import compare, saved
from tests.support.cases import TORCH_FP32, make_config
from tests.support.checkpoints import saved as checkpoint
from tests.support.helpers import MIXTRAL
from tests.support.models import FAMILIES
from tests.support.patched import adapted_model, patched_model, trainable
from tests.support.rank_trainers import Trained, trained, trainer
from tests.support.ranks import fill_whole, joined, on_ranks, relative, results

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


@pytest.mark.slow
def test_checkpoints_are_one_adapter_and_resume_on_any_number_of_hosts(tmp_path: Path) -> None:
    """Rank 0's host gathers and writes; each owner's optimizer once; every host cuts its ranks' parts from the file."""
    runs = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "save_total_limit": None}
    expected = trained(trainer(tmp_path / "one", 1, **runs))
    whole = on(RANKS, HOSTS, tmp_path / "hosts", **runs)
    compare(whole, expected, hosts=HOSTS)
    folder = tmp_path / "hosts" / "checkpoint-3"
    one = saved(tmp_path / "one" / "checkpoint-3")
    assert {key: value.shape for key, value in saved(folder).items()} == {key: v.shape for key, v in one.items()}
    assert sorted(path.name for path in folder.glob("*_*.pt*")) == [
        "kt_experts_optimizer_0.pt", "kt_experts_optimizer_1.pt", *(f"rng_state_{rank}.pth" for rank in range(RANKS)),
    ]  # fmt: skip
    check_checkpoint(folder)
    pair = on(2, 2, tmp_path / "pair", **runs)
    cases = (4, 2, "hosts"), (4, 4, "hosts"), (2, 1, "hosts"), (4, 1, "hosts"), (4, 2, "one"), (2, 2, "pair")
    for ranks, hosts, start in cases:
        train = {"resume_from_checkpoint": str(tmp_path / start / "checkpoint-3")}
        again = on(ranks, hosts, tmp_path / f"{start}-on-{ranks}-{hosts}", train, fill=False, **runs)
        if start == "pair":  # DDP lays out its buckets anew, and so the order of sums of more than two
            for before, after in zip(pair, again, strict=True):
                assert before.losses[3:] == after.losses[3:]
                assert all(torch.equal(value, after.parameters[name]) for name, value in before.parameters.items())
        compare(again, expected, hosts=hosts)


@pytest.mark.slow
def test_a_missing_file_of_an_owner_is_named(tmp_path: Path) -> None:
    on(RANKS, HOSTS, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    (tmp_path / "checkpoint-2" / "kt_experts_optimizer_1.pt").unlink()
    with pytest.raises(KTAMXError, match=r"kt_experts_optimizer_1.pt.*checkpoint-1"):
        check_checkpoint(tmp_path / "checkpoint-2")


def test_the_start_and_a_saved_adapter_are_those_of_one_process(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        model = adapted_model(MIXTRAL, TORCH_FP32)
        start = {name: p.detach().clone() for name, p in trainable(model).items()}
        fill_whole(model, 5)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(patched_model(MIXTRAL, TORCH_FP32), tmp_path / "adapter")
        values = dict(model.named_parameters())
        assert all(torch.equal(p, values[name]) for name, p in again.named_parameters() if "lora" in name)
        return start

    torch.manual_seed(0)
    whole = adapted_model(MIXTRAL, TORCH_FP32)
    one = {name: p.detach().clone() for name, p in trainable(whole).items()}
    parts = joined(results(on_ranks(RANKS, work, hosts=HOSTS)), HOSTS)
    assert parts.keys() == one.keys()
    assert all(torch.equal(parts[name], value) for name, value in one.items())
    fill_whole(whole, 5)
    whole.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / ADAPTER).read_bytes() == (tmp_path / "adapter" / ADAPTER).read_bytes()


def test_the_mean_is_taken_by_the_optimizer_where_nothing_clips() -> None:
    def work(rank: int) -> dict[str, Tensor]:
        model = model_of(MIXTRAL, None)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(2):
            ids = MIXTRAL.inputs(1, 6, seed=10 * step + rank)
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in trainable(model).items()}

    assert joined(results(on_ranks(RANKS, work, hosts=HOSTS)), HOSTS)  # equal to the bit on both hosts


def test_replicas_that_start_with_other_values_are_refused() -> None:
    def work(rank: int) -> None:
        torch.manual_seed(rank // 2)
        model = adapted_model(MIXTRAL, TORCH_FP32).train()
        with pytest.raises(KTAMXConfigError, match=r"ranks 0 and 2, of two hosts, .*one seed"):
            loss_of(model)
        return True

    assert all(results(on_ranks(RANKS, work, hosts=HOSTS)))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (["3", "3", "3", "1"], r"unlike numbers of processes \(1, 3 of 4, LOCAL_WORLD_SIZE\).*as many on each"),
        (["3", "3", "3", "3"], r"unlike numbers of processes \(3 of 4"),
        ("mixed", r"do not follow each other \(LOCAL_RANK 0, 0, 1, 1\).*kt_expert_ranks: all"),
    ],
)
def test_hosts_of_unlike_numbers_are_refused(environment: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> bool:
        if environment == "mixed":
            monkeypatch.setenv("LOCAL_RANK", str(rank // 2))
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", environment[rank])
        with pytest.raises(KTAMXConfigError, match=words):
            adapted_model(MIXTRAL, TORCH_FP32)
        return adapted_model(MIXTRAL, TORCH_FP32, kt_expert_ranks="all") is not None

    assert results(on_ranks(RANKS, work, hosts=HOSTS)) == [True] * RANKS


def test_experts_that_no_host_holds_are_divided_among_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_kt_model` asks before it reads; of all hosts the least memory decides."""
    folder = checkpoint(MIXTRAL, tmp_path)

    def work(rank: int) -> list[int]:
        sizes = []
        for free in (2**40, 2**40 if rank else 2**10):
            monkeypatch.setattr("kt_hf.placement.hosts.available_memory", lambda free=free: free)
            model = load_kt_model(folder, make_config("torch", kt_lora_rank=8), dtype=torch.float32)
            sizes.append(kt_layers(model)[0].share.ranks)
        return sizes

    assert results(on_ranks(RANKS, work, hosts=HOSTS)) == [[2, 4]] * RANKS


def test_what_a_host_has_room_for() -> None:
    shapes = [ExpertShape(8, 2, 64, 64)] * 2
    size = 2 * 8 * 3 * 64 * 64 * 2
    assert fits_host(Tiers(), shapes, 16, 2 * size, 0) is None
    assert "free host memory" in str(fits_host(Tiers(), shapes, 16, size, 0))
    assert fits_host(Tiers(), shapes, 4, size, 0) is None
    assert fits_host(Tiers(8), shapes, 16, 0, 2 * size) is None
    assert "memory of its GPUs" in str(fits_host(Tiers(8), shapes, 16, 2 * size, size))
    assert "memory of its GPUs" in str(fits_host(Tiers(0, 8, 1), shapes, 16, 2 * size, size // 2))
    assert fits_host(None, shapes, 16, 2 * size, 0) is None


def fails(where: str, rank: int) -> None:
    model = model_of(MIXTRAL, None)
    if rank == 3:
        backend = model.base_model.model._kt_wrappers[1 if where == "forward" else 0].backend
        raise_in(backend, where, torch.OutOfMemoryError("CUDA out of memory"))
    wrapped = DistributedDataParallel(model)
    for micro in range(2):
        with wrapped.no_sync() if micro == 0 else contextlib.nullcontext():
            loss_of(wrapped).backward()


@pytest.mark.parametrize("where", ["forward", slowly("backward")])
def test_an_error_of_one_rank_is_raised_on_all_hosts(where: str) -> None:
    every = outcomes(RANKS, lambda rank: fails(where, rank), timeout=60, hosts=HOSTS)
    for rank, (error, after) in enumerate(every):
        assert isinstance(error, torch.OutOfMemoryError if rank == 3 else KTAMXError), error
        assert rank == 3 or "rank 3 has failed" in str(error)
        assert rank == 3 or f"layers.{int(where == 'forward')}.mlp.experts" in str(error)
        assert "CUDA out of memory" in str(error)
        assert after < 30


@pytest.mark.slow
def test_an_error_in_evaluation_does_not_leave_the_other_host_waiting() -> None:
    def work(rank: int) -> None:
        model = model_of(MIXTRAL, None).eval()
        with torch.no_grad():
            loss_of(model)
            if rank == 3:
                raise_in(model.base_model.model._kt_wrappers[0].backend, "forward", RuntimeError("no luck"))
            loss_of(model)

    for rank, (error, after) in enumerate(outcomes(RANKS, work, hosts=HOSTS, timeout=60)):
        assert "no luck" in str(error)
        assert rank == 3 or "rank 3 has failed" in str(error)
        assert after < 30


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "DDP"])
@pytest.mark.parametrize("by", [(2, 3), (3,), (0, 1), (0,)])
def test_one_micro_batch_more_on_a_host_is_an_error_at_once(by: tuple[int, ...], wrapped: bool) -> None:
    def work(rank: int) -> None:
        model = model_of(MIXTRAL, None)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        model = DistributedDataParallel(model) if wrapped else model
        for step in range(2):
            for _ in range(3 if rank in by and step == 0 else 2):
                loss_of(model).backward()
            optimizer.step()

    for error, after in outcomes(RANKS, work, timeout=60, hosts=HOSTS):
        assert isinstance(error, KTAMXError), error
        assert "different places" in str(error)
        assert "step 0" in str(error)
        assert after < 30


@pytest.mark.slow
def test_after_an_error_that_is_caught_all_hosts_go_on() -> None:
    def work(rank: int) -> float:
        model = model_of(MIXTRAL, None)
        backend = model.base_model.model._kt_wrappers[1].backend
        original = backend.forward
        if rank == 1:
            raise_in(backend, "forward", torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises((KTAMXError, torch.OutOfMemoryError)):
            loss_of(model)
        backend.forward = original
        loss = loss_of(model)
        loss.backward()
        return float(clip_grad_norm_(model.parameters(), 1.0))

    assert len(set(results(on_ranks(RANKS, work, hosts=HOSTS)))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("by", [0, 3])
def test_a_rank_that_ends_is_named_on_all_hosts(by: int) -> None:
    """By its owners at once, by the other host where it meets them; what one of them has found is said by all."""

    def work(rank: int) -> Outcome:
        model = model_of(MIXTRAL, None)
        loss_of(model)

        def second(rank: int) -> None:
            if rank == by:
                os.kill(os.getpid(), signal.SIGKILL)
            loss_of(model).backward()

        return outcome(rank, second)

    values = on_ranks(RANKS, work, timeout=60, hosts=HOSTS)
    for rank, value in enumerate(values):
        if rank == by:
            assert value is None
            continue
        error, after = value
        assert isinstance(error, KTAMXError), error
        assert f"for rank {by}, which has ended" in str(error)
        assert after < 30
