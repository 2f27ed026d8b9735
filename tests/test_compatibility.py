"""What users have of 0.1.0 goes on working: their files on disk, their imports, their commands.

The files are in tests/data/written_by_0.1.0 (its README tells what wrote them), with the numbers 0.1.0 computed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from kt_hf import KTConfig, KTMoECallback, apply_kt_moe, kt_lora_config, verify_adapter
from kt_hf.adapters import check_checkpoint, convert
from tests.support.cases import KERNEL_MARKS

DATA = Path(__file__).parent / "data/written_by_0.1.0"
IDS = torch.arange(24).reshape(2, 12) * 5 % 32
EXPECTED = json.loads((DATA / "expected.json").read_text())
ANOTHER_CPU = 1e-4  # fp32 logits of about 1: sums may be taken in another order there
ADAPTER = "adapter_model.safetensors"

# What 0.1.0 had in public, by module: `__all__`, else what its documentation names. Not placement_of and take_over,
# which kt_hf.placement had without an underscore for its neighbors alone.
PUBLIC = {
    "kt_hf": "KTAMXBackwardError KTAMXConfigError KTAMXError KTAMXForwardError KTAMXModelNotSupportedError "
    "KTAMXNotAvailableError KTConfig KTExperts KTMoECallback Placement apply_kt_moe count_experts kt_lora_config "
    "load_kt_model read_placement verify_adapter",
    "kt_hf.adapters": "FORMATS MANIFEST Adapter Projection check_checkpoint convert last_complete load_adapter "
    "open_adapter publish seal start_from tell_interrupted verify_adapter",
    "kt_hf.backends": "CALL_LOCK FEW_CORES LORA_NAMES OPERATORS QUANTISED Availability ExpertShape ExpertWeights "
    "ExpertsBackend Gradients Saved SavedLayer TorchBackend choose_backend kernel_availability most_tokens pack "
    "save_packed shape_problem",
    "kt_hf.callback": "KTMoECallback",
    "kt_hf.checkpoint": "ExpertCheckpoint checkpoint_folder",
    "kt_hf.cli": "app",
    "kt_hf.config": "KTConfig",
    "kt_hf.errors": "KTAMXBackwardError KTAMXConfigError KTAMXError KTAMXForwardError KTAMXModelNotSupportedError "
    "KTAMXNotAvailableError",
    "kt_hf.experts": "KTExperts LoraParamsView kt_layers",
    "kt_hf.loading": "load_kt_model",
    "kt_hf.lora": "kt_lora_config",
    "kt_hf.patch": "apply_kt_moe",
    "kt_hf.placement": "PLACEMENT Placement as_placement count_experts read_placement write_placement",
    "kt_hf.quantized": "MANIFEST Manifest SavedExperts bytes_on_disk for_run open_saved quantise",
}
VERBS = ("train", "estimate", "quantize", "export", "import", "doctor", "bench", "demo")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy: no test may change what 0.1.0 wrote."""
    return shutil.copytree(DATA, tmp_path / "files")


