"""Where ranks meet: a header that all of them compare.

In a layer the owners of its experts meet. Where every host has all experts, hosts meet where a pass of the model enters
the layers and where it leaves them; a host in which a rank has failed waits for the others there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import KTAMXError
from .channel import Channel, Losses
from .place import Kind, Place, in_words, recomputed_by_some
from .world import World

# Where a pass of the model enters its layers of experts or leaves them: in the first or in the last layer.
_EDGES = {Kind.TOKENS: min, Kind.OUTPUTS: max, Kind.GRADIENTS: max, Kind.INPUT_GRADIENTS: min}

_KEPT = " Or set kt_expert_activations to recompute: some have kept the layer's output, others compute it again."


class Meetings:
    """The processes that train a model whose experts are divided among them, and what they say of themselves.

    Process groups are made at the first exchange, by all ranks together, so that a model can be patched before
    torch.distributed is initialized.

    Args:
        world: The processes; more than one.
        divided: Among how many the experts are divided, those of a host: ranks 0 to `divided` - 1, and so on. None is
            among all.

    Attributes:
        owners: The ranks that divide the experts, of which this is one.
        replicas: The ranks that own the same experts as this one, one of each host.
        patient: Whether every meeting is waited for, so that ranks can go on after an error: where it is noticed
            later, others may be in an exchange of DDP's that never ends.
        lengths: Tokens of each owner in the layer where the latest pass entered; None before the first.
    """

    def __init__(self, world: World, divided: int | None = None) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size
        divided = divided or world.size
        first = world.rank - world.rank % divided
        self.owners = Channel(range(first, first + divided), world.rank, world.size)
        self.replicas = Channel(range(world.rank % divided, world.size, divided), world.rank, world.size)
        self._losses = Losses(world.rank, world.size, (self.owners, self.replicas))
        self.patient = False
        self.lengths: list[int] | None = None
        self._first_step: int | None = None
        self._pending: _Pending | None = None
        self._edges: dict[Kind, int] = {}

    def agree(self, place: Place, tokens: int = 0, failure: BaseException | None = None) -> list[int]:
        """Meet the other ranks: all must be in the same place, and none may have failed.

        In a layer these are the owners of its experts; ranks of other hosts learn of a failure where the pass leaves
        the layers.

        Args:
            place: Where this rank is.
            tokens: Of this rank, T.
            failure: Why this rank cannot go on, which the others are told.

        Returns:
            The owners' tokens.

        Raises:
            KTAMXError: Of `place.error`: another rank has failed, is in another place, has ended or stands still. A
                rank that gives `failure` gets no error of its own: it raises what it has.
        """
        rows: list[list[int]] = []
        if not self.settled(failure):
            return []
        with self._meeting(place, failure), self._losses.noticed(self.owners, place, failure):
            rows = self.owners.gathered(self._header(place, tokens, failure)).tolist()
            self._compare(self.owners, place, rows, failure)
        return [row[-1] for row in rows]

    def defers(self, place: Place, device: torch.device) -> bool:
        """Whether ranks go on from a meeting of owners before they know of each other: on GPUs, inside of a pass.

        To be asked once a meeting, on all ranks.

        Args:
            place: Where this rank is.
            device: Of what is exchanged.
        """
        inside = self._on_gpu(device) and self.owners.size > 1 and not self._is_edge(place)
        return inside and not self.patient

    def agree_later(
        self, place: Place, tokens: int = 0, failure: BaseException | None = None,
        judge: Callable[[list[int]], None] | None = None,
    ) -> bool:  # fmt: skip
        """As `agree`, where ranks `defer`: what the others say is looked at when ranks meet next, and raised there.

        Args:
            place: Where this rank is.
            tokens: Of this rank, T.
            failure: Why this rank cannot go on, which the others are told.
            judge: Looks at the owners' tokens, and may raise.

        Returns:
            Whether this rank has met the others here; false if it gives `failure`, and another has failed before.

        Raises:
            KTAMXError: Of the meeting before.
        """
        if not self.settled(failure):
            return False
        header = self._header(place, tokens, failure)
        with self._losses.noticed(self.owners, place, failure):
            self._pending = _Pending(place, header, *self.owners.begin_gathered(header), failure, judge)
        return True

    def settled(self, failure: BaseException | None = None) -> bool:
        """Look at the meeting that `agree_later` began, if one is open: false if a rank failed there.

        Args:
            failure: Why this rank cannot go on; without one, what another has said is raised.

        Raises:
            KTAMXError: Of that meeting's place.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        place, own = pending.place, pending.failure
        try:
            with self._meeting(place, own), self._losses.noticed(self.owners, place, own):
                pending.work.wait()
                rows = pending.received.tolist()
                self._compare(self.owners, place, rows, own)
                if pending.judge:
                    pending.judge([row[-1] for row in rows])
        except KTAMXError as error:
            (failure or error).__dict__["kt_told"] = True  # to all who met there, or of an earlier one
            if failure is None:
                raise
            return False
        return True

    @contextlib.contextmanager
    def _meeting(self, place: Place, failure: BaseException | None) -> Iterator[None]:
        """A meeting of owners, after which hosts meet: where a pass enters or leaves the layers, or a rank failed."""
        try:
            yield
        except KTAMXError as error:
            self._meet_hosts(place, _Told(str(error)))
            raise
        self._meet_hosts(place, failure)

    def _meet_hosts(self, place: Place, failure: BaseException | None) -> None:
        """Meet the replicas, which the owners have met already: `failure` is this rank's or one that it was told of.

        Raises:
            KTAMXError: As `agree` does, of another host.
        """
        if self.replicas.size == 1 or self._losses.words is not None:
            return
        if failure is None and (place.kind is Kind.GRADIENTS or not self._is_edge(place)):
            return
        edges, self._edges = self._edges, {}  # forgotten on all hosts where one has failed, for it may know fewer
        with self._losses.noticed(self.replicas, place, failure):
            rows = self.replicas.gathered(self._header(place, 0, failure)).tolist()
            self._compare(self.replicas, place, rows, failure)
        if failure is None:
            self._edges = edges

    def _is_edge(self, place: Place) -> bool:
        if place.kind not in _EDGES:
            return True
        edge = _EDGES[place.kind](place.layer, self._edges.get(place.kind, place.layer))
        self._edges[place.kind] = edge
        return edge == place.layer

    def _compare(self, channel: Channel, place: Place, rows: list[list[int]], failure: BaseException | None) -> None:
        """Look at the headers of a channel's members, as `agree` says."""
        failed = [member for member, row in enumerate(rows) if row[-2]]
        texts = channel.texts("" if failure is None else self._sentence(channel, place, failure)) if failed else []
        if failure is not None:
            return
        if failed:
            sentence = texts[failed[0]]
            if channel is self.owners:
                sentence = f"{place}: rank {channel.members[failed[0]]} has failed there: {sentence}"
            raise place.error(sentence)
        places = [row[:-2] for row in rows]
        if any(other != places[0] for other in places):
            raise self._apart(channel, place, places)

    def _sentence(self, channel: Channel, place: Place, failure: BaseException) -> str:
        """What this rank says of its failure, or of one that it was told of: to other hosts all of it."""
        text = f"{type(failure).__name__}: {failure}"
        if channel is self.owners:
            return text
        return str(failure) if isinstance(failure, _Told) else f"{place}: rank {self.rank} has failed there: {text}"

    def steps_since_first(self, steps: int) -> int:
        """Optimizer steps since this was first asked, of `steps` that the process has seen in all."""
        if self._first_step is None:
            self._first_step = steps
        return steps - self._first_step

    def _header(self, place: Place, tokens: int, failure: BaseException | None) -> Tensor:
        if failure is not None:
            failure.__dict__["kt_told"] = True  # to all, once this is sent
        return torch.tensor([*place.numbers, int(failure is not None), tokens], dtype=torch.int64, device="cpu")

    def _apart(self, channel: Channel, place: Place, places: list[list[int]]) -> KTAMXError:
        every = zip(channel.members, places, strict=True)
        where = "; ".join(f"rank {rank}: {in_words(numbers)}" for rank, numbers in every)
        return place.error(
            f"{place}: the ranks are in different places. {where}. Each must do the same number of forwards, backwards "
            "and saves, in one order: look for a batch more on one of them, or a forward that one of them alone does."
            + (_KEPT if recomputed_by_some(places) else "")
        )

    def loss_in_words(self, error: RuntimeError) -> str | None:
        """What is to be said of an error, if it is one of torch.distributed's because a rank has ended or is stuck.

        Args:
            error: Of an exchange that others have begun, DDP or accelerate.
        """
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return None
        where = f"rank {self.rank} waited in an exchange of DDP's or accelerate's"
        return self._losses.in_words(where, error, range(self.size))

    @staticmethod
    def _on_gpu(device: torch.device) -> bool:
        return device.type != "cpu"  # a method, for tests that have no GPU to put another in its place


def is_told(error: BaseException) -> bool:
    """Whether this error was told to the other ranks, or seen by all of them where they met."""
    return bool(getattr(error, "kt_told", False))


@dataclass
class _Pending:
    """A meeting whose answer nobody has looked at yet: what was sent, what comes, and what to wait for."""

    place: Place
    header: Tensor
    received: Tensor
    work: Any
    failure: BaseException | None
    judge: Callable[[list[int]], None] | None


class _Told(RuntimeError):
    """What another rank of the host has said, to be passed on to other hosts as it is."""
