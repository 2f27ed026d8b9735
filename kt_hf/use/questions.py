"""A file of questions, and the file of their answers: written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..errors import KTAMXConfigError, KTAMXError
from ..system.files import replacing
from .generation import Answerer, Message, encode


@dataclass(frozen=True)
class Question:
    """A line of the file: its row, the conversation it stands for, and where it is, for messages."""

    row: dict[str, Any]
    messages: list[Message]
    where: str


def read_questions(file: Path, system: str = "") -> list[Question]:
    """The questions of a file of JSON lines.

    Args:
        file: Each line is an object with `prompt` (text) or `messages` (a conversation that ends with the user).
        system: A system prompt for conversations that have none.

    Raises:
        KTAMXConfigError: No such file, no lines, or a line that is no question, naming the first.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # other line ends may be within a text
    except UnicodeDecodeError as error:
        raise KTAMXConfigError(f"--input {file}: it is not UTF-8 text (at byte {error.start}).") from None
    except OSError as error:
        raise KTAMXConfigError(f"--input {file}: {error.strerror or error}.") from None
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
    if not is_text(json.dumps(row, ensure_ascii=False)):
        raise KTAMXConfigError(f"{where}: it holds half of a pair of UTF-16 (\\ud800 to \\udfff), which is no text.")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Question(row, messages, where)


def is_text(text: str) -> bool:
    """Whether a text can be written; bytes that are not UTF-8 come from a terminal as what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_questions(tokenizer: Any, config: Any, questions: Sequence[Question], thinking: bool | None = None) -> None:
    """Refuse conversations that the model cannot take, before its weights are loaded.

    Args:
        tokenizer: With a chat template.
        config: The model's configuration.
        questions: To look at.
        thinking: As `encode` takes it.

    Raises:
        KTAMXConfigError: Naming the first.
    """
    for question in questions:
        try:
            encode(tokenizer, config, question.messages, thinking)
        except KTAMXConfigError as error:
            raise KTAMXConfigError(f"{question.where}: {error}") from error


def check_output(file: Path) -> None:
    """Refuse a file of answers or numbers that cannot be written, before there are any.

    Raises:
        KTAMXConfigError: It exists, or its folder does not, or may not be written to.
    """
    if file.exists():
        raise KTAMXConfigError(f"--output {file} exists already: name a new file.")
    if not file.parent.is_dir():
        raise KTAMXConfigError(f"--output {file}: there is no folder {file.parent}.")
    if not os.access(file.parent, os.W_OK):
        raise KTAMXConfigError(f"--output {file}: {file.parent} may not be written to.")


def answer_file(
    answerer: Answerer, questions: Sequence[Question], file: Path, who: str, console: Console, progress: bool = True
) -> None:
    """Answer all questions and write them with their answers, one JSON line each.

    Args:
        answerer: The model.
        questions: In the order of the lines to write.
        file: The new file: written whole, or not at all; the answers are printed then.
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
    text = "\n".join(rows) + "\n"
    try:
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (KTAMXError, OSError):
        sys.stdout.write(text)  # they may have taken hours
        raise
