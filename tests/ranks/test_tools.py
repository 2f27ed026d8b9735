"""What the tools say of several processes: memory of each, cores of each, and how they are started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kt_hf import KTAMXConfigError
from kt_hf.cli import app
from kt_hf.system.parallel import launch_command
from kt_hf.tools import doctor
from tests.support.ranks import on_ranks, results
from tests.support.tiny import ROOT, save_model
from tests.support.train_runs import forbid_loading, runs_in

MODEL = str(ROOT / "configs/qwen3_30b_a3b_sft.yaml")


def estimated(*options: str) -> Any:
    result = CliRunner().invoke(app, ["estimate", MODEL, "--host-gb", "256", "--gpu-gb", "80", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_experts_are_on_the_host_once() -> None:
    one, four = estimated(), estimated("--ranks", "4")
    assert four["host"]["experts streamed"] * 4 == one["host"]["experts streamed"]
    assert four["gpu"]["LoRA of experts and its optimizer"] * 4 == one["gpu"]["LoRA of experts and its optimizer"]
    assert four["gpu"]["attention, embeddings and the rest"] == one["gpu"]["attention, embeddings and the rest"]
    assert four["gpu"]["activations"] == one["gpu"]["activations"], "a rank keeps the inputs of its own tokens"
    assert four["host_total_of_all_ranks"] == 4 * four["host_total"]
    assert four["host_free"] * 4 == one["host_free"]


def test_a_number_that_does_not_divide_the_experts() -> None:
    result = CliRunner().invoke(app, ["estimate", MODEL, "--ranks", "3"])
    assert result.exit_code == 2
    assert "--ranks=3: a layer's 128 experts are divided evenly by 1, 2, 4" in result.stderr


def test_several_gpus_and_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, with the command."""
    forbid_loading(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kt-hf", "train", "run.yaml", "seed=1"])
    with pytest.raises(KTAMXConfigError, match=r"torchrun --nproc_per_node 4 -m kt_hf.cli train run.yaml seed=1"):
        runs_in(tmp_path, save_model(tmp_path / "model")).again()
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    assert launch_command(2).startswith("torchrun --nproc_per_node 2 sft.py ")


def test_doctor_tells_once_what_each_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("_cpu", "_kernel", "_memory", "_gpu", "_versions", "_self_tests"):
        monkeypatch.setattr(doctor, part, lambda: [])
    first, second = results(on_ranks(2, lambda rank: [(f.name, f.value) for f in doctor.examine()]))
    assert second == []
    assert first[0] == ("world", "2 processes, 2 of this host, by gloo")
    assert [name for name, _ in first[1:]] == ["rank 0", "rank 1"]
    assert all("worker thread" in value for _, value in first[1:])
