"""What every rank has measured, on every rank: what is decided by all of it is decided alike everywhere.

Models are often patched before torch.distributed is initialized. Ranks then meet at the launcher's store, which every
process group of the run is made with later.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import KTAMXConfigError, KTAMXError
from .place import Kind, Place
from .ranks import Ranks
from .world import World

T = TypeVar("T")
_meetings = itertools.count()  # at the store, of all models of the process
_stores: list[Any] = []  # the launcher's, once it was asked for; kept, for rank 0 may serve the others with it


def of_all_ranks(ranks: Ranks | None, measure: Callable[[], T]) -> list[T]:
    """What `measure` gives on each rank, in rank order; all ranks call it together.

    Args:
        ranks: The processes; None in a run of one, which has its own alone.
        measure: Gives what JSON can hold.

    Raises:
        KTAMXError: Another rank has failed to measure, has ended or is elsewhere.
        KTAMXConfigError: The processes have no way to meet.
    """
    if ranks is None:
        return [measure()]
    connected = dist.is_available() and dist.is_initialized()
    try:
        data = json.dumps(measure()).encode()
    except Exception as error:
        if connected:
            ranks.agree(Place(Kind.PLAN), failure=error)
        else:
            _at_store(ranks.world, b"!" + f"{type(error).__name__}: {error}".encode())
        raise
    every = _by_group(ranks, data) if connected else _at_store(ranks.world, data)
    return [json.loads(part) for part in every]


def least_of_all(ranks: Ranks | None, measure: Callable[[], int]) -> int:
    """The least that any rank measures; otherwise as `of_all_ranks`."""
    return min(of_all_ranks(ranks, measure))


def _by_group(ranks: Ranks, data: bytes) -> list[bytes]:
    ranks.agree(Place(Kind.PLAN))
    lengths = ranks.all_values(torch.tensor([len(data)], dtype=torch.int64, device="cpu")).flatten().tolist()
    sent = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
    sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = ranks.all_values(sent)
    return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]


def _at_store(world: World, data: bytes) -> list[bytes]:
    store, number = _store(world), next(_meetings)
    try:
        store.set(f"kt_hf/measured/{number}/{world.rank}", data)
        every = [bytes(store.get(f"kt_hf/measured/{number}/{rank}")) for rank in range(world.size)]
    except RuntimeError as error:
        raise KTAMXError(
            f"rank {world.rank} waited for what the other ranks measure of their memory, in vain: {error}. Each must "
            "patch the same models in the same order."
        ) from error
    for rank, part in enumerate(every):
        if part.startswith(b"!") and rank != world.rank:
            raise KTAMXError(f"{Place(Kind.PLAN)}: rank {rank} has failed there: {part[1:].decode(errors='replace')}")
    return every


def _store(world: World) -> Any:
    if not _stores:
        try:
            _stores.append(next(rendezvous("env://", world.rank, world.size))[0])
        except (ValueError, RuntimeError) as error:
            raise KTAMXConfigError(
                f"The experts are divided among {world.size} processes (WORLD_SIZE), which cannot meet to decide where "
                f"they are computed: {error} Start them with torchrun or accelerate launch, or connect them before the "
                "model is patched: torch.distributed.init_process_group, accelerate.Accelerator() or TrainingArguments."
            ) from error
    return _stores[0]
