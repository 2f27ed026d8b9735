"""What else a script may do with a stock Trainer or accelerate, against the unpatched model with stock PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import logits_of, patched_model
from tests.support.stock import assert_same_parameters, pair, patched_config, same_start, stock_config
from tests.support.trainers import trainer_for
from tests.support.trl_runs import FP32_AND_KERNEL, arguments, callbacks, distance, limit, logged, std


def rows(count: int = 16, length: int = 25) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in MIXTRAL.inputs(count, length, seed=3)]


def train(model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, data: Any = None, **overrides: Any) -> Trainer:
    optimizers = overrides.pop("optimizers", (None, None))
    trainer = kind(
        model,
        TrainingArguments(**arguments(folder, **{"max_steps": 6, **overrides})),
        train_dataset=rows() if data is None else data,
        callbacks=callbacks(model),
        optimizers=optimizers,
    )
    trainer.train()
    return trainer


class Classifier(Trainer):
    """Which of four classes the last token's logits say; the router's load is punished too, by a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_router_logits=True)
        logits = outputs.logits[:, -1, :4].float()
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
        shares = [router.float().softmax(-1).mean(0) for router in outputs.router_logits]
        loss = loss + 0.1 * sum((share * share).sum() for share in shares)
        return (loss, {"logits": logits}) if return_outputs else loss


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
def test_a_custom_loss_of_classes(case: Case, tmp_path: Path) -> None:
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 4)} for i, row in enumerate(rows(32, 12))]
    model, stock = pair(MIXTRAL, case, std(case))
    over = {"per_device_train_batch_size": 32, "remove_unused_columns": False}
    ours, theirs = (train(m, tmp_path, Classifier, data, **over) for m in (model, stock))
    losses = logged(theirs)
    assert losses[0] - losses[-1] > 0.3
    # One token in twelve is looked at, so one token's other expert counts more.
    assert distance(logged(ours), losses) <= (1e-4 if case is TORCH_FP32 else 0.05)
    if case is TORCH_FP32:
        assert_same_parameters(model, stock, 1e-3)
    predictions = ours.predict(data[:8]).predictions
    assert predictions.shape == (8, 4)


def loraplus(model: nn.Module) -> tuple[Any, Any]:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0), None


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
def test_learning_rates_per_group(case: Case, tmp_path: Path) -> None:
    """LoRA+: B learns faster than A, the experts' too."""
    model, stock = pair(MIXTRAL, case, std(case))
    optimizer, _ = loraplus(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fast = {names[id(p)] for group in optimizer.param_groups if group["lr"] == 4e-3 for p in group["params"]}
    assert fast == {name for name in names.values() if ".lora_B." in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (train(m, tmp_path, optimizers=loraplus(m)) for m in (model, stock))
    assert logged(theirs)[0] - logged(theirs)[-1] > 0.2
    assert distance(logged(ours), logged(theirs)) <= limit(case)
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if name in before}
    experts_a = [moved[name] for name in moved if ".experts." in name and ".lora_A." in name]
    experts_b = [moved[name] for name in moved if ".experts." in name and ".lora_B." in name]
    assert max(experts_a) < 6.5 * 5e-4
    assert min(experts_b) > 6.5 * 5e-4


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
@pytest.mark.parametrize("names", [["lm_head"], ["gate"]], ids=["head", "router"])
def test_modules_to_save(names: list[str], case: Case, tmp_path: Path) -> None:
    """Trained whole beside LoRA, and in the checkpoint: the head, and the router, whose gradient the experts give."""
    model = get_peft_model(patched_model(MIXTRAL, case), patched_config(MIXTRAL, modules_to_save=names))
    stock = get_peft_model(MIXTRAL(), stock_config(MIXTRAL, modules_to_save=names))
    same_start(model, stock, std(case))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert len(trained) == (1 if names == ["lm_head"] else 2)
    before = {name: model.get_parameter(name).detach().clone() for name in trained}
    ours = train(model, tmp_path, save_strategy="steps", save_steps=6)
    theirs = train(stock, tmp_path / "stock")
    assert logged(theirs)[0] - logged(theirs)[-1] > 0.2
    assert distance(logged(ours), logged(theirs)) <= limit(case)
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in trained)
    if case is TORCH_FP32:
        assert_same_parameters(model, stock, 1e-3)
    again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path / "checkpoint-6")
    assert torch.equal(logits_of(again, MIXTRAL.inputs()), logits_of(model.eval(), MIXTRAL.inputs()))


