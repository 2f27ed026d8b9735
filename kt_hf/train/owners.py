"""Among how many processes a run's experts will be divided, before anything of the model is loaded."""

from __future__ import annotations

from ..placement.hosts import expected_owners
from .config.settings import TrainSettings
from .memory_parts import expert_bits, shape_of
from .model_sizes import ModelSizes


def owners_of(settings: TrainSettings, sizes: ModelSizes, world: tuple[int, int], free: tuple[int, int]) -> int:
    """Among how many processes experts will be divided: those of a host, or those of all.

    Args:
        settings: What is to be run.
        sizes: Of its model, of one process.
        world: Hosts, and processes of each.
        free: Bytes that are free in a host's memory, and in that of its GPUs together.
    """
    shape, bits = shape_of(sizes), expert_bits(settings, sizes)
    return expected_owners(settings.kt, shape, sizes.expert_layers, bits, *world, free)
