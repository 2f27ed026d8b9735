"""Ctrl-C and SIGTERM while a run trains or evaluates: a message, a checkpoint that resumes, no traceback, no hang."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kt_hf.train.progress import ShowProgress
from kt_hf.train.stopping import Interrupted
from tests.support.tiny import environment, kt_hf, write_yaml
from tests.support.train_runs import Runs, runs_in

STARTED = "kt-hf starts"
START = f"import kt_hf.__main__ as command; print({STARTED!r}); command.main()"


def config(cwd: Path, model: Path, **more: object) -> Path:
    (cwd / "data.jsonl").write_text(json.dumps({"text": "A few words to learn."}) + "\n")
    return write_yaml(
        cwd / "run.yaml",
        **{
            "model_name_or_path": str(model), "dataset": "data.jsonl", "cutoff_len": 64,
            "per_device_train_batch_size": 1, "max_steps": 3000, "logging_steps": 1, "output_dir": "out",
            "kt_num_threads": 1,
        }
        | more,
    )  # fmt: skip


def interrupted(cwd: Path, *overrides: str, number: int, at: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run that gets a signal when it has printed `at`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", START, "train", "run.yaml", *overrides],
        cwd=cwd, env=environment(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if at in line:
                time.sleep(0.2 if at == STARTED else 0)  # until it takes signals
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=120)
        return process.returncode, "".join(lines) + out, err
    finally:
        process.kill()


def test_it_stops_after_the_step_with_a_checkpoint_that_resumes(tiny_model: Path, tmp_path: Path) -> None:
    config(tmp_path, tiny_model)  # the next checkpoint would be due at step 500
    code, out, err = interrupted(tmp_path, "output_dir=out #1", "lora_rank=4", number=signal.SIGINT, at="step 2/")
    assert code == 130, out + err
    assert "Ctrl-C: stopping after this step" in out
    assert "Traceback" not in out + err
    (checkpoint,) = (tmp_path / "out #1").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 2 <= step < 100
    assert f"Stopped after step {step} of 3000" in err
    assert not (tmp_path / "out #1" / "adapter_model.safetensors").exists()  # it is not done
    command = shlex.split(err.splitlines()[-1])
    assert command == ["kt-hf", "train", "run.yaml", "output_dir=out #1", "lora_rank=4", "resume_from_checkpoint=true"]
    resumed = kt_hf(*command[1:], f"max_steps={step + 2}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"step {step + 1}/{step + 2}" in resumed.stdout
    assert f"step {step}/{step + 2}  loss" not in resumed.stdout
    assert (tmp_path / "out #1" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_first_seconds(number: int, tiny_model: Path, tmp_path: Path) -> None:
    config(tmp_path, tiny_model)
    code, out, err = interrupted(tmp_path, number=number, at=STARTED)
    assert code == 128 + number, out + err
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


def signal_at(monkeypatch: pytest.MonkeyPatch, moment: str, number: int, times: int = 1) -> None:
    """Send this process a signal when a run comes to a moment, a callback's name, for the first time."""
    before = getattr(ShowProgress, moment)
    left = [times]

    def send(self: ShowProgress, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        while left[0]:
            left[0] -= 1
            signal.raise_signal(number)

    monkeypatch.setattr(ShowProgress, moment, send)


def stopped(runs: Runs, *overrides: str) -> Interrupted:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        runs.again(*overrides)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return caught.value


def test_sigterm_saves_as_ctrl_c_does(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_in(tmp_path, tiny_model, max_steps=50, save_steps=50)
    signal_at(monkeypatch, "on_step_begin", signal.SIGTERM)
    error = stopped(runs)
    assert error.exit_code == 143
    assert "SIGTERM: stopping" in runs.printed
    assert "Stopped after step 1 of 50" in str(error)
    assert (runs.out / "checkpoint-1" / "trainer_state.json").exists()


def test_it_stops_between_the_batches_of_a_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_in(tmp_path, tiny_model, gradient_accumulation_steps=1_000, num_train_epochs=1_000, max_steps=3)
    signal_at(monkeypatch, "on_step_begin", signal.SIGINT)
    error = stopped(runs)
    assert error.exit_code == 130
    assert "Nothing was saved (not one step was done)" in str(error)


def test_it_stops_within_an_evaluation(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"val_size": 2, "per_device_eval_batch_size": 1, "eval_steps": 1, "max_steps": 50, "save_steps": 50}
    runs = runs_in(tmp_path, tiny_model, **settings, metric_for_best_model="loss")
    batches = []
    before = ShowProgress.on_prediction_step
    monkeypatch.setattr(
        ShowProgress, "on_prediction_step", lambda *args, **kwargs: batches.append(1) or before(*args, **kwargs)
    )
    signal_at(monkeypatch, "on_prediction_step", signal.SIGTERM)
    error = stopped(runs)
    assert error.exit_code == 143
    assert len(batches) == 1  # of two
    assert "Stopped after step 1 of 50" in str(error)
    assert (runs.out / "checkpoint-1" / "trainer_state.json").exists()


def test_in_the_last_evaluation_the_adapter_is_saved(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_in(tmp_path, tiny_model, val_size=2, save_strategy="no", max_steps=1)
    signal_at(monkeypatch, "on_prediction_step", signal.SIGINT)
    error = stopped(runs)
    assert "Stopped after the last step. The adapter is in" in str(error)
    assert (runs.out / "adapter_model.safetensors").exists()


def test_a_run_that_saves_nothing_says_so(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_in(tmp_path, tiny_model, save_strategy="no", max_steps=3)
    signal_at(monkeypatch, "on_step_begin", signal.SIGINT)
    assert "Nothing was saved (save_strategy: no)" in str(stopped(runs))
    assert not list(runs.out.glob("checkpoint-*"))


def test_twice_stops_at_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_in(tmp_path, tiny_model)
    signal_at(monkeypatch, "on_step_begin", signal.SIGINT, times=2)
    assert str(stopped(runs)) == "Interrupted."
    assert not list(runs.out.glob("checkpoint-*"))
