"""Rows of the formats people have, turned into the ones TRL knows. Recognized by their columns.

What comes out, for `stage: sft`: `messages`; or `prompt` and `completion`, as text or as messages; or `text`; or
`input_ids` and `labels`. For stages of pairs: `prompt`, `chosen` and `rejected`, as text or as messages. Rows of
messages may have `tools` and `chat_template_kwargs` beside them. Formats of other stages are in `stage_formats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .images import with_images
from .messages import BadRow, Message, check_plain, check_turns, is_empty, messages_of, parsed, without_nulls

Row = dict[str, Any]

# Columns of pictures and sound, which a text model cannot use.
MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
IMAGES = frozenset({"image", "images"})
# Formats whose rows may have images.
_PICTURED = frozenset({"messages", "sharegpt", "prompt and completion"})
# Arguments of apply_chat_template itself, which the data must not set.
_RESERVED = frozenset(
    {
        "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip


class Columns:
    """The columns of a row, and which of them anybody has asked for.

    Args:
        row: As it was read.
        used: Gets the names of columns that were asked for and have something in them.
    """

    def __init__(self, row: Row, used: set[str]) -> None:
        """Read `row`; the names of the columns that are read are added to `used`."""
        self.row, self.used = row, used

    def get(self, column: str) -> Any:
        """What the column holds, None if it is not there. Raises `BadRow` if that is no text at its bottom."""
        value = self.row.get(column)
        if value is not None:
            self.used.add(column)
            check_plain(value)
        return value


@dataclass(frozen=True)
class Format:
    """A format of data.

    Attributes:
        name: What messages call it.
        columns: Those it is known by, all of them needed.
        stages: What it can be trained with.
        convert: Turns a row's columns into TRL's form; raises `BadRow`.
    """

    name: str
    columns: frozenset[str]
    stages: tuple[str, ...]
    convert: Callable[[Columns], Row]

    def row(self, row: Row, used: set[str], sees: bool = False, folder: Path | None = None) -> Row:
        """A row in TRL's form; the columns that went into it are added to `used`.

        Args:
            row: As it was read.
            used: Gets the names of columns that are used.
            sees: Whether the model takes images.
            folder: Where relative paths of images begin.

        Raises:
            BadRow: It cannot be used, and why.
        """
        for column in (MEDIA - IMAGES if sees else MEDIA) & row.keys():
            if row[column]:
                raise BadRow(f"it has {column}, and this trains {'images' if sees else 'text models'}")
        pictured = with_images(row, folder) if sees and self.name in _PICTURED else row
        if sees and pictured is row and any(row.get(column) for column in IMAGES):
            raise BadRow(f"it has images, which go with {', '.join(sorted(_PICTURED))}")
        converted = self.convert(Columns(pictured, used))
        if pictured is row:
            return converted
        used |= IMAGES
        return converted | {"images": pictured["images"]}


def text(row: Columns, column: str, needed: bool = True) -> str:
    """The text of a column, "" where there is none. Raises `BadRow` if it is no text, or empty and `needed`."""
    value = row.get(column)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise BadRow(f"{column} is {type(value).__name__}, not text")
    if needed and not value.strip():
        raise BadRow(f"{column} is empty")
    return value


def beside(row: Columns) -> Row:
    """`tools` and `chat_template_kwargs` of a row of messages, each only if there is anything in it."""
    tools = parsed(row.get("tools"), "tools")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise BadRow("tools is not a list of descriptions")
    settings = parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if not isinstance(settings or {}, dict):
        raise BadRow("chat_template_kwargs is not an object")
    settings = {key: value for key, value in (settings or {}).items() if value is not None}
    if _RESERVED & settings.keys():
        raise BadRow(f"chat_template_kwargs must not set {', '.join(sorted(_RESERVED & settings.keys()))}")
    both = {"tools": without_nulls(tools), "chat_template_kwargs": settings}
    return {key: value for key, value in both.items() if value}


def with_system(row: Columns, messages: list[Message]) -> list[Message]:
    """`messages` after the system message of the column `system`, where it has one."""
    system = text(row, "system", needed=False)
    return [{"role": "system", "content": system}, *messages] if system else messages


def trained(messages: list[Message]) -> list[Message]:
    """Checked for an answer to train on."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("train", True) for message in answers):
        raise BadRow("every answer says that it is not to be trained")
    return messages


