"""A file of questions, and the file of their answers: written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..errors import KTAMXConfigError
from ..system.files import replacing
from .generation import Answerer, Message


@dataclass(frozen=True)
class Question:
    """A line of the file: its row, and the conversation it stands for."""

    row: dict[str, Any]
    messages: list[Message]


def read_questions(file: Path, system: str = "") -> list[Question]:
    """The questions of a file of JSON lines.

    Args:
        file: Each line is an object with `prompt` (text) or `messages` (a conversation that ends with the user).
        system: A system prompt for conversations that have none.

    Raises:
        KTAMXConfigError: No such file, no lines, or a line that is no question, naming the first.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KTAMXConfigError(f"--input {file}: {error}") from None
    questions = [_question(line, f"{file} line {i}", system) for i, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise KTAMXConfigError(f"--input {file} has no lines.")
    return questions


def _question(line: str, where: str, system: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise KTAMXConfigError(f"{where} is no JSON: {error}") from None
    wanted = 'a line is {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise KTAMXConfigError(f"{where} has no question, or two: {wanted}.")
    messages = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else row["messages"]
    good = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in messages
    )  # fmt: skip
    if not good or not messages[-1]["content"].strip() or messages[-1]["role"] not in ("user", "tool"):
        raise KTAMXConfigError(f"{where}: the conversation is not of texts, or does not end with the user; {wanted}.")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Question(row, messages)


def check_output(file: Path) -> None:
    """Refuse a file of answers that cannot be written.

    Raises:
        KTAMXConfigError: It exists, or its folder does not.
    """
    if file.exists():
        raise KTAMXConfigError(f"--output {file} exists already: name a new file.")
    if not file.parent.is_dir():
        raise KTAMXConfigError(f"--output {file}: there is no folder {file.parent}.")


def answer_file(
    answerer: Answerer, questions: Sequence[Question], file: Path, who: str, console: Console, progress: bool = True
) -> None:
    """Answer all questions and write them with their answers, one JSON line each.

    Args:
        answerer: The model.
        questions: In the order of the lines to write.
        file: The new file: written whole, or not at all.
        who: `adapter` or `base` (their answer is `answer`), or `both` (the base model's is `base_answer`).
        console: For the progress.
        progress: Whether to show it.
    """
    rows = []
    steps = track(questions, "Answering", console=console, transient=True, disable=not progress)
    for question in steps:
        answers = {"answer": answerer.answer(question.messages, adapter=who != "base")}
        if who == "both":
            answers["base_answer"] = answerer.answer(question.messages, adapter=False)
        rows.append(json.dumps(question.row | answers, ensure_ascii=False))
    with replacing(file) as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
