"""The demo's data, its training with the stock SFTTrainer, and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from .. import KTMoECallback, kt_lora_config
from ..builtin.pydoc_rows import Item, collect, import_modules, split
from ..train.plots import loss_points
from . import DemoError
from .settings import DemoSettings

# Asked before and after where they were held out, which is so unless a docstring has changed.
PREFERRED = ("math.isnan", "textwrap.indent", "str.strip", "sorted", "statistics.fmean", "inspect.getsource")
GENERAL_QUESTION = "Name the three primary colors."


def choose_questions(held_out: Sequence[Item], count: int = 3) -> list[str]:
    """Questions to ask before and after the training.

    Returns:
        `count` held-out ones, and one that has nothing to do with the training.
    """
    by_name = {item.name: item for item in held_out}
    chosen = [by_name[name] for name in PREFERRED if name in by_name]
    chosen += [item for item in held_out if item not in chosen]
    return [item.question for item in chosen[:count]] + [GENERAL_QUESTION]


def make_trainer(
    model: Any,
    tokenizer: Any,
    train: Sequence[Item],
    held_out: Sequence[Item],
    lora: LoraConfig,
    settings: DemoSettings,
    output_dir: Path,
    callback: TrainerCallback,
) -> SFTTrainer:
    """TRL's own SFTTrainer on the patched model, with `KTMoECallback`.

    Args:
        model: Patched.
        tokenizer: With a chat template.
        train: Examples to train on.
        held_out: Examples to evaluate on: before the first step and every few steps.
        lora: The adapter to train.
        settings: Of the run.
        output_dir: Where the adapter goes.
        callback: Takes the place of transformers' own printing.
    """
    # A few hundred tokens need no checkpointing. Newer releases of transformers have renamed the option.
    names = {field.name for field in fields(SFTConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(output_dir),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            per_device_eval_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            warmup_steps=2,
            lr_scheduler_type="cosine",
            max_length=256,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=settings.eval_every,
            eval_on_start=True,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=settings.dtype == "bfloat16",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            seed=settings.seed,
            **{checkpointing: False},
        ),
        train_dataset=Dataset.from_list([item.row() for item in train]),
        eval_dataset=Dataset.from_list([item.row() for item in held_out]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[KTMoECallback(), callback],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar takes its place
    return trainer


@dataclass(frozen=True)
class DemoData:
    """What a run trains on, is measured on, and is asked.

    Attributes:
        train: Examples to train on, as many as the run's steps take.
        held_out: Examples to measure the loss on.
        questions: Some that were held out, and one that has nothing to do with the training.
    """

    train: Sequence[Item]
    held_out: Sequence[Item]
    questions: list[str]


def make_data(settings: DemoSettings, console: Console) -> DemoData:
    """Collect the standard library's docstrings, and say how many there are.

    Raises:
        DemoError: There are too few for the run's steps.
    """
    modules, missing = import_modules()
    train, held_out = split(collect(modules))
    used = settings.steps * settings.batch
    if len(train) < used or len(held_out) < settings.held_out:
        raise DemoError(
            f"Too few docstrings for {settings.steps} steps: {len(train)} to train on, {len(held_out)} held out. "
            "Use fewer --steps; Python must not run with -OO, which leaves docstrings out.",
            exit_code=2,
        )
    console.print(
        f"  {len(modules)} modules: {len(train)} to train on (this run: {used}), "
        f"{len(held_out)} held out (measured on {settings.held_out})."
    )
    if missing:
        console.print(f"  Not in this Python: {', '.join(missing)}.")
    return DemoData(train[:used], held_out[: settings.held_out], choose_questions(held_out))


def lora_config(model: Any, settings: DemoSettings) -> LoraConfig:
    """The run's LoRA.

    Raises:
        KTAMXConfigError: A target that no module of the model has, or a value out of range.
    """
    return kt_lora_config(
        model, lora_rank=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_target=settings.lora_target
    )


@dataclass(frozen=True)
class Trained:
    """A run that has been trained.

    Attributes:
        trainer: With the trained model, and its log.
        step_seconds: Of each step.
    """

    trainer: SFTTrainer
    step_seconds: Sequence[float]

    @property
    def mean_step(self) -> float:
        """Seconds of a step, the mean."""
        return sum(self.step_seconds) / len(self.step_seconds)

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)

    def report(self) -> dict[str, Any]:
        """The summary's part about the training: losses, trained parameters, seconds of a step."""
        losses, evaluations = loss_points(self.trainer.state.log_history)
        first, last = evaluations[0][1], evaluations[-1][1]
        return {
            "held_out_loss": {"before": first, "after": last, "fall": 1 - last / first, "by_step": dict(evaluations)},
            "training_loss_by_step": dict(losses),
            "trainable_parameters": self.trainable,
            "seconds_per_step": round(self.mean_step, 3),
        }


def train(
    model: Any,
    tokenizer: Any,
    data: DemoData,
    lora: LoraConfig,
    settings: DemoSettings,
    output_dir: Path,
    console: Console,
) -> Trained:
    """Train, and evaluate before the first step, every few steps and after the last."""
    set_seed(settings.seed)
    progress = ShowProgress(console, settings.steps)
    trainer = make_trainer(model, tokenizer, data.train, data.held_out, lora, settings, output_dir, progress)
    try:
        trainer.train()
        if settings.steps % settings.eval_every:
            trainer.evaluate()  # else the last step has been measured already
    finally:
        progress.close()
    trained = Trained(trainer, progress.step_seconds)
    console.print(f"  {trained.trainable / 1e6:.1f} million trainable parameters, {trained.mean_step:.1f} s a step.")
    return trained


class ShowProgress(TrainerCallback):
    """A progress bar on terminals, and one line for each evaluation.

    Attributes:
        step_seconds: What each training step has taken.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.step_seconds: list[float] = []
        self._started = 0.0
        self._bar = Progress(
            TextColumn("  step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, loss="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to time a step."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the step took, and move the bar."""
        self.step_seconds.append(time.perf_counter() - self._started)
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show a step's loss on the bar, and an evaluation's in a line of its own."""
        if logs and "loss" in logs:
            self._bar.update(self._task, loss=f"loss {float(logs['loss']):.3f}")
        if logs and "eval_loss" in logs:
            self.console.print(f"  after {state.global_step:>3} steps: held-out loss {float(logs['eval_loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Take the bar away; does nothing the second time."""
        self._bar.stop()
