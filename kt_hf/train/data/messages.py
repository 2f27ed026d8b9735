"""Conversations as people write them, brought into the one form that chat templates know.

A message has `role` (system, developer, user, assistant or tool), `content` (text) and whatever else the data gave it:
`tool_calls`, `reasoning_content`, `name` and so on reach the template as they are. `train` of an answer says whether
the loss is on it.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    "system": "system",
    "developer": "developer",
}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_MEDIA = ("image", "audio", "video")
# axolotl's names and OpenAI's for whether the loss is on an answer.
_FLAGS = ("train", "training", "weight")
_PARTLY = ("train_detail", "training_detail")
_DEEPEST = 50  # levels of lists and objects in a row; tools' schemas have about ten


class BadRow(ValueError):
    """Why a row cannot be used."""


def keys_of(value: Any) -> tuple[str, str]:
    """The keys of the speaker and the text in a list of messages: role and content, or from and value."""
    first = value[0] if isinstance(value, list) and value else None
    return (
        ("from", "value")
        if isinstance(first, dict) and "from" in first and "role" not in first
        else ("role", "content")
    )


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages of a column.

    Raises:
        BadRow: It is not a list of messages, or one of them cannot be understood.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} is not a list of messages")
    role, content = keys_of(value)
    return [_message(message, column, role, content) for message in value]


def _message(message: Any, column: str, role: str, content: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get(role), str):
        raise BadRow(f"{column}: a message without {role}")
    speaker = ROLES.get(message[role])
    if speaker is None:
        raise BadRow(f"{column}: unknown {role} {reprlib.repr(message[role])}")
    # Null is absence: parquet gives every message the keys of all the others.
    rest = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
    if role == "from" and {"role", "content"} & set(rest):
        raise BadRow(f"{column}: a message with both from and role, or value and content")
    text = _text_of(message.get(content), column, content)
    if speaker == "function_call":
        if text is None:
            raise BadRow(f"{column}: a message without {content}")
        speaker, rest["tool_calls"], text = "assistant", _calls_in(text, column), None
    elif speaker == "assistant" and "tool_calls" not in rest and isinstance(rest.get("function_call"), dict):
        rest["tool_calls"] = [rest.pop("function_call")]  # as OpenAI had it before tool_calls
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], column)
        if not rest["tool_calls"]:
            del rest["tool_calls"]
        elif speaker != "assistant":
            raise BadRow(f"{column}: tool_calls of a message of {speaker}")
    if text is None and not (speaker == "assistant" and ("tool_calls" in rest or _thoughts(rest))):
        raise BadRow(f"{column}: a message without {content}")
    # Not null for a tool call alone: templates would print "None", or add text to it.
    return {"role": speaker, "content": text or "", **_flagged(rest, speaker, column)}


def _text_of(value: Any, column: str, key: str) -> str | None:
    """The text of a message; a list of text parts is joined, for templates of text models take text alone."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow(f"{column}: {key} is {type(value).__name__}, not text")
    parts = []
    for part in value:
        if isinstance(part, dict):
            kind = part.get("type", "text")
            if any(name in str(kind) for name in _MEDIA):
                raise BadRow(f"{column}: {key} has a part of type {reprlib.repr(kind)}, and this trains text models")
            if kind not in ("text", "input_text", "output_text"):
                raise BadRow(f"{column}: {key} has a part of unknown type {reprlib.repr(kind)}")
            part = part.get("text")
        if not isinstance(part, str):
            raise BadRow(f"{column}: {key} has a part without text")
        parts.append(part)
    return "".join(parts)


def _thoughts(message: Mapping[str, Any]) -> bool:
    return any(isinstance(message.get(key), str) and message[key].strip() for key in _THOUGHTS)


def parsed(value: Any, what: str) -> Any:
    """A value that may be JSON in text, as LLaMA-Factory and parquet files have tools.

    Raises:
        BadRow: It is text and no JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        result = json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} is text, and not JSON") from None
    check_plain(result)
    return result


def _calls_in(text: str, column: str) -> list[Any]:
    calls = parsed(text, f"{column}: a function_call")
    return calls if isinstance(calls, list) else [calls]


def _tool_calls(value: Any, column: str) -> list[Message]:
    calls = parsed(value, f"{column}: tool_calls")
    if not isinstance(calls or [], list):
        raise BadRow(f"{column}: tool_calls is not a list")
    result = []
    for call in calls or []:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{column}: a tool call without the name of a function")
        wrapped = call if "function" in call else {"type": "function", "function": call}
        result.append(without_nulls(wrapped))
    return result


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null: parquet gives every object the keys of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _flagged(message: Message, speaker: str, column: str) -> Message:
    """The message with `train` for whichever flag says whether the loss is on it."""
    if any(key in message for key in _PARTLY):
        raise BadRow(
            f"{column}: {next(key for key in _PARTLY if key in message)} is not supported: use train of a turn"
        )
    flags = {key: message.pop(key) for key in _FLAGS if key in message}
    for key, value in flags.items():
        if value not in (0, 1):
            raise BadRow(f"{column}: {key} is {reprlib.repr(value)}, and it must be true or false")
        if value and speaker != "assistant":
            raise BadRow(f"{column}: {key} is true for {speaker}, and only answers are trained")
    if flags and speaker == "assistant":
        if len(set(map(bool, flags.values()))) > 1:
            raise BadRow(f"{column}: {' and '.join(flags)} of a message differ")
        message["train"] = bool(next(iter(flags.values())))
    return message


def check_turns(messages: list[Message]) -> list[Message]:
    """`messages`, if they are a conversation.

    That is: an optional system message, then questions and answers in turn, with calls of tools and their results
    between, ending with an answer.

    Raises:
        BadRow: They are not.
    """
    roles = ["system" if message["role"] == "developer" else message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRow("a system message that is not the first")
    turns = messages[1:] if roles[0] == "system" else messages
    if not turns or turns[0]["role"] == "assistant":
        raise BadRow("it begins with an answer" if turns else "there is a system message alone")
    if turns[0]["role"] == "tool":
        raise BadRow("it begins with the result of a tool")
    for one, other in pairwise(turns):
        both = (one["role"], other["role"])
        calls = "tool_calls" in one or "tool_calls" in other
        if both == ("user", "user") or (both == ("assistant", "assistant") and not calls):
            raise BadRow("two messages of the same speaker in a row")
        if both == ("user", "tool"):
            raise BadRow("the result of a tool that was not called")
    if turns[-1]["role"] != "assistant":
        raise BadRow("it does not end with an answer")
    if is_empty(turns[-1]):
        raise BadRow("the answer is empty")
    return messages


def is_empty(message: Message) -> bool:
    """Whether an answer says nothing: no text, no thoughts, no call of a tool."""
    return not (message["content"].strip() or message.get("tool_calls") or _thoughts(message))


def check_plain(value: Any, level: int = 0) -> None:
    """That `value` is made of text, numbers, lists and objects, can be written as UTF-8, and is not nested without end.

    Raises:
        BadRow: It is not.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise BadRow(f"it has half a character ({value[error.start]!a}), which is no text") from None
    elif isinstance(value, (list, dict)):
        if level >= _DEEPEST:
            raise BadRow(f"it is nested deeper than {_DEEPEST} levels")
        for inner in value:
            check_plain(inner, level + 1)
            if isinstance(value, dict):
                check_plain(value[inner], level + 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise BadRow(f"it holds {type(value).__name__}, which is no text")
