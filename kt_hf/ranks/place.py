"""Where a rank is when it meets the others: what every exchange says of itself before anything is exchanged."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..errors import KTAMXBackwardError, KTAMXError, KTAMXForwardError

_GRADIENTS, _SYNCHRONIZED, _RECOMPUTED = 1, 2, 4


class Kind(enum.IntEnum):
    """What is exchanged."""

    TOKENS = 1  # the tokens of all ranks, before a layer's experts compute
    OUTPUTS = 2  # what each rank's experts gave, after they have
    GRADIENTS = 3  # the gradients of all ranks' outputs, before a layer's backward
    INPUT_GRADIENTS = 4  # what each rank's experts gave, after it
    OWNERS = 5  # fingerprints of owned LoRA, at the first step
    NORM = 6  # the gradients' norm
    SAVING = 7
    SAVED = 8
    LOAD = 9  # how often experts were used
    PLAN = 10  # what each rank has measured
    RUN = 11  # whether to stop, and how much was done
    REPLICAS = 12  # gradients of LoRA that ranks of several hosts own
    PASS = 13  # nothing: what DDP or FSDP2 exchange before a model's first layer comes next


_WORDS = {
    Kind.TOKENS: "the forward of layer {}",
    Kind.OUTPUTS: "the forward of layer {}, computed",
    Kind.GRADIENTS: "the backward of layer {}",
    Kind.INPUT_GRADIENTS: "the backward of layer {}, computed",
    Kind.OWNERS: "the first forward of layer {}",
    Kind.NORM: "the gradient norm",
    Kind.SAVING: "the beginning of a save",
    Kind.SAVED: "the end of a save",
    Kind.LOAD: "the count of used experts",
    Kind.PLAN: "the plan of the placement",
    Kind.RUN: "the end of a step of the run",
    Kind.REPLICAS: "the mean over hosts of the gradients of layer {}",
    Kind.PASS: "the beginning of a forward of the model",
}
_ERRORS: dict[Kind, type[KTAMXError]] = {
    Kind.OWNERS: KTAMXForwardError,
    Kind.PASS: KTAMXForwardError,
    Kind.TOKENS: KTAMXForwardError,
    Kind.OUTPUTS: KTAMXForwardError,
    Kind.GRADIENTS: KTAMXBackwardError,
    Kind.INPUT_GRADIENTS: KTAMXBackwardError,
}


@dataclass(frozen=True)
class Place:
    """Where a rank is: what must be the same on all ranks when they exchange something.

    Attributes:
        kind: What is exchanged.
        layer: Index of the layer; -1 for what is of no layer.
        step: Optimizer steps since the model was first computed.
        mode: Bits: whether gradients are on, whether this backward ends in DDP's exchange of gradients (the last
            micro-batch of a step), whether the forward is a recompute of checkpointing.
        dtype: A number for the hidden states' dtype.
        columns: Experts of a token, K.
        label: The layer's full name, for messages; not compared.
    """

    kind: Kind
    layer: int = -1
    step: int = 0
    mode: int = 0
    dtype: int = 0
    columns: int = 0
    label: str = ""

    @staticmethod
    def mode_of(gradients: bool, synchronized: bool, recomputed: bool) -> int:
        """The three bits of `mode`."""
        return _GRADIENTS * gradients + _SYNCHRONIZED * synchronized + _RECOMPUTED * recomputed

    @property
    def error(self) -> type[KTAMXError]:
        """The class of what is raised here."""
        return _ERRORS.get(self.kind, KTAMXError)

    @property
    def numbers(self) -> list[int]:
        """What is compared, as it is sent."""
        return [int(self.kind), self.layer, self.step, self.mode, self.dtype, self.columns]

    def __str__(self) -> str:
        return self.label or in_words(self.numbers)


def in_words(numbers: list[int]) -> str:
    """A place in words, from the numbers that a rank has sent."""
    kind, layer, step, mode, _, columns = numbers
    words = _WORDS[Kind(kind)].format(layer)
    if kind not in _ERRORS:
        return words
    parts = [f"step {step}", "with gradients" if mode & _GRADIENTS else "without gradients"]
    if mode & _GRADIENTS:
        parts.append("the step's last micro-batch" if mode & _SYNCHRONIZED else "not the step's last micro-batch")
    if mode & _RECOMPUTED:
        parts.append("recomputed")
    if columns:
        parts.append(f"{columns} experts a token")
    return f"{words} ({', '.join(parts)})"


def recomputed_by_some(places: list[list[int]]) -> bool:
    """Whether ranks are in the backward of one layer, which some have begun and others compute again for it."""
    kinds = {Kind(kind) for kind, *_ in places}
    return kinds == {Kind.TOKENS, Kind.GRADIENTS} and all(
        layer == places[0][1] and (kind == Kind.GRADIENTS or mode & _RECOMPUTED) for kind, layer, _, mode, *_ in places
    )
