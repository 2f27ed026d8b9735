"""What a user sees while a run trains and evaluates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class TokenCounter:
    """Tokens that went into training forwards, padding included: what is computed."""

    def __init__(self, model: Any) -> None:
        """Count from now on the tokens that `model`'s input embeddings are given, by a hook."""
        self.tokens = 0
        self._handle = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled() and inputs:
            self.tokens += inputs[0].numel()

    def close(self) -> None:
        """Remove the hook; `tokens` keeps its value."""
        self._handle.remove()


def last_metrics(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of what TRL's trainers log beside the loss, what says how a stage of rewards goes: the last values.

    `reward` is GRPO's mean reward; `margin` how much better good answers are judged than bad ones, by the policy's log
    probabilities (DPO, KTO, ORPO) or by a reward model's scores.
    """
    names = {"reward": "reward", "rewards/margins": "margin", "margin": "margin", "accuracy": "accuracy"}
    last: dict[str, Any] = next((row for row in reversed(history) if "loss" in row), {})
    return {word: float(last[name]) for name, word in names.items() if isinstance(last.get(name), int | float)}


_EVERY = 30.0  # seconds between two lines of an evaluation, where there is no bar


class ShowProgress(TrainerCallback):
    """A line for each log and each evaluation; on terminals a bar with the time left, too. What a run before this one
    did, which this one resumes, does not count for the time left."""

    def __init__(self, console: Console, counter: TokenCounter) -> None:
        """Print to `console`; the speed is that of `counter`, which counts the model's tokens."""
        self.console, self.counter = console, counter
        self.seconds = 0.0  # in training steps, without evaluation and saving
        self._started = self._shown_seconds = 0.0
        self._shown_tokens = 0
        self._step_tokens = 0  # of whole steps, without one on trial or one that failed
        self._first_step = 0  # that this run does not do itself
        self._evaluated = 0  # batches of the evaluation that is under way
        self._evaluation_shown = 0.0
        self._bar: Progress | None = None
        self._task: Any = None
        self._evaluation: Any = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of training steps by their seconds; 0 before the first step."""
        return self.counter.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, on terminals alone."""
        self.evaluation_over()
        self.close()  # of a training that did not end, and begins once more
        self.counter.tokens = self._step_tokens
        self._first_step = state.global_step
        if self._first_step:
            self.console.print(f"  going on after step {self._first_step} of {state.max_steps}")
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=30), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, text="")
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the step's seconds, and move the bar."""
        self.seconds += time.perf_counter() - self._started
        self._step_tokens = self.counter.tokens
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, text=f"{self.tokens_per_second:.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the loss of training or evaluation."""
        logs = logs or {}
        if "eval_loss" in logs:
            self.console.print(f"  step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            seconds, tokens = self.seconds - self._shown_seconds, self.counter.tokens - self._shown_tokens
            self._shown_seconds, self._shown_tokens = self.seconds, self.counter.tokens
            rate = f"{tokens / seconds:.0f}" if seconds else "?"
            done = max(1, state.global_step - self._first_step)
            left = self.seconds / done * (state.max_steps - state.global_step)
            more = "".join(f"{name} {value:.4f}  " for name, value in last_metrics([logs]).items())
            self.console.print(
                f"  step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  {more}"
                f"lr {float(logs.get('learning_rate', 0)):.2e}  {rate} tokens/s  {_clock(left)} left"
            )

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far an evaluation is: a bar on terminals, else a line every half minute."""
        total = _length(kwargs.get("eval_dataloader"))
        now = time.perf_counter()
        if self._evaluated == 0:
            self._evaluation_shown = now
            if self._bar:
                self._evaluation = self._bar.add_task("", total=total, text="evaluation batches")
        self._evaluated += 1
        if self._bar and self._evaluation is not None:
            self._bar.update(self._evaluation, completed=self._evaluated)
        if not self.console.is_terminal and now - self._evaluation_shown > _EVERY:
            self._evaluation_shown = now
            self.console.print(f"  evaluating: batch {self._evaluated}{f' of {total}' if total else ''}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the evaluation's bar away."""
        self.evaluation_over()

    def evaluation_over(self) -> None:
        """Take the evaluation's bar away."""
        self._evaluated = 0
        if self._bar and self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
        self._evaluation = None

    def close(self) -> None:
        """Take the bar away; does nothing the second time."""
        if self._bar:
            self._bar.stop()


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # of unknown length
        return None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
