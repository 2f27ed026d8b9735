"""How many layers of experts may stay on the GPU: learned from the memory that passes of the run took.

Pure: it is given readings and gives a number. More layers on the GPU are never slower, so the question is of memory
alone. A pass is a forward of the whole model with all that follows until the next one: its backward, the optimizer's
step, an evaluation's metrics. What a pass takes outside of the layers that stay is the same wherever experts are, so it
can be learned while all of them are streamed.

A kind of pass that has not been seen, or not to its end (an optimizer makes its state in its first step), gets all the
memory there is. A longer pass than any seen is expected to take more in proportion.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

# Of the memory that can be allocated: what a caching allocator loses to fragments, and libraries take beside it.
RESERVE = 0.05
# Layers come back only if there is this much room beyond the reserve, so that they do not come and go.
_SLACK = 0.01
_LONGER = 1.1  # what a longer pass takes, by proportion, and a tenth more
_LOGITS_WIDTH = 14  # bytes of a logit and its loss (bf16, fp32 twice, a gradient): an evaluation may make all of them


@dataclass(frozen=True)
class Pass:
    """A forward of the whole model that begins.

    Attributes:
        gradients: Whether a backward may follow.
        training: Whether the model is in training mode; else it evaluates or generates.
        tokens: Of the forward.
    """

    gradients: bool
    training: bool
    tokens: int

    @property
    def kind(self) -> str:
        """Passes of a kind take memory by their tokens.

        In training mode gradients make no difference: a forward that checkpointing computes again may have none, and
        DPO's reference comes before the policy.
        """
        if self.training:
            return "training"
        return "gradients" if self.gradients else "evaluation"


@dataclass(frozen=True)
class Reading:
    """What a device's memory is like when a pass begins; all in bytes.

    Attributes:
        allocated: By tensors now, layers that stay on the GPU among them.
        peak: The most of it since the last reset.
        limit: What could be allocated in all.
        optimizer_steps: Steps of any optimizer so far.
    """

    allocated: int
    peak: int
    limit: int
    optimizer_steps: int


@dataclass
class Seen:
    """What passes of a kind took outside of the layers that stay; in bytes.

    Attributes:
        since: Steps of optimizers before the first pass.
        tokens: Of the longest pass.
        passes: How many were seen, the first ones aside: an optimizer makes its state in its first step.
        peak: The most that was allocated.
        most_before: The most that was allocated when such a pass began.
        least_before: The least.
        whole: Whether passes have been seen with all that follows them.
    """

    since: int
    tokens: int = 0
    passes: int = 0
    peak: int = 0
    most_before: int = 0
    least_before: int = 0
    whole: bool = False


@dataclass
class _Open:
    """The pass that is under way, and those of its kind just before it."""

    now: Pass
    before: int
    held: int
    optimizer_steps: int


class Controller:
    """Says how many layers may stay on the GPU while the next pass is computed.

    Args:
        layer_bytes: Of the weights of each layer, in the order in which they come to the GPU.
        vocabulary: Logits of a token.

    Attributes:
        held: Layers that stay on the GPU now.
        seen: What was learned, by kind of pass.
    """

    def __init__(self, layer_bytes: Sequence[int], vocabulary: int = 0) -> None:
        self._bytes = [0, *itertools.accumulate(layer_bytes)]
        self._vocabulary = vocabulary
        self.held = 0
        self.seen: dict[str, Seen] = {}
        self._open: _Open | None = None

    def forget(self) -> None:
        """What was learned is true no more: another adapter, another optimizer. Layers go with the next pass."""
        self.seen.clear()
        self._open = None

    def begins(self, now: Pass, reading: Reading) -> tuple[int, bool]:
        """A pass begins.

        Args:
            now: The pass.
            reading: Of the memory.

        Returns:
            How many layers may be held during it; and whether the caller is to reset the peak, after layers have been
            moved.
        """
        before = reading.allocated - self._bytes[self.held]
        self._learn(reading)
        seen = self.seen.get(now.kind)
        held = self._allowed(now, before, reading, seen)
        same = self._open is not None and self._open.now.kind == now.kind and held == self.held
        fresh = not (same and seen is not None and seen.whole and now.tokens <= seen.tokens)
        if seen is None:
            self.seen[now.kind] = Seen(reading.optimizer_steps)
        self.held = held
        if fresh or self._open is None:
            self._open = _Open(now, before, held, reading.optimizer_steps)
        else:  # the peak goes on over passes of a kind
            self._open.before = max(self._open.before, before)
        return held, fresh

    def _learn(self, reading: Reading) -> None:
        """What the pass took that has ended, and those of its kind before it, if layers were the same."""
        done = self._open
        if done is None:
            return
        seen, evaluation = self.seen[done.now.kind], done.now.kind == "evaluation"
        if not evaluation and done.optimizer_steps == seen.since:
            return
        seen.tokens = max(seen.tokens, done.now.tokens)
        seen.peak = max(seen.peak, reading.peak - self._bytes[done.held])
        seen.most_before = max(seen.most_before, done.before)
        seen.least_before = min(seen.least_before, done.before) if seen.passes else done.before
        seen.passes += 1
        # All passes between two steps of an optimizer have been seen, and what the second took.
        stepped = reading.optimizer_steps - seen.since >= 2
        seen.whole = seen.whole or (seen.passes >= 2 if evaluation else stepped)

    def _allowed(self, now: Pass, before: int, reading: Reading, seen: Seen | None) -> int:
        if seen is None or not seen.whole:
            return 0
        room = int((1 - RESERVE) * reading.limit) - self.need(now, before, seen)
        fitting = sum(size <= room for size in self._bytes[1:])
        with_slack = sum(size <= room - int(_SLACK * reading.limit) for size in self._bytes[1:])
        return fitting if fitting < self.held else max(self.held, with_slack)

    def need(self, now: Pass, before: int, seen: Seen) -> int:
        """Bytes that a pass is expected to take at its peak, outside of the layers that stay.

        Args:
            now: The pass.
            before: Bytes that are allocated when it begins, outside of these layers.
            seen: What passes of its kind took.
        """
        longer = now.tokens / max(seen.tokens, 1)
        above = (seen.peak - seen.least_before) * (longer * _LONGER if longer > 1 else 1)
        need = int(seen.least_before + above) + max(0, before - seen.most_before)
        if now.kind == "evaluation":  # one that generates shows nothing of one that has a loss
            need = max(need, before + now.tokens * self._vocabulary * _LOGITS_WIDTH)
        return need

    def as_json(self) -> dict[str, dict[str, int | bool]]:
        """What was learned, for a checkpoint."""
        return {kind: asdict(seen) for kind, seen in self.seen.items()}
