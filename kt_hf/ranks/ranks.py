"""How the ranks of a run talk: a header that all of them compare, and rows that go from each to each.

No exchange is without a header. Where ranks may have come by different ways, it goes ahead with the number of each
rank's tokens (`agree`): rows of unlike sizes, which is what ranks in different places send, end in a hang or in
garbage, while headers of one size can always be compared. Where all have come from one such header by one way, sizes
are known and the header rides in the rows' own buffer (`rows_to_owners`); but not on a GPU, which somebody would have
to wait for to read it (106 us over gloo between two processes of a host).
"""

from __future__ import annotations

import contextlib
import datetime
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError
from .place import Place, in_words
from .world import World

_HEADER = 8
_MESSAGE = 1024  # bytes of a failing rank's error that the others are told
_PATIENCE = 3.0  # seconds that ranks which lost another give each other to say that they are alive


class Ranks:
    """The processes that a model's experts are divided among.

    Process groups are made at the first exchange, by all ranks together, so that a model can be patched before
    torch.distributed is initialized.

    Args:
        world: The processes; more than one.

    Attributes:
        gathered: Whether a save is under way, for which LoRA was gathered.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size
        self.gathered = False
        self._group: Any = None
        self._lost: str | None = None  # what was said when another rank was lost, after which nothing can be exchanged
        self._first_step: int | None = None

    def agree(self, place: Place, tokens: int = 0, failure: BaseException | None = None) -> list[int]:
        """Meet the other ranks: all must be in the same place, and none may have failed.

        Args:
            place: Where this rank is.
            tokens: Of this rank, T.
            failure: Why this rank cannot go on, which the others are told.

        Returns:
            Each rank's tokens.

        Raises:
            KTAMXError: Of `place.error`: another rank has failed, is in another place, has ended or stands still. A
                rank that gives `failure` gets no error of its own: it raises what it has.
        """
        if failure is not None:
            failure.__dict__["kt_told"] = True
        rows: list[list[int]] = []
        with self._noticing_loss(place, failure):
            received = torch.empty(self.size * _HEADER, dtype=torch.int64, device="cpu")
            dist.all_gather_into_tensor(received, self._header(place, tokens, failure), group=self.group)
            rows = received.view(self.size, _HEADER).tolist()
            self._compare(place, rows, failure)
        return [row[-1] for row in rows]

    @contextlib.contextmanager
    def _noticing_loss(self, place: Place | None = None, failure: BaseException | None = None) -> Iterator[None]:
        """Say in words what torch.distributed raises when a rank is gone; a rank that has failed says its own."""
        try:
            yield
        except (KTAMXError, torch.OutOfMemoryError):  # which may be RuntimeErrors too
            raise
        except RuntimeError as error:
            if failure is not None:
                return
            kind = KTAMXError if place is None else place.error
            where = (
                f"{place}: rank {self.rank} waited in {in_words(place.numbers)}"
                if place is not None
                else (f"rank {self.rank} waited in an exchange of values")
            )
            raise kind(self._told_of_loss(where, error)) from error

    def _compare(self, place: Place, rows: list[list[int]], failure: BaseException | None) -> None:
        """Look at the headers of all ranks, as `agree` says."""
        failed = [rank for rank, row in enumerate(rows) if row[-2]]
        messages = self._messages("" if failure is None else f"{type(failure).__name__}: {failure}") if failed else []
        if failure is not None:
            return
        if failed:
            raise place.error(f"{place}: rank {failed[0]} has failed there: {messages[failed[0]]}")
        places = [row[:-2] for row in rows]
        if any(other != places[0] for other in places):
            raise self._apart(place, places)

    def rows_to_all(self, rows: Tensor, lengths: Sequence[int], place: Place) -> Tensor:
        """The rows of all ranks, in rank order, on each of them, right after an `agree`.

        Args:
            rows: Of this rank, [lengths[rank], …].
            lengths: Rows of each rank, as all ranks know them.
            place: Where this rank is.

        Raises:
            KTAMXError: Of `place.error`: another rank has ended or stands still.
        """
        mine = rows.shape[0]
        sent = rows.contiguous().repeat(self.size, *([1] * (rows.dim() - 1)))
        received = rows.new_empty(sum(lengths), *rows.shape[1:])
        with self._noticing_loss(place):
            self._exchange(received, sent, list(lengths), [mine] * self.size)
        return received

    def rows_to_owners(
        self, rows: Tensor, lengths: Sequence[int], place: Place, failure: BaseException | None = None
    ) -> list[Tensor]:
        """What each rank has for this one's rows: N tensors [lengths[rank], B], in rank order; [] after a `failure`.

        All ranks must have met at an `agree`, and do nothing else since that another might not do. On the CPU the
        header then rides behind the rows for each rank.

        Args:
            rows: For the rows of all ranks, in rank order, [sum of lengths, B] uint8; of any values after a `failure`.
            lengths: Rows of each rank.
            place: Where this rank is.
            failure: Why this rank cannot go on, which the others are told.

        Raises:
            KTAMXError: As `agree` does.
        """
        mine, width = lengths[self.rank], rows.shape[1]
        if rows.device.type != "cpu":
            self.agree(place, failure=failure)
            if failure is not None:
                return []
            received = rows.new_empty(mine * self.size, width)
            with self._noticing_loss(place):
                self._exchange(received, rows.contiguous(), [mine] * self.size, list(lengths))
            return list(received.split(mine)) if mine else [received] * self.size
        header = self._header(place, 0, failure).view(torch.uint8)
        sent = torch.cat([part for r in rows.split(list(lengths)) for part in (r.reshape(-1), header)])
        into = [length * width + header.numel() for length in lengths]
        received = sent.new_empty(self.size, into[self.rank])
        with self._noticing_loss(place, failure):
            self._exchange(received.view(-1), sent, [into[self.rank]] * self.size, into)
            headers = received[:, mine * width :].contiguous().view(torch.int64)
            self._compare(place, headers.tolist(), failure)
        return [] if failure else list(received[:, : mine * width].view(self.size, mine, width))

    def all_values(self, values: Tensor) -> Tensor:
        """The values of all ranks, [N, …]: `values` [...] on the CPU, of one shape and dtype on all ranks."""
        received = values.new_empty(self.size * values.numel())
        with self._noticing_loss():
            dist.all_gather_into_tensor(received, values.detach().reshape(-1).contiguous(), group=self.group)
        return received.view(self.size, *values.shape)

    def gather(self, values: Tensor) -> list[Tensor] | None:
        """A tensor of each rank, of one shape and dtype, on the CPU of rank 0, in rank order; None on the others."""
        values = values.detach().cpu().contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)] if self.rank == 0 else None
        with self._noticing_loss():
            dist.gather(values, parts, dst=0, group=self.group)
        return parts

    def steps_since_first(self, steps: int) -> int:
        """Optimizer steps since this was first asked, of `steps` that the process has seen in all."""
        if self._first_step is None:
            self._first_step = steps
        return steps - self._first_step

    @property
    def group(self) -> Any:
        """The gloo group of all ranks, for headers and for tensors on the CPU."""
        if self._lost is not None:
            raise RuntimeError(self._lost)
        if self._group is None:
            if not (dist.is_available() and dist.is_initialized()):
                raise KTAMXConfigError(
                    f"The experts are divided among {self.size} processes (WORLD_SIZE), which are not connected: "
                    "torch.distributed.init_process_group, accelerate.Accelerator() or TrainingArguments connects them."
                )
            if dist.get_world_size() != self.size:
                raise KTAMXConfigError(
                    f"The experts were divided among {self.size} processes, and torch.distributed has "
                    f"{dist.get_world_size()} now: patch the model with the processes that will train it."
                )
            self._group = dist.new_group(backend="gloo", timeout=_timeout())
        return self._group

    def _header(self, place: Place, tokens: int, failure: BaseException | None) -> Tensor:
        return torch.tensor([*place.numbers, int(failure is not None), tokens], dtype=torch.int64, device="cpu")

    def _messages(self, text: str) -> list[str]:
        """What each rank says of its failure."""
        data = " ".join(text.split()).encode()[:_MESSAGE]
        sent = torch.zeros(_MESSAGE, dtype=torch.uint8, device="cpu")
        sent[: len(data)] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)]
        received = torch.empty(self.size * _MESSAGE, dtype=torch.uint8, device="cpu")
        dist.all_gather_into_tensor(received, sent, group=self.group)
        return [
            bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in received.view(self.size, _MESSAGE)
        ]

    def _exchange(self, received: Tensor, sent: Tensor, out: list[int], into: list[int]) -> None:
        # On a GPU by the group that DDP uses: what both launch is then in one order on every rank.
        group = self.group if sent.device.type == "cpu" else None
        dist.all_to_all_single(received, sent, out, into, group=group)

    def _apart(self, place: Place, places: list[list[int]]) -> Exception:
        where = "; ".join(f"rank {rank}: {in_words(numbers)}" for rank, numbers in enumerate(places))
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
        return self._told_of_loss(f"rank {self.rank} waited in an exchange of DDP's or accelerate's", error)

    def _told_of_loss(self, where: str, error: RuntimeError) -> str:
        if self._lost is None:
            # Neighbours that wait for this rank learn from the closed connection that somebody is gone.
            group, self._group = self._group, None
            self._lost = f"{where} for another rank, which has ended"
            with contextlib.suppress(Exception):
                if group is not None:  # None is every group
                    dist.destroy_process_group(group)
            del group
            traceback.clear_frames(error.__traceback__)  # which hold the group, and so its connections
            absent = self._absent()
            names = f"rank {', '.join(map(str, absent))}" if absent else "another rank"
            self._lost = f"{where} for {names}, which has ended or stands still; its own output says why "
            self._lost += f"({_line(error)})."
        return self._lost

    def _absent(self) -> list[int]:
        """The ranks that do not say, within a moment, that they too have lost somebody."""
        others = {rank for rank in range(self.size) if rank != self.rank}
        with contextlib.suppress(Exception):  # the store is gone with the process that held it
            store: Any = dist.distributed_c10d._get_default_store()
            store.set(self._key(self.rank), "1")
            until = time.monotonic() + _PATIENCE
            while others and time.monotonic() < until:
                others = {rank for rank in others if not store.check([self._key(rank)])}
                time.sleep(0.05)
            return sorted(others)
        return [] if self.size > 2 else sorted(others)

    def _key(self, rank: int) -> str:
        return f"kt_hf/alive/{rank}"


def _timeout() -> datetime.timedelta:
    """How long the run's own group waits, as its `init_process_group` was told."""
    default = torch.distributed.constants.default_pg_timeout
    with contextlib.suppress(Exception):  # a backend without options
        group: Any = dist.group.WORLD
        return group._get_backend(torch.device("cpu")).options._timeout
    return default


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
