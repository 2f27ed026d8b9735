"""Tickets: what ties a forward to its backward, and the LoRA values it was computed with."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from ..backends import SavedForward
from ..backends.transfer import to_device

_ticket_numbers = itertools.count(1)


def in_backward() -> bool:
    """Whether this is called inside a backward pass: a forward then is the recompute of gradient checkpointing."""
    task = getattr(torch._C, "_current_graph_task_id", None)  # private; without it every forward counts as a first one
    return task is not None and task() != -1


def graph_is_kept() -> bool:
    """Whether the running backward was asked to keep its graph (retain_graph), for a second backward."""
    keep = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keep is None else bool(keep())


class LoraValues:
    """LoRA values that a backend holds or held.

    Attributes:
        key: Tells these values from others.
        kept: A copy of the six tensors, made when they leave the backend while a ticket still needs them.
        tickets: The forwards that were computed with these values and may see a backward.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.kept: tuple[Tensor, ...] | None = None
        self.tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()


class Retained:
    """Inputs and output of a forward, to answer a recompute of the same.

    Args:
        x: [T, H], in the backend's dtype and on its device, as the output is.
        ids: [T, K], as the model gave them.
        weights: [T, K], as the model gave them.
        output: [T, H].
    """

    def __init__(self, x: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> None:
        self.x, self.ids, self.weights = x, ids, weights
        # An alias, for the output itself leads back to the ticket. It shares the version: a write to it is noticed.
        self.output = output.detach()
        self._version = output._version

    def fits(self, x: Tensor, ids: Tensor, weights: Tensor) -> bool:
        """Whether these inputs are the same to the bit, and the output was not written to.

        Args:
            x: [T, H], in the backend's dtype, contiguous, on any device.
            ids: [T, K], as the model gives them.
            weights: [T, K], as the model gives them.
        """
        kept, asked = (self.ids, self.weights, self.x), (ids.detach(), weights.detach(), x)
        alike = all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(kept, asked, strict=True))
        if self.output._version != self._version or not alike:
            return False
        if x.is_cuda:  # compared there, with one wait
            pairs = [_bits(to_device(a, x.device), b) for a, b in zip(kept, asked, strict=True)]
            return bool(torch.stack([(a == b).all() for a, b in pairs]).all())
        return all(torch.equal(*_bits(to_device(a, b.device), b)) for a, b in zip(kept, asked, strict=True))


def _bits(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of a size and dtype as integers, which a CPU compares several times as fast as bf16."""
    a, b = a.contiguous(), b.contiguous()
    size = a.element_size()
    wide = 8 if all(t.nbytes % 8 == 0 and t.storage_offset() * size % 8 == 0 for t in (a, b)) else size
    dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wide]
    return a.view(-1).view(dtype), b.view(-1).view(dtype)


class Ticket:
    """One forward that may see a backward.

    Args:
        values: The LoRA values it was computed with.
        saved: What the backend saved of it; None if nothing.
        ids: [T, K] int64 on the backend's device, -1 for no expert.

    Attributes:
        number: Of this forward, unlike every other's.
        retained: Its inputs and output, where they are kept for a recompute; of several ranks, this one's.
        gathering: Which exchange brought the inputs, by its number, where each of several ranks keeps its own.
        lengths: Tokens of each rank in it.
    """

    def __init__(self, values: LoraValues, saved: SavedForward | None, ids: Tensor) -> None:
        self.number = next(_ticket_numbers)
        self.saved = saved
        self.ids = ids  # [T, K], -1 for no expert
        self.values: LoraValues | None = values
        self.retained: Retained | None = None
        self.gathering, self.lengths = -1, list[int]()
        values.tickets.add(self)

    def release(self) -> None:
        """After the only backward: nothing needs the LoRA values or the saved tensors any more."""
        if self.values is not None:
            self.values.tickets.discard(self)
        self.values = self.saved = self.retained = None
