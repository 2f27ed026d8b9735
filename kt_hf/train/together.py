"""A run of several processes that train one model: what one of them does for all, and what all have to agree on."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from ..adapters.whole import ranks_of
from ..ranks import Kind, Place, current_world


def is_first() -> bool:
    """Whether this process writes and prints for all: rank 0, or the only one."""
    return current_world().rank == 0


def console_of_rank(console: Console) -> Console:
    """The console for rank 0; one that shows nothing for the others, which have nothing else to tell."""
    return console if is_first() else Console(quiet=True)


def largest(model: Any, number: int) -> int:
    """The largest of all ranks' numbers, which all of them ask for together; of one process its own.

    Args:
        model: A patched model; its ranks are asked.
        number: Of this rank.

    Raises:
        KTAMXError: Another rank has failed, has ended or is elsewhere.
    """
    return int(_numbers(model, number).max())


def total(model: Any, number: int) -> int:
    """The sum of all ranks' numbers; otherwise as `largest`."""
    return int(_numbers(model, number).sum())


def ranks_in_words(model: Any) -> str | None:
    """How many processes there are and what each holds; None of a run of one."""
    ranks = ranks_of(model)
    if ranks is None:
        return None
    return f"{ranks.size}, each with a part of every layer's experts and their LoRA, and the rest by DDP"


def _numbers(model: Any, number: int) -> torch.Tensor:
    numbers, ranks = torch.tensor([number], dtype=torch.int64, device="cpu"), ranks_of(model)
    if ranks is None:
        return numbers
    ranks.agree(Place(Kind.RUN))
    return ranks.all_values(numbers)
