"""Who has the cores between two calls: the operators' workers step aside for PyTorch's threads, and come back."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kt_hf.backends.kt_kernel import idle_workers as _cores
from kt_hf.backends.kt_kernel.engine import Engine
from kt_hf.backends.kt_kernel.idle_workers import CallGap, IdleWorkers, SleepingTeam
from kt_hf.system.cpu import affinity
from tests.support.cases import KERNEL_BF16, KERNEL_MARKS
from tests.support.helpers import MIXTRAL
from tests.support.patched import loss_of, trainable
from tests.support.trainers import model_to_train

CORES = sorted(affinity())[:2]
HOME, ASIDE = [{core} for core in CORES], [{CORES[0]} for _ in CORES]
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
kernel = pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS)])


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Threads pinned to a core each and named as kt-kernel's workers, and one that is not pinned: their native
    numbers; PyTorch with two threads and no GPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(_cores, "SleepingTeam", lambda: SimpleTeam())
    others = os.listdir(_cores._TASKS)  # an engine of other tests may be alive
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [name for name in listed(path) if name not in others])
    ended, numbers = threading.Event(), []
    threads = [threading.Thread(target=ended.wait) for _ in (*CORES, "not pinned")]
    for thread in threads:
        thread.start()
        assert thread.native_id is not None
        Path(_cores._TASKS, str(thread.native_id), "comm").write_text("numa_0_t_1")
        numbers.append(thread.native_id)
    for number, core in zip(numbers, CORES, strict=False):
        os.sched_setaffinity(number, {core})
    yield numbers[: len(CORES)]
    assert os.sched_getaffinity(numbers[-1]) == affinity()
    ended.set()
    for thread in threads:
        thread.join()


class SimpleTeam:
    """In place of a second team, where only the workers are looked at."""

    def end(self) -> None:
        pass


def where(threads: list[int]) -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in threads]


def call(workers: IdleWorkers, pauses: dict[str, CallGap], threads: list[int]) -> list[set[int]]:
    """Where the workers are during a call."""
    with workers.at_work(pauses, "forward"):
        return where(threads)


def eager() -> dict[str, CallGap]:
    """The workers are to step aside, for the pause after the last call took nine seconds."""
    return {"forward": CallGap(on_cores=9.0)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes by hand: what is measured does not depend on who else computes here."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@two_cores
def test_workers_are_at_home_in_calls_and_aside_between(pinned: list[int], clock: list[float]) -> None:
    workers, pauses = IdleWorkers(), {}
    assert call(workers, pauses, pinned) == HOME
    assert where(pinned) == HOME  # to know how long it takes so
    for seconds in (0.25, 0.02, 0.03):
        clock[0] += seconds
        assert call(workers, pauses, pinned) == HOME
        assert where(pinned) == ASIDE
    assert pauses["forward"].on_cores == 0.25
    assert pauses["forward"].aside == pytest.approx(1.25 * 0.02)  # a longer one counts as a quarter longer at most
    workers.gather()
    assert where(pinned) == HOME


@two_cores
def test_workers_stay_where_the_next_call_follows_at_once(
    pinned: list[int], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pauses after the same call and by what the moves took, ten seconds there and back here."""
    move = os.sched_setaffinity

    def moved(thread: int, cores: set[int]) -> None:
        clock[0] += 5
        move(thread, cores)

    monkeypatch.setattr(os, "sched_setaffinity", moved)
    workers, pauses, seen = IdleWorkers(), {}, []
    for pause in (30, 25, 30, 40, 20, 9, 9):
        call(workers, pauses, pinned)
        seen.append(where(pinned))
        clock[0] += pause
    # First; to be tried; 25 + 10 are no less than 30; nor now; now they are less than 37.5; 20 + 10 still; but 9.
    assert seen == [HOME, ASIDE, HOME, HOME, ASIDE, ASIDE, ASIDE]


def ways(pause: CallGap, calls: int, here: float, aside: float, moves: float = 1.0) -> list[int]:
    """The calls, of so many, after which the workers step aside, where a pause takes so long either way."""
    found = []
    for i in range(calls):
        away = pause.worth(moves)
        pause.took(aside if away else here, away)
        found += [i] if away else []
    return found


@pytest.mark.parametrize(
    ("here", "aside", "wanted"),
    [
        (3.0, 1.0, [*range(1, 255), *range(256, 300)]),  # worth it: the other way is tried once
        (3.0, 2.5, [1, *range(15, 300, 16)]),
        (0.5, 0.1, []),  # cannot become shorter by more than the moves take
    ],
)
def test_the_way_that_is_shorter_is_taken_and_the_other_tried_now_and_then(
    here: float, aside: float, wanted: list[int]
) -> None:
    assert ways(CallGap(), 300, here, aside) == wanted


def test_a_long_pause_of_another_cause_misleads_nobody() -> None:
    """A checkpoint was written; an evaluation ran."""
    for way in (True, False):
        pause = CallGap()
        ways(pause, 10, 3.0, 1.0)
        pause.took(1000.0, way)
        assert ways(pause, 10, 3.0, 1.0) == [*range(10)]
        pause = CallGap()
        ways(pause, 10, 3.0, 2.9)
        pause.took(1000.0, way)
        assert ways(pause, 5, 3.0, 2.9) == []


def test_other_lengths_are_followed() -> None:
    """Short sequences at first, where moving costs more than it brings, then long ones."""
    pause = CallGap()
    assert ways(pause, 20, 1.5, 1.0) == [1, 15]
    assert len(ways(pause, 100, 30.0, 10.0)) > 60


