"""Two GPUs, connected by NCCL: they train as one does, by DDP and by FSDP2, and name a rank that fails."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from kt_hf import KTMoECallback
from kt_hf.experts import kt_layers
from tests.ranks.test_trainer import compare
from tests.support.cases import TORCH_FP32, Case
from tests.support.gpu_ranks import GPUS, on_gpus
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model
from tests.support.rank_trainers import FSDP2, Trained, padded, trained, unequal_rows
from tests.support.ranks import fill_whole, is_owned, joined, results
from tests.support.trainers import settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
]
BF16 = Case("auto", torch.bfloat16, forward=1e-2, grad=2e-2, same=5e-3)
PLACEMENTS = {"streamed": {"resident": 0, "streamed": MIXTRAL.num_experts}, "resident": {"resident_layers": 2}}

SHARDED = {"sharded": True}


def train(rank: int, folder: str, ranks: int, tier: str = "cpu", sharded: bool = False, **more: Any) -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = tier == "cpu"
    placed = {} if exact else {"kt_expert_placement": PLACEMENTS[tier], "kt_moe_lora_device": "gpu"}
    model = adapted_model(MIXTRAL, TORCH_FP32 if exact else BF16, **placed)
    fill_whole(model, 1)
    dtypes = set[tuple[torch.dtype, torch.dtype]]()
    for layer in kt_layers(model):
        layer.register_forward_hook(lambda _, given, out: dtypes.add((given[0].dtype, out.dtype)))
    arguments = {
        "per_device_train_batch_size": 4 // ranks, "max_grad_norm": 0.5, "max_steps": 20, "learning_rate": 1e-3,
        "use_cpu": False, "ddp_timeout": 120, "bf16": not exact,
    }  # fmt: skip
    args = TrainingArguments(**(FSDP2 if sharded else {}) | settings(Path(folder), **arguments | more))
    trainer = Trainer(
        model, args, train_dataset=unequal_rows(), data_collator=padded, callbacks=[KTMoECallback()]
    )  # fmt: skip
    run = trained(trainer)
    assert dtypes == {(torch.float32 if exact else torch.bfloat16,) * 2}, "autocast widens what follows the experts"
    rest = [p for name, p in trainer.model.named_parameters() if not is_owned(name)]
    assert all(p.is_cuda for p in rest)
    assert any(isinstance(p, DTensor) for p in rest) == sharded
    nbytes = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in rest)
    parameters = {name: value.cpu() for name, value in run.parameters.items()}
    return {"run": Trained(run.losses, run.norms, parameters, run.log), "dense": nbytes}


@cache
def ran(folder: Path, ranks: int, **how: Any) -> tuple[list[Trained], int]:
    """The runs of all ranks, and bytes of what is not experts on the last."""
    got = results(on_gpus(ranks, train, folder=str(folder / str(len(how)) / str(ranks)), ranks=ranks, **how))
    return [one["run"] for one in got], got[-1]["dense"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def test_ddp_trains_as_one_gpu(folder: Path) -> None:
    expected = ran(folder, 1)[0][0]
    assert max(expected.norms) > 0.5, "nothing is clipped"
    compare(ran(folder, 2)[0], expected)


def test_fsdp2_trains_as_one_gpu_with_half_the_dense_part(folder: Path) -> None:
    runs, nbytes = ran(folder, 2, sharded=True)
    compare(runs, ran(folder, 1)[0][0])
    assert nbytes <= 0.6 * ran(folder, 2)[1]


def test_fsdp2_in_bf16(folder: Path) -> None:
    """Frozen bf16 and trained fp32 in one layer."""
    one, two = (ran(folder, ranks, tier="streamed", max_steps=4, **more)[0] for ranks, more in ((1, {}), (2, SHARDED)))
    assert max(abs(a - b) for a, b in zip(one[0].losses, two[0].losses, strict=True)) <= 0.02


@pytest.mark.parametrize("tier", PLACEMENTS)
def test_experts_on_the_gpus(tier: str, folder: Path) -> None:
    one, two = ran(folder, 1, tier=tier, max_steps=4)[0][0], ran(folder, 2, tier=tier, max_steps=4)[0]
    assert two[0].losses == two[1].losses
    assert max(abs(a - b) for a, b in zip(one.losses, two[0].losses, strict=True)) <= 0.02
    assert max(abs(a - b) / b for a, b in zip(one.norms, two[0].norms, strict=True)) <= 0.05
    assert joined([rank.parameters for rank in two]).keys() == one.parameters.keys()  # replicated ones equal to the bit


# ---- trouble


def loss_of(model: Any) -> Tensor:
    ids = MIXTRAL.inputs(1, 6).cuda()
    return model(input_ids=ids, labels=ids).loss


def _fail(model: Any, how: str, note: Path, layer: int) -> None:
    """What rank 1 does in a layer of its next forward."""

    def hook(*_: Any) -> None:
        note.write_text(str(time.time()))
        if how == "raises":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    model._kt_wrappers[layer].backend.forward = hook


def trouble(rank: int, how: str, note: str, layer: int) -> Any:
    model = adapted_model(MIXTRAL, BF16, kt_expert_placement=PLACEMENTS["streamed"], kt_moe_lora_device="gpu").cuda()
    fill_whole(model, 1)
    whole = DistributedDataParallel(model.train())
    for _ in range(2):  # from the second on ranks look at each other later inside of a pass
        loss_of(whole).backward()
    if rank == 1 and how != "one more":
        _fail(model.base_model.model, how, Path(note), layer)
    elif rank == 1:
        Path(note).write_text(str(time.time()))
    try:
        if rank == 1 and how == "one more":
            with whole.no_sync():
                loss_of(whole).backward()
        for _ in range(2):
            loss_of(whole).backward()
            torch.cuda.synchronize()
    except Exception as error:
        return type(error).__mro__[1].__name__, str(error), time.time() - float(Path(note).read_text())
    return "nothing", "", 0.0


@pytest.mark.parametrize(
    ("how", "layer", "timeout", "words"),
    [
        ("raises", 0, 60, r"layers\.0\.mlp\.experts: rank 1 has failed there.*CUDA out of memory"),
        ("raises", 1, 60, r"layers\.1\.mlp\.experts: rank 1 has failed there.*CUDA out of memory"),
        ("is killed", 0, 60, r"layer.? ?\d.*for rank 1, which has ended"),
        ("stalls", 0, 20, r"layer \d.*for rank 1, which has ended or stands still"),
        ("one more", 0, 60, r"different places.*the step's last micro-batch"),
    ],
)
def test_what_goes_wrong_on_one_gpu_is_named_on_the_other(
    how: str, layer: int, timeout: int, words: str, tmp_path: Path
) -> None:
    note = str(tmp_path / "note")
    told = on_gpus(2, trouble, timeout=timeout, limit=90, how=how, note=note, layer=layer)[0]
    assert told is not None, "rank 0 has ended without a word"
    _, text, seconds = told
    assert re.search(words, text, re.DOTALL), told
    assert seconds < (5 if how != "stalls" else timeout), told
