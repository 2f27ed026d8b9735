"""Rows that TRL's trainers tokenize themselves: whether they can, and the data set that they are given.

Each row is rendered and tokenized once here, as its trainer will do it, so that what cannot be trained on is told with
its row before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..config.stages import stage_of
from .formats import Row
from .messages import BadRow
from .reading import Reading, check_ids, ended
from .rows import messages_column
from .stage_formats import LABEL
from .template import ChatTemplate, common_length

_BESIDE = ("tools", "chat_template_kwargs")


def columns_of(stage: str) -> tuple[str, ...]:
    """The columns of messages or text that every row of a stage has."""
    kind = stage_of(stage)
    return (
        ("prompt", "chosen", "rejected") if kind.pairs else ("prompt",) if kind.generates else ("prompt", "completion")
    )


def tokenizing(stage: str) -> Callable[[Row, Reading], dict[str, Any]]:
    """The function that tries a row of a stage: its `input_ids`, and whether something is `cut`."""
    if stage_of(stage).scores:
        return _tokenized_scored
    if stage_of(stage).pairs:
        return _tokenized_pair
    return _tokenized_prompt if stage_of(stage).generates else _tokenized_marked


def _rendered(row: Row, how: Reading, *answers: str) -> tuple[list[int], list[list[int]]]:
    """(tokens of a row's prompt, tokens of the prompt with each of the answers)."""
    if messages_column(row):
        asked = how.template.tokens(row, row["prompt"], ask=True)
        return asked, [how.template.tokens(row, [*row["prompt"], *row[column]]) for column in answers]
    asked = list(how.tokenizer(row["prompt"])["input_ids"])
    return asked, [list(how.tokenizer(row["prompt"] + ended(row[column], how))["input_ids"]) for column in answers]


def _check_prompt(length: int, how: Reading, answers: str = "answers") -> None:
    if how.max_length is not None and not how.keep_end and length >= how.max_length:
        raise BadRow(f"its prompt has {length} tokens, and max_length={how.max_length} leaves none for the {answers}")


def _tokenized_pair(row: Row, how: Reading) -> dict[str, Any]:
    """What DPO's own preparation will make of a row: only whether it can, and whether anything is left to prefer."""
    asked, (chosen, rejected) = _rendered(row, how, "chosen", "rejected")
    check_ids([*chosen, *rejected], how)
    _check_prompt(min(common_length(asked, chosen), common_length(asked, rejected)), how)
    if how.kept(chosen) == how.kept(rejected):
        raise BadRow(f"chosen and rejected are the same within max_length={how.max_length}")
    cut = any(len(how.kept(ids)) < len(ids) for ids in (chosen, rejected))
    return {"input_ids": chosen, "cut": cut}


def _tokenized_scored(row: Row, how: Reading) -> dict[str, Any]:
    """A pair whose answers a reward model scores: TRL cuts none, and leaves out those that are longer (`cut`)."""
    _, (chosen, rejected) = _rendered(row, how, "chosen", "rejected")
    check_ids([*chosen, *rejected], how)
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return {"input_ids": chosen, "cut": any(len(how.kept(ids)) < len(ids) for ids in (chosen, rejected))}


def _tokenized_marked(row: Row, how: Reading) -> dict[str, Any]:
    """An answer that is marked as good or bad."""
    asked, (whole,) = _rendered(row, how, "completion")
    check_ids(whole, how)
    _check_prompt(common_length(asked, whole), how, "answer")
    return {"input_ids": whole, "cut": len(how.kept(whole)) < len(whole)}


def _tokenized_prompt(row: Row, how: Reading) -> dict[str, Any]:
    """A prompt, of which nothing is cut."""
    asked, _ = _rendered(row, how)
    check_ids(asked, how)
    if not asked:
        raise BadRow("its prompt has no tokens")
    return {"input_ids": asked}


def dataset_of(rows: Sequence[Row], stage: str, template: ChatTemplate) -> Any:
    """The `Dataset` that TRL's trainer of a stage is given: the columns it needs, and what stands beside them.

    Args:
        rows: In TRL's form, all of messages or all of text.
        stage: Their stage.
        template: The run's, which decides what it may see of a message.
    """
    from datasets import Dataset, Features, Json, Value

    needed, chats = columns_of(stage), any(messages_column(row) for row in rows)
    taken = [row | {c: template.plain(row[c]) for c in needed if isinstance(row[c], list)} for row in rows]
    # As JSON: Arrow's own form of objects gives each the keys of all, with null for what it does not have.
    kinds: dict[str, Any] = dict.fromkeys(needed, Json() if chats else Value("large_string"))
    if stage_of(stage).generates:  # for the reward functions
        kinds |= dict.fromkeys(sorted({column for row in taken for column in row} - {*needed, *_BESIDE}), Json())
    else:
        kinds |= {column: Json() for column in _BESIDE if any(column in row for row in taken)}
        kinds |= {LABEL: Value("bool")} if LABEL in taken[0] else {}
    filled: dict[str, Any] = {"tools": None, "chat_template_kwargs": {}}
    columns = {column: [(filled | row).get(column) for row in taken] for column in kinds}
    return Dataset.from_dict(columns, features=Features(kinds))
