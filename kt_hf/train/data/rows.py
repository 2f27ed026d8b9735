"""From the names in a configuration to data sets that TRL trains on, saying aloud what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import KTAMXConfigError
from ..config.settings import OwnKeys
from .formats import FORMATS, BadRow, recognize
from .sources import read_source

# More unusable rows than this share stop the run.
MOST_BAD = 0.01
_SHOWN = 3


@dataclass
class Rows:
    """Rows of one stage in TRL's format, and what to tell the user about them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def conversational(self) -> bool:
        return any("messages" in row or isinstance(row.get("prompt"), list) for row in self.rows)


def load_rows(specs: Sequence[str], purpose: str, stage: str, most: int | None = None) -> Rows:
    """The usable rows of several data sets.

    Args:
        specs: As in `dataset`.
        purpose: `train` or `eval`.
        stage: `sft` or `dpo`.
        most: Rows taken of each data set.

    Raises:
        KTAMXConfigError: A data set that cannot be read, has no known columns or the other stage's, or more than 1 %
            of unusable rows.
    """
    result = Rows()
    for spec in specs:
        raw = read_source(spec, purpose, stage, most)
        columns = raw.columns()
        known = recognize(columns)
        bad = list(raw.bad)
        rows = []
        if raw.rows and known is None:
            wanted = "; ".join(f"{form.name}: {', '.join(sorted(form.columns))}" for form in FORMATS)
            raise KTAMXConfigError(
                f"dataset {spec}: no known format has the columns {', '.join(sorted(columns))}. Known are {wanted}."
            )
        if known and known.stage != stage:
            raise KTAMXConfigError(
                f"dataset {spec} is {known.name}, which is data for stage: {known.stage}, and this is stage: {stage}."
            )
        for place, row in raw.rows:
            try:
                assert known is not None
                rows.append(known.convert(row))
            except BadRow as error:
                bad.append((place, str(error)))
        _judge(spec, bad, len(rows) + len(bad))
        assert known is not None
        result.told.append(f"{spec}: {len(rows)} rows, format {known.name}{_counted(bad)}")
        result.rows += rows
    forms = {tuple(sorted((key, type(value).__name__) for key, value in row.items())) for row in result.rows}
    if len(forms) > 1:
        shown = "; ".join(sorted(", ".join(f"{key} ({kind})" for key, kind in form) for form in forms))
        raise KTAMXConfigError(f"The data sets have different forms, and TRL trains on one at a time: {shown}.")
    return result


def _judge(spec: str, bad: list[tuple[str, str]], total: int) -> None:
    if total == 0:
        raise KTAMXConfigError(f"dataset {spec} has no rows.")
    if len(bad) > MOST_BAD * total:
        shown = "".join(f"\n  {place}: {reason}" for place, reason in bad[:_SHOWN])
        raise KTAMXConfigError(
            f"dataset {spec}: {len(bad)} of {total} rows cannot be used, more than {MOST_BAD:.0%}. The first:{shown}"
        )


def _counted(bad: list[tuple[str, str]]) -> str:
    if not bad:
        return ""
    shown = "; ".join(f"{place}: {reason}" for place, reason in bad[:_SHOWN])
    return f"; {len(bad)} left out ({shown})"


def split_off(
    rows: list[dict[str, Any]], val_size: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, evaluation rows): `val_size` is a share below 1, or a number of rows.

    Raises:
        KTAMXConfigError: Nothing would be left to train or to evaluate on.
    """
    import random

    count = int(val_size) if val_size >= 1 else round(len(rows) * val_size)
    if not 0 < count < len(rows):
        raise KTAMXConfigError(f"val_size={val_size:g} of {len(rows)} rows leaves nothing on one side.")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def training_and_evaluation(own: OwnKeys, seed: int) -> tuple[Rows, Rows | None]:
    """The data that a configuration names; evaluation rows from `eval_dataset` or `val_size`."""
    train = load_rows(own.dataset, "train", own.stage, own.max_samples)
    if own.eval_dataset:
        return train, load_rows(own.eval_dataset, "eval", own.stage, own.max_samples)
    if own.val_size:
        train.rows, held_out = split_off(train.rows, own.val_size, seed)
        return train, Rows(held_out, [f"{len(held_out)} rows held out by val_size"])
    return train, None


def only_last_answers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conversations as prompt and completion, so that TRL trains on the last answer of each."""
    return [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} if "messages" in row else row
        for row in rows
    ]


def for_sft(train: Rows, evaluation: Rows | None, can_mask: Callable[[], bool]) -> bool:
    """Arrange conversations so that the loss is on the answers. Returns whether TRL must mask (`assistant_only_loss`).

    With one answer a conversation, prompt and completion do. With several, TRL can mask the rest where the chat
    template marks the answers (`can_mask`); else only the last answer of each is trained, and that is told.
    """
    both = [rows for rows in (train, evaluation) if rows is not None]
    several = any(_answers(row) > 1 for rows in both for row in rows.rows)
    mixed = any("messages" not in row for rows in both for row in rows.rows)
    if several and not mixed and can_mask():
        return True
    if several:
        train.told.append(
            "conversations with several answers: only the last of each is trained, for the chat template does not mark "
            "answers"
        )
    for rows in both:
        rows.rows = only_last_answers(rows.rows)
    return False


def _answers(row: dict[str, Any]) -> int:
    return sum(message["role"] == "assistant" for message in row.get("messages", ()))
