"""KTMoECallback in a stock Trainer: what it refuses before the first step, what it tells, what it checks at a save."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState

from kt_hf import KTAMXConfigError, KTAMXError, KTMoECallback
from kt_hf.backends.buffer_pool import BUFFER_POOL
from kt_hf.callback import _check_world
from tests.support.cases import TORCH_FP32, Case
from tests.support.helpers import MIXTRAL
from tests.support.patched import lora_config, patched_model
from tests.support.trainers import model_to_train, trainer_for

ATTENTION = list(MIXTRAL.attention)
ADAPTER = "adapter_model.safetensors"


def no_step_was_made(trainer: Trainer) -> bool:
    return trainer.state.global_step == 0 and not trainer.state.log_history


def refused(model: nn.Module, folder: Path, words: str) -> None:
    trainer = trainer_for(model, folder, max_steps=2)
    with pytest.raises(KTAMXConfigError, match=words):
        trainer.train()
    assert no_step_was_made(trainer)


def test_unpatched_model_is_refused(tmp_path: Path) -> None:
    refused(get_peft_model(MIXTRAL(), lora_config(MIXTRAL)), tmp_path, "is not patched.*apply_kt_moe")


def unfrozen_base() -> nn.Module:
    model = patched_model(MIXTRAL, TORCH_FP32)
    model.lm_head.requires_grad_(True)
    return model


def test_run_that_would_save_nothing_is_refused(tmp_path: Path) -> None:
    refused(unfrozen_base(), tmp_path, r"Nothing of this run would be saved.*kt_lora_config\(model\)")


def begin(model: nn.Module, callback: KTMoECallback | None = None, **arguments: Any) -> None:
    args = SimpleNamespace(**{"n_gpu": 0, "world_size": 1, "output_dir": "out", "full_determinism": False, **arguments})
    (callback or KTMoECallback()).on_train_begin(args, TrainerState(), TrainerControl(), model=model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_gpu": 2}, r"sees 2 GPUs.*torchrun --nproc_per_node 2.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"),
        ({"n_gpu": 8}, r"sees 8 GPUs.*DataParallel.*--nproc_per_node 8"),
        ({"world_size": 4}, r"patched in a run of 1 processes, and the trainer counts 4.*torchrun"),
        ({"world_size": 2, "deepspeed": "zero3.json"}, "deepspeed does not go together with several processes"),
        ({"world_size": 2, "fp16": True}, "fp16 does not go together"),
        ({"world_size": 2, "fsdp": "full_shard"}, "fsdp=full_shard.*DDP takes what is not experts"),
    ],
)
def test_runs_over_several_devices_are_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(KTAMXConfigError, match=words):
        begin(model_to_train(TORCH_FP32), **arguments)


def test_data_parallel_model_is_refused() -> None:
    with pytest.raises(KTAMXConfigError, match="DataParallel"):
        begin(nn.DataParallel(model_to_train(TORCH_FP32)))


def test_full_layers_are_saved_too() -> None:
    model = patched_model(MIXTRAL, TORCH_FP32)
    config = lora_config(MIXTRAL, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    begin(model)


@pytest.mark.parametrize("n_gpu", [0, 1])
def test_one_device_is_fine(n_gpu: int) -> None:
    begin(model_to_train(TORCH_FP32), n_gpu=n_gpu)


def test_untrained_experts_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(patched_model(MIXTRAL, TORCH_FP32), lora_config(MIXTRAL, target_modules=ATTENTION))
    callback = KTMoECallback()
    for _ in range(2):
        trainer = trainer_for(model, tmp_path, callback=False, max_steps=1)
        trainer.add_callback(callback)
        trainer.train()
    told = [record for record in caplog.records if "experts are not trained" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert "gate_proj, up_proj, down_proj" in told[0].getMessage()


def test_trained_experts_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(model_to_train(TORCH_FP32), tmp_path, max_steps=1).train()
    assert "experts are not trained" not in caplog.text


def test_refreshed_at_begin_steps_and_end(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what nothing else can notice: values changed through .data."""
    model = model_to_train(case)
    layer, parameter = model._kt_wrappers[0], model._kt_wrappers[0].lora_params["down_lora_b"]
    held: list[bool] = []

    def look() -> None:
        copy = layer._runner.backend.lora_copy()[5]
        held.append(torch.equal(copy, (parameter.detach() * layer.down_proj.scaling["default"]).to(copy.dtype)))

    class Watch(KTMoECallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            parameter.data.add_(0.25)
            super().on_train_begin(*args, **kwargs)
            look()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            parameter.data.add_(0.25)
            super().on_step_end(*args, **kwargs)
            look()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            parameter.data.add_(0.25)
            super().on_train_end(*args, **kwargs)
            look()

    trainer = trainer_for(model, tmp_path, callback=False, max_steps=2)
    trainer.add_callback(Watch())
    trainer.train()
    assert held == [True] * 4


def test_pytorch_leaves_a_core_to_operators_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the user's number of threads is given back at the end; a smaller one than there are cores is kept."""
    model = model_to_train(TORCH_FP32)
    threads, seen = [7], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    model.register_forward_pre_hook(lambda *_: seen.append(threads[-1]))
    for most in (None, 5, 9):
        monkeypatch.setattr(model._kt_wrappers[0].backend, "torch_threads", most)
        trainer_for(model, tmp_path, max_steps=1).train()
        assert threads[-1] == 7
    assert seen == [7, 5, 7]


def test_memory_kept_for_the_next_step_is_given_back_at_the_end(tmp_path: Path) -> None:
    model = model_to_train(TORCH_FP32)
    BUFFER_POOL.release()
    held: list[int] = []
    model.register_forward_pre_hook(lambda *_: held.append(len(BUFFER_POOL._free)))
    BUFFER_POOL.empty((2**20,), torch.float32)  # free again at once
    trainer_for(model, tmp_path, max_steps=1).train()
    assert held == [1]
    assert BUFFER_POOL._free == []


# -- checkpoints


def test_checkpoints_with_every_tensor_pass(case: Case, tmp_path: Path) -> None:
    trainer_for(model_to_train(case), tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1" / ADAPTER).exists()
    assert (tmp_path / "checkpoint-2" / ADAPTER).exists()


def without_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if ".experts." not in name}


def without_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in tensors if "layers.1.mlp.experts.down_proj.lora_B" in name)
    return {key: value for key, value in tensors.items() if key != name}


