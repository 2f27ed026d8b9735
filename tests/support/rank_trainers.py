"""A stock Trainer on one process, or on each of several ranks, with the same rows in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from kt_hf import KTMoECallback
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model, trainable
from tests.support.ranks import fill_whole
from tests.support.trainers import settings


class Trained(NamedTuple):
    """What a rank has of a run."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    log: list[dict[str, Any]]


FSDP2 = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]}}


def whole(value: Any) -> Tensor:
    """A copy of a parameter, or of all ranks' parts of one that is sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def unequal_rows(count: int = 24) -> list[dict[str, Tensor]]:
    rows = [MIXTRAL.inputs(1, 5 + (3 * i) % 8, seed=i)[0] for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, mask = torch.full((len(rows), length), -100), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[i, :size], labels[i, :size], mask[i, :size] = row["input_ids"], row["labels"], 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def trainer(
    folder: Path, ranks: int, fill: bool = True, rows: Any = None, sharded: bool = False, **overrides: Any
) -> Trainer:
    """Four rows a step, whatever the number of ranks; `sharded` by FSDP2, which accelerate has for GPUs alone."""
    model = adapted_model(MIXTRAL, TORCH_FP32)
    if fill:
        fill_whole(model, 1)
    arguments = settings(
        folder,
        **{"per_device_train_batch_size": 4 // ranks, "max_grad_norm": 0.5, "max_steps": 20, "learning_rate": 1e-3}
        | overrides,
    )
    args = TrainingArguments(**((FSDP2 if sharded else {}) | arguments))
    if sharded:
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(
        model, args, train_dataset=rows or unequal_rows(), data_collator=padded,
        eval_dataset=unequal_rows(5), callbacks=[KTMoECallback()],
    )  # fmt: skip


def trained(of: Trainer, **train: Any) -> Trained:
    of.train(**train)
    log = of.state.log_history
    steps = [entry for entry in log if "loss" in entry]
    values = {name: whole(p) for name, p in trainable(of.model).items()}
    return Trained([e["loss"] for e in steps], [e["grad_norm"] for e in steps], values, log)
