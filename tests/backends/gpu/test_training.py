"""Stock trainers with the model on a GPU: SFT-like steps, DPO, resuming, wherever LoRA and experts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kt_hf import KTMoECallback
from kt_hf.experts import kt_layers
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS, TORCH_BF16, Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import adapted_model
from tests.support.tiered import split_model
from tests.support.tokenizer import text
from tests.support.trainers import result, settings, trainer_for

CASES = [pytest.param(KERNEL_BF16, marks=KERNEL_MARKS, id="AMXBF16"), pytest.param(TORCH_BF16, id="torch")]
RUN = {"use_cpu": False, "bf16": True, "max_steps": 10, "learning_rate": 1e-3, "optim": "adamw_torch_fused"}


@pytest.mark.parametrize(
    ("checkpointing", "where", "gpu"),
    [
        (False, "cpu", []),
        (True, "cpu", []),
        (True, "gpu", []),
        (True, "cpu", [1, 4, 6]),
        (False, "gpu", [1, 4, 6]),
        (True, "gpu", [1, 4, 6]),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_cpu(
    case: Case, checkpointing: bool, where: str, gpu: list[int], tmp_path: Path
) -> None:
    expected = trainer_for(adapted_model(MIXTRAL, case, seed=1), tmp_path, max_steps=10, learning_rate=1e-3)
    expected.train()
    model = split_model(case, gpu, seed=1, kt_moe_lora_device=where)
    trainer = trainer_for(model, tmp_path, **RUN, gradient_checkpointing=checkpointing,
                          gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    trainer.train()
    devices = {p.device.type for layer in kt_layers(model) for p in layer.lora_params.values()}
    assert devices == {"cuda" if where == "gpu" else "cpu"}
    pairs = zip(result(trainer).losses, result(expected).losses, strict=True)
    assert max(abs(a - b) for a, b in pairs) < 0.1
    assert result(trainer).losses[-1] < result(trainer).losses[0] - 0.1


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_optimizers_of_bitsandbytes(optim: str, where: str, tmp_path: Path) -> None:
    """State in 8 bits and state that is paged to the host, with expert LoRA on either device."""
    pytest.importorskip("bitsandbytes")
    model = split_model(TORCH_BF16, [1, 4, 6], seed=1, kt_moe_lora_device=where)
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if "experts" in name}
    trainer = trainer_for(model, tmp_path, **{**RUN, "optim": optim})
    trainer.train()
    assert result(trainer).losses[-1] < result(trainer).losses[0] - 0.1
    after = dict(model.named_parameters())
    assert all((after[name].cpu() != value).float().mean() > 0.5 for name, value in before.items() if "lora_A" in name)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_resumed_run(where: str, tmp_path: Path) -> None:
    """The run that was stopped ends like the one that was not; the optimizer's state is where the parameters are."""
    ends = []
    for resumed in (False, True):
        model = split_model(TORCH_BF16, [1, 4, 6], seed=1, kt_moe_lora_device=where)
        trainer = trainer_for(model, tmp_path, **{**RUN, "max_steps": 6}, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumed else None)
        ends.append(result(trainer))
        for parameter, state in trainer.optimizer.state.items():
            assert state["exp_avg"].device == parameter.device
    assert abs(ends[0].losses[-1] - ends[1].losses[-1]) < 0.02
    for name, value in ends[0].parameters.items():
        assert (ends[1].parameters[name] - value).abs().mean() < 3e-4, name


@pytest.mark.parametrize("gpu", [[], [1, 4, 6]], ids=["all on the CPU", "split"])
@pytest.mark.parametrize("case", CASES)
def test_dpo(case: Case, gpu: list[int], tmp_path: Path, tokenizer: Any) -> None:
    """The policy's forward, then the reference's with the adapter off, then backward."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = {
        "prompt": [text(seed, 5) for seed in range(8)],
        "chosen": [text(seed + 20, 6) for seed in range(8)],
        "rejected": [text(seed + 40, 7) for seed in range(8)],
    }
    args = trl.DPOConfig(**settings(tmp_path, **{**RUN, "max_steps": 8, "learning_rate": 2e-3}))
    trainer = trl.DPOTrainer(split_model(case, gpu, seed=1), args=args, processing_class=tokenizer,
                             train_dataset=datasets.Dataset.from_dict(rows), callbacks=[KTMoECallback()])  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_saved_adapters_are_alike(where: str, tmp_path: Path) -> None:
    """The same values saved from a GPU, from the CPU, split or not: the same file."""
    adapted_model(MIXTRAL, TORCH_BF16, seed=1).save_pretrained(tmp_path / "cpu")
    split_model(TORCH_BF16, [1, 4, 6], seed=1, kt_moe_lora_device=where).cuda().save_pretrained(tmp_path / "gpu")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cpu", "gpu"))
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
