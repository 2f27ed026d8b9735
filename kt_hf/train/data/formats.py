"""Rows of the formats people have, turned into the ones TRL trains on. Recognised by their columns.

What comes out, for `stage: sft`: `messages`, or `text`, or plain `prompt` and `completion`. For `stage: dpo`: `prompt`,
`chosen` and `rejected`, conversational or plain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Message = dict[str, str]
Row = dict[str, Any]

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}


class BadRow(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class Format:
    """A format: its name, the columns it is known by, the stage it is for, and how to turn a row over."""

    name: str
    columns: frozenset[str]
    stage: str
    convert: Callable[[Row], Row]


def recognize(columns: set[str]) -> Format | None:
    """The first format whose columns are all there."""
    return next((known for known in FORMATS if known.columns <= columns), None)


def _text(row: Row, column: str, needed: bool = True) -> str:
    value = row.get(column)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise BadRow(f"{column} is {type(value).__name__}, not text")
    if needed and not value.strip():
        raise BadRow(f"{column} is empty")
    return value


def _messages(value: Any, column: str, role: str, content: str) -> list[Message]:
    """A list of messages with the roles system, user and assistant; `role` and `content` are the keys in the data."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} is not a list of messages")
    found: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get(role), str):
            raise BadRow(f"{column}: a message without {role}")
        speaker = _SPEAKERS.get(message[role])
        if speaker is None:
            raise BadRow(f"{column}: unknown {role} {message[role]!r}")
        if not isinstance(message.get(content), str):
            raise BadRow(f"{column}: a message without {content}")
        found.append({"role": speaker, "content": message[content]})
    return found


def _conversation(messages: list[Message]) -> list[Message]:
    """Checked for turns: an optional system message, then user and assistant in turn, ending with an answer."""
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if "system" in [message["role"] for message in messages[1:]]:
        raise BadRow("a system message that is not the first")
    if turns[:1] == ["assistant"]:
        raise BadRow("it begins with an answer")
    if any(one == other for one, other in pairwise(turns)):
        raise BadRow("two messages of the same speaker in a row")
    if turns[-1:] != ["assistant"]:
        raise BadRow("it does not end with an answer")
    if not messages[-1]["content"].strip():
        raise BadRow("the answer is empty")
    return messages


def _alpaca_prompt(row: Row) -> list[Message]:
    messages = [{"role": "system", "content": system}] if (system := _text(row, "system", needed=False)) else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRow("history is not a list")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRow("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    more = _text(row, "input", needed=False)
    question = _text(row, "instruction", needed=not more)
    return [*messages, {"role": "user", "content": f"{question}\n{more}" if question and more else question or more}]


def _alpaca(row: Row) -> Row:
    return {"messages": [*_alpaca_prompt(row), {"role": "assistant", "content": _text(row, "output")}]}


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    system = _text(row, "system", needed=False)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _sharegpt(row: Row) -> Row:
    messages = _messages(row.get("conversations"), "conversations", *_keys(row.get("conversations")))
    return {"messages": _conversation(_with_system(row, messages))}


def _keys(value: Any) -> tuple[str, str]:
    """The keys of a list of messages: from and value, or role and content."""
    first = value[0] if isinstance(value, list) and value else None
    return ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")


def _openai(row: Row) -> Row:
    return {"messages": _conversation(_messages(row.get("messages"), "messages", "role", "content"))}


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = (_messages(row.get(c), c, "role", "content") for c in ("prompt", "completion"))
        return {"messages": _conversation([*before, *after])}
    return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}


def _plain(row: Row) -> Row:
    return {"text": _text(row, "text")}


def _answer(row: Row, column: str) -> str:
    """The text of a preferred or rejected answer: text, a message, or a list that ends with it."""
    value = row.get(column)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        messages = _messages(value, column, *_keys(value))
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise BadRow(f"{column} does not end with an answer")
        return messages[-1]["content"]
    return _text(row, column)


def _pair(prompt: Any, row: Row) -> Row:
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    _conversation([*prompt, {"role": "assistant", "content": chosen}])
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}


def _preference(row: Row) -> Row:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _pair(_messages(prompt, "prompt", "role", "content"), row)
    text = _text(row, "prompt")
    if isinstance(row.get("chosen"), str):
        return _pair(text, row)
    return _pair([{"role": "user", "content": text}], row)


def _implicit_prompt(row: Row) -> Row:
    """Whole conversations in `chosen` and `rejected`, which differ in the last answer only."""
    both = [_messages(row.get(c), c, *_keys(row.get(c))) for c in ("chosen", "rejected")]
    if both[0][:-1] != both[1][:-1]:
        raise BadRow("chosen and rejected differ before the last answer")
    if len(both[0]) < 2:
        raise BadRow("there is no prompt: neither of its own nor in chosen")
    return _pair(both[0][:-1], row)


def _sharegpt_ranking(row: Row) -> Row:
    messages = _messages(row.get("conversations"), "conversations", *_keys(row.get("conversations")))
    return _pair(_with_system(row, messages), row)


def _alpaca_ranking(row: Row) -> Row:
    return _pair(_alpaca_prompt(row), row)


# The more specific first.
FORMATS = (
    Format("alpaca ranking", frozenset({"instruction", "chosen", "rejected"}), "dpo", _alpaca_ranking),
    Format("sharegpt ranking", frozenset({"conversations", "chosen", "rejected"}), "dpo", _sharegpt_ranking),
    Format("preference pairs", frozenset({"prompt", "chosen", "rejected"}), "dpo", _preference),
    Format("preference pairs without prompt", frozenset({"chosen", "rejected"}), "dpo", _implicit_prompt),
    Format("messages", frozenset({"messages"}), "sft", _openai),
    Format("sharegpt", frozenset({"conversations"}), "sft", _sharegpt),
    Format("prompt and completion", frozenset({"prompt", "completion"}), "sft", _prompt_completion),
    Format("alpaca", frozenset({"instruction", "output"}), "sft", _alpaca),
    Format("text", frozenset({"text"}), "sft", _plain),
)  # fmt: skip
