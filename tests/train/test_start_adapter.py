"""Runs that start from an adapter, train other modules besides, and LoRA+."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kt_hf.adapters import convert
from kt_hf.errors import KTAMXError
from kt_hf.train import run as run_module
from kt_hf.train.targets import check_targets
from tests.support.tiny import save_model
from tests.support.train_runs import Runs, forbid_loading, runs_in


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = runs_in(tmp_path_factory.mktemp("start"), tiny_model, learning_rate=1e-2, save_strategy="no", lora_rank=4)
    runs.again()
    return runs


@pytest.mark.parametrize("form", ["kt", "peft", "per-expert", "fused"])
def test_any_readable_adapter_is_trained_on(form: str, trained: Runs, tiny_model: Path, tmp_path: Path) -> None:
    start = trained.out if form == "kt" else convert(trained.out, tmp_path / form, to=form)
    runs = runs_in(
        tmp_path, tiny_model, adapter_name_or_path=str(start), learning_rate=1e-9, save_strategy="no", max_steps=1
    )
    runs.again()
    assert "Starting from the adapter in" in runs.printed
    assert "lora_rank has no effect: the settings of the adapter" in runs.printed
    assert json.loads((runs.out / "adapter_config.json").read_text())["r"] == 4
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained.out, runs.out))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key].float(), tensor.float(), atol=1e-4, rtol=0)
    assert any(bool(tensor.any()) for key, tensor in after.items() if "lora_B" in key)


def test_an_adapter_of_another_model_is_refused_before_loading(
    trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_model(tmp_path / "other", layers=1)
    forbid_loading(monkeypatch)
    with pytest.raises(KTAMXError, match=r"has no place in this model: another base model's adapter\?"):
        runs_in(tmp_path, other, adapter_name_or_path=str(trained.out)).again()
    damaged = tmp_path / "damaged"
    shutil.copytree(trained.out, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(KTAMXError, match=r"adapter_model.safetensors"):
        runs_in(tmp_path, other, adapter_name_or_path=str(damaged)).again()


def test_stock_peft_starts_from_its_own_format(
    trained: Runs, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_in(tmp_path, tiny_model, use_kt=False, adapter_name_or_path=str(trained.out), save_strategy="no")
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        with pytest.raises(KTAMXError, match=r"format kt, .*kt-hf export .* --to peft"):
            runs.again()
    stock = convert(trained.out, tmp_path / "stock", to="peft")
    assert runs.again(f"adapter_name_or_path={stock}", "max_steps=1")["steps"] == 1


def test_additional_targets_are_trained_and_saved(tiny_model: Path, tmp_path: Path) -> None:
    runs = runs_in(tmp_path, tiny_model, additional_target="lm_head,embed_tokens", save_strategy="no", max_steps=1)
    runs.again()
    saved = load_file(runs.out / "adapter_model.safetensors")
    assert {key for key in saved if "lora" not in key} == {
        "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    }  # fmt: skip
    assert json.loads((runs.out / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head", "embed_tokens"]


def test_loraplus_gives_b_another_learning_rate(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []
    make = run_module._make_trainer
    monkeypatch.setattr(run_module, "_make_trainer", lambda *args: trainers.append(make(*args)) or trainers[0])
    runs_in(
        tmp_path, tiny_model, loraplus_lr_ratio=16, learning_rate=1e-3, save_strategy="no", max_steps=1,
        lr_scheduler_type="constant",
    ).again()  # fmt: skip
    (trainer,) = trainers
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {
        name: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"] if (name := names[id(p)])
    }
    assert rates
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1e-3 * 16}
    assert any(".experts." in name for name in rates)


def test_targets_are_checked_on_any_model(tiny_model: Path) -> None:
    from transformers import AutoConfig

    from kt_hf.discovery import skeleton
    from kt_hf.train.config.settings import RunKeys

    outline = skeleton(AutoConfig.from_pretrained(tiny_model))
    for targets in ("all", "all_attention", "q_proj,w1", "self_attn.q_proj", ["gate_proj", "up_proj"]):
        check_targets(outline, RunKeys(lora_target=targets))
    for targets in ("", "q_prj", "proj", ["q_proj", "nix"]):
        with pytest.raises(KTAMXError, match=r"lora_target"):
            check_targets(outline, RunKeys(lora_target=targets))
