"""`kt-hf train`, ended in the middle of its second save: resume_from_checkpoint=true goes on from the last complete
checkpoint, to the adapter of a run that nothing has happened to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny import environment, kt_hf
from tests.support.train_runs import runs_in

ADAPTER = "adapter_model.safetensors"
# Runs what it is given when the checkpoint's adapter is written and the optimizer's state is not yet.
START = """
import os, resource, signal, subprocess, sys
import kt_hf.__main__ as command
RESUME, left = "resume_from_checkpoint=true", [sys.argv.pop()]
def save_begins(event, args):
    if event == "open" and left and str(args[0]).endswith("checkpoint-2/adapter_config.json") and "w" in str(args[1]):
        exec(left.pop())
sys.addaudithook(save_begins)
command.main()
"""


class End(NamedTuple):
    """What happens; the exit code; words on stderr; the step that the next run goes on after."""

    what: str
    code: int
    words: str
    step: int


ENDS = {
    "killed": End("os.kill(os.getpid(), signal.SIGKILL)", -9, "", 1),
    "SIGTERM": End("os.kill(os.getpid(), signal.SIGTERM)", 143, "Stopped after step 3 of 4", 3),
    "full disk": End(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))", 1, "optimizer.pt could not be written", 1
    ),
    "started twice": End(
        "print(subprocess.run([sys.executable, '-m', 'kt_hf.cli', 'train', 'run.yaml', RESUME], stderr=2), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)", -9, "another run is writing there", 1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of four steps."""
    folder = tmp_path_factory.mktemp("whole")
    runs = runs_in(folder, tiny_model, max_steps=4)
    assert kt_hf("train", "run.yaml", cwd=folder).returncode == 0
    return load_file(runs.out / ADAPTER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_the_next_run_goes_on(name: str, whole: dict[str, torch.Tensor], tiny_model: Path, tmp_path: Path) -> None:
    end, runs = ENDS[name], runs_in(tmp_path, tiny_model, max_steps=4)
    ended = subprocess.run(
        [sys.executable, "-u", "-c", START, "train", "run.yaml", end.what],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == end.code, ended.stdout + ended.stderr
    assert end.words in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    if name == "started twice":
        assert "returncode=2" in ended.stdout
    assert not (runs.out / ADAPTER).exists()

    resumed = kt_hf("train", "run.yaml", "resume_from_checkpoint=true", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"checkpoint-{end.step}, after step {end.step}" in resumed.stdout
    assert json.loads((runs.out / "kt_hf_summary.json").read_text())["steps"] == 4
    ours = load_file(runs.out / ADAPTER)
    assert set(ours) == set(whole)
    assert all(torch.equal(ours[key], value) for key, value in whole.items())
