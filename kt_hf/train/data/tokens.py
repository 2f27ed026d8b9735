"""Rows as token ids, before a model is loaded: what cannot be trained on is reported with its row."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import KTAMXConfigError
from ..config.settings import RunKeys
from .formats import Row
from .messages import BadRow
from .rows import Rows, judge, messages_column
from .template import ChatTemplate, chat_template, common_length, conversation, fitted, left_out

_MASKED = -100
_PAIR = ("prompt", "chosen", "rejected")
_SHOWN = 3
_LONGEST_REASON = 300
_ROWS_PER_PROCESS = 1000  # a process costs more than a thousand short rows
# Settings of TRL about what is trained: done once the labels are made, and TRL wants conversations where it sees them.
IN_THE_LABELS = ("assistant_only_loss", "completion_only_loss")


@dataclass(frozen=True)
class Reading:
    """How rows become tokens: the part of a configuration that TRL's own preparation goes by.

    Attributes:
        tokenizer: As training will have it.
        template: Its chat template.
        vocabulary: Ids from here on have no embedding.
        max_length: Tokens of a row, None for any number.
        keep_end: Whether the end of a longer row is kept, not the beginning.
        cut: Whether a longer row is cut at all; packing may split it.
        train_on_all: Whether prompts are trained too (`completion_only_loss: false`).
        whole_conversations: Whether all of a conversation is trained (`assistant_only_loss: false`).
        last_answer: Whether only the last answer of a conversation is trained (`mask_history`).
        processes: That share the work; None for this one alone.
    """

    tokenizer: Any
    template: ChatTemplate
    vocabulary: int
    max_length: int | None
    keep_end: bool
    cut: bool
    train_on_all: bool
    whole_conversations: bool
    last_answer: bool
    processes: int | None

    @property
    def beginning(self) -> int | None:
        """How many tokens are kept of a row's beginning; None for all, or where its end is kept."""
        return self.max_length if self.cut and not self.keep_end else None

    def kept(self, numbers: list[int]) -> list[int]:
        """What is left of a row's tokens or labels."""
        if self.max_length is None or not self.cut:
            return numbers
        return numbers[-self.max_length :] if self.keep_end else numbers[: self.max_length]


@dataclass
class Prepared:
    """Data for a trainer.

    Attributes:
        dataset: For SFT `input_ids` and `labels`; for DPO the rows, which TRL tokenizes once more.
        notes: What to tell the user.
        sequences: Token ids of the first rows, an array each.
    """

    dataset: Any
    notes: list[str] = field(default_factory=list)
    sequences: list[Any] = field(default_factory=list)


def reading(keys: RunKeys, options: dict[str, Any], tokenizer: Any, vocabulary: int) -> Reading:
    """How the rows of a run are to be read.

    Args:
        keys: The run's keys that are not TRL's.
        options: Keyword arguments of TRL's configuration.
        tokenizer: The model's; not changed.
        vocabulary: How many embeddings the model has.

    Raises:
        KTAMXConfigError: `eos_token` or `chat_template_path` name nothing that there is.
    """
    tokenizer, vocabulary = _as_trained(options, tokenizer, vocabulary)
    packed = options.get("packing") and options.get("packing_strategy", "bfd") != "bfd"
    return Reading(
        tokenizer=tokenizer,
        template=chat_template(tokenizer),
        vocabulary=vocabulary,
        max_length=options.get("max_length", 1024),
        keep_end=options.get("truncation_mode") == "keep_end",
        cut=not packed,
        train_on_all=options.get("completion_only_loss") is False,
        whole_conversations=options.get("assistant_only_loss") is False,
        last_answer=keys.mask_history,
        processes=options.get("dataset_num_proc"),
    )


def _as_trained(options: dict[str, Any], tokenizer: Any, vocabulary: int) -> tuple[Any, int]:
    """(a copy of the tokenizer with what TRL will do to it, the number of embeddings there will be)."""
    end, source = options.get("eos_token"), options.get("chat_template_path")
    if end is None and source is None:
        return tokenizer, vocabulary
    tokenizer = copy.deepcopy(tokenizer)
    if end is not None:
        if end not in tokenizer.get_vocab():
            raise KTAMXConfigError(f"eos_token={end!r} is not in the tokenizer's vocabulary.")
        tokenizer.eos_token = end
    if source is not None:
        try:
            if source.endswith((".jinja", ".j2")) and Path(source).is_file():
                tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
                return tokenizer, vocabulary
            from transformers import AutoTokenizer

            other = AutoTokenizer.from_pretrained(source)
            tokenizer.chat_template = other.get_chat_template()
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())
            raise KTAMXConfigError(f"chat_template_path={source!r} cannot be used: {words}") from None
        tokenizer.add_tokens([t for t in other.added_tokens_decoder.values() if t.content not in tokenizer.vocab])
        tokenizer.eos_token = other.eos_token
        vocabulary = max(vocabulary, len(tokenizer.vocab))  # TRL makes room for them
    return tokenizer, vocabulary


