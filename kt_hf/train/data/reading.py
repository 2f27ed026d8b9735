"""How rows become tokens: what of a configuration TRL's own preparation goes by."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import KTAMXConfigError
from ..config.settings import RunKeys
from ..config.stages import stage_of
from .messages import BadRow
from .template import ChatTemplate, chat_template


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
        max_length=None if stage_of(keys.stage).generates else options.get("max_length", 1024),
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


def ended(text: str, how: Reading) -> str:
    """`text` with the end of a turn, once."""
    end = how.tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def check_ids(ids: Sequence[int], how: Reading) -> None:
    """Raise `BadRow` for a token that the model has no embedding of."""
    worst = max(ids, default=0)
    if worst >= how.vocabulary or min(ids, default=0) < 0:
        token = worst if worst >= how.vocabulary else min(ids)
        name = how.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(how.tokenizer) else None
        shown = f" ({name!r})" if name else ""
        raise BadRow(f"token {token}{shown} is none of the model's {how.vocabulary}: are model and tokenizer a pair?")
