"""Formats of single stages: answers marked as good or bad (`kto`), and prompts (`grpo`).

What comes out, for `stage: kto`: `prompt` and `completion`, as text or as messages, and `label`, whether the answer is
a good one. For `stage: grpo`: `prompt`, as text or as messages, and beside it whatever the row has: reward functions
are given it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from .formats import (
    MEDIA,
    OF_ANSWERS_AND_PAIRS,
    Columns,
    Format,
    Row,
    alpaca_prompt,
    asked,
    beside,
    prompt_completion,
    text,
    with_system,
)
from .messages import BadRow, Message, check_turns, messages_of

TAG, LABEL = "kto_tag", "label"  # LLaMA-Factory's name for the mark of an answer, and TRL's
_MARKS = {"true": True, "false": False, "1": True, "0": False}
# Columns that reward functions are not given: TRL has other things under these names, or keeps them for itself.
_NOT_GIVEN = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
     "messages", "tools", "chat_template_kwargs"}
)  # fmt: skip
_ANSWER: Message = {"role": "assistant", "content": "…"}


def is_marked(rows: Iterable[Row], stage: str) -> bool:
    """Whether the rows' answers are marked as good or bad: they have `kto_tag`, or a `label` that is true or false.

    Args:
        rows: As they were read.
        stage: For `kto` a `label` of any value is such a mark, if a wrong one.
    """
    for row in rows:
        label = row.get(LABEL)
        if row.get(TAG) is not None or (label is not None and (stage == "kto" or _mark(label) is not None)):
            return True
    return False


def recognize(columns: set[str], stage: str | None = None) -> Format | None:
    """The first format whose columns are all there; one of the stage before the others.

    Answers that are marked as good or bad (`kto_tag`) are not taken for those of SFT, which would train the bad ones.
    """
    known = [form for form in FORMATS if form.columns <= columns]
    if TAG in columns:
        known = [form for form in known if TAG in form.columns or "sft" not in form.stages] or known
    return next((form for form in known if stage in form.stages), known[0] if known else None)


def _mark(value: Any) -> bool | None:
    """Whether a mark says good; None if it is no mark."""
    if isinstance(value, bool):
        return value
    return _MARKS.get(str(value).strip().lower()) if isinstance(value, (str, int)) else None


def _label(row: Columns) -> bool:
    column = TAG if row.row.get(TAG) is not None else LABEL
    value = row.get(column)
    mark = _mark(value)
    if mark is None:
        what = "missing" if value is None else reprlib.repr(value)
        raise BadRow(f"{column} is {what}: write true for a good answer, false for a bad one")
    return mark


def _marked(row: Columns, prompt: list[Message], answer: list[Message]) -> Row:
    check_turns([*prompt, *answer])
    if any(message.get("train") is False for message in [*prompt, *answer]):
        raise BadRow("train of a message is for stage: sft")
    for message in [*prompt, *answer]:
        message.pop("train", None)
    return {"prompt": prompt, "completion": answer, LABEL: _label(row)} | beside(row)


def _marked_conversation(column: str) -> Callable[[Columns], Row]:
    def convert(row: Columns) -> Row:
        messages = check_turns(with_system(row, messages_of(row.get(column), column)))
        return _marked(row, messages[:-1], messages[-1:])

    return convert


def _marked_alpaca(row: Columns) -> Row:
    return _marked(row, alpaca_prompt(row), [{"role": "assistant", "content": text(row, "output")}])


def _marked_completion(row: Columns) -> Row:
    both = prompt_completion(row)
    if isinstance(both["prompt"], str):
        return both | {LABEL: _label(row)}
    return _marked(row, both["prompt"], both["completion"])


def _prompt(row: Columns, prompt: list[Message] | str, used: frozenset[str]) -> Row:
    """The prompt, and beside it what the row has in columns other than those `used` for it."""
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            raise BadRow("it ends with an answer, and a prompt ends with a question: the model writes the answer")
        if prompt[-1]["role"] in ("system", "developer"):
            raise BadRow("there is a system message alone" if len(prompt) == 1 else "a system message that is the last")
        check_turns([*prompt, _ANSWER])
        for message in prompt:
            message.pop("train", None)
    rest = {column: row.get(column) for column in row.row.keys() - used - _NOT_GIVEN - MEDIA}
    return {"prompt": prompt} | {column: value for column, value in rest.items() if value is not None}


def _plain_prompt(row: Columns) -> Row:
    prompt, used = row.get("prompt"), frozenset({"prompt", "system"})
    if isinstance(prompt, list) or text(row, "system", needed=False):
        return _prompt(row, asked(row, prompt), used)
    return _prompt(row, text(row, "prompt"), used)


def _conversation_prompt(column: str) -> Callable[[Columns], Row]:
    def convert(row: Columns) -> Row:
        return _prompt(row, with_system(row, messages_of(row.get(column), column)), frozenset({column, "system"}))

    return convert


def _alpaca_question(row: Columns) -> Row:
    return _prompt(row, alpaca_prompt(row), frozenset({"instruction", "input", "history", "system"}))


# The more specific first: prompts alone are the beginning of every other format.
FORMATS = (
    *(
        Format(name, frozenset(columns.split()), ("kto",), convert)
        for name, columns, convert in (
            ("marked messages", "messages kto_tag", _marked_conversation("messages")),
            ("marked sharegpt", "conversations kto_tag", _marked_conversation("conversations")),
            ("marked prompt and completion", "prompt completion kto_tag", _marked_completion),
            ("marked alpaca", "instruction output kto_tag", _marked_alpaca),
        )
    ),
    *OF_ANSWERS_AND_PAIRS,
    *(
        Format(name, frozenset({column}), ("grpo",), convert)
        for name, column, convert in (
            ("prompts", "prompt", _plain_prompt),
            ("messages of prompts", "messages", _conversation_prompt("messages")),
            ("sharegpt prompts", "conversations", _conversation_prompt("conversations")),
            ("alpaca prompts", "instruction", _alpaca_question),
        )
    ),
)
