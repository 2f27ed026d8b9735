"""Cases in processes of their own that take turns, so that a slow moment of the machine hits all of them.

A process has one pool of the operators' workers, and a peak of memory. Whoever's turn it is not is stopped (SIGSTOP):
idle workers spin. Processes are forked from one that has computed nothing yet, so that each starts within moments.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from harness import Timing

Run = Callable[[int], dict[str, float]]  # tokens -> seconds by part
Build = Callable[[], dict[str, Run]]  # the cases of a process
PATIENCE = 8.0  # seconds: a case whose run takes longer is run once
# Seconds after which a process is given up. The operators do not come back when their buffers cannot be allocated.
BUILD_LIMIT, RUN_LIMIT = 180.0, 900.0
SHORT = 0.5  # seconds: shorter runs are repeated within a turn, after one that is not measured


class Worker:
    """A process that has built some cases and runs them when asked."""

    def __init__(self, build: Build) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, build), daemon=True)
        self._process.start()
        there.close()
        try:
            self.cases: list[str] = self._answer(BUILD_LIMIT)
        except CaseFailed:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, case: str, tokens: int) -> tuple[list[dict[str, float]], int]:
        """Seconds by part of each run, and the process's peak of memory in MiB."""
        self._signal(signal.SIGCONT)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says so
                self._pipe.send((case, tokens))
            return self._answer(RUN_LIMIT)
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join()
        self._pipe.close()

    def _answer(self, limit: float) -> Any:
        try:
            if not self._pipe.poll(limit):
                self._signal(signal.SIGKILL)
                raise CaseFailed(f"no answer within {limit:.0f} s")
            ok, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise CaseFailed(f"its process ended with status {self._process.exitcode}") from None
        if not ok:
            raise CaseFailed(answer)
        return answer

    def _signal(self, which: signal.Signals) -> None:
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, which)


class CaseFailed(Exception):
    """A case that cannot be built or run here; the words of its error."""


def take_turns(
    builds: dict[str, Build], tokens: Iterable[int], rounds: int, keep: bool
) -> dict[tuple[str, int], Timing]:
    """Timings by case and number of tokens.

    Args:
        builds: The cases of each process.
        keep: Processes live through all rounds, which needs memory for all at once. Else each is made anew for its
            turn.
    """
    found: dict[tuple[str, int], Timing] = {}
    workers: dict[str, Worker] = {}
    failed: set[tuple[str, int]] = set()
    slow: set[tuple[str, int]] = set()
    tokens = list(tokens)
    try:
        for _ in range(rounds):
            for name in list(builds):
                try:
                    worker = workers.get(name) or Worker(builds[name])
                except CaseFailed as error:
                    print(f"  {name}: left out: {error}", flush=True)
                    del builds[name]
                    continue
                workers[name] = worker
                for case, count in [(case, count) for count in tokens for case in worker.cases]:
                    key = (case, count)
                    if key in failed | slow:
                        continue
                    try:
                        runs, peak = worker.turn(case, count)
                    except CaseFailed as error:
                        print(f"  {case}, T={count}: left out: {error}", flush=True)
                        failed.add(key)
                        continue
                    timing = found.setdefault(key, Timing())
                    timing.peak_mib = max(timing.peak_mib, peak)
                    for run in runs:
                        timing.add(run)
                    if sum(runs[0].values()) > PATIENCE:
                        slow.add(key)
                if not keep:
                    workers.pop(name).end()
    finally:
        for worker in workers.values():
            worker.end()
    return found


def _serve(pipe: Any, build: Build) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process would outlive its parent
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the operators print
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    try:
        cases = build()
    except BaseException as error:
        pipe.send((False, _words(error)))
        return
    gc.collect()
    gc.freeze()  # so that a collection before each run takes no time
    pipe.send((True, list(cases)))
    last: dict[tuple[str, int], float] = {}
    while True:
        case, tokens = pipe.recv()
        try:
            runs = _turn(cases[case], tokens, last.get((case, tokens), 0.0))
        except Exception as error:
            pipe.send((False, _words(error)))
            continue
        last[case, tokens] = sum(runs[-1].values())
        pipe.send((True, (runs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)))


def _turn(run: Run, tokens: int, last: float) -> list[dict[str, float]]:
    if last < SHORT:  # new, or so short that what others left in the caches would count
        first = run(tokens)
        if sum(first.values()) > PATIENCE:
            return [first]
    runs: list[dict[str, float]] = []
    start = time.perf_counter()
    while not runs or (time.perf_counter() - start < SHORT and len(runs) < 5):
        gc.collect()
        runs.append(run(tokens))
    return runs


def _words(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({where.name}, {where.lineno})"
