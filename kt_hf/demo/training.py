"""The demo's data, its stock SFTTrainer and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from .. import KTMoECallback
from ..builtin.pydoc_rows import Item
from .settings import DemoSettings

# Asked before and after where they were held out, which is so unless a docstring has changed.
PREFERRED = ("math.isnan", "textwrap.indent", "str.strip", "sorted", "statistics.fmean", "inspect.getsource")
GENERAL_QUESTION = "Name the three primary colors."


def choose_questions(held_out: Sequence[Item], count: int = 3) -> list[str]:
    """`count` held-out questions, and one that has nothing to do with the training."""
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
    """TRL's own SFTTrainer on the patched model."""
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


class ShowProgress(TrainerCallback):
    """A progress bar on terminals, and one line for each evaluation. Counts the time that training steps take."""

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
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._started)
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._bar.update(self._task, loss=f"loss {float(logs['loss']):.3f}")
        if logs and "eval_loss" in logs:
            self.console.print(f"  after {state.global_step:>3} steps: held-out loss {float(logs['eval_loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; does nothing the second time."""
        self._bar.stop()
