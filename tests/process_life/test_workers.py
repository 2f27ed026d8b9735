"""DataLoader workers and other processes beside a model on the operators."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kt_hf import KTAMXError
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS
from tests.support.helpers import MIXTRAL
from tests.support.patched import logits_of, loss_of, trainable
from tests.support.trainers import model_to_train, result, trainer_for

pytestmark = [*KERNEL_MARKS]
IDS = MIXTRAL.inputs()


class Rows(Dataset):
    """Token ids, each row made in the process that reads it."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = MIXTRAL.inputs(1, 10, seed=index)[0]
        return {"input_ids": ids, "labels": ids, "process": os.getpid()}


class Asking(Dataset):
    """Rows that need the model, as on-the-fly filtering by its loss would."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return logits_of(self.model, IDS)


def trained(**settings: Any) -> tuple[list[float], set[int], dict[str, Tensor]]:
    """Losses of some steps, the processes that made the rows, and the parameters after."""
    model = model_to_train(KERNEL_BF16)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    losses, processes = [], set()
    loader = DataLoader(Rows(), batch_size=4, **settings)
    for _ in range(2):  # epochs: workers end and others start, beside a live engine
        for batch in loader:
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            processes |= set(batch["process"].tolist())
    return losses, processes, {name: value.detach().clone() for name, value in trainable(model).items()}


@pytest.mark.parametrize("settings", [{}, {"persistent_workers": True}], ids=["", "persistent"])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_training_with_workers(start: str, settings: dict[str, Any]) -> None:
    if start == "spawn" and settings:
        pytest.skip("each spawned worker imports torch: once is enough")
    workers = 2 if start == "fork" else 1
    losses, processes, parameters = trained(num_workers=workers, multiprocessing_context=start, **settings)
    expected, here, values = trained()
    assert here == {os.getpid()}
    assert os.getpid() not in processes
    assert len(processes) == workers * (1 if settings else 2)
    assert losses == expected
    assert [name for name, value in values.items() if not torch.equal(parameters[name], value)] == []


def test_trainer_with_workers(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 2):
        trainer = trainer_for(
            model_to_train(KERNEL_BF16),
            tmp_path,
            max_steps=8,
            dataloader_num_workers=workers,
            evaluate=True,
            eval_strategy="steps",
            eval_steps=4,
        )
        trainer.train()
        runs.append(result(trainer).losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0]


def test_worker_that_calls_the_model() -> None:
    """The operators' threads are not in a fork: an error that says so, no hang, and training goes on."""
    model = model_to_train(KERNEL_BF16)
    expected = loss_of(model, IDS)
    loader = DataLoader(Asking(model), num_workers=1, multiprocessing_context="fork", timeout=60)
    with pytest.raises(KTAMXError, match=r"model\.layers\.0\.mlp\.experts: this process is a fork.*spawn"):
        list(loader)
    assert torch.equal(loss_of(model, IDS), expected)
    expected.backward()


def test_spawned_worker_cannot_take_the_model_along() -> None:
    model = model_to_train(KERNEL_BF16)
    loader = DataLoader(Asking(model), num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(KTAMXError, match=r"cannot be pickled.*load and patch the base model in the other process"):
        list(loader)


def _loss_there(queue: Any, seed: int) -> None:
    torch.set_num_threads(1)
    queue.put(loss_of(model_to_train(KERNEL_BF16), MIXTRAL.inputs(seed=seed)).item())


def test_spawned_process_patches_a_model_of_its_own() -> None:
    model = model_to_train(KERNEL_BF16)
    here = loss_of(model, MIXTRAL.inputs(seed=5)).item()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_loss_there, args=(queue, 5))
    process.start()
    assert queue.get(timeout=120) == here
    process.join(60)
    assert process.exitcode == 0


def test_parts_of_the_model_are_not_copied() -> None:
    """A projection alone as well: without its layer it would compute nothing."""
    layer = model_to_train(KERNEL_BF16)._kt_wrappers[0]
    for part in (layer, layer.gate_proj):
        with pytest.raises(KTAMXError, match="cannot be pickled"):
            pickle.dumps(part)
