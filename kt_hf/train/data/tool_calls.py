"""Arguments of tool calls: an object to Hugging Face, JSON text to OpenAI. Templates take one, the other, or both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .messages import Message


def has_arguments(messages: Sequence[Message], kind: type) -> bool:
    """Whether any call has arguments of a kind, `dict` or `str`."""
    return any(isinstance(arguments, kind) for arguments in _arguments(messages))


def json_twice(text: str, messages: Sequence[Message]) -> bool:
    """Whether `text` has arguments that are JSON text already written as JSON once more, with quotes within quotes."""
    return any(isinstance(given, str) and '"' in given and json.dumps(given) in text for given in _arguments(messages))


def with_arguments(messages: Sequence[Message], kind: type) -> list[Message]:
    """The messages with all arguments as objects (`dict`) or as JSON text (`str`); text that is no object stays."""
    change = _to_text if kind is str else _to_object
    return [_changed(message, change) for message in messages]


def _arguments(messages: Sequence[Message]) -> list[Any]:
    return [call["function"].get("arguments") for message in messages for call in message.get("tool_calls", ())]


def _changed(message: Message, change: Callable[[Any], Any]) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        new = {"arguments": change(function["arguments"])} if "arguments" in function else {}
        calls.append(call | {"function": function | new})
    return message | {"tool_calls": calls}


def _to_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _to_object(arguments: Any) -> Any:
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
