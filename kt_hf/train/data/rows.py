"""From the names in a configuration to rows in TRL's form, saying aloud what was found and what was left out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import KTAMXConfigError
from ..config.settings import MIX_STRATEGIES, RunKeys, TrainSettings
from ..config.stages import STAGES, in_words
from .formats import Format
from .messages import BadRow
from .sources import Source, read_source
from .stage_formats import FORMATS, TAG, is_marked, recognize

# More unusable rows than this share stop the run.
MOST_BAD = 0.01
_SHOWN = 3
_MOST_NAMES, _LONGEST_NAME = 20, 60  # of columns, in a sentence
_TEXT_COLUMN = "text"


@dataclass
class Rows:
    """Rows of one stage in TRL's form.

    Attributes:
        rows: The rows.
        notes: What to tell the user about them.
        places: Where each row stands, such as `data.jsonl line 3`; empty if nobody needs to know.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @property
    def pictured(self) -> bool:
        """Whether any of the rows has images."""
        return any(row.get("images") for row in self.rows)

    @property
    def conversational(self) -> bool:
        """Whether any of the rows is a conversation, so that a chat template is needed."""
        return any(messages_column(row) for row in self.rows)

    def pick(self, order: Sequence[int]) -> Rows:
        """The rows of these indices, in their order; `notes` stay where they are."""
        return Rows([self.rows[i] for i in order], [], [self.places[i] for i in order] if self.places else [])

    def place(self, index: int) -> str:
        """Where a row stands in its file, for messages."""
        return self.places[index] if self.places else f"row {index + 1}"


def messages_column(row: dict[str, Any]) -> str | None:
    """The column a conversation begins in; None for a row of text or tokens."""
    return next((column for column in ("messages", "prompt") if isinstance(row.get(column), list)), None)


def load_rows(
    specs: Sequence[str],
    purpose: str,
    stage: str,
    most: int | None = None,
    dataset_dir: str | None = None,
    text_column: str = _TEXT_COLUMN,
    sees: bool = False,
) -> Rows:
    """The usable rows of several data sets, one after the other.

    Args:
        specs: As in `dataset`.
        purpose: `train` or `eval`.
        stage: A name of `STAGES`.
        most: Rows taken of each data set.
        dataset_dir: The folder of LLaMA-Factory's `dataset_info.json`.
        text_column: What TRL's `dataset_text_field` calls the column `text`.
        sees: Whether the model takes images.

    Raises:
        KTAMXConfigError: A data set that cannot be read, has no known columns or the other stage's, or more than 1 %
            of unusable rows.
    """
    parts = [_load(spec, purpose, stage, most, dataset_dir, text_column, sees) for spec in specs]
    return _one_form(_joined(parts), stage)


def _load(
    spec: str, purpose: str, stage: str, most: int | None, dataset_dir: str | None, text_column: str, sees: bool
) -> Rows:
    sources = read_source(spec, purpose, stage, most, dataset_dir)
    result, bad = Rows(), list[tuple[str, str]]()
    used, filled, by_format = set[str](), set[str](), dict[str, list[int]]()
    for source in sources:
        bad += source.bad
        if text_column != _TEXT_COLUMN:
            source.rows = [(place, _renamed(row, text_column)) for place, row in source.rows]
        form = _format_of(source, spec, stage)
        folder = Path(source.name).parent if Path(source.name).is_file() else None
        count = by_format.setdefault(form.name, [0, 0]) if form else [0, 0]
        for place, row in source.rows:
            assert form is not None
            filled |= {column for column in row.keys() - filled if row[column] is not None and row[column] != ""}
            try:
                result.rows.append(form.row(row, used, sees, folder))
                result.places.append(place)
                count[0] += 1
            except BadRow as error:
                bad.append((place, str(error)))
        count[1] += bool(source.rows)
    judge(f"dataset {spec}", bad, len(result.rows) + len(bad))
    shown = ", and ".join(
        f"{rows} rows, format {name}" + (f" in {files} files" if len(by_format) > 1 else "")
        for name, (rows, files) in by_format.items()
    )
    result.notes.append(f"{spec}: {shown}{_left_out(bad)}")
    if filled - used:
        result.notes.append(f"{spec}: nothing uses the columns {_named(filled - used)}")
    return result


