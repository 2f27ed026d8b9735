"""What a chat template makes of a conversation: its text, where each answer stands in it, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .formats import Row
from .messages import BadRow, Message
from .tool_calls import has_arguments, json_twice, with_arguments

# Rows in which it is looked for what the template leaves out: of those that have a thing, the first few.
_PROBED = 3
_FLAG = "train"  # for us, not for the template


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, as TRL calls it.

    Attributes:
        tokenizer: With a chat template.
        marked: The template that tells answers from the rest, by `{% generation %}`: the tokenizer's own (""), one that
            TRL knows in its place, or None if there is none.
        calls: Template -> what it wants for the arguments of tool calls, `str` or `dict`, if the rows have others.
    """

    tokenizer: Any
    marked: str | None
    calls: Mapping[str, type] = field(default_factory=dict)

    def plain(self, messages: Sequence[Message], template: str = "") -> list[Message]:
        """The messages as a template may see them."""
        shown = [{key: value for key, value in message.items() if key != _FLAG} for message in messages]
        return with_arguments(shown, self.calls[template]) if template in self.calls else shown

    def arguments(self, row: Row, template: str = "") -> dict[str, Any]:
        """Of `apply_chat_template`, beside the messages."""
        given = {"chat_template": template} if template else {}
        return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {}), **given}

    def text(self, row: Row, messages: Sequence[Message], template: str = "", ask: bool = False) -> str:
        """The messages as text, with what begins an answer at the end if `ask`."""
        options = self.arguments(row, template) | {"tokenize": False, "add_generation_prompt": ask}
        return str(self.tokenizer.apply_chat_template(self.plain(messages, template), **options))

    def tokens(self, row: Row, messages: Sequence[Message], ask: bool = False) -> list[int]:
        """The messages as token ids, with what begins an answer at the end if `ask`."""
        options = self.arguments(row) | {"add_generation_prompt": ask}
        shown = self.plain(messages)
        processed = self.tokenizer.apply_chat_template(shown, tokenize=True, return_dict=True, **options)
        return list(processed["input_ids"])

    def answers(
        self, row: Row, messages: Sequence[Message], indices: Sequence[int], most: int | None = None
    ) -> tuple[list[int], list[bool], int]:
        """(token ids, which of them belong to answers, how many answers cannot be distinguished from the rest).

        Args:
            row: Of which `messages` are, for its tools and settings.
            messages: A conversation.
            indices: Indices of the answers to find.
            most: Tokens that will be kept of the beginning; answers behind the first that lies beyond are not looked
                for.

        Raises:
            BadRow: The template marks answers, but none in this row.
        """
        every = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked is None:
            return self._by_prefix(row, messages, indices, "", most)
        processed = self.tokenizer.apply_chat_template(
            self.plain(messages, self.marked), tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            **self.arguments(row, self.marked),
        )  # fmt: skip
        ids, inside = list(processed["input_ids"]), [bool(bit) for bit in processed["assistant_masks"]]
        if not any(inside):
            raise BadRow("the chat template marks no answer in it")
        if list(indices) == every:
            return ids, inside, 0
        _, turns, lost = self._by_prefix(row, messages, indices, self.marked, most)
        return ids, [one and other for one, other in zip(inside, turns, strict=True)], lost

    def _by_prefix(
        self, row: Row, messages: Sequence[Message], indices: Sequence[int], template: str, most: int | None
    ) -> tuple[list[int], list[bool], int]:
        """As `answers`, by comparing the conversation with its own beginnings.

        An answer begins where the text that asks for it ends, and ends where the conversation up to it does. That is
        sound if the whole begins as its part does; where a template renders an answer otherwise once another turn
        follows, the answer is not what the model would have said there, and counts as lost.
        """
        text = self.text(row, messages, template)
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        ids = list(encoded["input_ids"])
        if not fast:  # it does not say where its tokens stand in the text
            return ids, [False] * len(ids), len(indices)
        first, last = np.asarray(encoded["offset_mapping"]).reshape(-1, 2).T
        trained, lost = np.zeros(len(ids), dtype=bool), 0
        for index in indices:
            place = self._place(row, messages, index, template, text, (ids, first))
            if place is None:
                lost += 1
                continue
            start, end = place
            trained |= (start <= first) & (first < end) & (last > first)
            if most is not None and len(ids) > most and start >= first[most]:
                break
        return ids, trained.tolist(), lost

    def _place(
        self, row: Row, messages: Sequence[Message], index: int, template: str, text: str, tokens: tuple[Any, Any]
    ) -> tuple[int, int] | None:
        """(start, end) of an answer in the conversation's text, in characters; None if it is not rendered so there.

        `tokens` are the conversation's ids and where in the text each begins.
        """
        end = self.text(row, messages[: index + 1], template)
        if not text.startswith(end):
            return None
        asked = self.text(row, messages[:index], template, ask=True)
        if text.startswith(asked):
            return len(asked), len(end)
        # As TRL: the answer begins where the tokens part, though not before its own turn.
        before = self.text(row, messages[:index], template)
        ids, first = tokens
        return (max(len(before), first[self._common(asked, ids)]), len(end)) if text.startswith(before) else None

    def _common(self, text: str, ids: Sequence[int]) -> int:
        return common_length(self.tokenizer(text, add_special_tokens=False)["input_ids"], ids)