def of_another_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: value[..., :4].contiguous() if "experts.down_proj.lora_B" in key else value
        for key, value in tensors.items()
    }


def rewrite(file: Path, change: Callable[..., Any]) -> None:
    """Cloned before: what load_file gives is the file's own memory."""
    save_file(change({name: value.clone() for name, value in load_file(file).items()}), file)


LOSSES: dict[str, Callable[..., Any]] = {
    "without_experts": without_experts,
    "without_one": without_one,
    "of_another_rank": of_another_rank,
}


@pytest.mark.parametrize("name", LOSSES)
def test_checkpoint_lacking_expert_tensors_is_an_error(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever loses them on the way to the disk."""
    change = LOSSES[name]
    trainer = trainer_for(model_to_train(case), tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    save = trainer.save_model

    def save_model(folder: str, **kwargs: Any) -> None:
        save(folder, **kwargs)
        rewrite(Path(folder) / ADAPTER, change)

    monkeypatch.setattr(trainer, "save_model", save_model)
    with pytest.raises(KTAMXError, match=f"checkpoint-2/{ADAPTER}"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_adapter_of_another_name_is_checked_as_well(tmp_path: Path) -> None:
    """PEFT saves it in a folder of its name."""
    model = patched_model(MIXTRAL, TORCH_FP32)
    model = get_peft_model(model, lora_config(MIXTRAL), adapter_name="mine")
    model.save_pretrained(tmp_path / "checkpoint-1")
    file = tmp_path / "checkpoint-1" / "mine" / ADAPTER
    rewrite(file, without_one)
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = TrainerState(global_step=1, is_world_process_zero=True)
    with pytest.raises(KTAMXError, match=f"mine/{ADAPTER}"):
        KTMoECallback().on_save(args, state, TrainerControl(), model=model)


@pytest.mark.parametrize(("gpu", "words"), [(False, "use_cpu=True"), (True, "torchrun or accelerate launch")])
def test_a_trainer_that_counts_one_of_two_processes_is_told_why(
    gpu: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate counts one process under torchrun where there is no GPU and the CPU is not asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    layer: Any = SimpleNamespace(exchange=SimpleNamespace(ranks=SimpleNamespace(size=2)))
    with pytest.raises(KTAMXConfigError, match=f"run of 2 processes, and the trainer counts 1.*{words}"):
        _check_world([layer], 1)
