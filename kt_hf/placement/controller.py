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
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Of the memory that can be had: what libraries take beside the allocator, and what fragments differ by.
RESERVE = 0.04
# Layers come back only if there is this much room beyond the reserve, so that they do not come and go.
_SLACK = 0.01
_ANY = 2**62  # tokens, before the first pass
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
        so has DPO's reference.
        """
        if self.training:
            return "training"
        return "gradients" if self.gradients else "evaluation"


@dataclass(frozen=True)
class Reading:
    """What a device's memory is like when a pass begins; all in bytes.

    Attributes:
        allocated: By tensors now, layers that stay on the GPU among them.
        peak: The most that the allocator had taken since the last reset, fragments included.
        limit: What it could take in all.
        optimizer_steps: Steps of any optimizer so far.
    """

    allocated: int
    peak: int
    limit: int
    optimizer_steps: int


@dataclass
class Most:
    """The most that passes up to a length took.

    Attributes:
        tokens: Of the longest pass; 0 before the first.
        size: Bytes.
    """

    tokens: int = 0
    size: int = 0

    def learn(self, tokens: int, size: int) -> None:
        """A pass of so many tokens took so many bytes."""
        self.tokens, self.size = max(self.tokens, tokens), max(self.size, size)

    def expected(self, tokens: int) -> float:
        """What a pass of so many tokens takes at most; of one longer than any nothing is known."""
        return self.size if tokens <= self.tokens else math.inf


@dataclass
class Taken:
    """What passes took.

    Attributes:
        beyond: Of a pass, beyond what was allocated when it began.
        cycle: At the peak of all passes from one step of the optimizer to the next, by the shortest of them. Where
            batches are accumulated gradients are there when the later ones begin: this counts them once.
    """

    beyond: Most = field(default_factory=Most)
    cycle: Most = field(default_factory=Most)


@dataclass
class Seen:
    """What is known of passes of a kind.

    Attributes:
        since: Steps of optimizers before the first pass.
        passes: How many were seen, the first ones aside: an optimizer makes its state in its first step.
        before: The most that was allocated when such a pass began, outside of the layers that stay.
        streamed: What they took with all layers streamed.
        held: What they took with layers on the GPU, without the weights of these.
        whole: Whether passes have been seen with all that follows them.
    """

    since: int
    passes: int = 0
    before: int = 0
    streamed: Taken = field(default_factory=Taken)
    held: Taken = field(default_factory=Taken)
    whole: bool = False

    def need(self, tokens: int, before: int, work: int) -> float:
        """Bytes that a pass with layers on the GPU takes at its peak, without their weights.

        Args:
            tokens: Of the pass.
            before: Bytes that are allocated when it begins.
            work: A bound of what such a layer takes for a token.
        """

        def with_layers(streamed: Most, held: Most) -> float:
            least = streamed.size if tokens <= streamed.tokens else 0
            return max(least, min(held.expected(tokens), streamed.expected(tokens) + work * tokens))

        beyond = max(before, self.before) + with_layers(self.streamed.beyond, self.held.beyond)
        cycle = max(0, before - self.before) + with_layers(self.streamed.cycle, self.held.cycle)
        return min(beyond, cycle)


@dataclass
class _Open:
    """The pass that is under way, and those of its kind just before it."""

    now: Pass
    before: int
    held: int
    optimizer_steps: int


@dataclass
class _Cycle:
    """Passes since a step of the optimizer: the shortest one's tokens, and their peak.

    Attributes:
        held: Layers on the GPU in all of them; -1 before the first.
        tokens: Of the shortest.
        peak: Of all of them, without those layers; in bytes.
    """

    held: int
    tokens: int
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
        seen = self.seen.setdefault(now.kind, Seen(reading.optimizer_steps))
        held = self._allowed(now, before, reading, seen)
        last = self._open
        if last and last.now.kind == now.kind != "evaluation" and last.optimizer_steps == reading.optimizer_steps:
            held = min(held, self.held)
        taken = seen.held if held else seen.streamed
        known = seen.whole and now.tokens <= taken.beyond.tokens and (taken.cycle.tokens or now.kind == "evaluation")
        same = last is not None and last.now.kind == now.kind and held == self.held
        self.held = held
        if last is not None and same and known:  # the peak goes on over passes of a kind
            last.before, last.optimizer_steps = max(last.before, before), reading.optimizer_steps
            self._cycle = None
            return held, False
        self._open = _Open(now, before, held, reading.optimizer_steps)
        if self._cycle is not None and self._cycle.held != held:  # it begins, or is another's from here on
            self._cycle = _Cycle(held, _ANY) if self._cycle.held < 0 else None
        return held, True

    def moved(self, held: int) -> None:
        """Fewer layers are held than were allowed: the device had no room after all."""
        self.held = held
        if self._open is not None:
            self._open.held = held

    def interrupted(self) -> None:
        """The pass under way ran out of memory: what it took says nothing of others."""
        self._open = self._cycle = None

    def _learn(self, reading: Reading) -> None:
        """What the pass took that has ended, and those of its kind before it, if layers were the same."""
        done = self._open
        if done is None:
            return
        seen, evaluation = self.seen[done.now.kind], done.now.kind == "evaluation"
        stepped = reading.optimizer_steps > done.optimizer_steps
        if not evaluation and done.optimizer_steps == seen.since:
            self._cycle = _Cycle(-1, _ANY) if stepped else None
            return
        taken, peak = seen.held if done.held else seen.streamed, reading.peak - self._bytes[done.held]
        taken.beyond.learn(done.now.tokens if stepped or evaluation else 0, peak - done.before)
        if not evaluation:
            self._learn_cycle(done, peak, taken, stepped)
        seen.before = max(seen.before, done.before)
        seen.passes += 1
        # All passes between two steps of an optimizer have been seen, and what the second took.
        seen.whole = seen.whole or (seen.passes >= 2 if evaluation else reading.optimizer_steps - seen.since >= 2)

    def _learn_cycle(self, done: _Open, peak: int, taken: Taken, stepped: bool) -> None:
        cycle = self._cycle
        if cycle is not None and cycle.held == done.held:
            cycle.tokens, cycle.peak = min(cycle.tokens, done.now.tokens), max(cycle.peak, peak)
            if stepped:
                taken.cycle.learn(cycle.tokens, cycle.peak)
        if stepped:
            self._cycle = _Cycle(-1, _ANY)

    def _allowed(self, now: Pass, before: int, reading: Reading, seen: Seen) -> int:
        if not seen.whole:
            return 0
        room = (1 - RESERVE) * reading.limit - self._need(now, before, seen)
        fitting = sum(size <= room for size in self._bytes[1:])
        with_slack = sum(size <= room - _SLACK * reading.limit for size in self._bytes[1:])
        return fitting if fitting < self.held else max(self.held, with_slack)

    def _need(self, now: Pass, before: int, seen: Seen) -> float:
        """Bytes that a pass takes at its peak, outside of the layers that stay.

        It is reckoned for the longest pass seen, so that shorter ones move nothing.
        """
        longest = max(now.tokens, seen.streamed.beyond.tokens, seen.held.beyond.tokens)
        need = seen.need(longest, before, self._work)
        if now.kind == "evaluation":  # one that generates shows nothing of one that has a loss
            need = max(need, before + now.tokens * self._vocabulary * _LOGITS_WIDTH)
        return need

    def as_json(self) -> dict[str, Any]:
        """What was learned, for a checkpoint."""
        return {kind: asdict(seen) for kind, seen in self.seen.items()}
