"""Folded runs of `kt-hf train` beside those that are not: losses, rows, resumes, and memory that runs out."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trl import SFTTrainer

from kt_hf.backends.gpu.streamed import StreamedBackend
from kt_hf.experts.layer import kt_layers
from kt_hf.train import folding
from kt_hf.train.resume import RECORD
from kt_hf.train.trial_step import Trial
from tests.support.train_runs import Runs, runs_in

STREAMED = {
    "kt_expert_placement": {"resident": 0, "streamed": 4}, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4, "router_aux_loss_coef": 0.0, "learning_rate": 1e-3, "max_steps": 3,
    "save_strategy": "no", "activation_checkpointing": True,
}  # fmt: skip
ALMOST = [{"instruction": f"{i} + {i}?", "output": f"It is {2 * i}."} for i in range(14)]
PAIRS = [{"prompt": f"{i} + {i}?", "chosen": f" {2 * i}", "rejected": f" {i}, no"} for i in range(14)]


@dataclass
class Result:
    """What a run left."""

    adapter: dict[str, Tensor]
    state: dict[str, Any]
    printed: str

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.state["log_history"] if "loss" in row]


def result_of(runs: Runs) -> Result:
    state = json.loads((runs.out / "trainer_state.json").read_text())
    return Result(load_file(runs.out / "adapter_model.safetensors"), state, " ".join(runs.printed.split()))


def run(folder: Path, model: Path, *overrides: str, rows: Any = ALMOST, **settings: Any) -> Result:
    folder.mkdir(exist_ok=True)
    runs = runs_in(folder, model, rows, **STREAMED | settings)
    runs.again(*overrides)
    return result_of(runs)


def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is folded from here on."""
    monkeypatch.setattr(folding, "_PADDING", -1.0)


def same(a: Result, b: Result) -> bool:
    return a.losses == b.losses and all(torch.equal(a.adapter[name], b.adapter[name]) for name in a.adapter)


def near(a: Result, b: Result) -> bool:
    """Up to roundings of bf16 in another order, which Adam makes steps of."""
    pairs = [(a.adapter[name].float(), b.adapter[name].float()) for name in a.adapter]
    return len(a.losses) == len(b.losses) and all(
        abs(x - y) < 1e-3 * max(1.0, y) for x, y in zip(a.losses, b.losses, strict=True)
    ) and all(float((x - y).norm() / y.norm().clamp(min=1e-3)) < 0.1 for x, y in pairs)  # fmt: skip


@dataclass
class Memory:
    """A GPU whose memory ends where a forward or a backward of streamed experts has more than `rows` rows of a batch.

    Attributes:
        rows: How many it has room for.
        calls: Calls of layers that go well whatever they take.
    """

    rows: int = 10**6
    calls: int = 0
    length: int = 64

    def check(self, tokens: int) -> None:
        self.calls -= 1
        if self.calls < 0 and tokens > self.rows * self.length:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")


