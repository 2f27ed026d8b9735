"""What a rank measures of itself and of the others: exchanges, the bus, memory."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kt_hf.experts.holders import owned_lora


class Watch:
    """Seconds of the exchanges: of headers on the host, of rows on the GPU (or, without one, on the host).

    Attributes:
        on: Whether it watches; what it does takes some milliseconds of a step.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self._headers, self._rows = list[float](), list[float]()
        self.bytes = 0
        self._inside = False
        self._events: list[tuple[Any, Any]] = []

    def install(self) -> None:
        from kt_hf.ranks import Ranks
        from kt_hf.ranks.channel import Channel

        exchange, spread = Channel.exchange, Channel.spread

        def timed(meet: Any, begins: bool) -> Any:
            def timed_meeting(*args: Any, **kwargs: Any) -> Any:
                if not self.on or self._inside:  # a meeting looks at the one before
                    return meet(*args, **kwargs)
                begin, self._inside = time.perf_counter(), True
                try:
                    return meet(*args, **kwargs)
                finally:
                    self._inside = False
                    seconds = time.perf_counter() - begin
                    if begins:
                        self._headers.append(seconds)
                    elif self._headers:  # of the meeting that began last; one rank may look more often than another
                        self._headers[-1] += seconds

            return timed_meeting

        def of_rows(send: Any) -> Any:
            def timed_exchange(
                channel: Any, received: torch.Tensor, sent: torch.Tensor, *rest: Any, **how: Any
            ) -> None:  # fmt: skip
                if not self.on:
                    return send(channel, received, sent, *rest, **how)
                self.bytes += received.nbytes
                if not sent.is_cuda:
                    begin = time.perf_counter()
                    send(channel, received, sent, *rest, **how)
                    self._rows.append(time.perf_counter() - begin)
                    return
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
                send(channel, received, sent, *rest, **how)
                events[1].record()
                self._events.append(events)

            return timed_exchange

        for name in ("agree", "agree_later", "settled"):
            setattr(Ranks, name, timed(getattr(Ranks, name), begins=name != "settled"))
        Channel.exchange, Channel.spread = of_rows(exchange), of_rows(spread)  # type: ignore[method-assign]

    def take(self) -> tuple[float, float, float, int]:
        """Headers' seconds, rows' seconds, both without waiting, and bytes received since the last call.

        The rank that comes last to an exchange does not wait: what it takes there is the exchange's own time. Of
        meetings, which ranks begin in one order, the same.
        """
        for begin, end in self._events:
            end.synchronize()
            self._rows.append(begin.elapsed_time(end) / 1000)
        alone = 0.0
        for mine in (self._headers, self._rows) if self.on else ():
            of_ranks = of_all(mine)
            assert len({len(times) for times in of_ranks}) == 1
            alone += sum(min(times) for times in zip(*of_ranks, strict=True))
        taken = sum(self._headers), sum(self._rows), alone, self.bytes
        self.__init__(self.on)  # type: ignore[misc]
        return taken


def of_all(value: Any) -> list[Any]:
    """What each rank has."""
    every = [value] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def bus_rate(device: torch.device) -> float:
    """GB/s from page-locked memory to this rank's GPU while all ranks copy; without a GPU from memory to memory."""
    gpu = device.type == "cuda"
    source = torch.empty((2**28 if gpu else 2**24) // 4, pin_memory=gpu)
    target = torch.empty_like(source, device=device)
    for count in (2, 20):  # the first warm up
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            target.copy_(source, non_blocking=True)
        if gpu:
            torch.cuda.synchronize()
    return count * source.nbytes / (time.perf_counter() - begin) / 1e9


def memory(gpu: bool) -> dict[str, Any]:
    """GB that each process has of the host at the end (shared pages counted once), and of its GPU at the peak."""
    host = psutil.Process().memory_full_info().pss / 1e9
    peak = torch.cuda.max_memory_reserved() / 1e9 if gpu else 0.0
    host_gb, gpu_gb = zip(*of_all((round(host, 2), round(peak, 2))), strict=True)
    return {"host_gb": list(host_gb), "host_gb_in_all": round(sum(host_gb), 2), "gpu_gb": list(gpu_gb)}


def dense_gb(model: Any) -> float:
    """GB that this rank has on its device of what is not experts."""
    owned = {id(holder.weight) for holder in owned_lora(model)}
    rest = [p for p in model.parameters() if id(p) not in owned]
    return round(sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in rest) / 1e9, 3)