def _named(columns: set[str]) -> str:
    names = sorted(str(column)[:_LONGEST_NAME] for column in columns)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "none") + more


def _renamed(row: dict[str, Any], text_column: str) -> dict[str, Any]:
    rest = {key: value for key, value in row.items() if key not in (text_column, _TEXT_COLUMN)}
    return rest | ({_TEXT_COLUMN: row[text_column]} if text_column in row else {})


def _format_of(source: Source, spec: str, stage: str) -> Format | None:
    """The format of a file; None if it has no rows."""
    if not source.rows:
        return None
    columns, name = source.columns(), "" if source.name == spec else f" ({source.name})"
    if is_marked((row for _, row in source.rows), stage):
        columns.add(TAG)
    form = recognize(columns, stage)
    if form is None:
        known = "; ".join(f"{form.name}: {', '.join(sorted(form.columns))}" for form in FORMATS)
        shown = _named(columns)
        raise KTAMXConfigError(f"dataset {spec}{name}: no known format has the columns {shown}. Known are {known}.")
    if stage not in form.stages:
        more = " Take the marks (kto_tag, label) out to train on every answer." if TAG in form.columns else ""
        raise KTAMXConfigError(
            f"dataset {spec}{name} is {form.name}, which is data for stage: {in_words(form.stages)}, and this is "
            f"stage: {stage}.{more}"
        )
    return form


def _joined(parts: Sequence[Rows]) -> Rows:
    result = Rows()
    for part in parts:
        result.rows += part.rows
        result.notes += part.notes
        result.places += part.places
    return result


def _one_form(rows: Rows, stage: str) -> Rows:
    """`rows`, of which TRL's trainers take messages or text, not both. SFT's are tokenized here, each as it is."""
    if not STAGES[stage].tokenized and len({messages_column(row) is None for row in rows.rows}) > 1:
        raise KTAMXConfigError(
            f"The data sets have different forms, messages and text, and TRL trains stage: {stage} on one of them."
        )
    return rows


def judge(what: str, bad: Sequence[tuple[str, str]], total: int) -> None:
    """Stop a run whose data cannot be used.

    Args:
        what: The data, in words.
        bad: (place, reason) of unusable rows.
        total: Rows, the unusable ones among them.

    Raises:
        KTAMXConfigError: There is nothing, or more than 1 % of it is unusable.
    """
    if total == 0:
        raise KTAMXConfigError(f"{what} has no rows.")
    if len(bad) > MOST_BAD * total:
        shown = "".join(f"\n  {place}: {reason}" for place, reason in bad[:_SHOWN])
        raise KTAMXConfigError(
            f"{what}: {len(bad)} of {total} rows cannot be used, more than {MOST_BAD:.0%}. The first:{shown}"
        )


def _left_out(bad: Sequence[tuple[str, str]]) -> str:
    if not bad:
        return ""
    shown = "; ".join(f"{place}: {reason}" for place, reason in bad[:_SHOWN])
    return f"; {len(bad)} left out ({shown})"


def split_off(total: int, val_size: float, seed: int) -> tuple[list[int], list[int]]:
    """(indices of training rows, of evaluation rows): `val_size` is a share below 1, or a number of rows.

    Raises:
        KTAMXConfigError: Nothing would be left to train or to evaluate on.
    """
    count = int(val_size) if val_size >= 1 else round(total * val_size)
    if not 0 < count < total:
        raise KTAMXConfigError(f"val_size={val_size:g} of {total} rows leaves nothing on one side.")
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return sorted(order[count:]), sorted(order[:count])


