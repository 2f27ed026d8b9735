"""Rows as token ids, before a model is loaded: what cannot be trained on is reported with its row."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...errors import KTAMXConfigError
from ..config.stages import STAGES
from .formats import Row
from .messages import BadRow
from .raw_rows import dataset_of, tokenizing
from .reading import Reading, check_ids, ended
from .rows import Rows, judge, messages_column
from .template import common_length, conversation, fitted, left_out

_MASKED = -100
_SHOWN = 3
_LONGEST_REASON = 300
_ROWS_PER_PROCESS = 1000  # a process costs more than a thousand short rows
# Settings of TRL about what is trained: done once the labels are made, and TRL wants conversations where it sees them.
IN_THE_LABELS = ("assistant_only_loss", "completion_only_loss")


@dataclass
class Prepared:
    """Data for a trainer.

    Attributes:
        dataset: For SFT and plain text `input_ids` and `labels`; else the rows, which TRL tokenizes once more.
        notes: What to tell the user.
        sequences: Token ids of the first rows, an array each.
    """

    dataset: Any
    notes: list[str] = field(default_factory=list)
    sequences: list[Any] = field(default_factory=list)


def prepare(rows: Rows, how: Reading, stage: str, purpose: str) -> Prepared:
    """The rows for a trainer of `stage`, without those that cannot be trained on.

    Args:
        rows: In TRL's form.
        how: How they become tokens.
        stage: A name of `STAGES`.
        purpose: `train` or `eval`, for messages.

    Raises:
        KTAMXConfigError: More than 1 % of the rows cannot be trained on: the chat template refuses them, they have
            tokens the model does not know, or nothing that is trained is within `max_length`.
    """
    from datasets import Dataset, Features, List, Value

    name = "the training data" if purpose == "train" else "the evaluation data"
    seen = rows.rows if not STAGES[stage].generates else [{"prompt": row["prompt"]} for row in rows.rows]
    chats = [row for row in seen if messages_column(row)]
    template, fit = fitted(how.template, chats)
    how = replace(how, template=template)
    tokenized = STAGES[stage].tokenized
    results = _each(rows.rows, how, _tokenized if tokenized else tokenizing(stage))
    bad = [(rows.place(i), result["problem"]) for i, result in enumerate(results) if result["problem"]]
    judge(name, bad, len(results))
    uncut = STAGES[stage].scores
    good = [i for i, result in enumerate(results) if not (result["problem"] or (uncut and result["cut"]))]
    if not good:
        raise KTAMXConfigError(f"{name}: every row is longer than max_length={how.max_length} tokens: give more.")
    prepared = Prepared(None, [*([fit] if fit else []), *_notes(results, bad, how, name, uncut)])
    if chats:
        unused = left_out(how.template, chats)
        prepared.notes += [f"the chat template does not use {', '.join(unused)} in {name}"] if unused else []
    prepared.sequences = [results[i]["input_ids"] for i in good[:64]]
    if tokenized:
        features = Features({column: List(Value("int64")) for column in ("input_ids", "labels")})
        columns = {column: [results[i][column] for i in good] for column in features}
        prepared.dataset = Dataset.from_dict(columns, features=features)
    else:
        prepared.dataset = dataset_of([rows.rows[i] for i in good], stage, template)
    return prepared


def _notes(
    results: Sequence[dict[str, Any]], bad: Sequence[tuple[str, str]], how: Reading, name: str, uncut: bool
) -> list[str]:
    notes, of_all = [], f"of {len(results)} rows"
    if bad:
        shown = "; ".join(f"{place}: {reason}" for place, reason in bad[:_SHOWN])
        notes.append(f"{name}: {len(bad)} {of_all} are left out ({shown})")
    longer = sum(bool(result["cut"]) for result in results)
    if longer:
        what = f"lose {'the beginning' if how.keep_end else 'the end'}"
        what = "are left out: a reward model scores whole answers" if uncut else what
        notes.append(f"{name}: {longer} {of_all} are longer than max_length={how.max_length} tokens and {what}")
    lost = sum(result["lost"] > 0 for result in results)
    if lost:
        notes.append(
            f"{name}: in {lost} conversations with several answers only the last of each is trained, or those after a "
            "change: the chat template renders earlier ones otherwise once another turn follows"
        )
    return notes


def _each(
    rows: Sequence[Row], how: Reading, tokenize: Callable[[Row, Reading], dict[str, Any]]
) -> Sequence[dict[str, Any]]:
    processes = min(how.processes or 1, len(rows) // _ROWS_PER_PROCESS)
    if processes < 2:
        return [_attempt(row, how, tokenize) for row in rows]
    from datasets import Dataset, Features, List, Value

    texts = Dataset.from_dict({"row": [json.dumps(row) for row in rows]})
    numbers = List(Value("int32"))
    features = Features(
        problem=Value("string"), input_ids=numbers, labels=numbers, cut=Value("bool"), lost=Value("int32")
    )
    done = texts.map(
        lambda entry: _attempt(json.loads(entry["row"]), how, tokenize),
        remove_columns="row", num_proc=processes, features=features,
    )  # fmt: skip
    return [_compact(result) for result in done]


def _compact(result: dict[str, Any]) -> dict[str, Any]:
    """With arrays for lists, which take nine times the memory."""
    return result | {column: np.asarray(result[column], dtype=np.int32) for column in ("input_ids", "labels")}


def _attempt(row: Row, how: Reading, tokenize: Callable[[Row, Reading], dict[str, Any]]) -> dict[str, Any]:
    """What came of a row. Templates are programs of strangers: whatever one raises is the row's problem."""
    result: dict[str, Any] = {"problem": "", "input_ids": [], "labels": [], "cut": False, "lost": 0}
    try:
        result |= tokenize(row, how)
    except BadRow as error:
        result["problem"] = str(error)
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        what = "the chat template refuses it" if messages_column(row) else "it cannot be tokenized"
        result["problem"] = f"{what}: {words[:_LONGEST_REASON]}"
    return _compact(result)