@two_cores
@pytest.mark.parametrize(
    ("module", "name", "value"), [(torch, "get_num_threads", 1), (torch.cuda, "is_initialized", True)]
)
def test_workers_stay_where_nothing_would_use_their_cores(
    pinned: list[int], monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: int
) -> None:
    monkeypatch.setattr(module, name, lambda: value)
    call(IdleWorkers(), eager(), pinned)
    assert where(pinned) == HOME


@two_cores
def test_error_in_a_call(pinned: list[int]) -> None:
    workers = IdleWorkers()
    with pytest.raises(KeyError), workers.at_work(eager(), "forward"):
        raise KeyError
    assert where(pinned) == ASIDE
    assert call(workers, eager(), pinned) == HOME


@two_cores
def test_threads_of_another_name_stay(pinned: list[int]) -> None:
    Path(_cores._TASKS, str(pinned[1]), "comm").write_text("python")
    call(IdleWorkers(), eager(), pinned)
    assert where(pinned) == HOME


@two_cores
def test_workers_on_cores_that_are_not_the_process_s_stay(pinned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """kt-kernel pins them whatever the process's affinity is; PyTorch's threads cannot have those cores."""
    monkeypatch.setattr(_cores, "affinity", lambda: {CORES[0]})
    call(IdleWorkers(), eager(), pinned)
    assert where(pinned) == HOME


def refusing(forbidden: set[int]) -> Callable[[int, set[int]], None]:
    move = os.sched_setaffinity

    def refused(thread: int, cores: set[int]) -> None:
        if cores == forbidden:
            raise OSError("Invalid argument")
        move(thread, cores)

    return refused


@two_cores
def test_threads_that_may_not_be_moved(pinned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    workers = IdleWorkers()
    monkeypatch.setattr(os, "sched_setaffinity", refusing({CORES[0]}))
    for _ in range(2):
        assert call(workers, eager(), pinned) == where(pinned) == HOME


@two_cores
def test_a_core_that_is_taken_from_the_process(
    pinned: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker may have any other then: it must not wait for the corner."""
    workers = IdleWorkers()
    call(workers, eager(), pinned)
    monkeypatch.setattr(os, "sched_setaffinity", refusing({CORES[1]}))
    for _ in range(2):
        assert call(workers, eager(), pinned) == where(pinned) == [{CORES[0]}, affinity()]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"Core {CORES[1]} cannot be had any more (Invalid argument): its worker computes on any core."
    ]


# -- OpenMP's threads

_SPIN = """
import sys, time, torch
from kt_hf.backends.kt_kernel.idle_workers import SleepingTeam
team = SleepingTeam() if sys.argv[1] == "team" else None
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
    if int(threads) == 1:
        pytest.skip("PyTorch has one thread here")
    return statistics.median(map(float, spent[2:]))


@two_cores
def test_threads_sleep_after_a_loop() -> None:
    alone = spinning("alone")
    if alone < 0.002:
        pytest.skip("PyTorch's threads do not spin here: another OpenMP")
    assert spinning("team") < alone / 4


@pytest.fixture
def three_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # starts a pool of PyTorch's own, once
    yield
    torch.set_num_threads(before)


def settled(most: int) -> int:
    """Threads of this process, once there are no more than `most`: OpenMP's own end a moment after their master."""
    for _ in range(1000):
        if psutil.Process().num_threads() <= most:
            break
        time.sleep(0.02)
    return psutil.Process().num_threads()


def test_second_team_leaves_nothing(three_torch_threads: None) -> None:
    start = psutil.Process().num_threads()
    SleepingTeam().end()
    before = settled(start)
    assert before <= start
    team = SleepingTeam()
    assert psutil.Process().num_threads() >= before + len(affinity())
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *seen] == [3, 3]
    team.end()
    assert settled(before) <= before


# -- both with the operators


@two_cores
@kernel
def test_packing_and_new_lora_call_the_workers_home(mark: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(IdleWorkers, "gather", lambda self: calls.append("home"))
    layer = model_to_train(KERNEL_BF16)._kt_wrappers[0]
    layer.update_lora_pointers()
    calls.clear()
    backend = layer.backend
    operator = backend._moe

    class Watched:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(operator, name)

    monkeypatch.setattr(backend, "_moe", Watched())
    backend.set_lora(backend.lora_copy())
    assert calls == ["home", "update_lora_weights"]
    calls.clear()
    model_to_train(KERNEL_BF16)
    assert calls[0] == "home"


def test_second_team_ends_with_the_engine(three_torch_threads: None) -> None:
    """Also where it goes with a cycle that is collected while Python's list of threads is locked."""
    engine: Any = Engine.__new__(Engine)  # without worker pools: those of other tests may be alive
    engine.workers, engine.cpu_infer, engine.itself = IdleWorkers(), None, engine
    engine.workers._team = team = SleepingTeam()
    gc.disable()
    try:
        with threading._active_limbo_lock:  # type: ignore[attr-defined]
            del engine
            gc.collect()
    finally:
        gc.enable()
    assert team._ended.is_set()


def _trained(queue: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    found: list[bool] = []
    gathered = IdleWorkers.gather

    def gather(self: IdleWorkers) -> None:
        found.append(self._away)
        gathered(self)

    IdleWorkers.gather = gather  # type: ignore[method-assign]
    CallGap.worth = lambda self, moves: True  # type: ignore[method-assign]  # whatever the pauses are on a busy machine
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
    team = engine.workers._team
    queue.put((losses, any(found), team is not None, len(engine.workers._homes or {})))


@two_cores
@kernel
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
    (losses, *alone), (again, *beside) = seen
    assert losses == pytest.approx(again, rel=1e-3)
    assert losses[-1] < losses[0]
    assert alone == [False, False, 0]
    assert beside == [True, True, 1]