def mixing_problem(keys: RunKeys) -> tuple[str, str] | None:
    """(key, why) if `mix_strategy` and `interleave_probs` cannot be used, else None."""
    if keys.mix_strategy not in MIX_STRATEGIES:
        return "mix_strategy", f"mix_strategy={keys.mix_strategy!r}: it must be {' or '.join(MIX_STRATEGIES)}"
    if keys.interleave_probs is None:
        return None
    if keys.mix_strategy == "concat":
        return "interleave_probs", "interleave_probs is for mix_strategy: interleave_under or interleave_over"
    try:
        shares = _shares(keys) or []
    except (TypeError, ValueError):
        return "interleave_probs", f"interleave_probs={keys.interleave_probs!r}: it must be numbers"
    if len(shares) != len(keys.dataset):
        return "interleave_probs", f"interleave_probs has {len(shares)} numbers for {len(keys.dataset)} data sets"
    if not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        return "interleave_probs", f"interleave_probs={keys.interleave_probs!r}: shares above 0 that add up to 1"
    return None


def _shares(keys: RunKeys) -> list[float] | None:
    return None if keys.interleave_probs is None else [float(share) for share in keys.interleave_probs]


def _mixed(parts: Sequence[Rows], keys: RunKeys, seed: int) -> Rows:
    """Several data sets one after the other, or drawn from in turn: by shares, where some are given."""
    joined, how = _joined(parts), MIX_STRATEGIES[keys.mix_strategy]
    if how is None or len(parts) < 2:
        return joined
    import datasets

    starts = [sum(len(part.rows) for part in parts[:i]) for i in range(len(parts))]
    indices = [
        datasets.Dataset.from_dict({"row": list(range(start, start + len(part.rows)))})
        for start, part in zip(starts, parts, strict=True)
    ]
    order = datasets.interleave_datasets(indices, _shares(keys), seed=seed, stopping_strategy=how)["row"]
    mixed = joined.pick(list(order))
    mixed.notes = [
        *joined.notes,
        f"mix_strategy {keys.mix_strategy}: {len(mixed.rows)} rows of {len(joined.rows)} by turns",
    ]
    return mixed


def training_and_evaluation(settings: TrainSettings, sees: bool = False) -> tuple[Rows, Rows | None]:
    """The data that a configuration names; evaluation rows from `eval_dataset` or `val_size`.

    Args:
        settings: The configuration.
        sees: Whether the model takes images.

    Raises:
        KTAMXConfigError: They cannot be had, or not be used.
    """
    keys, seed = settings.run, settings.trainer.get("seed", 42)
    column = settings.trainer.get("dataset_text_field") or _TEXT_COLUMN

    def load(specs: Sequence[str], purpose: str) -> list[Rows]:
        return [_load(spec, purpose, keys.stage, keys.max_samples, keys.dataset_dir, column, sees) for spec in specs]

    train = _one_form(_mixed(load(keys.dataset, "train"), keys, seed), keys.stage)
    evaluation = None
    if keys.eval_dataset:
        evaluation = _one_form(_joined(load(keys.eval_dataset, "eval")), keys.stage)
    elif keys.val_size:
        order, held_out = split_off(len(train.rows), keys.val_size, seed)
        notes = train.notes
        train, evaluation = train.pick(order), train.pick(held_out)
        train.notes, evaluation.notes = notes, [f"{len(held_out)} rows held out by val_size"]
    for rows in (train, evaluation):
        if rows is not None:
            _set_defaults(rows, keys)
    return train, evaluation


def _set_defaults(rows: Rows, keys: RunKeys) -> None:
    """What a configuration says of every conversation: `default_system` and `enable_thinking`, where a row does not."""
    given = [key for key in ("default_system", "enable_thinking") if getattr(keys, key) is not None]
    if given and not rows.conversational:
        rows.notes.append(f"{' and '.join(given)}: no effect, for the data are not conversations")
    for row in rows.rows if given else ():
        column = messages_column(row)
        if column is None:
            continue
        if keys.default_system and row[column][0]["role"] not in ("system", "developer"):
            row[column] = [{"role": "system", "content": keys.default_system}, *row[column]]
        if keys.enable_thinking is not None:
            settings = {"enable_thinking": keys.enable_thinking}
            row["chat_template_kwargs"] = settings | row.get("chat_template_kwargs", {})
