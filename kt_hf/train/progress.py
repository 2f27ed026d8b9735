"""What a user sees while a run trains, and how a run is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class TokenCounter:
    """Tokens that went into training forwards, padding included: what is computed."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self._handle = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled() and inputs:
            self.tokens += inputs[0].numel()

    def close(self) -> None:
        self._handle.remove()


class ShowProgress(TrainerCallback):
    """A line for each log and each evaluation; on terminals a bar with the time left, too."""

    def __init__(self, console: Console, counter: TokenCounter) -> None:
        self.console, self.counter = console, counter
        self.seconds = 0.0  # in training steps, without evaluation and saving
        self._started = self._shown_seconds = 0.0
        self._shown_tokens = 0
        self._bar: Progress | None = None
        self._task: Any = None

    @property
    def tokens_per_second(self) -> float:
        return self.counter.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=30), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, text="")
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, text=f"{self.tokens_per_second:.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.console.print(f"  step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            seconds, tokens = self.seconds - self._shown_seconds, self.counter.tokens - self._shown_tokens
            self._shown_seconds, self._shown_tokens = self.seconds, self.counter.tokens
            rate = f"{tokens / seconds:.0f}" if seconds else "?"
            done = max(1, state.global_step)
            left = self.seconds / done * (state.max_steps - state.global_step)
            self.console.print(
                f"  step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"lr {float(logs.get('learning_rate', 0)):.2e}  {rate} tokens/s  {_clock(left)} left"
            )

    def close(self) -> None:
        """Take the bar away; does nothing the second time."""
        if self._bar:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the step it is in, with a checkpoint if the run makes any; the second at
    once.

    A KeyboardInterrupt in the middle of a step could hit a save, or leave worker threads with a call half done.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT while the run trains."""
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.console.print("Ctrl-C: stopping after this step. Press it again to stop at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_training_stop = True
            control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
            control.should_evaluate = False