@pytest.mark.parametrize("case", FP32_AND_KERNEL)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_auto_find_batch_size(case: Case, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the middle of a forward or backward: the next, smaller batches train as if nothing had been."""
    losses = []
    for fails in (False, True):
        torch.manual_seed(0)
        model, _ = pair(MIXTRAL, case)
        trainer = trainer_for(
            model, tmp_path, max_steps=4, auto_find_batch_size=True, per_device_train_batch_size=8 if fails else 7
        )
        backend = model._kt_wrappers[0]._runner.backend
        original, sizes = getattr(backend, where), []

        def limited(*args: Any, _original: Any = original, _sizes: Any = sizes, **kwargs: Any) -> Any:
            size = args[1 if where == "backward" else 0].shape[0]
            _sizes.append(size)
            if size > 70:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return _original(*args, **kwargs)

        monkeypatch.setattr(backend, where, limited)
        trainer.train()
        assert trainer._train_batch_size == 7
        assert (max(sizes) > 70) == fails
        losses.append(logged(trainer))
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.fixture
def accelerate() -> Iterator[None]:
    """accelerate keeps one state a process, and refuses another precision than the first one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize("case", FP32_AND_KERNEL)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_bare_accelerate_loop(case: Case, precision: str, tmp_path: Path) -> None:
    """prepare, accumulate, clip, save and load of the whole state; no Trainer and no callback."""
    losses: dict[str, list[float]] = {}
    models = dict(zip(("ours", "stock"), pair(MIXTRAL, case, std(case)), strict=True))
    for name, model in models.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=12)
        loader = torch.utils.data.DataLoader(rows(32), batch_size=8)
        wrapped, optimizer, loader, schedule = accelerator.prepare(model.train(), optimizer, loader, schedule)
        losses[name] = []

        def epoch(wrapped: Any = wrapped, optimizer: Any = optimizer, loader: Any = loader, name: str = name,
                  schedule: Any = schedule, accelerator: Any = accelerator) -> None:  # fmt: skip
            for batch in loader:
                with accelerator.accumulate(wrapped):
                    loss = wrapped(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                losses[name].append(accelerator.gather(loss.detach()).mean().item())

        epoch()
        epoch()
        if name == "ours":
            unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            unwrapped.save_pretrained(tmp_path)
            again = PeftModel.from_pretrained(patched_model(MIXTRAL, case), tmp_path)
            assert torch.equal(logits_of(again, MIXTRAL.inputs()), logits_of(unwrapped.eval(), MIXTRAL.inputs()))
        accelerator.free_memory()
    assert losses["stock"][0] - losses["stock"][-1] > 0.1
    exact = case is TORCH_FP32 and precision == "no"
    assert distance(losses["ours"], losses["stock"]) <= (1e-4 if exact else 0.03)


@pytest.mark.usefixtures("accelerate")
def test_accelerates_state_is_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    """save_state in the middle, load_state into the same model later: on from there as before, to the bit."""
    model, _ = pair(MIXTRAL, case)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    def steps(count: int) -> list[float]:
        losses = []
        for ids in MIXTRAL.inputs(count, 20, seed=1).split(1):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    steps(2)
    accelerator.save_state(str(tmp_path / "state"))
    first = steps(3)
    accelerator.load_state(str(tmp_path / "state"))
    assert steps(3) == first
    accelerator.free_memory()
