"""Where experts of a run are computed: as a resumed checkpoint's were, and those the data use most first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..config import KTConfig
from ..errors import KTAMXConfigError
from ..placement import Placement, count_experts, read_placement
from ..placement.memory_model import MemoryBudget
from ..placement.record import read_run_placement
from ..placement.tiers import is_auto
from ..ranks import Ranks, current_world, of_all_ranks
from ..system import gpu
from .config.settings import TrainSettings

# Tokens of a profile: ratios of the popular experts settle within a few thousand.
_TOKENS = 8_192


def as_before(kt: KTConfig, folder: Path) -> tuple[KTConfig, list[str]]:
    """The experts' settings of a run that goes on, with what is to be said: as before, if nothing else is asked.

    All experts stay on the CPU where they were, and LoRA that was there beside experts on the GPU.

    Args:
        kt: The settings.
        folder: Of the checkpoint.

    Raises:
        KTAMXConfigError: The checkpoint's record is damaged.
    """
    recorded = read_run_placement(folder)
    if recorded and recorded.tiers.need_gpu and recorded.lora_layers == 0 and kt.kt_moe_lora_device == "auto":
        note = f"The experts' LoRA stays on the CPU, as in {folder}. kt_moe_lora_device: gpu moves it, moments and all."
        return replace(kt, kt_moe_lora_device="cpu"), [note]
    nothing_set = is_auto(kt) and kt.kt_expert_placement is None
    if not nothing_set or gpu.experts_device() is None or recorded is not None:
        return kt, []
    note = (
        f"{folder} was trained with all experts on the CPU, and they stay there. kt_expert_placement: auto streams "
        "them to the GPU, with the rounding of another device."
    )
    return replace(kt, kt_expert_placement="cpu"), [note]


def with_lora_as_before(budget: MemoryBudget, folder: Path) -> MemoryBudget:
    """The budget of a run that goes on: LoRA of no more layers on the GPU than in the checkpoint's run.

    Args:
        budget: Of the run.
        folder: Of the checkpoint.
    """
    recorded = read_run_placement(folder)
    return replace(budget, lora_layers=recorded.lora_layers or None) if recorded else budget


@dataclass
class ProfileRun:
    """Finds the placement of a run.

    Attributes:
        settings: The run's.
        sequences: Token ids of its first rows.
        console: Where progress is printed.
        resume: Folder of the checkpoint to resume from.
    """

    settings: TrainSettings
    sequences: Sequence[Sequence[int]]
    console: Console
    resume: Path | None = None

    def saved(self) -> Placement | None:
        """That of the checkpoint to resume from, or of the adapter to start from; None if there is none."""
        start = self.settings.run.adapter_name_or_path
        folder = self.resume or (Path(start) if start and Path(start).is_dir() else None)
        return read_placement(folder) if folder else None

    def profile(self, model: Any) -> Placement:
        """By the routers of `model`, still unpatched, over the first rows."""
        if self.console.is_terminal:
            self.console.print("Counting which experts the data use most")
        world = current_world()
        counts = count_experts(model, itertools.islice(self.batches(), world.rank, None, world.size))
        ranks = Ranks(world) if world.size > 1 else None  # each counts a part of the rows
        every = of_all_ranks(ranks, lambda: {str(layer): count.tolist() for layer, count in counts.items()})
        of_layer = {layer: torch.tensor([one[str(layer)] for one in every]) for layer in counts}
        return Placement.by_use({layer: count.sum(0) for layer, count in of_layer.items()})

    def batches(self) -> Iterator[Tensor]:
        """Token ids of the first rows, one row at a time, as long as training would see them.

        Raises:
            KTAMXConfigError: No row has any tokens.
        """
        longest = self.settings.trainer.get("max_length", 1024) or 1024
        left = _TOKENS
        for sequence in self.sequences:
            ids = sequence[: min(longest, left)]
            if len(ids):
                left -= len(ids)
                yield torch.tensor([list(ids)])
            if left <= 0:
                return
        if left == _TOKENS:
            raise KTAMXConfigError("Experts on the GPU: the first rows of the data have no tokens to count experts by.")
