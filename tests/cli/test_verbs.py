"""Every verb has help with an example; export and import go there and back; accelerate launches what kt-hf runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kt_hf import KTConfig, apply_kt_moe, kt_lora_config
from kt_hf.backends import kernel_availability
from kt_hf.cli import VERBS, app
from tests.support.tiny import ROOT, environment, save_model, write_yaml

USERS = sorted((ROOT / "tests/configs/user-yaml").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_help_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    if verb != "demo":
        assert f"Example: kt-hf {verb}" in re.sub(r"\s+", " ", result.stdout)


@pytest.mark.parametrize("form", ["peft", "fused"])
def test_export_and_import_go_there_and_back(form: str, model: Path, tmp_path: Path) -> None:
    base = apply_kt_moe(AutoModelForCausalLM.from_pretrained(model), KTConfig(kt_backend="torch"))
    tuned = get_peft_model(base, kt_lora_config(base, 4, init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    run = CliRunner()
    there = run.invoke(app, ["export", str(tmp_path / "adapter"), str(tmp_path / "there"), "--to", form])
    assert there.exit_code == 0, there.output
    wrong = run.invoke(app, ["import", str(tmp_path / "there"), str(tmp_path / "back"), "--from", "per-expert"])
    assert wrong.exit_code == 2
    assert f"is of the format {form}" in wrong.stderr
    back = run.invoke(app, ["import", str(tmp_path / "there"), str(tmp_path / "back"), "--from", form])
    assert back.exit_code == 0, back.output
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_export_to_nowhere_is_exit_code_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path / "none"), str(tmp_path / "out"), "--to", "peft"])
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


@pytest.mark.parametrize("file", USERS, ids=lambda file: file.stem)
def test_a_users_file_trains_with_model_and_data_put_over(file: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"instruction": "2+2?", "input": "", "output": "4"}\n' * 4)
    overrides = [f"model_name_or_path={model}", "dataset=data.jsonl", "max_steps=1", "output_dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "kt_hf.cli", "train", str(file), *overrides],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "AMXBF16" in file.read_text() and not kernel_availability().ok:  # asked for by name: refused in words
        assert done.returncode == 2
        assert "kt_backend=AMXBF16 cannot run" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 layers patched" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_accelerate_launches_one_process(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "A few words."}\n' * 4)
    write_yaml(
        tmp_path / "run.yaml", model_name_or_path=str(model), dataset="data.jsonl", output_dir="out", max_steps=1
    )
    config = str(ROOT / "configs/accelerate/one_process.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--cpu", "--module"]
    command = ["kt_hf.cli", "train", "run.yaml"]
    done = subprocess.run(
        [*launch, *command], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
