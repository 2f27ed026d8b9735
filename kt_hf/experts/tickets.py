"""Tickets: what ties a forward to its backward, and the LoRA values it was computed with."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import SavedForward
from ..backends.finite_checks import DeferredChecks, magnitudes
from ..backends.transfer import to_device
from ..errors import KTAMXBackwardError

_ticket_numbers = itertools.count(1)
_OTHER = 0.1  # of the largest magnitude: kernels that do not repeat their bits differ by less, other tokens by more


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

    def alike(self, x: Tensor, ids: Tensor, weights: Tensor) -> bool:
        """Whether these inputs have the sizes and dtypes of those kept, and the output was not written to."""
        pairs = zip((self.ids, self.weights, self.x), (ids, weights, x), strict=True)
        same = all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
        return same and self.output._version == self._version

    def fits(self, x: Tensor, ids: Tensor, weights: Tensor) -> bool:
        """Whether these inputs are the same to the bit, and the output was not written to.

        Args:
            x: [T, H], in the backend's dtype, contiguous, on any device.
            ids: [T, K], as the model gives them.
            weights: [T, K], as the model gives them.
        """
        if not self.alike(x, ids, weights):
            return False
        kept, asked = (self.ids, self.weights, self.x), (ids.detach(), weights.detach(), x)
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
        first: Whether it came outside of a backward pass, in which a recompute of it is to be expected.
        retained: Its inputs and output, where they are kept for a recompute; of several ranks, this one's.
        gathering: Which exchange brought the inputs, by its number, where each of several ranks keeps its own.
        lengths: Tokens of each rank in it.
        rows: How many rows of its own a rank found in it (`Resumable.known_rows`), where it does not keep them.
    """

    def __init__(self, values: LoraValues, saved: SavedForward | None, ids: Tensor) -> None:
        self.number, self.first = next(_ticket_numbers), not in_backward()
        self.saved = saved
        self.ids = ids  # [T, K], -1 for no expert
        self.values: LoraValues | None = values
        self.retained: Retained | None = None
        self.gathering, self.lengths = -1, list[int]()
        self.rows: int | list[int] | None = None
        values.tickets.add(self)

    def release(self) -> None:
        """After the only backward: nothing needs the LoRA values or the saved tensors any more."""
        if self.values is not None:
            self.values.tickets.discard(self)
        self.values = self.saved = self.retained = None


class Known(NamedTuple):
    """A forward whose output was kept, found again by its recompute.

    Attributes:
        ticket: The forward's.
        sure: Whether it is the only one that is open: then other ranks, which have done the same, know it as well.
    """

    ticket: Ticket
    sure: bool


class Recomputes:
    """Recognizes the recomputes of one layer's forwards whose output was kept.

    A recompute has its forward's inputs. Which forward's that is, is plain where only one is open, which did not come
    in a backward itself: there others may come that are no recomputes, of a layer's second call. Then what is on a
    GPU is compared without a wait, and the answer looked at later, for the host would stand still in each layer.
    (Kernels that do not repeat their bits make small differences: output and gradients are those of the forward, as
    they should be.) Where several are open, it is the newest whose inputs are the same to the bit.

    Args:
        label: The layer's name, for messages.
        checks: Look at the answers.
    """

    def __init__(self, label: str, checks: DeferredChecks) -> None:
        self._label, self._checks = label, checks

    def find(self, tickets: Iterable[Ticket], x: Tensor, ids: Tensor, weights: Tensor) -> Known | None:
        """The forward that these inputs were given to before.

        Args:
            tickets: Of the layer's open forwards.
            x: [T, H], in the backend's dtype, contiguous, on any device.
            ids: [T, K], as the model gives them.
            weights: [T, K], as the model gives them.
        """
        newest = sorted((t for t in tickets if t.values is not None), key=lambda ticket: -ticket.number)
        kept = [(ticket, ticket.retained) for ticket in newest if ticket.retained is not None]
        alike = [(ticket, retained) for ticket, retained in kept if retained.alike(x, ids, weights)]
        only = len(newest) == len(alike) == 1 and newest[0].first
        if only and _on_gpu(x) and alike[0][1].x.device == x.device:
            ticket, retained = alike[0]
            judge = functools.partial(_judged_recompute, self._label)
            self._checks.add(judge, magnitudes(x - retained.x, x))
            return Known(ticket, True)
        return next((Known(ticket, False) for ticket, retained in alike if retained.fits(x, ids, weights)), None)


def _judged_recompute(label: str, found: Tensor) -> Exception | None:
    """The error of a recompute's hidden states, by how far they are from the forward's and how large they are."""
    apart, largest = found.tolist()
    if not apart > _OTHER * largest or not math.isfinite(apart + largest):
        return None
    return KTAMXBackwardError(
        f"{label}: a forward within backward got other inputs than the forward whose output was kept for its "
        "recompute. Set kt_expert_activations to recompute."
    )


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda  # a function, for tests that have no GPU to put another in its place