def alpaca_prompt(row: Columns) -> list[Message]:
    """The question of an alpaca row, after its history and system message. Raises `BadRow` if there is none."""
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRow("history is not a list")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRow("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    more = text(row, "input", needed=False)
    question = text(row, "instruction", needed=not more)
    messages.append({"role": "user", "content": f"{question}\n{more}" if question and more else question or more})
    return with_system(row, messages)


def _alpaca(row: Columns) -> Row:
    return {"messages": [*alpaca_prompt(row), {"role": "assistant", "content": text(row, "output")}]} | beside(row)


def _conversation(column: str) -> Callable[[Columns], Row]:
    def convert(row: Columns) -> Row:
        messages = check_turns(with_system(row, messages_of(row.get(column), column)))
        return {"messages": trained(messages)} | beside(row)

    return convert


def prompt_completion(row: Columns) -> Row:
    """`prompt` and `completion`, both text or both messages. Raises `BadRow` if they are no question and answer."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return {"prompt": text(row, "prompt"), "completion": text(row, "completion")}
    question = asked(row, prompt)
    answer = messages_of(completion, "completion") if isinstance(completion, list) else None
    answer = answer or [{"role": "assistant", "content": text(row, "completion")}]
    check_turns([*question, *answer])
    return {"prompt": question, "completion": trained(answer)} | beside(row)


def asked(row: Columns, prompt: Any) -> list[Message]:
    """A prompt as messages; text is a question."""
    if isinstance(prompt, list):
        return with_system(row, messages_of(prompt, "prompt"))
    return with_system(row, [{"role": "user", "content": text(row, "prompt")}])


def _plain(row: Columns) -> Row:
    return {"text": text(row, "text")}


def _tokens(row: Columns) -> Row:
    """Rows that have been tokenized elsewhere, as TRL takes them: with `labels`, or with masks of what is trained."""
    ids = _numbers(row, "input_ids")
    labels = _numbers(row, "labels", len(ids)) if row.get("labels") is not None else ids
    for mask in ("completion_mask", "assistant_masks"):
        if row.get("labels") is None and row.get(mask) is not None:
            bits = _numbers(row, mask, len(ids))
            labels = [label if bit else -100 for label, bit in zip(labels, bits, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _numbers(row: Columns, column: str, length: int | None = None) -> list[int]:
    value = row.get(column)
    if not isinstance(value, list) or not all(type(number) is int for number in value) or not value:
        raise BadRow(f"{column} is not a list of whole numbers")
    if length is not None and len(value) != length:
        raise BadRow(f"{column} has {len(value)} numbers, input_ids {length}")
    return value


def _answers(row: Columns, asked: list[Message]) -> list[list[Message]]:
    """The preferred and the rejected answer, each a list of messages that follow those `asked`."""
    both: list[list[Message]] = []
    for column in ("chosen", "rejected"):
        value = row.get(column)
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            both.append([{"role": "assistant", "content": text(row, column)}])
            continue
        answer = messages_of(value, column)
        # Some have the whole conversation in it, the prompt once more.
        turns = [message for message in asked if message["role"] != "system"]
        for prompt in (asked, turns):
            if prompt and len(answer) > len(prompt) and answer[: len(prompt)] == prompt:
                answer = answer[len(prompt) :]
        if answer[-1]["role"] != "assistant" or is_empty(answer[-1]):
            raise BadRow(f"{column} does not end with an answer")
        both.append(answer)
    return both


def _pair(row: Columns, asked: list[Message]) -> Row:
    chosen, rejected = _answers(row, asked)
    shorter = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    asked, chosen, rejected = [*asked, *chosen[:same]], chosen[same:], rejected[same:]  # alike so far: that is prompt
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if not asked:
        raise BadRow("there is no prompt: neither of its own nor in chosen")
    for answer in (chosen, rejected):
        check_turns([*asked, *answer])
    messages = [*asked, *chosen, *rejected]
    if any(message.get("train") is False for message in messages):
        raise BadRow("train of a message is for stage: sft")
    for message in messages:
        message.pop("train", None)
    return {"prompt": asked, "chosen": chosen, "rejected": rejected} | beside(row)


def _preference(row: Columns) -> Row:
    prompt = row.get("prompt")
    if isinstance(prompt, list) or not isinstance(row.get("chosen"), str):
        return _pair(row, asked(row, prompt))
    pair = {column: text(row, column) for column in ("prompt", "chosen", "rejected")}
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("chosen and rejected are the same")
    return pair


def _implicit_prompt(row: Columns) -> Row:
    """The prompt is what `chosen` and `rejected` both begin with, in messages or, as TRL does it, in text."""
    if not isinstance(row.get("chosen"), str):
        return _pair(row, with_system(row, []))
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        raise BadRow("one of chosen and rejected is the beginning of the other")
    same -= same > 0 and chosen[same - 1] == " "  # a space belongs to the word after it
    if not chosen[:same].strip():
        raise BadRow("there is no prompt: chosen and rejected have no beginning in common")
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _sharegpt_ranking(row: Columns) -> Row:
    return _pair(row, with_system(row, messages_of(row.get("conversations"), "conversations")))


def _alpaca_ranking(row: Columns) -> Row:
    return _pair(row, alpaca_prompt(row))


# The more specific first.
OF_ANSWERS_AND_PAIRS = tuple(
    Format(name, frozenset(columns.split()), tuple(stages.split()), convert)
    for name, columns, stages, convert in (
        ("alpaca ranking", "instruction chosen rejected", "dpo orpo rm", _alpaca_ranking),
        ("sharegpt ranking", "conversations chosen rejected", "dpo orpo rm", _sharegpt_ranking),
        ("preference pairs", "prompt chosen rejected", "dpo orpo rm", _preference),
        ("preference pairs without prompt", "chosen rejected", "dpo orpo rm", _implicit_prompt),
        ("tokens", "input_ids", "sft pt", _tokens),
        ("messages", "messages", "sft", _conversation("messages")),
        ("sharegpt", "conversations", "sft", _conversation("conversations")),
        ("prompt and completion", "prompt completion", "sft", prompt_completion),
        ("alpaca", "instruction output", "sft", _alpaca),
        ("text", "text", "pt sft", _plain),
    )
)
