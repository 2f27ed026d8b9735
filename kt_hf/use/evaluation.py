"""Loss and perplexity of a model on a data set, as the Trainer that trained it computes them, and scored answers."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, track

from ..errors import KTAMXConfigError
from ..train.data.reading import reading
from ..train.data.rows import Rows, load_rows, messages_column
from ..train.data.template import conversation
from ..train.data.tokens import Prepared, prepare
from .generation import Answerer, Sampling, positions_of
from .opening import Checked, Opened
from .questions import Question, check_questions
from .scores import Score, score
from .tasks import run_tasks


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        dataset: Data as `kt-hf train` reads them; None for tasks alone.
        generate: Whether the data's questions are answered too.
        rouge: Whether those answers get ROUGE.
        tasks: Names of lm-eval's tasks.
        include: A folder of the user's own tasks.
        compare: Whether the base model is measured beside the adapter.
        most: Rows taken of the data, and of each task.
        length: Tokens of a row at most; the rest is cut off.
        batch: Rows of a batch.
        new_tokens: Tokens of an answer at most.

    Raises:
        KTAMXConfigError: A number out of range.
    """

    dataset: str | None
    generate: bool = False
    rouge: bool = False
    tasks: Sequence[str] = ()
    include: Path | None = None
    compare: bool = False
    most: int | None = None
    length: int = 1024
    batch: int = 8
    new_tokens: int = 256

    def __post_init__(self) -> None:
        numbers = {"--max-samples": self.most, "--cutoff-len": self.length, "--batch-size": self.batch}
        for name, value in (numbers | {"--max-new-tokens": self.new_tokens}).items():
            if value is not None and value < 1:
                raise KTAMXConfigError(f"{name} {value}: it must be 1 or more.")


@dataclass(frozen=True)
class EvalData:
    """A data set that is ready to be evaluated on.

    Attributes:
        rows: In TRL's form.
        prepared: Their token ids and labels.
        length: Tokens of a row at most.
        batch: Rows of a batch.
    """

    rows: Rows
    prepared: Prepared
    length: int
    batch: int


def read_data(checked: Checked, wanted: Wanted) -> EvalData | None:
    """Read the data set as `kt-hf train` reads `eval_dataset`; None without one.

    Args:
        checked: The model that it is for.
        wanted: Names the data set, and how much of it is taken.

    Raises:
        KTAMXConfigError: It cannot be read or used.
    """
    if wanted.dataset is None:
        return None
    rows = load_rows([wanted.dataset], "eval", "sft", wanted.most)
    if rows.conversational and not checked.tokenizer.chat_template:
        raise KTAMXConfigError(
            f"{wanted.dataset} is of conversations, and the tokenizer has no chat template: --template chatml or "
            "alpaca."
        )
    vocabulary = getattr(checked.config.get_text_config(), "vocab_size", None) or len(checked.tokenizer)
    if wanted.generate:
        asked = [
            Question({}, messages, f"--generate, question {i}") for i, (messages, _) in enumerate(_questions(rows), 1)
        ]
        check_questions(checked.tokenizer, checked.config, asked)
    how = reading(checked.keys, {"max_length": wanted.length}, checked.tokenizer, vocabulary)
    prepared = prepare(rows, how, "sft", "eval")
    longest, positions = max(map(len, prepared.dataset["input_ids"])), positions_of(checked.config)
    if positions is not None and longest > positions:
        note = (
            f"{wanted.dataset}: a row has {longest:,} tokens, and the model was made for {positions:,} (--cutoff-len)"
        )
        prepared = replace(prepared, notes=[*prepared.notes, note])
    return EvalData(rows, prepared, wanted.length, wanted.batch)


