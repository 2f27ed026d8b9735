"""Which experts of a run go to the GPU first: those its data use most, or the resumed checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..errors import KTAMXConfigError
from ..placement import Placement, count_experts, read_placement
from .config.settings import TrainSettings

# Tokens of a profile: ratios of the popular experts settle within a few thousand.
_TOKENS = 8_192
_ROWS = 64


@dataclass
class ProfileRun:
    """Finds the placement of a run.

    Attributes:
        settings: The run's.
        rows: Its training data, in TRL's format.
        tokenizer: With a chat template, if the rows are conversations.
        console: Is told what is done.
        resume: Folder of the checkpoint to resume from.
    """

    settings: TrainSettings
    rows: list[dict[str, Any]]
    tokenizer: Any
    console: Console
    resume: Path | None = None

    def saved(self) -> Placement | None:
        """That of the checkpoint to resume from, or of the adapter to start from; None if there is none."""
        start = self.settings.own.adapter_name_or_path
        folder = self.resume or (Path(start) if start and Path(start).is_dir() else None)
        return read_placement(folder) if folder else None

    def profile(self, model: Any) -> Placement:
        """By the routers of `model`, still unpatched, over the first rows."""
        if self.console.is_terminal:
            self.console.print("Counting which experts the data use most")
        return Placement.by_use(count_experts(model, self.batches()))

    def batches(self) -> Iterator[Tensor]:
        """Token ids of the first rows, one row at a time, as long as training would see them.

        Raises:
            KTAMXConfigError: No row has any tokens.
        """
        longest = self.settings.trainer.get("max_length", 1024) or 1024
        left = _TOKENS
        for row in self.rows[:_ROWS]:
            ids = self._tokens(row)[: min(longest, left)]
            if ids:
                left -= len(ids)
                yield torch.tensor([ids])
            if left <= 0:
                return
        if left == _TOKENS:
            raise KTAMXConfigError("Experts on the GPU: the first rows of the data have no tokens to count experts by.")

    def _tokens(self, row: dict[str, Any]) -> list[int]:
        if "messages" in row:
            return self._conversation(row["messages"])
        prompt, answer = row.get("prompt", ""), row.get("completion", row.get("chosen", ""))
        if isinstance(prompt, list) or isinstance(answer, list):
            return self._conversation([*(prompt or []), *(answer or [])])
        return list(self.tokenizer(row.get("text") or prompt + answer)["input_ids"])

    def _conversation(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
