"""A disk that becomes full in a run: a sentence, and the next run goes on from the last complete checkpoint."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import Trainer, TrainerState

from kt_hf.cli.failures import plain_failures
from kt_hf.errors import KTAMXConfigError, KTAMXDiskFullError
from kt_hf.system import disk
from kt_hf.system.threads import torch_threads
from tests.support.train_runs import Runs, runs_in

ADAPTER = "adapter_model.safetensors"
SAVED = (peft.peft_model, "safe_save_file")
# What is being written when the disk fills: its writer; the number of calls before the one that fails; its file.
MOMENTS: dict[str, tuple[tuple[Any, str], int, str]] = {
    "adapter": (SAVED, 1, f"checkpoint-2/{ADAPTER}"),
    "optimizer": ((Trainer, "_save_optimizer_and_scheduler"), 1, "checkpoint-2/optimizer.pt"),
    "trainer state": ((TrainerState, "save_to_json"), 1, "checkpoint-2/trainer_state.json"),
    "state at the end": ((TrainerState, "save_to_json"), 2, "trainer_state.json"),
    "random state": ((Trainer, "_save_rng_state"), 1, "checkpoint-2/rng_state.pth"),
    "adapter at the end": (SAVED, 2, ADAPTER),
}
FAST = ("adapter", "optimizer", "trainer state", "state at the end")


@contextmanager
def full_from(writer: tuple[Any, str], calls: int) -> Iterator[None]:
    """The system refuses all but the first bytes of a file, as a full disk does, once a writer was called so often."""
    limits, (owner, name), left = resource.getrlimit(resource.RLIMIT_FSIZE), writer, [calls]
    original = getattr(owner, name)

    def write(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        return original(*args, **kwargs)

    setattr(owner, name, write)
    try:
        yield
    finally:
        setattr(owner, name, original)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def logged(runs: Runs) -> list[tuple[int, float]]:
    """Step and loss of every log of a run."""
    history = json.loads((runs.out / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["loss"]) for row in history if "loss" in row]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run that nothing has happened to."""
    runs = runs_in(tmp_path_factory.mktemp("whole"), tiny_model)
    with torch_threads(1):  # as each test: sums in one order
        runs.again()
    return runs


@pytest.mark.parametrize("moment", [pytest.param(m, marks=() if m in FAST else pytest.mark.slow) for m in MOMENTS])
def test_the_next_run_goes_on(moment: str, whole: Runs, tiny_model: Path, tmp_path: Path) -> None:
    runs = runs_in(tmp_path, tiny_model)
    writer, calls, file = MOMENTS[moment]
    with full_from(writer, calls), pytest.raises(KTAMXDiskFullError) as caught:
        runs.again()
    assert re.search(rf"{runs.out}/{file}\b.* could not be written: the disk is full \(.* free", str(caught.value))
    assert re.search(r"(of|takes about) [\d,.]+ (bytes|MB)", str(caught.value))
    assert not (runs.out / "kt_hf_summary.json").exists()

    summary = runs.again("resume_from_checkpoint=true")
    step = 1 if file.startswith("checkpoint-2") else 2  # all are done: the result alone is missing
    assert f"Resuming from {runs.out}/checkpoint-{step}, after step {step}" in runs.printed
    assert summary["steps"] == 2
    losses, expected_losses = (logged(run) for run in (runs, whole))
    assert losses == expected_losses
    ours, expected = load_file(runs.out / ADAPTER), load_file(whole.out / ADAPTER)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[key], value) for key, value in expected.items())
    with pytest.raises(KTAMXConfigError, match="checkpoint-2 has done 2, so nothing is left"):
        runs.again("resume_from_checkpoint=true")


def test_without_experts_of_ours(tiny_model: Path, tmp_path: Path) -> None:
    runs = runs_in(tmp_path, tiny_model, use_kt=False)
    expected = rf"checkpoint-2/{ADAPTER} could not be written: the disk is full"
    with full_from(SAVED, 1), pytest.raises(KTAMXDiskFullError, match=expected):
        runs.again()


def test_a_checkpoint_without_room_is_not_begun(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command ends with 1, for nothing of the settings is wrong."""
    runs = runs_in(tmp_path, tiny_model)
    free = disk.free_bytes(tmp_path)
    monkeypatch.setattr(
        disk, "free_bytes", lambda path: 1000 if (runs.out / "checkpoint-1" / "trainer_state.json").exists() else free
    )
    with pytest.raises(typer.Exit) as ended, plain_failures():
        runs.again()
    assert ended.value.exit_code == 1
    assert "out: the disk has 1,000 bytes free" in capsys.readouterr().err
    assert {path.name for path in runs.out.glob("checkpoint-*")} == {"checkpoint-1"}
