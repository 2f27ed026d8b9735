"""Who has the cores between two calls of the operators: their workers or PyTorch's threads.

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

logger = logging.getLogger(__name__)

# After so many calls the way that seemed worse is tried again. Staying costs loops that wait for cores, moving little.
_STAY_AGAIN, _MOVE_AGAIN = 256, 16
# A pause counts for this many times as long as was known at most: an evaluation or a checkpoint may fall into it.
_LONGER = 1.25
_LOOP = 32768  # elements that PyTorch gives a thread at least
_TASKS = Path("/proc/self/task")


@dataclass
class CallGap:
    """Seconds from a call to the next of anything, with the workers on their cores and with them aside; as measured."""

    here: float = math.nan
    aside: float = math.nan
    calls: int = 0

    def took(self, seconds: float, aside: bool) -> None:
        """A pause has ended."""
        if aside:
            self.aside = min(seconds, _LONGER * self.aside) if self.aside > 0 else seconds
        else:
            self.here = min(seconds, _LONGER * self.here) if self.here > 0 else seconds

    def worth(self, moves: float) -> bool:
        """Whether to step aside after this call; the moves there and back take so many seconds."""
        self.calls += 1
        if math.isnan(self.here) or self.here < moves:
            return False
        if math.isnan(self.aside):
            return True
        if self.aside + moves < self.here:
            return self.calls % _STAY_AGAIN != 0
        return self.calls % _MOVE_AGAIN == 0


class IdleWorkers:
    """The operators' threads. Between calls they share one core, where that is worth the moves.

    It is not where a GPU does the rest, where PyTorch has one thread only, and after a call that is followed by the
    next so soon that the moves take longer than they save, as measured. Priorities would do as well, but nobody may
    raise his own again; and a pinned thread of low priority gets nothing on a core that anything else computes on.

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
            pauses: By the name of the call before them; kept here, one a layer.
            name: Of the call.
        """
        self.gather()
        try:
            yield
        finally:
            if torch.get_num_threads() > 1 and not torch.cuda.is_initialized():
                if self._homes is None:
                    self._homes, self._corner = _find()
                pause = pauses.setdefault(name, CallGap())
                if self._homes and pause.worth(self._moves if self._moves < math.inf else 0.0):
                    self._step_aside(self._homes)
                self._last = (pause, time.perf_counter())

    def gather(self) -> None:
        """Each worker to its core, before a call; or before something else that they do."""
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
        """The workers are about to end."""
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


def _find() -> tuple[dict[int, int], int]:
    """The workers, each with its core, but the one on whose core all of them will be; and that core.

    kt-kernel names them numa_0_m_0, numa_0_t_1, ... and pins them; looked for after a call, when all have begun.
    """
    found: dict[int, int] = {}
    allowed = affinity()
    for thread in sorted(map(int, os.listdir(_TASKS))):
        with contextlib.suppress(OSError):  # it has ended
            if (_TASKS / str(thread) / "comm").read_text().startswith("numa_"):
                cores = os.sched_getaffinity(thread)
                if len(cores) == 1 and cores <= allowed:
                    found[thread] = cores.pop()
    corner = next(iter(found.values()), -1)
    logger.debug("Of the operators' workers %d have a core that PyTorch's threads can have.", len(found))
    return {thread: core for thread, core in found.items() if core != corner}, corner


class SleepingTeam:
    """A team of sleeping OpenMP threads, one a core, whose presence makes PyTorch's sleep after each loop.

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
        """Without waiting for it: this may be called by the garbage collector, anywhere."""
        self._ended.set()


def _hold(ready: threading.Event, ended: threading.Event) -> None:
    try:
        before, cores = torch.get_num_threads(), len(affinity())
        torch.set_num_threads(cores)
        try:
            torch.zeros(cores * _LOOP, dtype=torch.uint8, device="cpu").add_(1)
        finally:
            torch.set_num_threads(before)  # what threads that start later begin with
    finally:
        ready.set()
    ended.wait()
