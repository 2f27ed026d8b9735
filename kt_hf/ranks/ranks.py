"""How the ranks of a run talk: a header that all of them compare, and rows that go from each to each.

No exchange is without a header. Where ranks may have come by different ways, it goes ahead with the number of each
rank's tokens (`agree`): rows of unlike sizes, which is what ranks in different places send, end in a hang or in
garbage, while headers of one size can always be compared. Where all have come from one such header by one way, sizes
are known and the header rides in the rows' own buffer (`rows_to_owners`); but not on a GPU, which somebody would have
to wait for to read it (106 us over gloo between two processes of a host).

Where every host has all experts, the ranks of a host divide them (owners), and ranks of other hosts own the same ones
(replicas). Layers exchange among owners alone, so that hosts need not wait for each other in each. Hosts meet where a
pass enters the layers and where it leaves them; a host in which a rank has failed waits for the others there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import KTAMXError
from .channel import Channel, Losses
from .place import Kind, Place, in_words
from .world import World

_HEADER = 8
# Where a pass of the model enters its layers of experts or leaves them: in the first or in the last layer.
_EDGES = {Kind.TOKENS: min, Kind.OUTPUTS: max, Kind.INPUT_GRADIENTS: min}
_INSIDE = (*_EDGES, Kind.GRADIENTS)
_serials = itertools.count()


class Ranks:
    """The processes that train a model whose experts are divided among them.

    Process groups are made at the first exchange, by all ranks together, so that a model can be patched before
    torch.distributed is initialized.

    Args:
        world: The processes; more than one.
        divided: Among how many the experts are divided, those of a host: ranks 0 to `divided` - 1, and so on. None is
            among all.

    Attributes:
        owners: The ranks that divide the experts, of which this is one.
        replicas: The ranks that own the same experts as this one, one of each host.
        gathered: Whether a save is under way, for which LoRA was gathered.
        dense: Whole tensors of the parameters that are sharded otherwise, by their `id`, while a save is under way.
        serial: A number that the other processes have for this model too, if all make models in one order.
    """

    def __init__(self, world: World, divided: int | None = None) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size
        self.gathered, self.serial = False, next(_serials)
        self.dense: dict[int, Tensor] = {}
        divided = divided or world.size
        first = world.rank - world.rank % divided
        self.owners = Channel(range(first, first + divided), world.rank, world.size)
        self.replicas = Channel(range(world.rank % divided, world.size, divided), world.rank, world.size)
        self._losses = Losses(world.rank, world.size, (self.owners, self.replicas))
        self._first_step: int | None = None
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
        with self._meeting(place, failure), self._losses.noticed(self.owners, place, failure):
            rows = self.owners.gathered(self._header(place, tokens, failure)).tolist()
            self._compare(self.owners, place, rows, failure)
        return [row[-1] for row in rows]

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
        if self.replicas.size == 1 or self._losses.words is not None or (failure is None and not self._is_edge(place)):
            return
        edges, self._edges = self._edges, {}  # forgotten on all hosts where one has failed, for it may know fewer
        with self._losses.noticed(self.replicas, place, failure):
            rows = self.replicas.gathered(self._header(place, 0, failure)).tolist()
            self._compare(self.replicas, place, rows, failure)
        if failure is None:
            self._edges = edges

    def _is_edge(self, place: Place) -> bool:
        if place.kind not in _INSIDE:
            return True
        if place.kind not in _EDGES:
            return False
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

    def rows_to_all(self, rows: Tensor, lengths: Sequence[int], place: Place) -> Tensor:
        """The rows of all owners, in rank order, on each of them, right after an `agree`.

        Args:
            rows: Of this rank, [lengths[index], …].
            lengths: Rows of each owner, as all of them know them.
            place: Where this rank is.

        Raises:
            KTAMXError: Of `place.error`: another rank has ended or stands still.
        """
        mine, size = rows.shape[0], self.owners.size
        if size == 1:
            return rows
        sent = rows.contiguous().repeat(size, *([1] * (rows.dim() - 1)))
        received = rows.new_empty(sum(lengths), *rows.shape[1:])
        with self._losses.noticed(self.owners, place):
            self.owners.exchange(received, sent, list(lengths), [mine] * size)
        return received

    def rows_to_owners(
        self, rows: Tensor, lengths: Sequence[int], place: Place, failure: BaseException | None = None
    ) -> list[Tensor]:
        """What each owner has for this one's rows: N tensors [lengths[index], B], in rank order; [] after a `failure`.

        All must have met at an `agree`, and do nothing else since that another might not do. On the CPU the header
        then rides behind the rows for each rank.

        Args:
            rows: For the rows of all owners, in rank order, [sum of lengths, B] uint8; of any values after a `failure`.
            lengths: Rows of each owner.
            place: Where this rank is.
            failure: Why this rank cannot go on, which the others are told.

        Raises:
            KTAMXError: As `agree` does.
        """
        mine, width, size = lengths[self.owners.index], rows.shape[1], self.owners.size
        if rows.device.type != "cpu" or size == 1:
            self.agree(place, failure=failure)
            if failure is not None:
                return []
            if size == 1:
                return [rows]
            received = rows.new_empty(mine * size, width)
            with self._losses.noticed(self.owners, place):
                self.owners.exchange(received, rows.contiguous(), [mine] * size, list(lengths))
            return list(received.split(mine)) if mine else [received] * size
        header = self._header(place, 0, failure).view(torch.uint8)
        sent = torch.cat([part for r in rows.split(list(lengths)) for part in (r.reshape(-1), header)])
        into = [length * width + header.numel() for length in lengths]
        received = sent.new_empty(size, into[self.owners.index])
        with self._meeting(place, failure), self._losses.noticed(self.owners, place, failure):
            self.owners.exchange(received.view(-1), sent, [into[self.owners.index]] * size, into)
            headers = received[:, mine * width :].contiguous().view(torch.int64)
            self._compare(self.owners, place, headers.tolist(), failure)
        return [] if failure else list(received[:, : mine * width].view(size, mine, width))

    def all_values(self, values: Tensor) -> Tensor:
        """The values of all ranks, [size, …]: `values` [...] on the CPU, of one shape and dtype on all ranks."""
        with self._losses.noticed(self.owners, None):
            of_owners = self.owners.gathered(values)
        if self.replicas.size == 1:
            return of_owners
        with self._losses.noticed(self.replicas, None):
            return self.replicas.gathered(of_owners).flatten(0, 1)

    def owner_values(self, values: Tensor) -> Tensor:
        """The values of the owners, [N, …]; otherwise as `all_values`."""
        with self._losses.noticed(self.owners, None):
            return self.owners.gathered(values)

    def gather(self, values: Tensor) -> list[Tensor] | None:
        """A tensor of each owner, of one shape and dtype, on the CPU of rank 0, in rank order; None on the others."""
        if self.owners.members[0] != 0:
            return None
        with self._losses.noticed(self.owners, None):
            return self.owners.gather(values.detach().cpu().contiguous())

    def mean_of_replicas(self, values: Tensor, place: Place) -> PendingMean:
        """Begin to replace values, which all replicas have of one shape, by their mean over these."""
        with self._losses.noticed(self.replicas, place):
            return PendingMean(self, place, values, self.replicas.summed(values))

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


class _Told(RuntimeError):
    """What another rank of the host has said, to be passed on to other hosts as it is."""


class PendingMean:
    """A mean over replicas that is being computed.

    Args:
        ranks: The processes.
        place: Where they are.
        values: Summed in place.
        work: Of torch.distributed.
    """

    def __init__(self, ranks: Ranks, place: Place, values: Tensor, work: object) -> None:
        self._ranks, self._place, self._values, self._work = ranks, place, values, work

    def wait(self) -> Tensor:
        """The values, once they are the mean; of a GPU they are on their way.

        Raises:
            KTAMXError: Another rank has ended or stands still.
        """
        with self._ranks._losses.noticed(self._ranks.replicas, self._place):
            self._work.wait()  # type: ignore[attr-defined]
        return self._values.div_(self._ranks.replicas.size)
