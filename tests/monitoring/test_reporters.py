"""What the callback adds to the logs reaches reporters, which a Trainer calls before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import PrinterCallback, TrainerCallback

from tests.support.tiny import save_model
from tests.support.train_runs import runs_in

KEYS = {"tokens_per_second", "expert_load_entropy", "expert_load_max", "experts_without_tokens", "host_memory_gib"}


class Reporter(TrainerCallback):
    """Stands for TensorBoard's and the like: keeps what it is given to report."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_a_reporter_sees_the_callbacks_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a Trainer adds reporters: before the callbacks that it is given.
    monkeypatch.setattr(Reporter, "seen", [])
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", _defaults(Reporter))
    runs_in(tmp_path, save_model(tmp_path / "model")).again()
    steps = [logs for logs in Reporter.seen if "loss" in logs]
    assert len(steps) == 2
    assert all(logs.keys() >= KEYS for logs in steps)


def _defaults(*more: type[TrainerCallback]) -> list[Any]:
    from transformers import trainer

    return [*trainer.DEFAULT_CALLBACKS, *more]


def test_lead_goes_before_all_but_the_flow() -> None:
    from kt_hf import KTMoECallback

    class Handler:
        callbacks: list[Any]

    class Trainer:
        callback_handler = Handler()

        def add_callback(self, callback: Any) -> None:
            self.callback_handler.callbacks.append(callback)

        def remove_callback(self, callback: Any) -> None:
            self.callback_handler.callbacks.remove(callback)

    from transformers import DefaultFlowCallback

    flow, reporter, printer, ours = DefaultFlowCallback(), Reporter(), PrinterCallback(), KTMoECallback()
    trainer = Trainer()
    trainer.callback_handler.callbacks = [flow, reporter, printer, ours]
    ours.lead(trainer)
    ours.lead(trainer)
    assert trainer.callback_handler.callbacks == [flow, ours, reporter, printer]
    trainer.callback_handler.callbacks = [flow, reporter]
    ours.lead(trainer)
    assert trainer.callback_handler.callbacks == [flow, ours, reporter]


def test_tensorboards_file_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    runs_in(tmp_path, save_model(tmp_path / "model"), report_to="tensorboard").again()
    (file,) = (tmp_path / "events").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) >= {f"train/{key}" for key in KEYS}
    assert len(events.Scalars("train/tokens_per_second")) == 2
