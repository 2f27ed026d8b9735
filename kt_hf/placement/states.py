"""What a rank says of itself when a pass of the model begins, so that all decide by what all have said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ranks import Kind, Place, Ranks
from .passes import Pass, Reading


class State(NamedTuple):
    """A rank as a pass begins; whole numbers, to be sent.

    Attributes:
        tokens: Of the rank's forward.
        gradients: Whether a backward may follow.
        training: Whether the model is in training mode.
        is_turn: Whether the pass before on the rank's device was this model's.
        forgets: Whether what was learned is true no more there.
        interrupted: Whether the pass before ran out of memory there.
        allocated: As in `Reading`, in bytes.
        peak: As in `Reading`.
        limit: As in `Reading`.
        optimizer_steps: As in `Reading`.
        held: Layers on the device.
        most: As in `Reading`; -1 for None.
    """

    tokens: int
    gradients: int
    training: int
    is_turn: int
    forgets: int
    interrupted: int
    allocated: int
    peak: int
    limit: int
    optimizer_steps: int
    held: int
    most: int

    @property
    def reading(self) -> Reading:
        """Of the device's memory; of one that forgets nothing is left of the room that it once had."""
        most = None if self.most < 0 else self.most
        return Reading(self.allocated, self.peak, self.limit, self.optimizer_steps, self.held, most)


def states_of_all(ranks: Ranks | None, layer_idx: int, state: State) -> list[State]:
    """The states of all ranks, in rank order; in a run of one process, its own.

    Args:
        ranks: The processes; all of them call this at the same pass.
        layer_idx: Of the first layer that is moved, for messages.
        state: Of this rank.

    Raises:
        KTAMXError: Another rank has failed, has ended or is elsewhere.
    """
    if ranks is None:
        return [state]
    ranks.agree(Place(Kind.PLAN, layer_idx, mode=Place.mode_of(bool(state.gradients), False, False)))
    rows = ranks.all_values(torch.tensor(state, dtype=torch.int64, device="cpu"))
    return [State(*row) for row in rows.tolist()]


def joint_pass(states: Sequence[State], owners: int) -> Pass:
    """The pass that begins on all ranks.

    Args:
        states: Of all ranks.
        owners: How many of them, those of a host, gather their tokens.
    """
    tokens = [state.tokens for state in states]
    gradients, training = (any(state[i] for state in states) for i in (1, 2))
    gathered = max(sum(tokens[first : first + owners]) for first in range(0, len(tokens), owners))
    return Pass(gradients, training, max(tokens), gathered)
