"""Who has the cores between two calls: the operators' workers step aside for PyTorch's threads, and come back."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kt_hf.backends import _cores
from kt_hf.backends._cores import SecondTeam, Workers, native_threads
from kt_hf.cpu import affinity
from tests.conftest import KERNEL_BF16, KERNEL_MARKS
from tests.families.patched import loss_of, trainable
from tests.helpers import MIXTRAL
from tests.trainers import model_to_train

CORES = sorted(affinity())[:2]
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


@pytest.fixture
def pinned() -> Iterator[dict[int, int]]:
    """Threads pinned to a core each, by their native numbers: what kt-kernel's workers are."""
    ended, homes = threading.Event(), {}
    threads = [threading.Thread(target=ended.wait) for _ in CORES]
    for thread, core in zip(threads, CORES, strict=True):
        thread.start()
        os.sched_setaffinity(thread.native_id, {core})
        homes[thread.native_id] = core
    yield homes
    ended.set()
    for thread in threads:
        thread.join()


@pytest.fixture(autouse=True)
def two_torch_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


def where(homes: dict[int, int]) -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in homes]


def call(workers: Workers, pauses: dict[str, float], homes: dict[int, int]) -> list[set[int]]:
    """Where the workers are during a call."""
    with workers.at_work(pauses, "forward"):
        return where(homes)


@two_cores
def test_workers_are_at_home_in_calls_and_aside_between(pinned: dict[int, int]) -> None:
    workers, pauses, home = Workers(set(pinned)), {}, [{core} for core in CORES]
    for _ in range(3):
        assert call(workers, pauses, pinned) == home
        assert where(pinned) == [{CORES[0]}] * 2
        time.sleep(0.02)
    workers.gather()
    assert where(pinned) == home


@two_cores
def test_workers_stay_where_the_next_call_follows_at_once(
    pinned: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the last pause of the same call. One with the workers aside counts for more, or they would go every other
    time."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    workers, pauses = Workers(set(pinned)), {}
    home, aside = [{core} for core in CORES], [{CORES[0]}] * 2
    short, long = _cores._WORTH / 2, _cores._WORTH * 2
    seen = []
    for pause in (long, short, short / _cores._SHORTENED, short, long, long):
        call(workers, pauses, pinned)
        seen.append(where(pinned))
        clock[0] += pause
    #       at first, long,  short but aside, nothing: home, short, long
    assert seen == [aside, aside, aside, home, home, aside]


@two_cores
@pytest.mark.parametrize(
    ("module", "name", "value"), [(torch, "get_num_threads", 1), (torch.cuda, "is_initialized", True)]
)
def test_workers_stay_where_nothing_would_use_their_cores(
    pinned: dict[int, int], monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: int
) -> None:
    monkeypatch.setattr(module, name, lambda: value)
    call(Workers(set(pinned)), {}, pinned)
    assert where(pinned) == [{core} for core in CORES]


@two_cores
def test_errors_in_a_call_and_threads_that_are_not_pinned(pinned: dict[int, int]) -> None:
    workers = Workers({threading.main_thread().native_id or 0, *pinned})
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyError), workers.at_work({}, "forward"):
        raise KeyError
    assert where(pinned) == [{CORES[0]}] * 2
    workers.gather()
    assert where(pinned) == [{core} for core in CORES]
    assert os.sched_getaffinity(0) == before


@two_cores
def test_a_system_that_refuses(pinned: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A core is taken from the process, or threads may not be moved: they stay, and nothing fails."""
    workers = Workers(set(pinned))

    def refused(thread: int, cores: set[int]) -> None:
        raise OSError("not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    call(workers, {}, pinned)
    monkeypatch.undo()
    assert call(workers, {}, pinned) == where(pinned) == [{core} for core in CORES]


def test_threads_that_have_ended() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    workers = Workers({thread.native_id or 0})
    with workers.at_work({}, "forward"):
        pass
    workers.gather()


# -- OpenMP's threads

_SPIN = """
import sys, time, torch
from kt_hf.backends._cores import SecondTeam
team = SecondTeam() if sys.argv[1] == "team" else None
threads = torch.get_num_threads()
values, spent = torch.ones(4_000_000), []
for _ in range(12):
    values.add_(1)
    begin = time.process_time()
    time.sleep(0.1)
    spent.append(time.process_time() - begin)
if team is not None:
    team.end()
print(threads, *spent)
"""


def spinning(name: str) -> float:
    """Seconds of the processor that PyTorch's threads use after a parallel loop."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", _SPIN, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    threads, *spent = done.stdout.split()
    assert int(threads) > 1
    return statistics.median(map(float, spent[2:]))


@two_cores
def test_threads_sleep_after_a_loop() -> None:
    alone = spinning("alone")
    if alone < 0.002:
        pytest.skip("PyTorch's threads do not spin here: another OpenMP")
    assert spinning("team") < alone / 4


def test_second_team_leaves_nothing() -> None:
    torch.set_num_threads(torch.get_num_threads())  # starts a pool of PyTorch's own, once
    SecondTeam().end()
    time.sleep(0.2)
    before, threads = native_threads(), torch.get_num_threads()
    team = SecondTeam()
    assert native_threads() > before
    assert torch.get_num_threads() == threads
    team.end()
    for _ in range(100):  # OpenMP's own end a moment later
        if native_threads() <= before:
            break
        time.sleep(0.02)
    assert native_threads() <= before


# -- both with the operators


def _trained(queue: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    found: list[Any] = []
    gathered = Workers.gather

    def gather(self: Workers) -> None:
        found.append(self._away)
        gathered(self)

    Workers.gather = gather  # type: ignore[method-assign]
    _cores._WORTH = 0.0
    model = model_to_train(KERNEL_BF16, kt_num_threads=2)
    engine = model._kt_wrappers[0].backend.engine
    engine.torch_threads = 2  # on two cores one would be left
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = loss_of(model, MIXTRAL.inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    queue.put((losses, any(found), len(engine.workers._homes or {})))


@two_cores
@pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS)])
def test_training_is_the_same_with_workers_aside(mark: None) -> None:
    context = multiprocessing.get_context("spawn")
    seen = []
    for threads in (1, 2):
        queue = context.Queue()
        process = context.Process(target=_trained, args=(queue, threads))
        process.start()
        seen.append(queue.get(timeout=200))
        process.join(60)
        assert process.exitcode == 0
    (losses, moved, _), (again, moved_again, homes) = seen
    assert losses == pytest.approx(again, rel=1e-3)
    assert losses[-1] < losses[0]
    assert not moved
    assert moved_again
    assert homes == 1