def prepare(rows: Rows, how: Reading, stage: str, purpose: str) -> Prepared:
    """The rows for a trainer of `stage`, without those that cannot be trained on.

    Args:
        rows: In TRL's form.
        how: How they become tokens.
        stage: `sft` or `dpo`.
        purpose: `train` or `eval`, for messages.

    Raises:
        KTAMXConfigError: More than 1 % of the rows cannot be trained on: the chat template refuses them, they have
            tokens the model does not know, or nothing that is trained is within `max_length`.
    """
    from datasets import Dataset, Features, Json, List, Value

    name = "the training data" if purpose == "train" else "the evaluation data"
    chats = [row for row in rows.rows if messages_column(row)]
    template, fit = fitted(how.template, chats)
    how = replace(how, template=template)
    results = _each(rows.rows, how, _tokenized_pair if stage == "dpo" else _tokenized)
    bad = [(rows.place(i), result["problem"]) for i, result in enumerate(results) if result["problem"]]
    judge(name, bad, len(results))
    good = [i for i, result in enumerate(results) if not result["problem"]]
    prepared = Prepared(None, [*([fit] if fit else []), *_notes(results, bad, how, name)])
    if chats:
        unused = left_out(how.template, chats)
        prepared.notes += [f"the chat template does not use {', '.join(unused)} in {name}"] if unused else []
    prepared.sequences = [results[i]["input_ids"] for i in good[:64]]
    if stage == "sft":
        features = Features({column: List(Value("int64")) for column in ("input_ids", "labels")})
        columns = {column: [results[i][column] for i in good] for column in features}
        prepared.dataset = Dataset.from_dict(columns, features=features)
        return prepared
    taken = [_as_rendered(rows.rows[i], template) for i in good]
    # As JSON: Arrow's own form of objects gives each the keys of all, with null for what it does not have.
    beside = [column for column in ("tools", "chat_template_kwargs") if any(column in row for row in taken)]
    filled: list[Row] = [{"tools": None, "chat_template_kwargs": {}} | row for row in taken]
    columns = {column: [row[column] for row in filled] for column in (*_PAIR, *beside)}
    kind = Json() if chats else Value("large_string")
    prepared.dataset = Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, kind)))
    return prepared


def _as_rendered(row: Row, template: ChatTemplate) -> Row:
    """A pair whose messages are as its chat template may see them."""
    shown = {column: template.plain(row[column]) for column in _PAIR if isinstance(row[column], list)}
    return row | shown


def _notes(results: Sequence[dict[str, Any]], bad: Sequence[tuple[str, str]], how: Reading, name: str) -> list[str]:
    notes, of_all = [], f"of {len(results)} rows"
    if bad:
        shown = "; ".join(f"{place}: {reason}" for place, reason in bad[:_SHOWN])
        notes.append(f"{name}: {len(bad)} {of_all} are left out ({shown})")
    longer = sum(bool(result["cut"]) for result in results)
    if longer:
        what = "the beginning" if how.keep_end else "the end"
        notes.append(f"{name}: {longer} {of_all} are longer than max_length={how.max_length} tokens and lose {what}")
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
    _check_ids([*ids, *(label for label in labels if label != _MASKED)], how)
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
        ids = list(how.tokenizer(text=_ended(row["text"], how))["input_ids"])
        return ids, ids, 0
    if messages_column(row) is None:
        ids = list(how.tokenizer(text=row["prompt"] + _ended(row["completion"], how))["input_ids"])
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


def _ended(text: str, how: Reading) -> str:
    end = how.tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _tokenized_pair(row: Row, how: Reading) -> dict[str, Any]:
    """What DPO's own preparation will make of a row: only whether it can, and whether anything is left to prefer."""
    if messages_column(row):
        asked = how.template.tokens(row, row["prompt"], ask=True)
        chosen, rejected = (how.template.tokens(row, [*row["prompt"], *row[c]]) for c in ("chosen", "rejected"))
    else:
        asked = list(how.tokenizer(row["prompt"])["input_ids"])
        chosen, rejected = (
            list(how.tokenizer(row["prompt"] + _ended(row[c], how))["input_ids"]) for c in ("chosen", "rejected")
        )
    start = min(common_length(asked, chosen), common_length(asked, rejected))
    _check_ids([*chosen, *rejected], how)
    if how.max_length is not None and not how.keep_end and start >= how.max_length:
        raise BadRow(f"its prompt has {start} tokens, and max_length={how.max_length} leaves none for the answers")
    if how.kept(chosen) == how.kept(rejected):
        raise BadRow(f"chosen and rejected are the same within max_length={how.max_length}")
    cut = any(len(how.kept(ids)) < len(ids) for ids in (chosen, rejected))
    return {"input_ids": chosen, "cut": cut}


def _check_ids(ids: Sequence[int], how: Reading) -> None:
    worst = max(ids, default=0)
    if worst >= how.vocabulary or min(ids, default=0) < 0:
        token = worst if worst >= how.vocabulary else min(ids)
        name = how.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(how.tokenizer) else None
        shown = f" ({name!r})" if name else ""
        raise BadRow(f"token {token}{shown} is none of the model's {how.vocabulary}: are model and tokenizer a pair?")
