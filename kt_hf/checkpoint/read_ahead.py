"""Reading the next layer while one is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def read_ahead(jobs: Sequence[Job], read: Callable[[Job], Result]) -> Generator[Result, None, None]:
    """Results of `read` in the order of `jobs`, each read in a thread of its own while the one before is used.

    No more than two results are in memory: the one handed out, which nothing here keeps, and the next one.

    Args:
        jobs: What `read` takes, one after the other.
        read: Called in the other thread, never twice at a time. What it raises is raised here, in its job's turn.
    """
    if not jobs:
        return
    with ThreadPoolExecutor(1, "kt_hf-read") as reader:
        coming = reader.submit(read, jobs[0])
        for following in jobs[1:]:
            ready = [coming.result()]
            coming = reader.submit(read, following)
            yield ready.pop()
        ready = [coming.result()]
        del coming
        yield ready.pop()
