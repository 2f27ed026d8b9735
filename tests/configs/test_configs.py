"""The configurations that come with kt_hf, and those that users already have: taken as they are, and estimated."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kt_hf.cli import app
from kt_hf.cli.estimate import make
from kt_hf.train.config.read import read_arguments
from kt_hf.train.config.settings import OwnKeys
from kt_hf.train.model_sizes import model_sizes
from kt_hf.train.models import load_config

HERE = Path(__file__).parent
MODELS = HERE / "models"
OURS = sorted((HERE.parents[1] / "configs").glob("*.yaml"))
USERS = sorted((HERE / "user-yaml").glob("*.yaml"))
# Billions of parameters, as published.
PUBLISHED = {
    "deepseek-ai/DeepSeek-V2-Lite-Chat": 15.7,
    "deepseek-ai/DeepSeek-V3": 671,
    "Qwen/Qwen2-57B-A14B-Instruct": 57.4,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-235B-A22B": 235,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.7,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def local(file: Path) -> list[str]:
    """The override that puts the stored configuration in the place of the model's."""
    name = read_arguments(file, purpose="estimate").own.model_name_or_path
    return [] if name.startswith("builtin:") else [f"model_name_or_path={MODELS / name}"]


def test_there_are_as_many_as_promised() -> None:
    assert len(OURS) == 10
    assert len(USERS) == 3
    assert sorted(str(path.parent.relative_to(MODELS)) for path in MODELS.glob("*/*/config.json")) == sorted(PUBLISHED)


@pytest.mark.parametrize("file", [*OURS, *USERS], ids=lambda file: file.stem)
def test_it_is_valid_and_estimated(file: Path) -> None:
    result = CliRunner().invoke(app, ["estimate", str(file), *local(file), "--device", "cuda", "--json"])
    assert result.exit_code in (0, 1), result.output
    made = json.loads(result.stdout)
    assert result.exit_code == (0 if made["fits"] else 1)
    assert made["fits"] == (made["host_total"] <= made["host_free"])
    assert made["host_total"] == sum(made["host"].values())
    assert made["gpu_total"] == sum(made["gpu"].values()) > 0


@pytest.mark.parametrize("file", [file for file in OURS if file.stem != "demo_smol"], ids=lambda file: file.stem)
def test_its_comment_says_what_estimate_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_hf.backends.kernel_availability", lambda: type("Yes", (), {"ok": True})())
    wide, shared = (
        make(str(file), [*local(file), f"kt_share_backward_weights={share}"], "cuda") for share in ("false", "true")
    )
    text = " ".join(file.read_text().replace("\n# ", " ").split())
    assert (
        f"the experts: {wide.host_total / 2**30:.0f} GiB of host memory ({shared.host_total / 2**30:.0f} with "
        f"kt_share_backward_weights: true), {wide.gpu_total / 2**30:.0f} GiB on the GPU."
    ) in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_those_published(name: str) -> None:
    own = OwnKeys(model_name_or_path=str(MODELS / name))
    sizes = model_sizes(load_config(own)[0], own)
    total = (sizes.expert_parameters + sizes.other_parameters) / 1e9
    assert total == pytest.approx(PUBLISHED[name], rel=0.003)


@pytest.mark.parametrize("file", USERS, ids=lambda file: file.stem)
def test_a_users_file_is_understood(file: Path) -> None:
    overrides = [] if "dataset:" in file.read_text() else ["dataset=alpaca_en"]
    settings = read_arguments(file, overrides)
    assert settings.own.lora_rank == 16
    assert settings.own.use_kt
    assert settings.trainer["output_dir"].startswith("outputs/")


def test_a_native_model_is_not_taken_from_the_hubs_code() -> None:
    own = OwnKeys(model_name_or_path=str(MODELS / "deepseek-ai/DeepSeek-V3"), trust_remote_code=True)
    config, told = load_config(own)
    assert type(config).__module__.startswith("transformers.models.deepseek_v3")
    assert any("its own class is used" in line for line in told)


def test_a_model_without_a_file_needs_no_file(tmp_path: Path) -> None:
    model = str(MODELS / "Qwen/Qwen3-30B-A3B")
    result = CliRunner().invoke(app, ["estimate", model, "lora_rank=4", "--device", "cpu"])
    assert result.exit_code in (0, 1)
    assert "experts packed" in result.stdout or "experts" in result.stdout
    assert "GPU memory" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "cannot be read"),
        (["./missing-model"], "there is no such folder"),
        (["builtin:smollm2-moe", "lora_rnak=4"], "did you mean lora_rank?"),
        (["builtin:smollm2-moe", "--device", "tpu"], "must be auto, cuda or cpu"),
    ],
)
def test_bad_input_is_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
