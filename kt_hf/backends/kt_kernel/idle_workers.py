"""Parks kt-kernel's spinning workers on one core between calls, so that PyTorch's threads can use the others.

kt-kernel pins each worker to a core and lets it spin there for 50 ms after a call. GNU OpenMP lets PyTorch's threads
spin too, after each parallel loop. Where the rest of the model is on the CPU, either waits for the other's cores while
nobody computes there. A step of two DeepSeek-V2-Lite layers with 512 tokens on 16 AMX cores took 0.5 s with one thread
of PyTorch's and 0.6 with 16; 0.37 with eight that sleep after a loop, and 0.22 with 15, the workers being aside.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...system.cpu import affinity
from ...system.threads import torch_threads

logger = logging.getLogger(__name__)

# Calls until the way that was measured as worse is tried again: leaving the workers on their cores, and parking them.
# To leave them costs loops that wait for cores, to park them costs little.
_STAY_AGAIN, _MOVE_AGAIN = 256, 16
# A gap counts as at most this many times the one recorded before: an evaluation or a checkpoint may fall into one.
_LONGER = 1.25
_LOOP = 32768  # elements: PyTorch gives a thread of a loop no fewer
_TASKS = Path("/proc/self/task")


@dataclass
class CallGap:
    """Measured seconds between a call and whatever call of the operators comes next.

    Attributes:
        on_cores: Seconds with each worker on a core; NaN until measured.
        aside: Seconds with the workers parked on one core; NaN until measured.
        calls: Number of calls so far.
    """

    on_cores: float = math.nan
    aside: float = math.nan
    calls: int = 0

    def took(self, seconds: float, aside: bool) -> None:
        """Record a gap of `seconds` that has ended, with the workers `aside` or on their cores."""
        if aside:
            self.aside = min(seconds, _LONGER * self.aside) if self.aside > 0 else seconds
        else:
            self.on_cores = min(seconds, _LONGER * self.on_cores) if self.on_cores > 0 else seconds

    def worth(self, moves: float) -> bool:
        """Whether to park the workers after this call; to park them and move them back takes `moves` seconds."""
        self.calls += 1
        if math.isnan(self.on_cores) or self.on_cores < moves:
            return False
        if math.isnan(self.aside):
            return True
        if self.aside + moves < self.on_cores:
            return self.calls % _STAY_AGAIN != 0
        return self.calls % _MOVE_AGAIN == 0


class IdleWorkers:
    """The operators' worker threads, which share one core between calls where parking them saves time.

    Parking saves nothing where a GPU does the rest, where PyTorch has one thread only, and after a call that is
    followed by the next so soon that the moves take longer than they save, as measured. Priorities are no way: a
    process may not raise its own again, and a pinned thread of low priority gets nothing on a core that anything else
    computes on.

    Not thread-safe: the caller holds `kt_hf.backends.CALL_LOCK`.
    """

    def __init__(self) -> None:
        self._homes: dict[int, int] | None = None  # the core of each worker that has to move
        self._corner = -1  # the core of the one that has not
        self._away = False
        self._out = 0.0  # seconds that the last move to the corner took
        self._moves = math.inf  # there and back; the fastest, for it is not taken again while it seems too slow
        self._last: tuple[CallGap, float] | None = None
        self._team: SleepingTeam | None = None

    @contextlib.contextmanager
    def at_work(self, pauses: dict[str, CallGap], name: str) -> Iterator[None]:
        """Around a call of an operator.

        Args:
            pauses: The layer's gaps, by the name of the call before each; one is added for a name that is new.
            name: Name of the call.
        """
        self.gather()
        try:
            yield
        finally:
            if torch.get_num_threads() > 1 and not torch.cuda.is_initialized():
                if self._homes is None:
                    self._homes, self._corner = _pinned_workers()
                pause = pauses.setdefault(name, CallGap())
                if self._homes and pause.worth(self._moves if self._moves < math.inf else 0.0):
                    self._step_aside(self._homes)
                self._last = (pause, time.perf_counter())

    def gather(self) -> None:
        """Move each worker back to its core, before the workers are given any work."""
        if self._last is not None:
            pause, ended = self._last
            pause.took(time.perf_counter() - ended, self._away)
            self._last = None
        if not self._away or self._homes is None:
            return
        begin = time.perf_counter()
        for thread, core in list(self._homes.items()):
            try:
                os.sched_setaffinity(thread, {core})
            except OSError as error:  # the core was taken from this process meanwhile
                logger.warning("Core %d cannot be had any more (%s): its worker computes on any core.", core, error)
                del self._homes[thread]
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, affinity())
        self._away = False
        self._moves = min(self._moves, self._out + time.perf_counter() - begin)

    def end(self) -> None:
        """Let the sleeping OpenMP threads end, before the workers do."""
        if self._team is not None:
            self._team.end()

    def _step_aside(self, homes: dict[int, int]) -> None:
        if self._team is None:
            self._team = SleepingTeam()
        begin = time.perf_counter()
        self._away = True  # before the first is moved: an interruption must not leave some of them there
        try:
            for thread in homes:
                os.sched_setaffinity(thread, {self._corner})
        except OSError as error:
            self.gather()
            self._homes = {}
            logger.debug("The operators' workers stay on their cores between calls: %s", error)
        self._out = time.perf_counter() - begin


def _pinned_workers() -> tuple[dict[int, int], int]:
    """The workers that have to move, each with its core, and the core where all of them will be parked.

    The worker whose core that is has not to move and is left out. kt-kernel names its threads numa_0_m_0, numa_0_t_1,
    ... and pins them. Call this after a call of the operators, when all threads have begun.
    """
    cores_of: dict[int, int] = {}
    allowed = affinity()
    for thread in sorted(map(int, os.listdir(_TASKS))):
        with contextlib.suppress(OSError):  # it has ended
            if (_TASKS / str(thread) / "comm").read_text().startswith("numa_"):
                cores = os.sched_getaffinity(thread)
                if len(cores) == 1 and cores <= allowed:
                    cores_of[thread] = cores.pop()
    corner = next(iter(cores_of.values()), -1)
    logger.debug("Of the operators' workers %d have a core that PyTorch's threads can have.", len(cores_of))
    return {thread: core for thread, core in cores_of.items() if core != corner}, corner


class SleepingTeam:
    """A team of sleeping OpenMP threads, one a core, whose presence makes PyTorch's threads sleep after each loop.

    GNU OpenMP's threads spin for less than 0.1 ms instead of up to 76 ms where there are more of them than cores (its
    manual, under GOMP_SPINCOUNT). A setting in the environment would be read too early: when PyTorch is loaded.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        ready = threading.Event()
        threading.Thread(target=_hold, args=(ready, self._ended), name="kt_hf OpenMP", daemon=True).start()
        try:
            ready.wait()
        except BaseException:  # KeyboardInterrupt
            self.end()
            raise

    def end(self) -> None:
        """Let the threads end, without waiting for them: the garbage collector may call this anywhere."""
        self._ended.set()


def _hold(ready: threading.Event, ended: threading.Event) -> None:
    try:
        cores = len(affinity())
        with torch_threads(cores):  # set back afterwards: threads that start later begin with the number then set
            torch.zeros(cores * _LOOP, dtype=torch.uint8, device="cpu").add_(1)
    finally:
        ready.set()
    ended.wait()