def patched(**config: Any) -> nn.Module:
    dtype = config.pop("dtype", torch.float32)
    model = MixtralForCausalLM.from_pretrained(DATA / "model", dtype=dtype)
    return apply_kt_moe(model, KTConfig(**{"kt_backend": "torch", "kt_lora_rank": 2, "kt_num_threads": 1} | config))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def checksums(model: nn.Module) -> dict[str, str]:
    """sha256 of each LoRA parameter's bytes."""
    return {
        name: hashlib.sha256(parameter.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def assert_logits(
    model: nn.Module, name: str, file: str = "expected.safetensors", tolerance: float = ANOTHER_CPU
) -> None:
    expected = load_file(DATA / file)[name]
    assert (logits(model) - expected).abs().max() < tolerance
    assert (expected[0, 0] - expected[1, 5]).abs().max() > 0.1  # numbers that mean something


@pytest.mark.parametrize("folder", ["kt", "checkpoint-2"])
def test_an_adapter_loads_and_computes_the_same(files: Path, folder: str) -> None:
    assert verify_adapter(files / folder)
    model = PeftModel.from_pretrained(patched(), files / folder)
    assert checksums(model) == EXPECTED[folder]
    assert_logits(model, folder)


def test_an_adapter_changes_the_logits() -> None:
    expected = load_file(DATA / "expected.safetensors")
    assert (logits(patched()) - expected["kt"]).abs().max() > 100 * ANOTHER_CPU
    assert (expected["checkpoint-2"] - expected["kt"]).abs().max() > 100 * ANOTHER_CPU


@pytest.mark.parametrize("form", ["peft", "per-expert", "fused"])
def test_converted_adapters_come_back(files: Path, tmp_path: Path, form: str) -> None:
    back, original = (
        load_file(convert(files / form, tmp_path / "back", to="kt") / ADAPTER),
        load_file(DATA / "kt" / ADAPTER),
    )
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize("form", ["peft", "per-expert", "fused"])
def test_conversions_are_written_as_they_were(tmp_path: Path, form: str) -> None:
    """Names, dtypes and values of the tensors; so vLLM, SGLang and stock PEFT read them as before."""
    now = convert(DATA / "kt", tmp_path / "now", to=form, base=DATA / "model")
    written = sorted(file.name for file in (DATA / form).glob("*.safetensors"))
    assert sorted(file.name for file in now.glob("*.safetensors")) == written
    for name in written:
        new, old = load_file(now / name), load_file(DATA / form / name)
        assert new.keys() == old.keys()
        assert all(new[key].dtype == old[key].dtype and torch.equal(new[key], old[key]) for key in old)


def test_stock_peft_reads_its_format(files: Path) -> None:
    model = PeftModel.from_pretrained(
        MixtralForCausalLM.from_pretrained(DATA / "model", dtype=torch.float32), files / "peft"
    )
    assert_logits(model, "kt")


def test_a_trainer_resumes_from_its_checkpoint(files: Path, tmp_path: Path) -> None:
    checkpoint = files / "checkpoint-2"
    check_checkpoint(checkpoint)
    model = patched()
    model = get_peft_model(model, kt_lora_config(model, lora_rank=2, lora_alpha=3))
    rows = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(8 * 10).reshape(8, 10) * 7 % 32)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1, seed=0, save_strategy="no", max_steps=4,
        dataloader_pin_memory=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[KTMoECallback()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(EXPECTED["losses of steps 1 to 4"], abs=ANOTHER_CPU)
    assert_logits(model, "after 4 steps", tolerance=1e-3)  # AdamW's steps amplify rounding


@pytest.mark.kernel
@KERNEL_MARKS[1]
@pytest.mark.skipif(not (DATA / "int8").exists(), reason="int8/ has not been written yet: write.py quantized")
def test_quantized_experts_load(files: Path) -> None:
    model = patched(dtype=torch.bfloat16, kt_backend="AMXInt8", kt_weight_path=str(files / "int8"))
    model = get_peft_model(model, kt_lora_config(model, lora_rank=2, lora_alpha=3))
    values = load_file(DATA / "kt" / ADAPTER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[name.replace(".default", "")])
    assert_logits(model, "int8", "expected-int8.safetensors", tolerance=0.05)  # bf16; AMX and AVX512 differ


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module: str) -> None:
    names = PUBLIC[module].split()
    assert not [name for name in names if not hasattr(importlib.import_module(module), name)]


def test_the_package_has_all_it_lists() -> None:
    for module in PUBLIC:
        package = importlib.import_module(module)
        assert not [name for name in getattr(package, "__all__", ()) if not hasattr(package, name)]


def test_the_command_has_its_verbs() -> None:
    from kt_hf.cli import app

    assert [command.name for command in app.registered_commands if command.name in VERBS] == list(VERBS)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert not [verb for verb in VERBS if f" {verb} " not in shown]
