"""Which of how many processes this is, and the experts that it owns."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..errors import KTAMXConfigError


@dataclass(frozen=True)
class World:
    """The processes of a run, of which this is one.

    Attributes:
        rank: This process among all, from 0.
        size: How many there are; 1 for a run of one process.
        local_rank: This process among those of its host.
        local_size: How many of them are on this host.
        host: The number that the launcher has given this host, of several; -1 if it has given none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: int = -1


def current_world() -> World:
    """The processes as torch.distributed knows them; before it is initialized, as a launcher has set the environment.

    Raises:
        KTAMXConfigError: WORLD_SIZE counts several processes, but RANK does not say which of them this is.
    """
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        size = _number("WORLD_SIZE") or 1
        if size <= 1:
            return World()
        position = _number("RANK")
        if position is None:
            raise KTAMXConfigError(
                f"WORLD_SIZE={size}, but RANK is not set: start the processes with torchrun --nproc_per_node {size} "
                "SCRIPT or accelerate launch, which set both."
            )
        rank = position
    if size == 1:
        return World()
    # Processes that were started without a launcher are taken to be of one host.
    here = min(local_size or size, size)
    host = _number("GROUP_RANK")
    return World(rank, size, rank % here if local_rank is None else local_rank, here, -1 if host is None else host)


def _number(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdigit() else None


@dataclass(frozen=True)
class Share:
    """The experts of a layer that one rank owns: `lo` to `hi` - 1 of `total`.

    Attributes:
        rank: Of the rank that owns them, among those.
        ranks: How many ranks the layer's experts are divided among: those of a host, or all.
        total: Experts of the layer, E.
    """

    rank: int
    ranks: int
    total: int

    @classmethod
    def of(cls, rank: int, ranks: int, total: int, where: str) -> Share:
        """This process's share of a layer.

        Args:
            rank: This process, among those that divide the experts.
            ranks: How many they are.
            total: Experts of the layer, E.
            where: The layer's name, for the message.

        Raises:
            KTAMXConfigError: The experts cannot be divided evenly.
        """
        if total % ranks:
            fitting = [n for n in range(1, ranks) if total % n == 0]
            raise KTAMXConfigError(
                f"{where}: {total} experts cannot be divided evenly among {ranks} processes (WORLD_SIZE, or those of a "
                f"host). Start {fitting[-1]}, or another number that divides {total}."
            )
        return cls(rank, ranks, total)

    @property
    def count(self) -> int:
        """Experts that a rank owns, E / N."""
        return self.total // self.ranks

    @property
    def lo(self) -> int:
        """The first expert."""
        return self.rank * self.count

    @property
    def hi(self) -> int:
        """The expert after the last."""
        return self.lo + self.count

    @property
    def experts(self) -> slice:
        """Where they are in a tensor of all experts."""
        return slice(self.lo, self.hi)
