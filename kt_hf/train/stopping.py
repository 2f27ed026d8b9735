"""How a run is stopped: Ctrl-C and SIGTERM end it after the batch it is in, with a checkpoint."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from .together import largest

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(KeyboardInterrupt):
    """A run was stopped; the message says what is left of it.

    Attributes:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        """Keep the message, and 128 + the signal's number as exit code."""
        super().__init__(message)
        self.exit_code = 128 + number


class _EvaluationStopped(Exception):
    """Leaves an evaluation at the end of a batch."""


class StopOnSignal(TrainerCallback):
    """The first signal ends the run after the batch it is in, with a checkpoint if the run makes any; the second at
    once.

    A KeyboardInterrupt in the middle of a batch could hit a save, or leave worker threads with a call half done. What
    a step has gathered of its gradient when it is stopped between two of its batches is dropped: the checkpoint is the
    one after the step before. Several processes stop together, after the step at whose end one of them knows.
    """

    def __init__(self, console: Console) -> None:
        """Tell the user on `console` what a signal does; none is caught before `listening`."""
        self.console = console
        self.number: int | None = None  # of the signal

    @property
    def asked(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.number is not None

    @contextmanager
    def listening(self, trainer: Any) -> Iterator[None]:
        """Take SIGINT and SIGTERM while `trainer` trains; its evaluations can be stopped, too."""
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *args, **kwargs: self._evaluate(trainer, evaluate, *args, **kwargs)
        before = {}
        if threading.current_thread() is threading.main_thread():  # signals come to no other
            before = {number: signal.signal(number, self._take) for number in _NAMES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            trainer.evaluate = evaluate

    def _take(self, number: int, frame: Any) -> None:
        if self.asked:
            raise Interrupted("Interrupted.", number)
        self.number = number
        self.console.print(f"{_NAMES[signal.Signals(number)]}: stopping after this step's batch. Again stops at once.")

    def _evaluate(self, trainer: Any, evaluate: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return dict(evaluate(*args, **kwargs))
        except _EvaluationStopped:
            self._stop(trainer.args, trainer.state, trainer.control)
            metric = trainer.args.metric_for_best_model or "loss"
            return {f"eval_{metric.removeprefix('eval_')}": math.nan}  # which is never the best

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop and save after this step, if asked, or if another process of the run is."""
        self.number = largest(kwargs.get("model"), self.number or 0) or None
        if self.asked:
            self._stop(args, state, control)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop and save after this step of gradient accumulation, if asked."""
        if self.asked and args.world_size == 1:
            self._stop(args, state, control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation at once, if asked."""
        if self.asked and args.world_size == 1:
            raise _EvaluationStopped

    @staticmethod
    def _stop(args: Any, state: Any, control: Any) -> None:
        control.should_training_stop = True
        saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        is_saved = (checkpoint_of(args, state) / "trainer_state.json").exists()
        control.should_save = saves and state.global_step > 0 and not is_saved
        control.should_evaluate = False


def checkpoint_of(args: Any, state: Any) -> Path:
    """Where the Trainer saves the checkpoint of the step it is at."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
