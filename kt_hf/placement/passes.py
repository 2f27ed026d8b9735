"""Passes of a model, what a device's memory is like when one begins, and what is known of those that were seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple


class Length(NamedTuple):
    """Tokens of a pass, by which it takes memory: a layer's experts take it by those of all ranks, the rest does not.

    Attributes:
        tokens: Of the forward; where there are several ranks, the most that one of them has.
        gathered: Of the forwards of all ranks that divide the experts.
    """

    tokens: int = 0
    gathered: int = 0

    def within(self, other: Length) -> bool:
        """Whether neither is more than in `other`."""
        return self.tokens <= other.tokens and self.gathered <= other.gathered

    def longest(self, other: Length) -> Length:
        """The more of both."""
        return Length(max(self.tokens, other.tokens), max(self.gathered, other.gathered))

    def shortest(self, other: Length) -> Length:
        """The less of both."""
        return Length(min(self.tokens, other.tokens), min(self.gathered, other.gathered))


@dataclass(frozen=True)
class Pass:
    """A forward of the whole model that begins.

    Attributes:
        gradients: Whether a backward may follow.
        training: Whether the model is in training mode; else it evaluates or generates.
        tokens: Of the forward; where there are several ranks, the most that one of them has.
        gathered: Tokens of all ranks that divide the experts, of the host that has most; None if there is one.
    """

    gradients: bool
    training: bool
    tokens: int
    gathered: int | None = None

    @property
    def length(self) -> Length:
        """Both numbers of tokens."""
        return Length(self.tokens, self.tokens if self.gathered is None else self.gathered)

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
        held: Layers that are on the device; None if they are those that the controller has said.
        most: Layers that it had room for when it had none for more; None if that was never so.
    """

    allocated: int
    peak: int
    limit: int
    optimizer_steps: int
    held: int | None = None
    most: int | None = None


@dataclass
class Most:
    """The most that passes up to a length took.

    Attributes:
        tokens: Of the longest pass; 0 before the first.
        size: Bytes.
        gathered: Of all ranks' tokens, those of the pass that had most.
    """

    tokens: int = 0
    size: int = 0
    gathered: int = 0

    @property
    def length(self) -> Length:
        """Both numbers of tokens."""
        return Length(self.tokens, self.gathered)

    def learn(self, length: Length, size: int) -> None:
        """A pass of so many tokens took so many bytes."""
        (self.tokens, self.gathered), self.size = self.length.longest(length), max(self.size, size)

    def expected(self, length: Length) -> float:
        """What a pass of so many tokens takes at most; of one longer than any nothing is known."""
        return self.size if length.within(self.length) else math.inf


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

    def need(self, length: Length, before: int, work: int) -> float:
        """Bytes that a pass with layers on the GPU takes at its peak, without their weights.

        Args:
            length: Of the pass.
            before: Bytes that are allocated when it begins.
            work: A bound of what such a layer takes for a token.
        """

        def with_layers(streamed: Most, held: Most) -> float:
            least = streamed.size if length.within(streamed.length) else 0
            return max(least, min(held.expected(length), streamed.expected(length) + work * length.gathered))

        beyond = max(before, self.before) + with_layers(self.streamed.beyond, self.held.beyond)
        cycle = max(0, before - self.before) + with_layers(self.streamed.cycle, self.held.cycle)
        return min(beyond, cycle)
