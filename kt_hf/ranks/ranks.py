"""How the ranks of a run talk: a header that all of them compare, and rows that go from each to each.

No exchange is without a header. Where ranks may have come by different ways, it goes ahead with the number of each
rank's tokens (`agree`): rows of unlike sizes, which is what ranks in different places send, end in a hang or in
garbage, while headers of one size can always be compared. Where all have come from one such header by one way, sizes
are known and the header rides in the rows' own buffer (`rows_to_owners`). Not on a GPU, which somebody would have to
wait for to read it: inside of a pass the header goes beside the rows there, and is looked at when the ranks meet next
(`agree_later`), so that their hosts need not wait for each other five times a layer. Where a pass enters the layers or
leaves them it is waited for: what brings ranks to different places is seen before rows are sent.

Where every host has all experts, the ranks of a host divide them (owners), and ranks of other hosts own the same ones
(replicas). Layers exchange among owners alone, so that hosts need not wait for each other in each. Hosts meet where a
pass enters the layers and where it leaves them; a host in which a rank has failed waits for the others there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .meetings import Meetings
from .place import Place
from .world import World

_serials = itertools.count()


class Ranks(Meetings):
    """The processes that train a model whose experts are divided among them: what they exchange.

    Args:
        world: The processes; more than one.
        divided: Among how many the experts are divided, as `Meetings` has it.

    Attributes:
        gathered: Whether a save is under way, for which LoRA was gathered.
        dense: Whole tensors of the parameters that are sharded otherwise, by their `id`, while a save is under way.
        serial: A number that the other processes have for this model too, if all make models in one order.
    """

    def __init__(self, world: World, divided: int | None = None) -> None:
        super().__init__(world, divided)
        self.gathered, self.serial = False, next(_serials)
        self.dense: dict[int, Tensor] = {}

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
        received, rows = rows.new_empty(sum(lengths), *rows.shape[1:]), rows.contiguous()
        with self._losses.noticed(self.owners, place):
            if _alike(lengths):  # without a copy for each
                self.owners.spread(received, rows)
            else:
                sent = rows.repeat(size, *([1] * (rows.dim() - 1)))
                self.owners.exchange(received, sent, list(lengths), [mine] * size)
        return received

    def fail_to_all(self, like: Tensor, lengths: Sequence[int], place: Place, failure: BaseException) -> None:
        """Tell of a failure where ranks defer, which are about to call `rows_to_all`.

        Args:
            like: [0, B] uint8 on the device of the rows.
            lengths: Rows of each owner.
            place: Where this rank is.
            failure: Why it cannot go on.
        """
        mine, size = lengths[self.owners.index], self.owners.size
        if _alike(lengths):
            self._fail_later(like, (sum(lengths), mine), self.owners.spread, place, failure)
            return
        send = functools.partial(self.owners.exchange, out=list(lengths), into=[mine] * size)
        self._fail_later(like, (sum(lengths), mine * size), send, place, failure)

    def rows_to_owners(
        self, rows: Tensor, lengths: Sequence[int], place: Place, failure: BaseException | None = None
    ) -> Tensor | None:
        """What each owner has for this one's rows: [N, lengths[index], B], in rank order; None after a `failure`.

        All must have met at an `agree`, and do nothing else since that another might not do. On the CPU the header
        then rides behind the rows for each rank.

        Args:
            rows: For the rows of all owners, in rank order, [sum of lengths, B] uint8; after a `failure` [0, B].
            lengths: Rows of each owner.
            place: Where this rank is.
            failure: Why this rank cannot go on, which the others are told.

        Raises:
            KTAMXError: As `agree` does.
        """
        mine, width, size = lengths[self.owners.index], rows.shape[1], self.owners.size
        if size == 1:
            self.agree(place, failure=failure)
            return None if failure else rows[None]
        if self._on_gpu(rows.device):
            return self._beside_header(rows, lengths, place, failure)
        if not self.settled(failure):
            return None
        if failure is not None:
            rows = rows.new_zeros(sum(lengths), width)
        header = self._header(place, 0, failure).view(torch.uint8)
        sent = torch.cat([part for r in rows.split(list(lengths)) for part in (r.reshape(-1), header)])
        into = [length * width + header.numel() for length in lengths]
        received = sent.new_empty(size, into[self.owners.index])
        with self._meeting(place, failure), self._losses.noticed(self.owners, place, failure):
            self.owners.exchange(received.view(-1), sent, [into[self.owners.index]] * size, into)
            headers = received[:, mine * width :].contiguous().view(torch.int64)
            self._compare(self.owners, place, headers.tolist(), failure)
        return None if failure else received[:, : mine * width].reshape(size, mine, width)

    def _beside_header(
        self, rows: Tensor, lengths: Sequence[int], place: Place, failure: BaseException | None
    ) -> Tensor | None:
        """`rows_to_owners` on GPUs."""
        mine, size = lengths[self.owners.index], self.owners.size
        if self.defers(place, rows.device):
            if failure is not None:
                send = functools.partial(self.owners.exchange, out=[mine] * size, into=list(lengths))
                self._fail_later(rows, (mine * size, sum(lengths)), send, place, failure)
                return None
            self.agree_later(place)
        else:
            self.agree(place, failure=failure)
            if failure is not None:
                return None
        received = rows.new_empty(mine * size, rows.shape[1])
        with self._losses.noticed(self.owners, place):
            self.owners.exchange(received, rows.contiguous(), [mine] * size, list(lengths))
        return received.view(size, mine, rows.shape[1])

    def _fail_later(
        self, like: Tensor, counts: tuple[int, int], send: Callable[[Tensor, Tensor], None], place: Place,
        failure: BaseException,
    ) -> None:  # fmt: skip
        """Tell of a failure where ranks defer, and send rows of zeros, if there is memory: the others have begun to.

        Args:
            like: [0, B] on the device of the rows.
            counts: How many rows would be received, and how many sent.
            send: Exchanges them, given both.
            place: Where this rank is.
            failure: Why it cannot go on.
        """
        if not self.agree_later(place, failure=failure):
            return
        traceback.clear_frames(failure.__traceback__)  # what its computation held
        rows = _empty_rows(like, sum(counts))
        if rows is not None:
            with self._losses.noticed(self.owners, place, failure):
                send(*rows.split(counts))
        self.settled()

    def all_values(self, values: Tensor) -> Tensor:
        """The values of all ranks, [size, …]: `values` [...] on the CPU, of one shape and dtype on all ranks."""
        self.settled()
        with self._losses.noticed(self.owners, None):
            of_owners = self.owners.gathered(values)
        if self.replicas.size == 1:
            return of_owners
        with self._losses.noticed(self.replicas, None):
            return self.replicas.gathered(of_owners).flatten(0, 1)

    def owner_values(self, values: Tensor) -> Tensor:
        """The values of the owners, [N, …]; otherwise as `all_values`."""
        self.settled()
        with self._losses.noticed(self.owners, None):
            return self.owners.gathered(values)

    def gather(self, values: Tensor) -> list[Tensor] | None:
        """A tensor of each owner, of one shape and dtype, on the CPU of rank 0, in rank order; None on the others."""
        if self.owners.members[0] != 0:
            return None
        self.settled()
        with self._losses.noticed(self.owners, None):
            return self.owners.gather(values.detach().cpu().contiguous())

    def mean_of_replicas(self, values: Tensor, place: Place) -> PendingMean:
        """Begin to replace values, which all replicas have of one shape, by their mean over these."""
        with self._losses.noticed(self.replicas, place):
            return PendingMean(self, place, values, self.replicas.summed(values))


def _alike(lengths: Sequence[int]) -> bool:
    """Whether all ranks have equally many rows, and any."""
    return len(set(lengths)) == 1 and lengths[0] > 0


def _empty_rows(like: Tensor, count: int) -> Tensor | None:
    """Rows of zeros, to be computed with; None if there is no memory, even after what is cached was given back."""
    for free in (lambda: None, torch.cuda.empty_cache):
        free()
        with contextlib.suppress(torch.OutOfMemoryError):
            return like.new_zeros(count, like.shape[1])
    return None


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