@pytest.fixture(params=["backward", pytest.param("forward", marks=pytest.mark.slow)])
def memory(request: pytest.FixtureRequest, cpu_for_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Of rows that are all 40 tokens long."""
    limit, real = Memory(length=40), getattr(StreamedBackend, request.param)

    def limited(self: Any, first: Any, *rest: Any) -> Any:
        limit.check((first if isinstance(first, Tensor) else first.x).shape[0])
        return real(self, first, *rest)

    monkeypatch.setattr(StreamedBackend, request.param, limited)
    return limit


LONG = [{"text": f"{i:02d}" + "abc" * 20} for i in range(14)]
OF_LONG: dict[str, Any] = {"rows": LONG, "max_length": 40}


def recorded_rows(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Of each optimizer step, the token ids of its rows; a trial's are left out."""
    steps: list[list[list[int]]] = []
    on_trial = []
    step, trial = SFTTrainer.training_step, folding.try_step

    def watched_step(self: Any, model: Any, inputs: Any, items: Any = None) -> Any:
        if kt_layers(model) and not on_trial:  # the settings' trial has a model of its own
            while len(steps) <= self.state.global_step:
                steps.append([])
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                steps[self.state.global_step].append(ids[mask.bool()].tolist())
        return step(self, model, inputs, items)

    def watched_trial(*args: Any) -> Trial:
        on_trial.append(True)
        try:
            return trial(*args)
        finally:
            on_trial.pop()

    monkeypatch.setattr(SFTTrainer, "training_step", watched_step)
    monkeypatch.setattr(folding, "try_step", watched_trial)
    return steps


def test_a_folded_run_is_the_run(
    cpu_for_gpu: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the end of an epoch of 14 rows, whose last step has two."""
    settings = {"max_steps": 5}
    steps = recorded_rows(monkeypatch)
    folded = run(tmp_path / "folded", tiny_model, **settings)
    rows, count = [list(step) for step in steps], [len(step) for step in steps]
    steps.clear()
    as_written(monkeypatch)
    written = run(tmp_path / "written", tiny_model, **settings)
    assert rows == steps
    assert count == [4, 4, 4, 2, 4]
    assert near(folded, written)
    assert folded.printed.count("1 x 4 rows a step are computed as 4 x 1") == 1
    assert written.printed.count("gradient_accumulation_steps=4 is not folded") == 1
    assert folded.state["train_batch_size"] == 4
    assert written.state["train_batch_size"] == 1
    for key in ("max_steps", "global_step", "num_train_epochs"):
        assert folded.state[key] == written.state[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 6, "per_device_train_batch_size": 2, "num_train_epochs": 2, "max_steps": -1},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"loraplus_lr_ratio": 4.0, "train_sampling_strategy": "group_by_length"},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
        {"dataloader_drop_last": True, "rows": ALMOST[:12]},
        {"stage": "dpo", "rows": PAIRS, "precompute_ref_log_probs": True},
        {"stage": "dpo", "rows": PAIRS, "precompute_ref_log_probs": False, "loss_type": ["ipo"]},
    ],
    ids=lambda settings: "-".join(settings) or "sft",
)
def test_twenty_steps(
    settings: dict[str, Any], cpu_for_gpu: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 20} | settings
    folded = run(tmp_path / "folded", tiny_model, **settings)
    as_written(monkeypatch)
    written = run(tmp_path / "written", tiny_model, **settings)
    assert near(folded, written)
    assert "rows a step are computed as" in folded.printed
    assert "not folded" in written.printed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router_aux_loss_coef": 0.001}, "the auxiliary loss of the routers (router_aux_loss_coef=0.001)"),
        ({"rows": [{"text": "x" * n} for n in (60, 1, 2, 3, 50, 1, 2, 3)]}, "padding would add"),
        ({"rows": ALMOST[:13], "dataloader_drop_last": True, "num_train_epochs": 1, "max_steps": -1,
          "gradient_accumulation_steps": 2}, None),
        ({"gradient_accumulation_steps": 1}, None),
        ({"kt_expert_placement": {"resident": 4, "streamed": 0}}, None),
        ({"kt_expert_placement": None}, None),
    ],
    ids=["auxiliary", "padding", "dropped rows", "one batch", "resident", "cpu"],
)  # fmt: skip
def test_runs_that_are_not_folded(
    settings: dict[str, Any], words: str | None, cpu_for_gpu: None, tmp_path: Path, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = []
    monkeypatch.setattr(folding.Folding, "train", lambda self, _: seen.append(self._trainer.args))
    monkeypatch.setattr("kt_hf.train.run.finish", lambda *_: pytest.skip.Exception)
    monkeypatch.setattr("kt_hf.train.run.show_result", lambda *_: None)
    runs = runs_in(tmp_path, tiny_model, settings.pop("rows", ALMOST), **STREAMED | settings)
    runs.again()
    steps = settings.get("gradient_accumulation_steps", 4)
    assert (seen[0].per_device_train_batch_size, seen[0].gradient_accumulation_steps) == (1, steps)
    if words is None and "dataloader_drop_last" in settings:
        words = "the last step of an epoch of 13 rows would have other rows"
    assert runs.printed.count("is not folded") == (words is not None)
    assert words is None or words in " ".join(runs.printed.split())


def live_bytes() -> int:
    """Of all tensors on the CPU, each memory once."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, Tensor) and value.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def snapshot(trainer: Any) -> dict[str, Any]:
    """All that a trial could change."""
    model = trainer.model
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "numbers": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        "metrics": {mode: dict(values) for mode, values in trainer._metrics.items()},
        "tokens": trainer._total_train_tokens,
        "load": [layer._runner.load._counts.tolist() for layer in kt_layers(model)],
        "optimizer": trainer.optimizer.state_dict(),
        "global_step": trainer.state.global_step,
    }


@pytest.mark.parametrize("rows", [2, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (4, 1))])
def test_a_trial_leaves_nothing(
    rows: int, memory: Memory, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fits or not; and the next smaller batch is tried, 1 x 4 at last."""
    memory.rows = rows
    real, seen = folding.try_step, []

    def watched(trainer: Any, *rest: Any) -> Trial:
        before, size = snapshot(trainer), live_bytes()
        trial = real(trainer, *rest)
        after, grown = snapshot(trainer), live_bytes() - size
        for name, value in before.pop("values").items():
            assert torch.equal(value, after["values"][name]), name
        assert before == {name: value for name, value in after.items() if name != "values"}
        # The two snapshots' own values are in both counts, but the first's.
        assert grown <= sum(value.nbytes for value in after["values"].values()) + 10_000
        seen.append((len(rest[1]), trial.fits))
        return trial

    monkeypatch.setattr(folding, "try_step", watched)
    result = run(tmp_path, tiny_model, **OF_LONG, max_steps=1)
    assert seen == [(4, True)] if rows == 4 else [(4, False), (2, rows == 2)]
    if rows == 1:
        assert "is not folded into larger batches: the GPU's memory is too small" in result.printed
        assert "On trial 4 x 1 ran out of memory; 2 x 2 ran out of memory." in result.printed
    else:
        assert f"1 x 4 rows a step are computed as {rows} x {4 // rows}" in result.printed
    assert result.state["train_batch_size"] == rows


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"loraplus_lr_ratio": 4.0}, {"lora_dropout": 0.3}], ids=lambda e: "".join(e))
def test_a_trial_changes_no_bit_of_the_run(
    extra: dict[str, Any], memory: Memory, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.rows = 1
    tried = run(tmp_path / "tried", tiny_model, **OF_LONG, **extra)
    memory.rows = 4
    on_trial = run(tmp_path / "folded", tiny_model, **OF_LONG, **extra)
    monkeypatch.setattr(folding, "try_step", lambda *_: Trial(True, ""))
    assert same(on_trial, run(tmp_path / "untried", tiny_model, **OF_LONG, **extra))
    as_written(monkeypatch)
    assert same(tried, run(tmp_path / "written", tiny_model, **OF_LONG, **extra))


def armed_at(step: int, memory: Memory, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """From the first batch after so many steps on there is room for `rows` rows. Returns (step, rows) of batches."""
    seen: list[tuple[int, int]] = []
    real = SFTTrainer.training_step

    def armed(self: Any, model: Any, inputs: Any, items: Any = None) -> Any:
        if self.state.global_step >= step:
            memory.rows = rows
        if kt_layers(model):
            seen.append((self.state.global_step, len(inputs["input_ids"])))
        return real(self, model, inputs, items)

    monkeypatch.setattr(SFTTrainer, "training_step", armed)
    return seen


def test_memory_that_runs_out_later(
    memory: Memory, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On from the last checkpoint, in batches half as large; again where these do not fit; never in silence."""
    seen = armed_at(3, memory, 1, monkeypatch)
    result = run(tmp_path, tiny_model, **OF_LONG, max_steps=4, save_strategy="steps", save_steps=2)
    assert seen[1:] == [(0, 4), (1, 4), (2, 4), (3, 2), (2, 2), *[(2, 1)] * 4, *[(3, 1)] * 2]
    for before, after in (("4 x 1", "2 x 2"), ("2 x 2", "1 x 4")):
        assert f"in batches folded to {before}: the run goes on from" in result.printed
        assert f"checkpoint-2, with {after}." in result.printed
    assert result.state["train_batch_size"] == 1
    assert result.state["global_step"] == 4
    assert json.loads((tmp_path / "out/checkpoint-4" / RECORD).read_text())["folding"] == {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    assert [row["step"] for row in result.state["log_history"] if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_batches_as_they_are_written_fail_as_ever(
    memory: Memory, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed_at(1, memory, 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, tiny_model, **OF_LONG, max_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"loraplus_lr_ratio": 4.0}, {"lora_dropout": 0.3}], ids=lambda e: "".join(e))
@pytest.mark.parametrize("step", [0, 2])
def test_without_a_checkpoint_it_begins_once_more(
    step: int, extra: dict[str, Any], memory: Memory, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit as a run that began with the smaller batches."""
    with monkeypatch.context() as patch:
        patch.setattr(folding, "try_step", lambda *_: Trial(True, ""))
        armed_at(step, memory, 2, patch)
        result = run(tmp_path / "failed", tiny_model, **OF_LONG, **extra)
    assert "from the start, for there is no complete checkpoint, with 2 x 2." in result.printed
    memory.rows = 2  # on trial
    assert same(result, run(tmp_path / "smaller", tiny_model, **OF_LONG, **extra))
    assert not list(Path(tmp_path / "failed/out").glob("tmp*"))


@pytest.mark.slow
def test_from_a_checkpoint_it_is_near_the_run(
    memory: Memory, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    with monkeypatch.context() as patch:
        armed_at(5, memory, 2, patch)
        failed = run(tmp_path / "failed", tiny_model, **OF_LONG, **saved)
    assert "goes on from" in failed.printed
    assert "checkpoint-4, with 2 x 2." in failed.printed
    memory.rows = 4
    assert near(failed, run(tmp_path / "folded", tiny_model, **OF_LONG, **saved))


def resumed(folder: Path, model: Path, change: Callable[[dict[str, Any]], None] | None = None, **settings: Any) -> Any:
    """(the uninterrupted run, the one that goes on from its second step, whose record was changed)."""
    folder.mkdir(exist_ok=True)
    runs = runs_in(
        folder, model, ALMOST, **STREAMED | {"save_strategy": "steps", "save_steps": 2, "max_steps": 5} | settings
    )
    runs.again()
    whole = result_of(runs)
    checkpoint = runs.out / "checkpoint-2"
    record = json.loads((checkpoint / RECORD).read_text())
    if change:
        change(record)
        (checkpoint / RECORD).write_text(json.dumps(record))
    runs.again(f"resume_from_checkpoint={checkpoint}")
    return whole, result_of(runs), record


def test_a_folded_run_resumes_as_it_was(cpu_for_gpu: None, tmp_path: Path, tiny_model: Path) -> None:
    """In the middle of an epoch, to the bit; without another trial."""
    whole, rest, record = resumed(tmp_path, tiny_model)
    assert record["folding"] == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert rest.losses == whole.losses
    assert same(whole, rest)
    assert "1 x 4 rows a step are computed as 4 x 1, as in the checkpoint" in rest.printed
    assert "streamed experts are copied" not in rest.printed
    assert rest.state["train_batch_size"] == whole.state["train_batch_size"] == 4
    assert rest.state["epoch"] == whole.state["epoch"]


@pytest.mark.slow
def test_a_run_that_was_not_folded_resumes_so(
    cpu_for_gpu: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of earlier versions, which say nothing of it."""
    with monkeypatch.context() as patch:
        as_written(patch)
        folder = tmp_path / "a"
        folder.mkdir()
        runs = runs_in(
            folder, tiny_model, ALMOST, **STREAMED | {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
        )
        runs.again()
    whole = result_of(runs)
    for forget in (False, True):
        file = runs.out / "checkpoint-2" / RECORD
        record = json.loads(file.read_text())
        if forget:
            del record["folding"]
            file.write_text(json.dumps(record))
        runs.again(f"resume_from_checkpoint={file.parent}")
        assert same(whole, result_of(runs))
        assert "computed as" not in runs.printed


@pytest.mark.slow
def test_a_smaller_record_is_kept(cpu_for_gpu: None, tmp_path: Path, tiny_model: Path) -> None:
    def halve(record: dict[str, Any]) -> None:
        record["folding"] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    whole, rest, _ = resumed(tmp_path, tiny_model, halve)
    assert rest.state["train_batch_size"] == 2
    assert near(whole, rest)


@pytest.mark.slow
def test_another_number_of_rows_is_decided_anew(cpu_for_gpu: None, tmp_path: Path, tiny_model: Path) -> None:
    runs = runs_in(
        tmp_path, tiny_model, ALMOST, **STREAMED | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    )
    runs.again()
    runs.again("resume_from_checkpoint=true", "gradient_accumulation_steps=2", "max_steps=3")
    assert "1 x 2 rows a step are computed as 2 x 1" in " ".join(runs.printed.split())
    assert result_of(runs).state["train_batch_size"] == 2


@pytest.mark.slow
def test_speed_counts_the_run_alone(cpu_for_gpu: None, tmp_path: Path, tiny_model: Path) -> None:
    """Not the trial's tokens."""
    runs = runs_in(tmp_path, tiny_model, LONG, **STREAMED | {"max_length": 40})
    assert runs.again()["tokens"] == 3 * 4 * 40


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_under_auto(
    cpu_for_gpu: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = SFTTrainer.prediction_step

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.extend([self.state.global_step] * bool(kt_layers(self.model)))
        if calls == [2, 4]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "prediction_step", limited)
    saved = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "val_size": 4}
    auto = {"kt_backend": "auto", "kt_expert_placement": "auto"}
    result = run(tmp_path, tiny_model, **saved, **auto, max_steps=6)
    assert "after step 4, in batches folded to 4 x 1" in result.printed
    assert "checkpoint-2, with 2 x 2." in result.printed
    assert [row["step"] for row in result.state["log_history"] if "eval_loss" in row] == [2, 4, 6]
    assert result.state["train_batch_size"] == 2
