"""Some of a run's processes that exchange tensors among themselves, and what is said when one of them is lost."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import KTAMXConfigError, KTAMXError
from .place import Place, in_words

_MESSAGE = 1024  # bytes of what a failing rank says to the others
_PATIENCE = 3.0  # seconds that ranks which lost another give each other to say that they are alive
_BEFORE_NCCL = datetime.timedelta(seconds=2 * _PATIENCE), datetime.timedelta(seconds=30)  # at least, at most
_ABSENT = "kt_hf/absent"
_CHANNELS: weakref.WeakSet[Channel] = weakref.WeakSet()  # those with a process group


@atexit.register
def _end_threads() -> None:
    """Before Python ends: gloo's threads, which may still have to let go tensors of the last exchange.

    That takes Python's lock, and a thread that asks for it once Python is ending ends the process by SIGABRT
    ("terminate called without an active exception"). Where a process group is closed its threads are waited for.
    """
    for channel in list(_CHANNELS):
        channel.close("the process ends")


class Channel:
    """A process group, made at the first exchange, which its members come to together.

    Args:
        members: Ranks of the run, in order.
        rank: Of this process, one of them.
        size: Processes of the run.

    Attributes:
        index: Of this process among the members.
        size: How many they are.
    """

    def __init__(self, members: Sequence[int], rank: int, size: int) -> None:
        self.members = list(members)
        self.index, self.size = self.members.index(rank), len(self.members)
        self._world = size
        self._groups: dict[str, Any] = {}
        self._closed: str | None = None

    def gathered(self, values: Tensor) -> Tensor:
        """The values of all members, [size, …]: `values` [...] on the CPU, of one shape and dtype on all."""
        values = values.detach().contiguous()
        if self.size == 1:
            return values[None]
        received = values.new_empty(self.size, *values.shape)
        dist.all_gather_into_tensor(received.view(-1), values.view(-1), group=self.group())
        return received

    def begin_gathered(self, values: Tensor) -> tuple[Tensor, Any]:
        """As `gathered`, and what to wait for before the answer is read; `values` must stay until then."""
        received = values.new_empty(self.size, *values.shape)
        work = dist.all_gather_into_tensor(received.view(-1), values.view(-1), group=self.group(), async_op=True)
        return received, work

    def texts(self, text: str) -> list[str]:
        """What each member says, cut off after some lines."""
        data = " ".join(text.split()).encode()[:_MESSAGE]
        sent = torch.zeros(_MESSAGE, dtype=torch.uint8, device="cpu")
        sent[: len(data)] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)]
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self.gathered(sent).tolist()]

    def gather(self, values: Tensor) -> list[Tensor] | None:
        """A tensor of each member, as `gathered`, on the first one; None on the others."""
        parts = [torch.empty_like(values) for _ in self.members] if self.index == 0 else None
        dist.gather(values, parts, dst=self.members[0], group=self.group())
        return parts

    def exchange(self, received: Tensor, sent: Tensor, out: list[int], into: list[int]) -> None:
        """Rows from each to each, of a CPU or of GPUs: `out[i]` of member i are received, `into[i]` sent to it."""
        dist.all_to_all_single(received, sent, out, into, group=self.group(sent.device.type))

    def spread(self, received: Tensor, rows: Tensor) -> None:
        """The rows of all members, of equally many each, to all: `received` [size x T, …] of `rows` [T, …]."""
        dist.all_gather_into_tensor(received, rows, group=self.group(rows.device.type))

    def summed(self, values: Tensor) -> Any:
        """Begin to sum the values of all members in place; what is returned is to be waited for."""
        return dist.all_reduce(values, group=self.group(values.device.type), async_op=True)

    def group(self, device: str = "cpu") -> Any:
        """The process group for tensors of a kind of device."""
        if self._closed is not None:
            raise RuntimeError(self._closed)
        if not (dist.is_available() and dist.is_initialized()):
            raise KTAMXConfigError(
                f"The experts are divided among {self._world} processes (WORLD_SIZE), which are not connected: "
                "torch.distributed.init_process_group, accelerate.Accelerator() or TrainingArguments connects them."
            )
        if dist.get_world_size() != self._world:
            raise KTAMXConfigError(
                f"The experts were divided among {self._world} processes, and torch.distributed has "
                f"{dist.get_world_size()} now: patch the model with the processes that will train it."
            )
        whole = self.size == self._world
        if device != "cpu" and whole:  # the one that DDP uses: what both launch is then in one order on every rank
            return None
        if device not in self._groups:
            _CHANNELS.add(self)
            if whole:
                self._groups[device] = dist.new_group(backend="gloo", timeout=_timeout())
            else:
                backend = "gloo" if device == "cpu" else "nccl"
                self._groups[device] = dist.new_group(
                    self.members, backend=backend, timeout=_timeout(), use_local_synchronization=True
                )
        return self._groups[device]

    def close(self, words: str) -> None:
        """Close the connections, from which members that wait for this process learn that somebody is gone.

        Args:
            words: What is said of every later exchange.
        """
        self._closed = words
        groups, self._groups = self._groups, {}
        for group in groups.values():
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)


class Losses:
    """What is said when another rank has ended or stands still, after which nothing can be exchanged.

    Args:
        rank: Of this process.
        size: Processes of the run.
        channels: That are closed then.
    """

    def __init__(self, rank: int, size: int, channels: Sequence[Channel]) -> None:
        self.rank, self.size = rank, size
        self._channels = channels
        self.words: str | None = None

    @contextlib.contextmanager
    def noticed(self, channel: Channel, place: Place | None, failure: BaseException | None = None) -> Iterator[None]:
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
                else f"rank {self.rank} waited in an exchange of values"
            )
            raise kind(self.in_words(where, error, channel.members)) from error

    def in_words(self, where: str, error: RuntimeError, members: Sequence[int]) -> str:
        """What there is to say of an exchange that failed; closes all channels.

        Args:
            where: Who waited in which exchange.
            error: Of torch.distributed.
            members: Ranks that took part in it.
        """
        if self.words is None:
            self.words = f"{where} for another rank, which has ended"
            for channel in self._channels:
                channel.close(self.words)
            traceback.clear_frames(error.__traceback__)  # which hold a group, and so its connections
            absent = self._absent(members)
            names = f"rank {', '.join(map(str, absent))}" if absent else "another rank"
            self.words = f"{where} for {names}, which has ended or stands still; its own output says why "
            self.words += f"({' '.join(str(error).split())[:200]})."
            for channel in self._channels:
                channel.close(self.words)
        return self.words

    def _absent(self, members: Sequence[int]) -> list[int]:
        """The ranks that do not say, within a moment, that they too have lost somebody.

        Where ranks are connected in several groups, one may wait for another that has lost a third: what those who
        waited for that one have found out is then at the store.
        """
        others, began = {rank for rank in members if rank != self.rank}, time.monotonic()
        with contextlib.suppress(Exception):  # the store is gone with the process that held it
            store: Any = dist.distributed_c10d._get_default_store()
            store.set(self._key(self.rank), "1")
            among_all = len(members) == self.size
            while others or not among_all:
                others = {rank for rank in others if not store.check([self._key(rank)])}
                if store.check([_ABSENT]):
                    return [int(rank) for rank in json.loads(bytes(store.get(_ABSENT)))]
                if time.monotonic() > began + _PATIENCE * (1 if others else 2):
                    break
                time.sleep(0.05)
            if others:
                store.set(_ABSENT, json.dumps(sorted(others)))
            return sorted(others)
        return [] if self.size > 2 else sorted(others)

    def _key(self, rank: int) -> str:
        return f"kt_hf/alive/{rank}"


def _timeout() -> datetime.timedelta:
    """How long the run's own group waits, as its `init_process_group` was told."""
    default = torch.distributed.constants.default_pg_timeout
    with contextlib.suppress(Exception):  # a backend without options
        group: Any = dist.group.WORLD
        timeout = group._get_backend(group._device_types[0]).options._timeout  # NCCL alone has none for the CPU
        if torch.device("cuda") not in group._device_types:
            return timeout
        # NCCL ends the process when an exchange of its own has waited so long: what there is to say comes before.
        return timeout - min(max(timeout / 4, _BEFORE_NCCL[0]), timeout / 2, _BEFORE_NCCL[1])
    return default
