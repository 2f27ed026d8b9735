"""How many tokens each expert gets: what the callback logs, and the heat map of a run is drawn from."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..experts.layer import KTExperts


def entropy(counts: Tensor) -> float:
    """How even a load is: the Shannon entropy of the experts' shares over that of an even load.

    Args:
        counts: [E] tokens of each expert.

    Returns:
        1 for an even load, 0 if one expert gets everything, NaN without tokens or with a single expert.
    """
    if len(counts) < 2 or not counts.any():
        return float("nan")
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum() / math.log(len(counts)))


@dataclass
class LoadLog:
    """What the experts of a run were given since the last log, and in all.

    Counted where gradients are computed, once a token and expert: evaluation, reference passes and the recompute of
    gradient checkpointing do not count.

    Attributes:
        total: Layer index -> [E] int64, tokens of each expert since the run began.
    """

    total: dict[int, Tensor] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)
    _stepped: float = 0.0  # when the last step ended

    def stepped(self) -> None:
        """A step of the optimizer has ended."""
        self._stepped = time.perf_counter()

    def set_aside(self) -> None:
        """Leave out the time since the last step: it was an evaluation's, or that of saving a checkpoint."""
        now = time.perf_counter()
        self._since += now - max(self._stepped, self._since)
        self._stepped = now

    def begin(self, layers: list[KTExperts]) -> None:
        """Forget what these layers counted before, and start the clock."""
        self.total = {}
        for layer in layers:
            layer.take_load()
        self._since = time.perf_counter()

    def collect(self, layers: list[KTExperts]) -> dict[str, float]:
        """Values to log of the time since the last call, {} if no gradient was computed in it.

        `tokens_per_second`: tokens through the first layer of experts (padding included) per second of the wall clock,
            evaluations and the saving of checkpoints left out.
        `expert_load_entropy`: `entropy`, the mean of the layers.
        `expert_load_max`: the busiest expert's tokens over an even share, the largest of the layers.
        `experts_without_tokens`: their number, over all layers.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        taken = [layer.take_load() for layer in layers]
        for layer, (_, counts) in zip(layers, taken, strict=True):
            self.total[layer.layer_idx] = self.total.get(layer.layer_idx, torch.zeros_like(counts)) + counts
        loads = [counts for _, counts in taken if counts.any()]
        if not loads:
            return {}
        return {
            "tokens_per_second": round(taken[0][0] / seconds, 1),
            "expert_load_entropy": round(sum(map(entropy, loads)) / len(loads), 4),
            "expert_load_max": round(max(float(c.max() * len(c) / c.sum()) for c in loads), 2),
            "experts_without_tokens": sum(int((c == 0).sum()) for c in loads),
        }
