"""Ctrl-C while a run trains: a message, a usable checkpoint if the run makes any, no traceback, no hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.tiny import environment, kt_hf, write_yaml


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


def interrupted(cwd: Path, at: str = "step 2/", times: int = 1) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run that gets SIGINT when it has printed `at`, and again after each answer."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kt_hf.cli", "train", "run.yaml"],
        cwd=cwd, env=environment(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines, sent = [], 0
        for line in process.stdout:
            lines.append(line)
            if at in line and sent == 0:
                time.sleep(8 if times > 1 else 0)  # until it is in a step
            if (at in line and sent == 0) or "Ctrl-C" in line:
                process.send_signal(signal.SIGINT)
                sent += 1
                if sent == times:
                    break
        out, err = process.communicate(timeout=120)
        return process.returncode, "".join(lines) + out, err
    finally:
        process.kill()


def test_it_stops_after_the_step_with_a_checkpoint_that_resumes(tiny_model: Path, tmp_path: Path) -> None:
    config(tmp_path, tiny_model)  # the next checkpoint would be due at step 500
    code, out, err = interrupted(tmp_path)
    assert code == 130, out + err
    assert "Ctrl-C: stopping after this step" in out
    assert "Traceback" not in out + err
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 2 <= step < 100
    assert f"Stopped after step {step} of 3000" in err
    assert "kt-hf train run.yaml resume_from_checkpoint=true" in err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # it is not done
    more = ("resume_from_checkpoint=true", f"max_steps={step + 2}")
    resumed = kt_hf("train", "run.yaml", *more, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"step {step + 1}/{step + 2}" in resumed.stdout
    assert f"step {step}/{step + 2}" not in resumed.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_run_that_saves_nothing_says_so(tiny_model: Path, tmp_path: Path) -> None:
    config(tmp_path, tiny_model, save_strategy="no")
    code, out, err = interrupted(tmp_path)
    assert code == 130, out + err
    assert "Nothing was saved (save_strategy: no)" in err
    assert "Traceback" not in out + err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_twice_stops_at_once(tiny_model: Path, tmp_path: Path) -> None:
    config(tmp_path, tiny_model, gradient_accumulation_steps=1_000_000)  # a step of hours
    code, out, err = interrupted(tmp_path, "The first example", times=2)
    assert code == 130, out + err
    assert "Interrupted." in err
    assert "Traceback" not in out + err
