"""The configurations that come with kt_hf, and those that users already have: taken as they are, and estimated."""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kt_hf.builtin.known_models import known_models
from kt_hf.cli import app
from kt_hf.cli.estimate import make
from kt_hf.placement import assembly
from kt_hf.placement.tiers import Tiers, is_auto
from kt_hf.shapes import ExpertShape
from kt_hf.train.config.read import read_arguments
from kt_hf.train.config.settings import RunKeys
from kt_hf.train.hub import configuration_of, reachable, sizes_of
from kt_hf.train.model_sizes import model_sizes
from kt_hf.train.models import load_config

HERE = Path(__file__).parent
OURS = sorted((HERE.parents[1] / "configs").glob("*.yaml"))
# With experts of 4 bits: host and GPU memory, in GiB, of the machine they are for.
LOW_BITS = {
    "qwen3_30b_a3b_int4_sft": (32, 24),
    "qwen3_235b_a22b_int4_sft": (192, 24),
    "deepseek_v3_int4_sft": (450, 48),
    "kimi_k2_thinking_sft": (768, 48),
    "glm_4.5_air_int4_sft": (96, 24),
    "minimax_m2_int4_sft": (192, 24),
}
WIDE = [file for file in OURS if file.stem not in {*LOW_BITS, "demo_smol"}]
USERS = sorted((HERE / "user-yaml").glob("*.yaml"))
# Billions of parameters, as published.
PUBLISHED = {
    "deepseek-ai/DeepSeek-V2-Lite-Chat": 15.7,
    "deepseek-ai/DeepSeek-V3": 671,
    "Qwen/Qwen2-57B-A14B-Instruct": 57.4,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-235B-A22B": 235,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.7,
    "zai-org/GLM-4.5-Air": 106.9,
    "MiniMaxAI/MiniMax-M2": 229,
    "moonshotai/Kimi-K2-Thinking": 1026,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_there_are_as_many_as_promised() -> None:
    assert len(OURS) == 21
    assert len(USERS) == 3
    assert known_models() == sorted(PUBLISHED)


@pytest.mark.parametrize("file", [*OURS, *USERS], ids=lambda file: file.stem)
def test_it_is_valid_and_estimated(file: Path) -> None:
    result = CliRunner().invoke(app, ["estimate", str(file), "--device", "cuda", "--json"])
    assert result.exit_code in (0, 1), result.output
    made = json.loads(result.stdout)
    assert result.exit_code == (0 if made["fits"] else 1)
    assert made["fits"] == (made["host_total"] <= made["host_free"])
    assert made["host_total"] == sum(made["host"].values())
    assert made["gpu_total"] == sum(made["gpu"].values()) > 0


@pytest.mark.parametrize("name", LOW_BITS)
def test_a_model_of_low_bits_fits_its_machine_as_its_comment_says(name: str) -> None:
    host, gpu = LOW_BITS[name]
    file = next(file for file in OURS if file.stem == name)
    found = make(str(file), [], host_gb=host, gpu_gb=gpu)
    assert found.fits
    text = file.read_text()
    assert (
        f"# Memory by `kt-hf estimate`: {found.host_total / 2**30:.0f} GiB of host memory and "
        f"{found.gpu_total / 2**30:.0f} GiB on the GPU.\n"
    ) in text
    assert f"kt-hf estimate configs/{file.name} --host-gb {host} --gpu-gb {gpu}\n" in text


@pytest.mark.parametrize(
    "file", [file for file in WIDE if not file.stem.startswith("demo_")], ids=lambda file: file.stem
)
def test_its_comment_says_what_estimate_says(file: Path) -> None:
    """With a GPU of 24 GB: as it is without settings, at the least; and with the experts on the CPU."""

    def of(*settings: str) -> Any:
        return make(str(file), list(settings), host_gb=4096, gpu_gb=24)

    streamed = of("kt_expert_placement={resident_layers: 0}", "kt_moe_lora_device=cpu")
    wide, shared = (of("kt_backend=AMXBF16", f"kt_share_backward_weights={share}") for share in ("false", "true"))
    more = "" if streamed.fits else ", more than a card of 24 GB has"
    text = " ".join(file.read_text().replace("\n# ", " ").split())
    assert (
        f"streamed to a GPU take {streamed.host_total / 2**30:.0f} GiB of host memory and "
        f"{streamed.gpu_total / 2**30:.0f} GiB on the GPU at least{more}; "
        f"on the CPU {wide.host_total / 2**30:.0f} GiB ({shared.host_total / 2**30:.0f} with "
        f"kt_share_backward_weights: true) and {wide.gpu_total / 2**30:.0f} GiB on the GPU."
    ) in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_those_published(name: str) -> None:
    sizes = model_sizes(sizes_of(name), RunKeys(model_name_or_path=name))
    total = (sizes.expert_parameters + sizes.other_parameters) / 1e9
    assert total == pytest.approx(PUBLISHED[name], rel=0.003)


@pytest.mark.parametrize("file", USERS, ids=lambda file: file.stem)
def test_a_users_file_is_understood(file: Path) -> None:
    overrides = [] if "dataset:" in file.read_text() else ["dataset=alpaca_en"]
    settings = read_arguments(file, overrides)
    assert settings.run.lora_rank == 16
    assert settings.run.use_kt
    assert settings.trainer["output_dir"].startswith("outputs/")


def test_a_native_model_is_not_taken_from_the_hubs_code(tmp_path: Path) -> None:
    sizes_of("deepseek-ai/DeepSeek-V3").save_pretrained(tmp_path)
    keys = RunKeys(model_name_or_path=str(tmp_path), trust_remote_code=True)
    config, told = load_config(keys)
    assert type(config).__module__.startswith("transformers.models.deepseek_v3")
    assert any("its own class is used" in line for line in told)


def test_a_model_without_a_file_needs_no_file() -> None:
    result = CliRunner().invoke(app, ["estimate", "Qwen/Qwen3-30B-A3B", "lora_rank=4", "--device", "cpu"])
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


# Another machine, and no network


def estimated(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["estimate", "Qwen/Qwen3-30B-A3B", *arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_another_machine_is_named_by_its_memory() -> None:
    """Whatever this one has: with a GPU only where it is said, with kt-kernel's operators unless refused."""
    cpu = "kt_num_gpu_experts=0"
    code, large = estimated("--host-gb", "512", "--gpu-gb", "80", cpu)
    assert (code, large["fits"]) == (0, True)
    assert large["host_free"] == 512 * 2**30
    assert large["gpu_free"] == 80 * 2**30
    assert "experts packed" in large["host"]
    assert not large["shared_backward_weights"]
    code, small = estimated("--host-gb", "64", "--gpu-gb", "8", cpu)
    assert (code, small["fits"]) == (1, False)
    assert small["shared_backward_weights"]
    assert small["host_total"] == large["host_total_otherwise"]
    assert small["host_total_otherwise"] == large["host_total"]
    code, alone = estimated("--host-gb", "512")
    assert alone["gpu"] == {}
    assert code == 0


def test_a_choice_that_was_made_has_no_other() -> None:
    assert estimated("--host-gb", "512", "kt_share_backward_weights=true")[1]["host_total_otherwise"] is None
    assert estimated("--host-gb", "512", "kt_backend=torch")[1]["host_total_otherwise"] is None


def test_both_choices_are_told() -> None:
    text = (
        CliRunner()
        .invoke(app, ["estimate", "Qwen/Qwen3-30B-A3B", "kt_backend=AMXBF16", "--host-gb", "512", "--gpu-gb", "80"])
        .stdout
    )
    assert "otherwise 99.5 GiB, slower." in " ".join(text.split())


@pytest.mark.parametrize("text", ["-1", "0", "nan", "inf", "1e30", "512GB", ""])
@pytest.mark.parametrize("option", ["--host-gb", "--gpu-gb"])
def test_what_is_no_size_is_exit_code_2(option: str, text: str) -> None:
    result = CliRunner().invoke(app, ["estimate", "Qwen/Qwen3-30B-A3B", f"{option}={text}"])
    assert result.exit_code == 2
    assert option in result.stderr


def test_a_gpu_and_none_do_not_go_together() -> None:
    result = CliRunner().invoke(app, ["estimate", "Qwen/Qwen3-30B-A3B", "--gpu-gb=24", "--device=cpu"])
    assert result.exit_code == 2


@pytest.mark.parametrize("verb", [["estimate"], ["bench"]])
def test_a_model_nobody_has_is_refused_without_waiting(verb: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would try six times, for 41 seconds: here no library is asked to."""
    monkeypatch.setattr("kt_hf.train.hub.reachable", lambda: False)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", lambda *_: pytest.fail("the hub was asked"))
    result = CliRunner().invoke(app, [*verb, "somebody/something-new"])
    assert result.exit_code == 2
    assert "cannot be reached" in result.stderr
    assert "Qwen/Qwen3-30B-A3B" in result.stderr


def test_the_cache_is_used_where_the_hub_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kt_hf.train.hub.reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "a" / "config.json"))
    assert configuration_of("somebody/something-new") == str(tmp_path / "a")
    assert configuration_of(str(tmp_path)) == str(tmp_path)


def test_reaching_for_the_hub_takes_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = threading.Event()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("kt_hf.train.hub._PATIENCE", 0.05)
    # A name that is looked up for ever.
    monkeypatch.setattr(socket, "create_connection", lambda *_: asleep.wait(60) and socket.socket())
    assert not reachable()
    asleep.set()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", lambda address, _: addresses.append(address) or socket.socket())
    addresses: list[Any] = []
    monkeypatch.setattr("kt_hf.train.hub._PATIENCE", 5.0)
    assert reachable()
    assert addresses == [("127.0.0.1", 9)]


@pytest.mark.parametrize(
    ("name", "on_gpu"),
    [("train_kt_amx_minimal", True), ("train_kt_amx_sft", False), ("train_kt_amx_full", False)],
)
def test_what_becomes_of_a_users_file_on_a_machine_with_a_gpu(
    name: str, on_gpu: bool, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing set is `auto`; who asks for AMX, or no expert on the GPU, has them on the CPU, and hears of it."""
    file = next(file for file in USERS if file.stem == name)
    settings = read_arguments(file, [] if "dataset:" in file.read_text() else ["dataset=alpaca_en"])
    monkeypatch.setattr(assembly, "choose_backend", lambda *_: ("torch", "a test"))  # AMX is not everywhere
    shape = ExpertShape(64, 6, 2048, 1408)
    with caplog.at_level(logging.INFO, "kt_hf"):
        packer = assembly.make_packer(settings.kt, {f"layers.{i}": shape for i in range(26)}, torch.bfloat16)
    assert packer.tiers == (None if on_gpu else Tiers())
    assert is_auto(settings.kt) is on_gpu
    assert caplog.text.count("kt_expert_placement: auto does that") == int(not on_gpu)
    found = make(str(file), [], host_gb=4096, gpu_gb=24)
    assert ("experts streamed" in found.host) is on_gpu
