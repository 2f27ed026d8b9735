"""`kt-hf train` in several processes: one result, the same as one process's; one of them writes and prints."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kt_hf import KTAMXConfigError
from kt_hf.adapters import check_checkpoint
from kt_hf.train.stopping import Interrupted, StopOnSignal
from tests.support.ranks import on_ranks, relative, results
from tests.support.tiny import save_model
from tests.support.train_runs import runs_in

ADAPTER = "adapter_model.safetensors"


def run_on_ranks(
    folder: Path, model: Path, *overrides: str, ranks: int = 2, hosts: int = 1, **settings: Any
) -> list[tuple[dict[str, Any], str]]:
    folder.mkdir()
    runs = runs_in(folder, model, torch_dtype="float32", **settings)

    def work(rank: int) -> tuple[dict[str, Any], str]:
        return runs.again(*overrides), runs.printed

    return results(on_ranks(ranks, work, timeout=60, hosts=hosts))


@pytest.mark.slow
def test_two_hosts_train_what_one_process_does(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (tmp_path / "one").mkdir()
    one = runs_in(tmp_path / "one", model, torch_dtype="float32", per_device_train_batch_size=4).again()
    every = run_on_ranks(tmp_path / "two", model, ranks=4, hosts=2, per_device_train_batch_size=1)
    (first, printed), others = every[0], every[1:]
    assert "4 on 2 hosts, which have all experts each: of a host's 2, each with a part" in " ".join(printed.split())
    assert not any(silent.strip() for _, silent in others)
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert first["tokens"] == one["tokens"]
    assert (first["processes"], first["hosts"]) == (4, 2)
    assert first["experts_of_processes"] == [(0, 2), (2, 4)]
    assert first["expert_load"] == one["expert_load"]
    check_checkpoint(tmp_path / "two" / "out" / "checkpoint-2")


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (tmp_path / "one").mkdir()
    one = runs_in(tmp_path / "one", model, torch_dtype="float32").again()
    (first, printed), (second, silent) = run_on_ranks(tmp_path / "two", model, per_device_train_batch_size=1)
    assert "2, each with a part of every layer's experts" in printed
    assert not silent.strip()
    assert first["loss"] == second["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert "(0: 0 to 1, 1: 2 to 3)" in printed
    assert first["processes"] == 2
    assert first["experts_of_processes"] == [(0, 2), (2, 4)]
    assert first["tokens"] == second["tokens"]
    adapters = [load_file(tmp_path / name / "out" / ADAPTER) for name in ("one", "two")]
    # B begins at zero, and AdamW's first steps are as large for the smallest gradients, rounding and all.
    assert max(relative(adapters[1][key], value) for key, value in adapters[0].items()) <= 3e-4
    check_checkpoint(tmp_path / "two" / "out" / "checkpoint-2")
    assert not list((tmp_path / "two" / "out").glob(".kt_hf.lock"))
    summary = json.loads(next((tmp_path / "two" / "out").glob("*summary*.json")).read_text())
    assert summary["processes"] == 2


@pytest.mark.slow
def test_what_is_wrong_is_told_once(tmp_path: Path) -> None:
    """By the first that has it; a row that only one process cannot read ends the others as well."""
    runs = runs_in(tmp_path, save_model(tmp_path / "model"))

    (tmp_path / "bad.jsonl").write_text('{"instruction": 1}\n')

    def refused(file: str) -> str:
        with pytest.raises(KTAMXConfigError) as error:
            runs.again(f"dataset={tmp_path / file}")
        return str(error.value)

    every = results(on_ranks(2, lambda rank: refused(["data.jsonl", "bad.jsonl"][rank]), timeout=60))
    assert every[0] == "process 0 ends with process 1, which says why"
    assert "bad.jsonl" in every[1]
    every = results(on_ranks(2, lambda rank: refused("bad.jsonl"), timeout=60))
    assert "bad.jsonl" in every[0]
    assert every[1] == "process 1 ends with process 0, which says why"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    whole = run_on_ranks(tmp_path / "whole", model, per_device_train_batch_size=1, max_steps=4)
    (tmp_path / "two").mkdir()
    runs = runs_in(tmp_path / "two", model, torch_dtype="float32", per_device_train_batch_size=1, max_steps=4)

    def stopped(rank: int) -> str:
        original = StopOnSignal.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, args, state, control, **kwargs)

        monkeypatch.setattr(StopOnSignal, "on_step_end", on_step_end)
        with pytest.raises(Interrupted) as stop:
            runs.again("save_steps=100")
        assert stop.value.exit_code == 143
        return str(stop.value)

    assert all("Stopped after step 2 of 4" in words for words in results(on_ranks(2, stopped, timeout=60)))
    again = results(on_ranks(2, lambda rank: runs.again("resume_from_checkpoint=true"), timeout=60))
    assert again[0]["loss"] == whole[0][0]["loss"]