def evaluate(opened: Opened, data: EvalData | None, wanted: Wanted, console: Console) -> dict[str, Any]:
    """All numbers, of the adapter, of the base model, or of both.

    Args:
        opened: The model.
        data: What `read_data` gave.
        wanted: What is measured.
        console: For the progress.

    Returns:
        `base_model`, `adapter`, `dataset`, `rows`, and `results`: base or adapter -> name -> number.
    """
    result: dict[str, Any] = {"base_model": opened.base, "adapter": str(opened.adapter) if opened.adapter else None}
    result |= {"dataset": wanted.dataset, "rows": len(data.prepared.dataset) if data else None, "results": {}}
    sampling = Sampling(max_new_tokens=wanted.new_tokens)
    for who in ["base"] * (wanted.compare or not opened.adapter) + ["adapter"] * bool(opened.adapter):
        console.print(f"Evaluating the {'base model' if who == 'base' else who}")
        values: dict[str, float] = {}
        with opened.without_adapter() if who == "base" else contextlib.nullcontext():
            if data:
                values |= losses(opened, data, console)
            if data and wanted.generate:
                values |= scored(Answerer(opened, sampling), data, console, wanted.rouge)
            if wanted.tasks:
                values |= run_tasks(opened, wanted.tasks, wanted.include, wanted.most, wanted.batch)
        result["results"][who] = values
    return result


def losses(opened: Opened, data: EvalData, console: Console) -> dict[str, float]:
    """`loss`, nats a trained token as TRL's SFTTrainer evaluates it, and `perplexity`, its exponential.

    Args:
        opened: The model; an adapter is evaluated as it is active.
        data: What to evaluate on.
        console: For the progress.
    """
    import torch
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Bar(TrainerCallback):
        """Moves a bar with every batch."""

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            """Move the bar."""
            progress.advance(task)

    total = -(-len(data.prepared.dataset) // data.batch)
    with tempfile.TemporaryDirectory(prefix="kt-eval-") as folder, Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as progress:  # fmt: skip
        task = progress.add_task("Loss", total=total)
        arguments = SFTConfig(
            output_dir=folder, per_device_eval_batch_size=data.batch, max_length=data.length, report_to="none",
            use_cpu=opened.model.device.type == "cpu", bf16=False, fp16=False, disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        dataset = data.prepared.dataset
        trainer = SFTTrainer(
            opened.model, args=arguments, train_dataset=dataset.select([0]), eval_dataset=dataset,
            processing_class=opened.tokenizer, callbacks=[Bar()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        loss = float(trainer.evaluate()["eval_loss"])
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def scored(answerer: Answerer, data: EvalData, console: Console, rouge: bool) -> Score:
    """Answers to the data's questions, scored against the answers in the data.

    Args:
        answerer: The model.
        data: Conversations and prompts with their answers.
        console: For the progress.
        rouge: Whether ROUGE is wanted.

    Raises:
        KTAMXConfigError: No row is a question with its answer.
    """
    pairs = _questions(data.rows)
    steps = track(pairs, "Answers", console=console, transient=True, disable=not console.is_terminal)
    answers = [answerer.answer(asked) for asked, _ in steps]
    return score(answers, [reference for _, reference in pairs], rouge)


def _questions(rows: Rows) -> list[tuple[list[dict[str, Any]], str]]:
    """The rows that are questions with their answers."""
    pairs = [pair for row in rows.rows if (pair := _question(row)) is not None]
    if not pairs:
        raise KTAMXConfigError("--generate needs rows with a question and its answer: messages, or prompt/completion.")
    return pairs


def _question(row: dict[str, Any]) -> tuple[list[dict[str, Any]], str] | None:
    """(the conversation up to the last answer, that answer); None for a row of text alone."""
    if messages_column(row):
        messages: Sequence[Any] = conversation(row)
        last = messages[-1]
        if last["role"] != "assistant" or not isinstance(last.get("content"), str) or len(messages) < 2:
            return None
        return list(messages[:-1]), last["content"]
    if "completion" in row and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}], str(row["completion"])
    return None


def write_result(file: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON; None writes nothing."""
    from ..system.files import write_json

    if file is not None:
        write_json(file, result)
