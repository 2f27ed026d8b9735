"""The dense part sharded by FSDP2, by hand and by accelerate, owned LoRA left to its rank: as one process trains.

accelerate shards on GPUs alone; here it is told that the CPU is one, and does all that it does there with gloo.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kt_hf import KTAMXConfigError, KTAMXError
from kt_hf.adapters import check_checkpoint
from kt_hf.experts import clip_grad_norm_
from kt_hf.experts.holders import owned_lora
from tests.ranks.test_failures import outcomes
from tests.ranks.test_trainer import compare, saved
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, trainable
from tests.support.rank_trainers import Trained, trained, trainer, whole
from tests.support.ranks import fill_whole, joined, on_ranks, relative, results
from tests.support.tiny import ROOT

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
    gradients = {name: whole(p.grad) for name, p in trainable(model).items()}
    for optimizer in optimizers:
        optimizer.step()
    return total, norm, gradients, {name: whole(p.detach()) for name, p in trainable(model).items()}


def _groups(model: Any, own: list[Any]) -> list[list[Any]]:
    ids = {id(p) for p in own}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [group for group in (own, rest) if group]


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


def on(
    ranks: int, folder: Path, train: dict[str, Any] | None = None, hosts: int = 1, sharded: bool = True, **settings: Any
) -> list[Trained]:
    def work(rank: int) -> Trained:
        made = trainer(folder, ranks, sharded=sharded, **settings)
        got = trained(made, **(train or {}))
        kinds = [isinstance(p, DTensor) for p in made.model.parameters()]
        assert any(kinds) == sharded
        assert not all(kinds)
        return got

    return results(on_ranks(ranks, work, hosts=hosts))


def test_two_steps_by_accelerate(tmp_path: Path) -> None:
    expected = trained(trainer(tmp_path / "one", 1, max_steps=2))
    assert max(expected.norms) > 0.5, "nothing is clipped"
    compare(on(2, tmp_path / "two", max_steps=2), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "hosts"), [(2, 1), (4, 2)])
def test_twenty_steps_by_accelerate(ranks: int, hosts: int, tmp_path: Path) -> None:
    """Accumulation too, where FSDP2 does not reduce gradients of all but the last micro-batch."""
    more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // ranks}
    one = trained(trainer(tmp_path / "one", 1, **more | {"per_device_train_batch_size": 4}))
    compare(on(ranks, tmp_path / "ranks", hosts=hosts, **more), one, hosts=hosts)


@pytest.mark.slow
def test_checkpoints_are_those_of_ddp_and_of_one_process(tmp_path: Path) -> None:
    runs = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "save_total_limit": None}
    expected = trained(trainer(tmp_path / "one", 1, **runs))
    first = on(2, tmp_path / "fsdp", **runs)
    compare(first, expected)
    compare(on(2, tmp_path / "ddp", sharded=False, **runs), expected)
    folders = [tmp_path / name / "checkpoint-3" for name in ("one", "fsdp", "ddp")]
    one, fsdp, _ = map(saved, folders)
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in fsdp.items()}
    assert max(relative(fsdp[key], value) for key, value in one.items()) <= 5e-6
    assert sorted(path.name for path in folders[1].iterdir()) == sorted(path.name for path in folders[2].iterdir())
    check_checkpoint(folders[1])
    cases = ("fsdp", 2, True), ("fsdp", 4, True), ("fsdp", 2, False), ("ddp", 2, True), ("one", 2, True)
    for start, ranks, sharded in cases:
        train = {"resume_from_checkpoint": str(tmp_path / start / "checkpoint-3")}
        again = on(ranks, tmp_path / f"{start}-{ranks}-{sharded}", train, fill=False, sharded=sharded, **runs)
        if (start, ranks, sharded) == ("fsdp", 2, True):
            for before, after in zip(first, again, strict=True):
                assert before.losses[3:] == after.losses[3:]
                assert all(torch.equal(value, after.parameters[name]) for name, value in before.parameters.items())
        compare(again, expected)


@pytest.mark.slow
def test_evaluation_and_the_best_model(tmp_path: Path) -> None:
    runs = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
        "load_best_model_at_end": True, "per_device_eval_batch_size": 1, "learning_rate": 0.1, "save_total_limit": 1,
    }  # fmt: skip
    two = on(2, tmp_path, **runs)
    best = saved(next(tmp_path.glob("checkpoint-*")))
    parameters = joined([rank.parameters for rank in two])
    assert all(torch.equal(value, best[name.replace(".default", "")]) for name, value in parameters.items())


def test_whole_tensors_are_loaded_into_a_sharded_model(tmp_path: Path) -> None:
    """PEFT cuts an adapter's up by itself where it knows of DTensors; torch takes nothing else for them."""

    def work(rank: int) -> bool:
        of = trainer(tmp_path, 2, sharded=True, max_steps=1)
        of.train()
        sharded = {name: p for name, p in trainable(of.model).items() if isinstance(p, DTensor)}
        values = {name: torch.arange(float(p.numel())).view(p.shape) for name, p in sharded.items()}
        of.model.load_state_dict(values, strict=False)
        return bool(values) and all(torch.equal(whole(p), values[name]) for name, p in sharded.items())

    assert results(on_ranks(2, work)) == [True, True]


@pytest.mark.parametrize("by", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_micro_batch_more_on_one_rank_is_an_error_at_once(by: int, tmp_path: Path) -> None:
    """FSDP2 gathers parameters before the first layer of experts, where the other rank would never come."""

    def work(rank: int) -> None:
        of = trainer(tmp_path, 2, sharded=True, max_steps=1)
        step = of.training_step
        of.training_step = lambda *args: sum(step(*args) for _ in range(2 if rank == by else 1))
        of.train()

    for error, after in outcomes(2, work):
        assert isinstance(error, KTAMXError), error
        assert "different places" in str(error)
        assert all(words in str(error) for words in ("the beginning of a forward", "the gradient norm")), error
        assert after < 10


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading=True.*each rank has its own experts"),
        ({"cpu_offload": True}, "fsdp_offload_params=True.*fsdp_offload_params: false"),
    ],
)
def test_what_experts_cannot_follow_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        with pytest.raises(KTAMXConfigError, match=words):
            trainer(tmp_path, 2, sharded=True, max_steps=1, fsdp_config=config).train()
        return True

    assert results(on_ranks(2, work)) == [True, True]


def test_fsdp1_is_refused() -> None:
    def work(rank: int) -> bool:
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False))
        with pytest.raises(KTAMXConfigError, match=r"fsdp_version=1: FSDP1 flattens.*fsdp_version: 2"):
            Accelerator.prepare_model(accelerator, model_of())
        return True

    assert results(on_ranks(2, work)) == [True, True]


def test_a_trainer_that_shards_nothing_is_refused(tmp_path: Path) -> None:
    """As on a CPU, where accelerate would take DDP without a word."""

    def work(rank: int) -> bool:
        with pytest.raises(KTAMXConfigError, match="nothing of the model is sharded; accelerate shards on GPUs alone"):
            trainer(tmp_path, 2, max_steps=1, fsdp=True).train()
        return True

    assert results(on_ranks(2, work)) == [True, True]


def test_the_configuration_is_accelerates() -> None:
    config = load_config_from_file(str(ROOT / "configs/accelerate/fsdp2.yaml"))
    assert str(config.distributed_type).endswith("FSDP")
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert config.fsdp_config["fsdp_offload_params"] is False