def _tokenized(row: Row, how: Reading) -> dict[str, Any]:
    """A row of SFT. Its labels are its tokens, or -100 where nothing is trained."""
    ids, labels, lost = _labelled(row, how)
    if not ids:
        raise BadRow("it has no tokens")
    check_ids([*ids, *(label for label in labels if label != _MASKED)], how)
    if all(label == _MASKED for label in labels):
        raise BadRow("no token of it is trained")
    if all(label == _MASKED for label in how.kept(labels)):
        first = next(i for i, label in enumerate(labels) if label != _MASKED)
        raise BadRow(f"nothing of what is trained is within max_length={how.max_length}: it comes after {first} tokens")
    return {"input_ids": ids, "labels": labels, "lost": lost, "cut": len(how.kept(ids)) < len(ids)}


def _labelled(row: Row, how: Reading) -> tuple[list[int], list[int], int]:
    """(token ids, labels, answers that should be trained and cannot be distinguished from the rest)."""
    if "input_ids" in row:
        return row["input_ids"], row["labels"], 0
    if "text" in row:
        ids = list(how.tokenizer(text=ended(row["text"], how))["input_ids"])
        return ids, ids, 0
    if messages_column(row) is None:
        ids = list(how.tokenizer(text=row["prompt"] + ended(row["completion"], how))["input_ids"])
        asked = how.tokenizer(text=row["prompt"])["input_ids"]
        return ids, _from(ids, 0 if how.train_on_all else common_length(asked, ids)), 0
    messages = conversation(row)
    if how.train_on_all or (how.whole_conversations and "messages" in row):
        ids = how.template.tokens(row, messages)
        return ids, ids, 0
    first = len(messages) - len(row["completion"]) if "completion" in row else 0
    indices = [
        i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant" and m.get("train", True)
    ]  # fmt: skip
    indices = [i for i in indices if i == len(messages) - 1] if how.last_answer else indices
    if indices == [len(messages) - 1]:
        return _last_answer(row, how)
    ids, trained, lost = how.template.answers(row, messages, indices, how.beginning)
    if (
        lost == len(indices) and indices[-1] == len(messages) - 1
    ):  # a tokenizer that does not say where its tokens stand
        ids, labels, _ = _last_answer(row, how)
        return ids, labels, lost - 1
    if lost == len(indices):
        raise BadRow(
            "the chat template renders its answers otherwise once another turn follows, so none can be trained"
        )
    return ids, [token if bit else _MASKED for token, bit in zip(ids, trained, strict=True)], lost


def _last_answer(row: Row, how: Reading) -> tuple[list[int], list[int], int]:
    messages = conversation(row)
    ids = how.template.tokens(row, messages)
    asked = how.template.tokens(row, messages[:-1], ask=True)
    return ids, _from(ids, common_length(asked, ids)), 0


def _from(ids: list[int], start: int) -> list[int]:
    return [_MASKED] * start + ids[start:]
