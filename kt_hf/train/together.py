"""A run of several processes that train one model: what one of them does for all, and what all have to agree on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from ..adapters.whole import ranks_of
from ..errors import KTAMXConfigError, KTAMXError
from ..experts import kt_layers
from ..ranks import Kind, Place, Ranks, Share, current_world, is_told, of_all_ranks

_FAILED = "has failed there"  # in the words of `Ranks.agree`


def is_first() -> bool:
    """Whether this process writes and prints for all: rank 0, or the only one."""
    return current_world().rank == 0


def console_of_rank(console: Console) -> Console:
    """The console for rank 0; one that shows nothing for the others, which have nothing else to tell."""
    return console if is_first() else Console(quiet=True)


@contextlib.contextmanager
def first_of_host_first() -> Iterator[None]:
    """While this is open, the other processes of a host wait for its first one: what it downloads or caches they have.

    They go on where it fails, too.
    """
    world = current_world()
    if world.size == 1 or not torch.distributed.is_initialized():
        yield
        return
    ranks = Ranks(world)
    if world.local_rank:
        ranks.agree(Place(Kind.RUN))
    try:
        yield
    finally:
        if not world.local_rank:
            ranks.agree(Place(Kind.RUN))


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """An error of what is inside, which several processes may have, is told by the first that has it; all end.

    Raises:
        KTAMXError: This process's own error, or that another one tells it.
    """
    world, failure = current_world(), None
    try:
        yield
    except KTAMXError as error:
        if world.size == 1:
            raise
        failure = error
    if world.size == 1:
        return
    texts = of_all_ranks(Ranks(world), lambda: "" if failure is None else str(failure) or type(failure).__name__)
    first = next((rank for rank, text in enumerate(texts) if text), None)
    if failure is not None and texts.index(texts[world.rank]) == world.rank:
        raise failure
    if first is not None:
        raise KTAMXConfigError(f"process {world.rank} ends with process {first}, which says why")


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
    return _FAILED in str(error) or is_told(error)


def ranks_in_words(model: Any) -> str | None:
    """How many processes there are and what each holds; None of a run of one."""
    ranks = ranks_of(model)
    if ranks is None:
        return None
    parts = [f"{rank}: {lo} to {hi - 1}" for rank, (lo, hi) in enumerate(experts_of_ranks(model))]
    held = f"each with a part of every layer's experts and their LoRA ({', '.join(parts)}), and the rest by DDP"
    copies, hosts = ranks.replicas.size, hosts_of(model)
    if copies > 1:
        return f"{ranks.size} on {copies} hosts, which have all experts each: of a host's {ranks.owners.size}, {held}"
    return f"{ranks.size}{f' on {hosts} hosts' if hosts > 1 else ''}, {held}"


def hosts_of(model: Any) -> int:
    """How many hosts the run's processes are on."""
    ranks = ranks_of(model)
    return 1 if ranks is None else ranks.size // ranks.world.local_size


def experts_of_ranks(model: Any) -> list[tuple[int, int]]:
    """Of each rank (of each host the same, where hosts have all experts), the first expert of a layer that it owns and
    the one after the last; [] in a run of one process.
    """
    share = next((layer.share for layer in kt_layers(model)), None)
    if share is None:
        return []
    every = [Share(rank, share.ranks, share.total) for rank in range(share.ranks)]
    return [(one.lo, one.hi) for one in every]


def _numbers(model: Any, number: int) -> torch.Tensor:
    numbers, ranks = torch.tensor([number], dtype=torch.int64, device="cpu"), ranks_of(model)
    if ranks is None:
        return numbers
    ranks.agree(Place(Kind.RUN))
    return ranks.all_values(numbers)