def common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(ids), len(others))
    return next((i for i in range(shorter) if ids[i] != others[i]), shorter)


def chat_template(tokenizer: Any) -> ChatTemplate:
    """The chat template of a tokenizer, and whether it marks answers, itself or by one that TRL knows in its place."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template or has_generation_markers(tokenizer.chat_template):
        return ChatTemplate(tokenizer, "" if tokenizer.chat_template else None)
    try:
        return ChatTemplate(tokenizer, get_training_chat_template(tokenizer))
    except Exception:  # it renders dialogues of its own, which any template may refuse
        return ChatTemplate(tokenizer, None)


def fitted(template: ChatTemplate, rows: Sequence[Row]) -> tuple[ChatTemplate, str | None]:
    """(the template with what it wants for the arguments of tool calls, what to tell), tried out on the first such row.

    Most want objects; DeepSeek's own adds text, and fails on objects. Some write text as JSON once more.
    """
    calls: dict[str, type] = {}
    objects, texts = (next((r for r in rows if has_arguments(conversation(r), kind)), None) for kind in (dict, str))
    for name in {"", template.marked or ""}:
        as_text = replace(template, calls={name: str})
        if objects and not _rendered(template, objects, name) and _rendered(as_text, objects, name):
            calls[name] = str
        elif texts and json_twice(_rendered(template, texts, name), conversation(texts)):
            calls[name] = dict
    note = "the arguments of tool calls are given to the chat template as "
    note += "JSON text: it refuses objects" if calls.get("") is str else "objects: it writes text as JSON once more"
    return replace(template, calls=calls), note if "" in calls else None


def _rendered(template: ChatTemplate, row: Row, name: str) -> str:
    try:
        return template.text(row, conversation(row), name)
    except Exception:  # whatever a template raises
        return ""


def left_out(template: ChatTemplate, rows: Sequence[Row]) -> list[str]:
    """What the rows have and the template does not render, in words: each named once.

    A thing counts as left out if the first few rows that have it are rendered the same without it.
    """
    probes: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for thing in _things(row):
            having = probes.setdefault(thing, [])
            if len(having) < _PROBED:
                having.append(row)
    unused = [thing for thing, having in probes.items() if all(_same(template, row, thing) for row in having)]
    return [f"{key} of {owner}" if owner else key for owner, key in unused]


def conversation(row: Row) -> list[Message]:
    """The messages of a row of any stage, the preferred answer for the last."""
    return [message for column in ("messages", "prompt", "completion", "chosen") for message in row.get(column) or []]


def _things(row: Row) -> set[tuple[str, str]]:
    """(role, key) of what the messages of a row have, ("", "tools"), and ("chat_template_kwargs", key)."""
    things = {(m["role"], key) for m in conversation(row) for key in m if m[key] and key not in ("role", _FLAG)}
    return things | ({("", "tools")} if "tools" in row else set()) | {
        ("chat_template_kwargs", key) for key in row.get("chat_template_kwargs", {})
    }  # fmt: skip


def _without(row: Row, thing: tuple[str, str]) -> Row:
    """A row as a conversation without one of its things."""
    owner, key = thing
    result = {"messages": conversation(row)} | {c: row[c] for c in ("tools", "chat_template_kwargs") if c in row}
    if owner == "":
        del result[key]
    elif owner == "chat_template_kwargs":
        result[owner] = {name: value for name, value in result[owner].items() if name != key}
    else:
        empty = {"content": ""} if key == "content" else {}
        result["messages"] = [
            {name: value for name, value in m.items() if name != key} | empty if m["role"] == owner else m
            for m in result["messages"]
        ]
    return result


def _same(template: ChatTemplate, row: Row, thing: tuple[str, str]) -> bool:
    """Whether a row is rendered the same without one of its things, with and without a question at the end."""
    messages, without = conversation(row), _without(row, thing)
    several = sum(message["role"] == "assistant" for message in messages) > 1
    used = (several and template.marked) or ""
    try:
        whole = [template.text(row, messages, used, ask) for ask in (False, True)]
        return whole == [template.text(without, without["messages"], used, ask) for ask in (False, True)]
    except Exception:  # without it the template fails, so it is used; or it always fails, which the row itself tells
        return False
