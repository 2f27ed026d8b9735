"""Runs of a Trainer that are killed, and what must be left of them. Started by test_kill.py in a process of its own.

The process imports and then only forks: each run is a child, so that a kill costs no import.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from kt_hf import KTAMXError
from kt_hf.adapters import check_checkpoint, last_complete
from tests.support.cases import TORCH_FP32
from tests.support.trainers import model_to_train, trainer_for

STEPS = 3
ADAPTER = "adapter_model.safetensors"


def train(folder: Path, resume: Any = None, limit: int | None = 1) -> None:
    """Three steps, a save after each, and only the last kept."""
    trainer = trainer_for(
        model_to_train(TORCH_FP32), folder, max_steps=STEPS, save_strategy="steps", save_steps=1,
        save_total_limit=limit, learning_rate=1e-3, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)


class Killer:
    """Ends the process at the n-th point; n = 0 only counts them."""

    def __init__(self, at: int, log: Path) -> None:
        self.at, self.passed, self.log = at, 0, log

    def point(self, what: str) -> None:
        self.passed += 1
        if self.at == 0:
            with open(self.log, "a") as file:
                file.write(f"{self.passed} {what}\n")
        if self.passed == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self, folder: Path) -> None:
        """Before each change of a file or folder; and for writers, also halfway and after."""

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and str(args[0]).startswith(str(folder)) and args[2] & (os.O_WRONLY | os.O_RDWR):
                self.point(f"open {args[0]}")
            elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                self.point(f"{event} {args[0]}")

        for owner, name, where in (
            (torch, "save", 1), (peft.peft_model, "safe_save_file", 1), (TrainerState, "save_to_json", 1),
            (Path, "write_text", 0), (peft.PeftConfig, "save_pretrained", 1),
        ):  # fmt: skip
            setattr(owner, name, self._in_steps(getattr(owner, name), where))
        original = os.replace

        def replace(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            self.point(f"after rename to {args[1]}")

        os.replace = replace
        sys.addaudithook(hook)

    def _in_steps(self, original: Callable[..., Any], where: int) -> Callable[..., Any]:
        def stepwise(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[where])
            path = path / "adapter_config.json" if path.is_dir() else path
            self.point(f"before {path}")
            result = original(*args, **kwargs)
            if self.passed + 1 == self.at:
                data = path.read_bytes()
                os.truncate(path, len(data) // 2)
            self.point(f"half of {path}")
            self.point(f"after {path}")
            return result

        return stepwise


def child(run: Callable[[], None], kill_after: float | None = None) -> int:
    """Run in a fork; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_is(folder: Path, golden: Path) -> None:
    """A checkpoint holds what the uninterrupted run saved at that step."""
    expected = golden / folder.name
    assert same(load_file(folder / ADAPTER), load_file(expected / ADAPTER)), f"{folder}: other LoRA"
    for name in ("optimizer.pt", "scheduler.pt"):
        assert same(*(torch.load(f / name, weights_only=True) for f in (folder, expected))), f"{folder}: other {name}"
    steps = [json.loads((f / "trainer_state.json").read_text())["global_step"] for f in (folder, expected)]
    assert steps[0] == steps[1], folder


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def examine(folder: Path, golden: Path) -> str:
    """What a killed run left: each checkpoint complete and right, or refused; the run can be brought to its end."""
    usable, refused = [], []
    for path in checkpoints(folder):
        try:
            check_checkpoint(path)
        except KTAMXError:
            refused.append(path)
            continue
        assert_is(path, golden)
        usable.append(path)
    last = last_complete(folder)
    assert last == (usable[-1] if usable else None), (last, usable)
    there = checkpoints(folder)
    if there:  # a save is begun after the one before is complete, so at most the newest is not
        assert len(there) == 1 or usable, f"nothing usable among {there}"
    if there and (last is None or last.name != f"checkpoint-{STEPS}"):  # else there is nothing to go on with
        finish(folder, golden, there[-1] in refused, last)
    return f"{len(usable)} usable, {len(refused)} refused"


def finish(folder: Path, golden: Path, must_refuse: bool, last: Path | None) -> None:
    """resume_from_checkpoint=True goes on rightly, or says which one to take."""
    log = folder / "error"

    def resume(which: Any) -> Callable[[], None]:
        def run() -> None:
            try:
                train(folder, which)
            except Exception as error:
                log.write_text(f"{type(error).__name__}: {error}")
                raise

        return run

    with quiet_errors():
        failed = child(resume(True)) != 0
    assert failed == must_refuse, f"resume_from_checkpoint=True: failed {failed}, should have {must_refuse}"
    if failed:
        said = log.read_text()
        # Between the Trainer's mkdir and the first file there is nothing that could say more than the Trainer does.
        empty = "Can't find a valid checkpoint" in said
        assert empty or (said.startswith("KTAMXError") and (last is None or repr(str(last)) in said)), said
        if last is None:
            return
        assert child(resume(str(last))) == 0, "the last complete one does not resume"
    final = folder / f"checkpoint-{STEPS}"
    check_checkpoint(final)
    assert_is(final, golden)


@contextlib.contextmanager
def quiet_errors() -> Iterator[None]:
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def killed_at_points(root: Path, golden: Path) -> None:
    log = root / "points"
    log.touch()

    def run(at: int, folder: Path) -> Callable[[], None]:
        def go() -> None:
            Killer(at, log).install(folder)
            train(folder)

        return go

    assert child(run(0, root / "count")) == 0
    points = log.read_text().splitlines()
    print(f"{len(points)} points")
    assert len(points) > 100
    for at in range(1, len(points) + 1):
        folder = root / f"at-{at}"
        assert child(run(at, folder)) == -signal.SIGKILL, points[at - 1]
        try:
            print(points[at - 1].replace(str(root), ""), "|", examine(folder, golden), flush=True)
        except AssertionError as error:
            raise AssertionError(f"killed at {points[at - 1]}: {error}") from error
        shutil.rmtree(folder, ignore_errors=True)


def killed_at_random(root: Path, golden: Path) -> None:
    rng, begin = random.Random(0), time.monotonic()
    assert child(lambda: train(root / "timed")) == 0
    duration = time.monotonic() - begin
    for index in range(30):
        folder = root / f"random-{index}"
        moment = rng.uniform(0.3, 1) * duration  # before, nothing is saved yet
        code = child(lambda folder=folder: train(folder), kill_after=moment)
        last = last_complete(folder) if folder.exists() else None
        if (
            code != 0 and last is not None and last.name != f"checkpoint-{STEPS}"
        ):  # and once more, writing over what the first has left
            moment = rng.uniform(0.3, 1) * duration
            with quiet_errors():
                child(lambda folder=folder, last=last: train(folder, str(last)), kill_after=moment)
        try:
            print(
                f"{index}: {moment:.2f} s |", examine(folder, golden) if folder.exists() else "nothing yet", flush=True
            )
        except AssertionError as error:
            raise AssertionError(f"killed at random, {index}, {moment} s: {error}") from error
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[2])
    assert child(lambda: train(where / "golden", limit=None)) == 0
    {"points": killed_at_points, "random": killed_at_random}[sys.argv[1]](where, where / "golden")
