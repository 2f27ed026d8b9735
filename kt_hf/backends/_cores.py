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
from pathlib import Path

import torch

from ..cpu import affinity

logger = logging.getLogger(__name__)

# A pause is worth the moves if it is so many times as long: PyTorch's loops that have to wait for cores take
# milliseconds. With the workers aside it is shorter by as much, perhaps, and worth it if it is longer than the moves.
_SHORTENED = 4
_LOOP = 32768  # elements that PyTorch gives a thread at least
_TASKS = Path("/proc/self/task")


class Workers:
    """The operators' threads. Between calls they share one core, where that is worth the moves.

    It is not where a GPU does the rest, where PyTorch has one thread only, and after a call that the next one followed
    at once the last time. Priorities would do as well, but nobody may raise his own again; and a pinned thread of low
    priority gets nothing on a core that anything else computes on.

    Not thread-safe: the caller holds `kt_hf.backends.CALL_LOCK`.
    """

    def __init__(self) -> None:
        self._homes: dict[int, int] | None = None  # the core of each worker that has to move
        self._corner = -1  # the core of the one that has not
        self._away = False
        self._out = 0.0  # seconds that the last move to the corner took
        self._moves = math.inf  # there and back; the fastest, for it is not taken again while it seems too slow
        self._last: tuple[dict[str, float], str, float] | None = None
        self._team: SecondTeam | None = None

    @contextlib.contextmanager
    def at_work(self, pauses: dict[str, float], name: str) -> Iterator[None]:
        """Around a call of an operator.

        Args:
            pauses: Seconds from the last call of each name to the next call of anything, as they would be with the
                workers on their cores; kept here, one a layer.
            name: Of the call.
        """
        if self._last is not None:
            of, last, ended = self._last
            of[last] = (time.perf_counter() - ended) * (_SHORTENED if self._away else 1)
        self.gather()
        try:
            yield
        finally:
            if torch.get_num_threads() > 1 and not torch.cuda.is_initialized():
                if self._homes is None:
                    self._homes, self._corner = _find()
                if self._homes and pauses.get(name, math.inf) >= _SHORTENED * self._moves:
                    self._step_aside(self._homes)
            self._last = (pauses, name, time.perf_counter())

    def gather(self) -> None:
        """Each worker to its core, before a call."""
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
            self._team = SecondTeam()
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


class SecondTeam:
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
