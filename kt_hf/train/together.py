"""A run of several processes that train one model: what one of them does for all, and what all have to agree on."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from ..adapters.whole import ranks_of
from ..errors import KTAMXError
from ..ranks import Kind, Place, current_world

_FAILED = "has failed there"  # in the words of `Ranks.agree`


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


def meet_after(model: Any, failure: BaseException | None) -> None:
    """Have all ranks be in one place again, behind work of which one may have failed, wherever the others were then.

    Args:
        model: A patched model; its ranks meet.
        failure: Why this rank has left the work; None if it has done it, or left it because another has failed.

    Raises:
        KTAMXError: Another rank has ended or is elsewhere.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return
    if failure is not None:  # those that wait for this rank leave their work; those that are here come once more
        ranks.agree(Place(Kind.PLAN), failure=failure)
    for left in range(ranks.size, -1, -1):
        try:
            ranks.agree(Place(Kind.PLAN))
            return
        except KTAMXError as error:
            if _FAILED not in str(error) or not left:
                raise


def was_told(error: BaseException) -> bool:
    """Whether the other ranks know of this error, or it is of another rank."""
    return _FAILED in str(error) or bool(getattr(error, "kt_told", False))


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
