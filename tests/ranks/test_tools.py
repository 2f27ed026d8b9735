"""What the tools say of several processes: memory of each, cores of each, and how they are started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kt_hf import KTAMXConfigError
from kt_hf.cli import app
from kt_hf.system.parallel import launch_command, refuse_parallel_trainer
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


def test_experts_are_on_each_host_or_once_on_all() -> None:
    """By the memory of a host, unless `kt_expert_ranks` says it."""
    one, two = estimated("--ranks", "4"), estimated("--ranks", "4", "--hosts", "2")
    assert (two["hosts"], two["ranks"]) == (2, 4)
    assert two["host"] == one["host"]
    assert two["host_total_of_all_ranks"] == one["host_total_of_all_ranks"]
    divided = estimated("--ranks", "4", "--hosts", "2", "kt_expert_ranks=all")
    assert (divided["hosts"], divided["ranks"]) == (2, 8)
    assert 2 * divided["host"]["experts streamed"] == one["host"]["experts streamed"]
    assert divided["host_total_of_all_ranks"] == 4 * divided["host_total"]
    small = CliRunner().invoke(
        app, ["estimate", MODEL, "--host-gb", "48", "--gpu-gb", "80", "--ranks", "2", "--hosts", "2"]
    )
    words = " ".join(small.output.split())
    assert "of each of 2 processes on each of 2 hosts" in words
    assert "once on 2 hosts together" in words


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


def test_doctor_tells_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("_cpu", "_kernel", "_memory", "_gpu", "_versions", "_self_tests"):
        monkeypatch.setattr(doctor, part, lambda: [])

    def work(rank: int) -> Any:
        even = [(f.value, f.ok, f.fix) for f in doctor.examine()]
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if rank == 3 else "3")
        return even, [(f.ok, f.fix) for f in doctor.examine()]

    (even, uneven), *_ = results(on_ranks(4, work, hosts=2))
    assert even[0] == ("4 processes on 2 hosts, 2 of this host, by gloo", True, "")
    assert all("on " in value for value, *_ in even[1:])
    assert uneven[0][0] is False
    assert "as many processes on each host" in uneven[0][1]


def test_saving_on_each_host_is_refused() -> None:
    def work(rank: int) -> bool:
        args = SimpleNamespace(world_size=4, save_on_each_node=True)
        with pytest.raises(KTAMXConfigError, match=r"save_on_each_node=True: .*output_dir that all hosts see"):
            refuse_parallel_trainer(torch.nn.Linear(1, 1), 0, args)
        return True

    assert all(results(on_ranks(4, work, hosts=2)))
