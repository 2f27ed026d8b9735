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

import psutil
import torch

logger = logging.getLogger(__name__)

# A worker is sent to another core and fetched back in 35 µs (on a virtual machine). A pause is worth it from four times
# that on: a loop that has to wait for cores takes milliseconds.
_WORTH = 140e-6  # seconds a worker
_SHORTENED = 8  # how much longer a pause would have been with the workers on their cores, at most
_LOOP = 32768  # elements that PyTorch gives a thread at least


def native_threads() -> set[int]:
    """The system's numbers of this process's threads."""
    return {thread.id for thread in psutil.Process().threads()}


class Workers:
    """The operators' threads. Between calls they share one core, where that is worth the moves.

    It is not where a GPU does the rest, where PyTorch has one thread only, and after a call that the next one followed
    at once the last time. Priorities would do as well, but nobody may raise his own again; and a pinned thread of low
    priority gets nothing on a core that anything else computes on.

    Not thread-safe: the caller holds `kt_hf.backends.CALL_LOCK`.

    Args:
        threads: Those that came with the worker pools, workers among them.
    """

    def __init__(self, threads: set[int]) -> None:
        self._threads = threads
        self._homes: dict[int, int] | None = None
        self._away = False
        self._last: tuple[dict[str, float], str, float] | None = None

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
            self._last = (pauses, name, time.perf_counter())
            if torch.get_num_threads() > 1 and not torch.cuda.is_initialized():
                homes = self._homes if self._homes is not None else self._find()
                if pauses.get(name, math.inf) > _WORTH * len(homes):
                    self._step_aside(homes)

    def gather(self) -> None:
        """Each worker to its core, before a call."""
        if self._away and self._homes is not None:
            for thread, core in self._homes.items():
                with contextlib.suppress(OSError):  # the core was taken from this process meanwhile
                    os.sched_setaffinity(thread, {core})
            self._away = False

    def _find(self) -> dict[int, int]:
        """The core of each worker that has to move. They pin themselves, so not before the first call."""
        self._homes = {}
        try:
            allowed = {thread: os.sched_getaffinity(thread) for thread in sorted(self._threads)}
        except (OSError, AttributeError):  # a thread has ended; a system without affinities
            return self._homes
        pinned = {thread: next(iter(cores)) for thread, cores in allowed.items() if len(cores) == 1}
        self._corner = next(iter(pinned.values()), 0)
        self._homes = {thread: core for thread, core in pinned.items() if core != self._corner}
        return self._homes

    def _step_aside(self, homes: dict[int, int]) -> None:
        self._away = True  # before the first is moved: an interruption must not leave some of them there
        try:
            for thread in homes:
                os.sched_setaffinity(thread, {self._corner})
        except OSError as error:
            self.gather()
            self._homes = {}
            logger.debug("The operators' workers stay on their cores between calls: %s", error)


class SecondTeam:
    """A team of sleeping OpenMP threads, one a core, whose presence makes PyTorch's sleep after each loop.

    GNU OpenMP's threads spin for less than 0.1 ms instead of up to 76 ms where there are more of them than cores (its
    manual, under GOMP_SPINCOUNT). A setting in the environment would be read too early: when PyTorch is loaded.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        ready = threading.Event()
        self._master = threading.Thread(target=_hold, args=(ready, self._ended), name="kt_hf OpenMP", daemon=True)
        self._master.start()
        ready.wait()

    def end(self) -> None:
        self._ended.set()
        self._master.join()


def _hold(ready: threading.Event, ended: threading.Event) -> None:
    try:
        before, cores = torch.get_num_threads(), len(psutil.Process().cpu_affinity())
        torch.set_num_threads(cores)
        try:
            torch.zeros(cores * _LOOP, dtype=torch.uint8, device="cpu").add_(1)
        finally:
            torch.set_num_threads(before)  # what threads that start later begin with
    finally:
        ready.set()
    ended.wait()
