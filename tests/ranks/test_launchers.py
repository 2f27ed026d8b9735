"""The same script by torchrun and by accelerate launch, on two ranks, against one process; and TRL's trainers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import get_peft_model

from tests.ranks.test_trainer import compare, saved
from tests.support.cases import TORCH_FP32
from tests.support.helpers import MIXTRAL
from tests.support.patched import fill_lora, patched_model
from tests.support.rank_trainers import Trained
from tests.support.ranks import fill_whole, on_ranks, relative, results
from tests.support.stock import patched_config, stock_config
from tests.support.tiny import save_model
from tests.support.train_runs import runs_in
from tests.support.trl_runs import arguments, callbacks, distance, logged, preferences, sft

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/two_cpu_processes.yaml"),
    ],
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def run(launcher: list[str], folder: Path, ranks: int) -> list[Any]:
    folder.mkdir()
    if "accelerate.commands.launch" in launcher:
        launcher = [*launcher, "--main_process_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = str(ROOT / "tests/support/rank_script.py")
    done = subprocess.run(
        [sys.executable, *launcher, script, str(folder)], env=environment, capture_output=True, text=True, timeout=300,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_needs_nothing_but_a_launcher(launcher: str, tmp_path: Path) -> None:
    one = run([], tmp_path / "one", 1)[0]
    two = run(LAUNCHERS[launcher], tmp_path / "two", 2)
    compare([Trained(*rank[0]) for rank in two], Trained(*one[0]))
    for rank in two:
        for mine, expected in zip(rank[1], one[1], strict=True):
            assert max(abs(a - b) / abs(b) for a, b in zip(mine, expected, strict=True)) <= 1e-6
    adapters = saved(tmp_path / "one" / "bare"), saved(tmp_path / "two" / "bare")
    assert max(relative(adapters[1][key], value) for key, value in adapters[0].items()) <= 5e-6


@pytest.mark.slow
def test_two_hosts_by_torchrun(tmp_path: Path) -> None:
    """An agent for each host, both on this machine, each with two processes."""
    one = run([], tmp_path / "one", 1)[0]
    (tmp_path / "two").mkdir()
    script, port = str(ROOT / "tests/support/rank_script.py"), free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--node_rank",
                str(host), "--master_addr", "127.0.0.1", "--master_port", str(port), script, str(tmp_path / "two"),
            ],
            env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    try:
        errors = [agent.communicate(timeout=300)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], errors[0][-3000:]
    two = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in range(4)]
    compare([Trained(*rank[0]) for rank in two], Trained(*one[0]), hosts=2)
    adapters = saved(tmp_path / "one" / "bare"), saved(tmp_path / "two" / "bare")
    assert max(relative(adapters[1][key], value) for key, value in adapters[0].items()) <= 5e-6


@pytest.mark.slow
def test_kt_hf_train_by_torchrun(tmp_path: Path) -> None:
    runs_in(tmp_path, save_model(tmp_path / "model"), per_device_train_batch_size=1, torch_dtype="float32")
    done = subprocess.run(
        [sys.executable, *LAUNCHERS["torchrun"], "-m", "kt_hf.cli", "train", "run.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kt-hf train") == 1, done.stdout  # rank 0 prints for all
    assert "2, each with a part of every layer's experts" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def sft_losses(folder: Path, tokenizer: Any, patched: bool, ranks: int) -> list[float]:
    model = get_peft_model(
        patched_model(MIXTRAL, TORCH_FP32) if patched else MIXTRAL(),
        patched_config(MIXTRAL) if patched else stock_config(MIXTRAL),
    )
    (fill_whole if patched else fill_lora)(model, 1)
    return logged(sft(model, folder, tokenizer, max_steps=4, per_device_train_batch_size=8 // ranks))


def dpo_losses(folder: Path, tokenizer: Any, patched: bool, ranks: int, reference: str) -> list[float]:
    base = patched_model(MIXTRAL, TORCH_FP32) if patched else MIXTRAL()
    config = patched_config(MIXTRAL) if patched else stock_config(MIXTRAL)
    if reference == "ref":
        base, config = get_peft_model(base, config), None
        (fill_whole if patched else fill_lora)(base, 1, std=0.02)
    trainer = trl.DPOTrainer(
        base,
        args=trl.DPOConfig(
            **arguments(
                folder, max_steps=4, learning_rate=1e-3, per_device_train_batch_size=8 // ranks,
                precompute_ref_log_probs=reference == "precomputed", train_sampling_strategy="sequential",
            )
        ),
        train_dataset=preferences(), processing_class=tokenizer, peft_config=config, callbacks=callbacks(base),
    )  # fmt: skip
    assert ("ref" in trainer.model.peft_config) == (reference == "ref")
    trainer.train()
    return logged(trainer)


def check(losses: Any, folder: Path) -> None:
    """One process and two ranks differ by no more than twice what stock TRL's losses differ by."""
    apart = {}
    for patched in (True, False):
        one = losses(folder / f"one-{patched}", patched, 1)
        work = lambda rank, patched=patched: losses(folder / f"two-{patched}", patched, 2)  # noqa: E731
        two = results(on_ranks(2, work))
        assert two[0] == two[1]
        apart[patched] = distance(two[0], one)
    assert apart[True] <= 2 * apart[False] + 1e-6, apart


@pytest.mark.slow
def test_sft(tmp_path: Path, tokenizer: Any) -> None:
    check(lambda folder, patched, ranks: sft_losses(folder, tokenizer, patched, ranks), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["disable_adapter", "ref", "precomputed"])
def test_dpo(reference: str, tmp_path: Path, tokenizer: Any) -> None:
    check(lambda folder, patched, ranks: dpo_losses(folder, tokenizer, patched, ranks, reference), tmp_path)
