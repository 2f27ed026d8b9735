"""How many layers of experts may stay on the GPU: learned from the memory that passes of the run took.

Pure: it is given readings and gives a number. More layers on the GPU are never slower, so the question is of memory
alone. A pass is a forward of the whole model with all that follows until the next one: its backward, the optimizer's
step, an evaluation's metrics. What a pass takes outside of the layers that stay is the same wherever experts are, so it
can be learned while all of them are streamed.

A kind of pass that has not been seen, or not to its end (an optimizer makes its state in its first step), gets all the
memory there is, and so does a longer pass than any seen: attention may take more than in proportion. A layer that is
computed at once takes more beside its weights than one that comes in chunks: until that has been seen, a bound of it is
left free.

Of training the passes between two steps of an optimizer belong together: the backward of one may come behind the
forward of another (DPO computes the policy, then the reference, then the policy's backward). A length counts as seen
when the optimizer has stepped behind such a pass, and layers come to the GPU behind a step alone.

Where ranks divide the experts, a device of each, all of them are asked with the readings of all, and so have one
answer: as many layers as the one with the least room can hold. More on another would bring nothing, for at every layer
all wait for the slowest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .passes import Length, Pass, Reading, Seen, Taken

# Of the memory that can be had: what libraries take beside the allocator, and what fragments differ by.
RESERVE = 0.04
# Layers come back only if there is this much room beyond the reserve, so that they do not come and go.
_SLACK = 0.01
_LOGITS_WIDTH = 14  # bytes of a logit and its loss (bf16, fp32 twice, a gradient): an evaluation may make all of them
_ANY = Length(2**62, 2**62)  # tokens, before the first pass


@dataclass
class _Open:
    """The pass that is under way, and those of its kind just before it."""

    now: Pass
    before: list[int]  # of each device
    held: int
    optimizer_steps: int


@dataclass
class _Cycle:
    """Passes since a step of the optimizer: the shortest one's tokens, and their peak.

    Attributes:
        held: Layers on the GPU in all of them; -1 before the first.
        length: Of the shortest.
        peak: Of all of them, without those layers; in bytes.
    """

    held: int
    length: Length
    peak: int = 0


class Controller:
    """Says how many layers may stay on the GPU while the next pass is computed.

    Args:
        layer_bytes: Of the weights of each layer, in the order in which they come to the GPU.
        vocabulary: Logits of a token.
        work: Bytes of a token that a layer on the GPU takes at most while it is computed.

    Attributes:
        held: Layers that stay on the GPU now.
        seen: What was learned, by kind of pass.
    """

    def __init__(self, layer_bytes: Sequence[int], vocabulary: int = 0, work: int = 0) -> None:
        self._bytes = [0, *itertools.accumulate(layer_bytes)]
        self._vocabulary, self._work = vocabulary, work
        self.held = 0
        self.seen: dict[str, Seen] = {}
        self._open: _Open | None = None
        self._cycle: _Cycle | None = None

    def forget(self) -> None:
        """What was learned is true no more: another adapter, another optimizer. Layers go with the next pass."""
        self.seen.clear()
        self._open = self._cycle = None

    def begins(self, now: Pass, *readings: Reading) -> tuple[int, bool]:
        """A pass begins.

        Args:
            now: The pass.
            readings: Of the memory; where ranks divide the experts, of each rank's, in rank order.

        Returns:
            How many layers may be held during it; and whether the caller is to reset the peak, after layers have been
            moved.
        """
        held_before = self._held_before(readings)
        before = [r.allocated - self._bytes[held] for r, held in zip(readings, held_before, strict=True)]
        steps = min(reading.optimizer_steps for reading in readings)
        self._learn(readings, steps)
        seen = self.seen.setdefault(now.kind, Seen(steps))
        held = min(self._allowed(now, *device, seen) for device in zip(before, readings, strict=True))
        last = self._open
        if last and last.now.kind == now.kind != "evaluation" and last.optimizer_steps == steps:
            held = min(held, self.held)
        taken = seen.held if held else seen.streamed
        known = seen.whole and now.length.within(taken.beyond.length)
        known = known and (taken.cycle.tokens > 0 or now.kind == "evaluation")
        same = last is not None and last.now.kind == now.kind and held == self.held
        self.held = held
        if last is not None and same and known:  # the peak goes on over passes of a kind
            last.before, last.optimizer_steps = list(map(max, last.before, before)), steps
            self._cycle = None
            return held, False
        self._open = _Open(now, before, held, steps)
        if self._cycle is not None and self._cycle.held != held:  # it begins, or is another's from here on
            self._cycle = _Cycle(held, _ANY) if self._cycle.held < 0 else None
        return held, True

    def _held_before(self, readings: Sequence[Reading]) -> list[int]:
        """Layers on each device until now, which may be fewer than were allowed: one may have had no room after all."""
        held = [self.held if reading.held is None else reading.held for reading in readings]
        if min(held) != self.held:
            self.moved(min(held))
        if min(held) != max(held):
            self.interrupted()
        return held

    def moved(self, held: int) -> None:
        """Fewer layers are held than were allowed: the device had no room after all."""
        self.held = held
        if self._open is not None:
            self._open.held = held

    def interrupted(self) -> None:
        """The pass under way ran out of memory: what it took says nothing of others."""
        self._open = self._cycle = None

    def _learn(self, readings: Sequence[Reading], steps: int) -> None:
        """What the pass took that has ended, and those of its kind before it, if layers were the same."""
        done = self._open
        if done is None:
            return
        seen, evaluation = self.seen[done.now.kind], done.now.kind == "evaluation"
        stepped = steps > done.optimizer_steps
        if not evaluation and done.optimizer_steps == seen.since:
            self._cycle = _Cycle(-1, _ANY) if stepped else None
            return
        taken, peaks = seen.held if done.held else seen.streamed, [r.peak - self._bytes[done.held] for r in readings]
        beyond = max(peak - before for peak, before in zip(peaks, done.before, strict=True))
        taken.beyond.learn(done.now.length if stepped or evaluation else Length(), beyond)
        if not evaluation:
            self._learn_cycle(done, max(peaks), taken, stepped)
        seen.before = max(seen.before, *done.before)
        seen.passes += 1
        # All passes between two steps of an optimizer have been seen, and what the second took.
        seen.whole = seen.whole or (seen.passes >= 2 if evaluation else steps - seen.since >= 2)

    def _learn_cycle(self, done: _Open, peak: int, taken: Taken, stepped: bool) -> None:
        cycle = self._cycle
        if cycle is not None and cycle.held == done.held:
            cycle.length, cycle.peak = cycle.length.shortest(done.now.length), max(cycle.peak, peak)
            if stepped:
                taken.cycle.learn(cycle.length, cycle.peak)
        if stepped:
            self._cycle = _Cycle(-1, _ANY)

    def _allowed(self, now: Pass, before: int, reading: Reading, seen: Seen) -> int:
        """How many layers one device has room for."""
        if not seen.whole:
            return 0
        room = (1 - RESERVE) * reading.limit - self._need(now, before, seen)
        fitting = sum(size <= room for size in self._bytes[1:])
        with_slack = sum(size <= room - _SLACK * reading.limit for size in self._bytes[1:])
        allowed = fitting if fitting < self.held else max(self.held, with_slack)
        return allowed if reading.most is None else min(allowed, reading.most)

    def _need(self, now: Pass, before: int, seen: Seen) -> float:
        """Bytes that a pass takes at its peak, outside of the layers that stay.

        It is reckoned for the longest pass seen, so that shorter ones move nothing.
        """
        longest = now.length.longest(seen.streamed.beyond.length).longest(seen.held.beyond.length)
        need = seen.need(longest, before, self._work)
        if now.kind == "evaluation":  # one that generates shows nothing of one that has a loss
            need = max(need, before + now.tokens * self._vocabulary * _LOGITS_WIDTH)
        return need

    def as_json(self) -> dict[str, Any]:
        """What was learned, for a checkpoint."""
        return {kind: asdict(seen) for kind, seen in self.seen.items()}
