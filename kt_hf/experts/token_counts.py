"""How many tokens each expert of a layer was trained with."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenCounts:
    """Counts tokens, on their device and without a wait for it.

    Args:
        experts: E.
        device: Of the ids that `add` gets.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self._tokens = 0
        self._counts = torch.zeros(experts + 1, dtype=torch.int64, device=device)  # first those of id -1, of no expert
        self._one = torch.ones((), dtype=torch.int64, device=device)

    def add(self, ids: Tensor) -> None:
        """Count the tokens of ids [T, K], int64, each in [0, E) or -1 for no expert."""
        self._tokens += ids.shape[0]
        numbers = ids.flatten() + 1
        if ids.device.type == "cpu":
            self._counts += torch.bincount(numbers, minlength=len(self._counts))
        else:  # bincount would wait
            self._counts.scatter_add_(0, numbers, self._one.expand(len(numbers)))

    def take(self) -> tuple[int, Tensor]:
        """Tokens since the last call, and how many of them each expert got: [E] int64 on the CPU. Waits for a GPU."""
        tokens, counts = self._tokens, self._counts[1:].to("cpu", copy=True)
        self._tokens = 0
        self._counts.zero_()
        return tokens, counts
