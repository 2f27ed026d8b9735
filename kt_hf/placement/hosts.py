"""Among which processes experts are divided: those of a host, where each host has all of them, or all there are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..ranks import Ranks, World, current_world, of_all_ranks
from ..shapes import ExpertShape, expert_bytes
from ..system.gpu import experts_device
from ..system.memory import available_memory, free_device_memory
from .tiers import Tiers, asked_for

logger = logging.getLogger(__name__)

_USABLE = 0.9  # of a host's free memory; the rest is for LoRA and what grows in a run
_GIB = 2**30


def ranks_of_run(
    config: KTConfig, shapes: Sequence[ExpertShape], bits: Callable[[], float] | None = None
) -> Ranks | None:
    """The processes among which this one trains a model; None if it is alone. All of them call this together.

    Args:
        config: Settings; of them `kt_expert_ranks` chooses, and says by itself where a host has memory for all experts.
        shapes: Of the model's layers, of all their experts.
        bits: Gives those of a weight as it is held; None if the experts are in the memory of each process already.

    Raises:
        KTAMXConfigError: Hosts with unlike numbers of processes, or processes that cannot meet.
        KTAMXError: Another process has failed.
    """
    world = current_world()
    if world.size == 1:
        return None
    if world.local_size == world.size:
        return Ranks(world)
    every = Ranks(world)
    if config.kt_expert_ranks == "all":
        logger.info("kt_hf: experts are divided among all %d processes; every layer crosses the network.", world.size)
        return every
    _check_hosts(of_all_ranks(every, lambda: [world.local_size, world.local_rank, world.host]))
    hosts = world.size // world.local_size
    if config.kt_expert_ranks == "auto" and bits is not None:
        problem = _lacks(config, shapes, bits(), world, every)
        if problem is not None:
            logger.info(
                "kt_hf: experts are divided among all %d processes of %d hosts: %s.", world.size, hosts, problem
            )
            return every
    logger.info("kt_hf: each of %d hosts has all experts, divided among its %d processes.", hosts, world.local_size)
    return Ranks(world, world.local_size)


def expected_owners(
    config: KTConfig, shape: ExpertShape, layers: int, bits: float, hosts: int, ranks: int, free: tuple[int, int]
) -> int:
    """Among how many processes experts will be divided, as `ranks_of_run` says when a checkpoint is loaded.

    Args:
        config: Settings.
        shape: Of each of the model's layers, of all their experts.
        layers: How many have experts.
        bits: Of a weight as it is held.
        hosts: Of the run.
        ranks: Processes of a host.
        free: Bytes that are free in a host's memory, and in that of its GPUs together.
    """
    if hosts == 1 or config.kt_expert_ranks == "host":
        return ranks
    tiers = asked_for(config, [shape], free[1] > 0)
    fits = config.kt_expert_ranks == "auto" and fits_host(tiers, [shape] * layers, bits, *free) is None
    return ranks if fits else hosts * ranks


def fits_host(tiers: Tiers | None, shapes: Sequence[ExpertShape], bits: float, host: int, gpus: int) -> str | None:
    """What a host lacks to have all experts of a model; None if it has room for them.

    Args:
        tiers: Where experts are, of a whole layer; None if that is to be planned.
        shapes: Of the model's layers, of all their experts.
        bits: Of a weight as it is held.
        host: Bytes that are free on it.
        gpus: Bytes that are free on its GPUs together.
    """
    on_gpu, in_all = 0, 0
    tiers = tiers or Tiers()
    for index, shape in enumerate(shapes):
        whole = index < tiers.resident_layers
        resident = shape.num_experts if whole else min(tiers.resident, shape.num_experts)
        on_gpu += expert_bytes(shape, bits) * resident
        in_all += expert_bytes(shape, bits) * shape.num_experts
    for need, free, what in ((in_all - on_gpu, host, "free host memory"), (on_gpu, gpus, "free memory of its GPUs")):
        if need > _USABLE * free:
            sizes = f"{need / _GIB:.1f} GiB, more than {_USABLE:.0%} of {free / _GIB:.1f} GiB"
            return f"a host's part would be {sizes} of {what}"
    return None


def _lacks(config: KTConfig, shapes: Sequence[ExpertShape], bits: float, world: World, every: Ranks) -> str | None:
    gpu = experts_device()
    tiers = asked_for(config, shapes, gpu is not None)

    def free() -> list[int]:
        return [available_memory(), free_device_memory(gpu) if gpu is not None else 0]

    host, gpus = (min(of_one) * world.local_size for of_one in zip(*of_all_ranks(every, free), strict=True))
    return fits_host(tiers, shapes, bits, host, gpus)


def _check_hosts(every: list[list[int]]) -> None:
    """Refuse hosts of unlike numbers of processes, and ranks that do not follow each other on a host.

    Args:
        every: Of each rank: processes of its host, its number among them, and the host's number (-1 if unknown).

    Raises:
        KTAMXConfigError: Saying what to start.
    """
    sizes = sorted({local_size for local_size, _, _ in every})
    if len(sizes) > 1 or len(every) % sizes[0]:
        numbers = ", ".join(str(size) for size in sizes)
        raise KTAMXConfigError(
            f"The hosts of the run have unlike numbers of processes ({numbers} of {len(every)}, LOCAL_WORLD_SIZE): "
            "start as many on each (torchrun --nproc_per_node N), or set kt_expert_ranks: all, which divides the "
            "experts among all processes."
        )
    owners = sizes[0]
    hosts = [{host for _, _, host in every[first : first + owners]} for first in range(0, len(every), owners)]
    in_order = all(local == rank % owners for rank, (_, local, _) in enumerate(every))
    if not in_order or any(len(host) > 1 for host in hosts):
        given = ", ".join(str(local) for _, local, _ in every)
        raise KTAMXConfigError(
            f"The ranks of a host do not follow each other (LOCAL_RANK {given}): start them "
            "with torchrun or accelerate launch, which number them host by host, or set kt_expert_ranks: all."
        )
